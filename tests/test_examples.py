"""The examples run as their heads say, and what they print is true of what they did."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import conftest
from test_smddprun import NAMES, start

EXAMPLES = conftest.HERE.parent / "examples"


def run(example: str, *arguments: str) -> str:
    """What it printed, started by smddprun on 2 ranks."""
    done = subprocess.run(
        [sys.executable, *start(NAMES[1], 2), str(EXAMPLES / example), *arguments],
        env=conftest.clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([0-9.]+)", printed)]


def test_smddp_legacy() -> None:
    found = losses(run("smddp_legacy.py"))
    assert len(found) == 4
    assert found[-1] < 0.8


def test_smddp_throughput() -> None:
    printed = run("smddp_throughput.py", "--tensors", "4", "--mb", "0.25", "--rounds", "3")
    assert "smddp, 2 ranks: 4 x 0.25 MB float16" in printed
    assert "GB/s" in printed


def test_train_fsdp(tmp_path: Path) -> None:
    found = losses(run("train_fsdp.py", "--model-dir", str(tmp_path)))
    assert len(found) == 3
    assert found[-1] < found[0] - 0.5
    assert (tmp_path / "model.pt").stat().st_size > 100_000
