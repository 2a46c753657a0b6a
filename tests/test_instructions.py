"""How many instructions a blocking all_reduce of two ranks executes, and a message each way.

It is the guard of their speed that noise cannot hide.

`COUNTED` is what was counted when it was last changed; a call may take a tenth more, for other compilers and libraries.
Count again with ``pytest tests/test_instructions.py -s``; say why in docs/performance-log.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import conftest

# The program is built first, for up to 900 s.
pytestmark = pytest.mark.timeout(1300)
ROOT = conftest.HERE.parent
CALLS = 20
COUNTED = {
    ("all_reduce", 4): 1_800,
    ("all_reduce", 1024): 2_280,
    ("all_reduce", 16 << 10): 21_500,
    ("sendrecv", 4): 2_180,
    ("sendrecv", 1024): 2_570,
}
"""operation and bytes of float32, and instructions of a call"""


@pytest.fixture(scope="module")
def program() -> Path:
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    build = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "smddp", "--example", "instructions"]
    subprocess.run(build, cwd=ROOT, check=True, timeout=900)
    target = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--no-deps", "--offline"],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    folder = re.search(r'"target_directory":"([^"]+)"', target)
    assert folder
    return Path(folder[1]) / "release/examples/instructions"


def count(program: Path, op: str, nbytes: int, folder: Path) -> float:
    """Instructions of a call, without those of the first calls and of whatever other threads do."""
    callgrind = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={folder}/out",
        "--toggle-collect=*measured_call*",
    ]
    ended = subprocess.run(
        [*callgrind, str(program), op, str(nbytes), str(CALLS)],
        env=conftest.clean_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    collected = re.search(r"Collected : (\d+)", ended.stderr)
    assert collected, ended.stderr
    return int(collected[1]) / CALLS


@pytest.mark.parametrize(("op", "nbytes"), COUNTED)
def test_a_call_takes_no_more_instructions(op: str, nbytes: int, program: Path, tmp_path: Path) -> None:
    found = count(program, op, nbytes, tmp_path)
    print(f"{op} of {nbytes} bytes: {found:.0f} instructions a call")
    assert found > 1000, "nothing was counted"
    assert found < 1.1 * COUNTED[op, nbytes]
