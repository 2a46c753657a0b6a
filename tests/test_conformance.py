"""PyTorch's own tests of torch.distributed: none that passes on gloo is lost here.

The shortest of the runs of scripts/conformance; docs/conformance.md has the results of all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import conftest

FOLDER = Path(__file__).parent / "conformance"
BASELINE = FOLDER / "gloo-2.json"
"""what passes on gloo with two ranks, by the torch it names"""


def test_no_test_that_passes_on_gloo_is_lost(tmp_path: Path) -> None:
    from importlib.metadata import version

    made_with = json.loads(BASELINE.read_text())["torch"]
    # "+cpu", say, is the same torch.
    if version("torch").partition("+")[0] != made_with:
        pytest.skip(f"what passes on gloo is known of torch {made_with} only")
    done = subprocess.run(
        [
            *(sys.executable, str(FOLDER / "suite.py"), "--quiet", "--baseline", str(BASELINE)),
            *("--may-lose", "test_ddp_logging_data_cpu", "--json", str(tmp_path / "results.json")),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        env=conftest.clean_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["of"] >= 90
    # It compares the backend's name with "gloo".
    assert result["lost"] in ([], ["test_ddp_logging_data_cpu"])
