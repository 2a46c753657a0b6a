"""Every command of the README and the how-to pages is run here, or its block says who tries it, or why nobody does.

A block without a word above it is run: each line of a `sh` block by bash in a folder with a small train.py, made
smaller by `SMALLER`; each `python` block by Python. Above any other stands a comment no reader of the page sees:

    <!-- tried by tests/clients/case_slurm.py -->
    <!-- not tried: needs AWS -->
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import conftest

ROOT = conftest.HERE.parent
PAGES = [ROOT / "README.md", ROOT / "shim/README.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
FENCE = re.compile(r"(?ms)^(?:<!-- (?P<word>.*?) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```")

TRAIN = """
import torch, torch.distributed as dist
import smdistributed_rs

dist.init_process_group("smddp")
x = torch.full((1000,), 1.0 + dist.get_rank())
dist.all_reduce(x)
assert x[0] == sum(range(1, dist.get_world_size() + 1)), x[0]
print(f"trained {dist.get_rank()} of {dist.get_world_size()}", flush=True)
dist.destroy_process_group()
"""

SMALLER = {
    r"(-n|-np|--nproc-per-node) [48]\b": r"\1 2",
    r"--max (256M|1G)": "--max 64K",
    r"smddp-perf all_reduce(?! --)": "smddp-perf all_reduce --max 64K",
    r"(--np \d)(?!.*--max)": r"\1 --max 64K",
    r"^\.venv/bin/": "",
    r"^scripts/": f"{ROOT}/scripts/",
    r" \.venv/bin/(\w+)": rf" {Path(sys.executable).parent}/\1",
}
"""What makes the commands' jobs small, and finds this checkout."""


class Block(NamedTuple):
    place: str
    word: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            place = f"{page.relative_to(ROOT)}:{line}"
            found.append(Block(place, match["word"] or "", match["language"], match["text"]))
    return found


BLOCKS = blocks()
MARKED = [block for block in BLOCKS if block.word]
COMMANDS = [
    (block.place, line)
    for block in BLOCKS
    if not block.word and block.language == "sh"
    for line in (text.partition("  #")[0].strip() for text in block.text.splitlines())
    if line
]
SNIPPETS = [block for block in BLOCKS if not block.word and block.language == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("howto")
    (made / "train.py").write_text(TRAIN)
    (made / "package").mkdir()
    (made / "package/module.py").write_text(TRAIN)
    return made


def run(command: list[str], folder: Path) -> str:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # What the pages tell those who are root, or have more ranks than cores.
    env = conftest.clean_environment() | {
        "PATH": paths, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "SMDDP_TIMEOUT": "60",
    }  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    print(*command)
    return conftest.wait_for([process], [log], 120).check().text


@pytest.mark.parametrize(("place", "line"), COMMANDS, ids=[f"{place} {line}" for place, line in COMMANDS])
def test_commands(place: str, line: str, folder: Path) -> None:
    if "scripts/nodes" in line and os.getuid() != 0:
        pytest.skip("emulated nodes need root")
    for pattern, smaller in SMALLER.items():
        line = re.sub(pattern, smaller, line)
    said = run(["bash", "-euo", "pipefail", "-c", line], folder)
    if ("train.py" in line or "package.module" in line) and "--dry-run" not in line:
        ranks = [int(number) for number in re.findall(r"trained \d of (\d)", said)]
        assert ranks, said
        assert len(ranks) == ranks[0], said


@pytest.mark.parametrize("block", SNIPPETS, ids=[block.place for block in SNIPPETS])
def test_snippets(block: Block, folder: Path) -> None:
    (folder / "snippet.py").write_text(block.text)
    run(["mpirun", "-n", "2", sys.executable, "snippet.py"], folder)


@pytest.mark.parametrize("block", MARKED, ids=[block.place for block in MARKED])
def test_words_over_blocks(block: Block) -> None:
    word = re.fullmatch(r"tried by (\S+)(?:, .+)?|not tried: .+", block.word)
    assert word, f"{block.place}: '{block.word}' is neither 'tried by FILE' nor 'not tried: why'"
    if not word[1]:
        return
    file = ROOT / word[1]
    assert file.exists(), f"{block.place}: there is no {word[1]}"
    tests = file.read_text()
    # With the jobs it runs.
    tests += "".join(other.read_text() for other in file.parent.glob("*.py") if other.stem in tests)
    named = programs(block) if block.language == "sh" else ["".join(names) for names in CALLED.findall(block.text)]
    assert named, f"{block.place}: nothing in it could be looked for"
    missing = [name for name in named if not re.search(rf"\b{re.escape(name)}\b", tests)]
    assert not missing, f"{block.place}: {missing} not in {word[1]}"


CALLED = re.compile(r"(?m)^(\w+)\(|^import ([\w.]+)")


def programs(block: Block) -> list[str]:
    """What its lines start with."""
    return [line.split()[0] for line in block.text.splitlines() if line and not line.startswith("#")]


def test_there_are_commands() -> None:
    """The pattern that finds them finds them."""
    fences = sum(page.read_text().count(f"```{language}\n") for page in PAGES for language in ("sh", "python"))
    assert len(BLOCKS) == fences
    assert len(COMMANDS) > 15
    assert shutil.which("mpirun", path=str(Path(sys.executable).parent))
