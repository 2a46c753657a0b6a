#!/usr/bin/env python3
"""Writes docs/conformance.md from the results of scripts/conformance: report.py FOLDER [--publish]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from suite import compare

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {"test_ddp_logging_data_cpu": 'compares the backend\'s name with "gloo"'}
"""tests that may be lost, and why"""

HEAD = """# Conformance

PyTorch's own tests of `torch.distributed`, those in the torch {torch} wheel, run on this backend by
`./scripts/conformance`; this page is what its last run printed. How they are run: `tests/conformance/suite.py`.

*alias*: the suite believes it tests gloo, so every test it gates on gloo's name runs. *native*: it is told the name
smddp, runs what it does not gate on other names, and checks the names of profiler ranges. *mpi*: the all_to_all tests
the suite keeps for MPI. *group*: what torch calls first is a group of ours; *backend*: a backend inside a group of
torch's own, as when its hooks must see the calls. Nodes are emulated, with libfabric between them.

| ranks | nodes | mode | carrier | passed | failed | skipped | of gloo's | lost | gained | seconds |
| --: | --: | --- | --- | --: | --: | --: | --: | --- | --- | --: |
"""


def names(tests: list[str]) -> str:
    return ", ".join(f"`{test}`" for test in tests) or "-"


def row(result: dict, carrier: str, baseline: dict | None) -> tuple[str, list[str]]:
    """A line of the table, and the tests that are lost and may not be."""
    lost, gained, of = compare(result["rows"], baseline["rows"]) if baseline else ([], [], 0)
    if result["mode"] == "native":
        # Tests that name gloo are skipped under another name.
        skipped = {r["test"] for r in result["rows"] if r["status"] == "skip"}
        of, lost = of - len(skipped & set(lost)), [test for test in lost if test not in skipped]
    nodes = -(-result["world_size"] // result["ranks_per_node"]) if result["ranks_per_node"] else 1
    share = f"{of - len(lost)} of {of}" if baseline else "-"
    cells = [
        result["world_size"], nodes, result["mode"], carrier, result["pass"], result["fail"], result["skip"],
        share, names(lost), names(gained), result["seconds"],
    ]  # fmt: skip
    failed = [r["test"] for r in result["rows"] if r["status"] == "fail"]
    return f"| {' | '.join(map(str, cells))} |", [test for test in {*lost, *failed} if test not in EXPECTED]


def main() -> int:
    folder = Path(sys.argv[1])
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    ours = {name: r for name, r in results.items() if r["backend"] != "gloo"}
    if not ours:
        sys.exit(f"no results in {folder}")
    lines, bad = [], {}
    for name, result in ours.items():
        kind = "mpi" if result["mode"] == "mpi" else "alias"
        baseline = results.get(f"gloo-{kind}-{result['world_size']}")
        line, wrong = row(result, name.split("-")[-1], baseline)
        lines.append(line)
        if wrong:
            bad[name] = wrong
    text = HEAD.format(torch=re.sub(r"\+.*", "", next(iter(ours.values()))["torch"])) + "\n".join(lines) + "\n\n"
    text += "".join(f"Expected to be lost: `{test}`, which {why}.\n" for test, why in EXPECTED.items())
    print(text)
    if "--publish" in sys.argv:
        (ROOT / "docs" / "conformance.md").write_text(text)
    for name, tests in bad.items():
        print(f"{name}: failed or lost: {', '.join(sorted(tests))}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
