"""The tests on a GPU: every step in processes of its own with a time limit; a line a step, and the results in files.

    python tests/gpu/run.py OUT                  all steps, into OUT/gpu-results.json and OUT/gpu-results.md
    python tests/gpu/run.py OUT --only ddp       steps whose names contain that
    python tests/gpu/run.py OUT --device cpu     the harness itself, on a machine without a GPU

One GPU is enough: ranks share it, each being a node of its own, or one node whose ranks are staged through the host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import conftest  # noqa: E402

TOTAL = 480.0
"""seconds for all steps"""

CARRIED = ("SMDDP_LIBFABRIC", "SMDDP_NCCL", "SMDDP_LOG")
"""settings of this process that ranks get too"""

CACHE = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
"""where what was measured on this machine is kept: speed is that of users' jobs"""


@dataclass
class Step:
    name: str
    function: str
    """what each rank does: module:function of this folder"""
    nodes: list[int]
    """of each rank"""
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    each: Callable[[int], dict[str, str]] | None = None
    dead: dict[int, int] = field(default_factory=dict)
    """ranks that end without a report, and their statuses"""
    shares: bool = False
    """NCCL's ranks share a GPU, which it does not do on every machine"""


STAGED = {"SMDDP_CUDA": "staged"}
NCCL = {"SMDDP_CUDA": "nccl"}
SHARED = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_CTAS": "2", "NCCL_IB_DISABLE": "1"}
"""ranks of NCCL that share a GPU, each taking the others for ranks on other hosts"""


def as_hosts(rank: int) -> dict[str, str]:
    return {"NCCL_HOSTID": f"host{rank}"}


SHARING = Step("torch's NCCL, 2 ranks on one GPU", "groups:shares_by_nccl", [0, 0], 40, SHARED, as_hosts)
"""tried once, before the first step that shares"""

NOT_BLOCKING = {"NCCL_COMM_BLOCKING": "0"}
ON_TWO, ON_FOUR, TWO_BY_TWO = [0, 1], [0, 1, 2, 3], [0, 0, 1, 1]


def shared(name: str, function: str, nodes: list[int], limit: float, env: dict[str, str], **more: Any) -> Step:
    return Step(name, function, nodes, limit, SHARED | env, as_hosts, shares=True, **more)


STEPS = [
    # What no GPU has met yet comes first.
    Step("examples, 2 nodes", "training:examples", ON_TWO, 90),
    shared("a rank that dies, two ranks of NCCL", "failures:a_rank_that_dies", [0, 0], 50, NCCL, dead={1: 0}),
    shared("an abort, two ranks of NCCL", "failures:an_abort", [0, 0], 40, NCCL),
    shared("an abort, NCCL, 2 nodes x 2", "failures:an_abort", TWO_BY_TWO, 40, {}),
    shared("two ranks of NCCL on one GPU", "streams:streams", [0, 0], 60, NCCL),
    shared("two ranks of NCCL that does not block", "streams:streams", [0, 0], 60, NCCL | NOT_BLOCKING),
    shared("messages, native, two ranks of NCCL on one GPU", "messages:messages_natively", [0, 0], 45, NCCL),
    shared("messages, two ranks of NCCL on one GPU", "messages:messages", [0, 0], 45, NCCL),
    Step("the device chosen at start, 2 nodes", "groups:chosen_device", ON_TWO, 30),
    Step("a group that is made for a device, 2 nodes", "groups:made_for_a_device", ON_TWO, 30),
    Step("GPUDirect wished for, 2 nodes", "groups:gpudirect", ON_TWO, 30, {"SMDDP_GPUDIRECT": "on"}),
    Step("collectives, 2 nodes", "groups:collectives", ON_TWO, 50),
    shared("collectives, NCCL, 2 nodes x 2", "groups:collectives", TWO_BY_TWO, 60, {}),
    Step("streams, NCCL, 1 rank", "streams:streams", [0], 30, NCCL),
    Step("streams, 2 nodes", "streams:streams", ON_TWO, 40),
    Step("training, 2 nodes", "training:training", ON_TWO, 45),
    Step("collectives, NCCL, 1 rank", "groups:collectives", [0], 60, NCCL),
    Step("bad input, 2 nodes", "misuse:misuse", ON_TWO, 25),
    Step("bad input, NCCL, 1 rank", "misuse:misuse_by_nccl", [0], 25, NCCL),
    Step("a rank that dies", "failures:a_rank_that_dies", ON_TWO, 50, dead={1: 0}),
    Step("calls that differ", "failures:calls_that_differ", ON_TWO, 50),
    Step("an abort", "failures:an_abort", ON_TWO, 40),
    Step("speed, staged, 2 nodes", "speed:staging", ON_TWO, 40),
    Step("speed, beside torch's nccl, 1 rank", "speed:beside_nccl", [0], 45, NCCL),
    Step("collectives, 1 node x 2, staged", "groups:collectives", [0, 0], 50, STAGED),
    Step("collectives, 4 nodes", "groups:collectives", ON_FOUR, 60),
    Step("training, 4 nodes", "training:training", ON_FOUR, 50),
    Step("streams, 1 connection", "streams:streams", ON_TWO, 40, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    Step("collectives, 1 rank", "groups:collectives", [0], 40),
    Step("backends by device, 1 rank", "groups:backends_by_device", [0], 40),
    shared("backends by device, 2 ranks", "groups:backends_by_device", [0, 0], 45, {}),
    shared("streams, NCCL, 2 nodes x 2", "streams:streams", TWO_BY_TWO, 60, {}),
    shared("training, NCCL, 2 nodes x 2", "training:training", TWO_BY_TWO, 60, {}),
]

CASES_OF = "Cases of"
"""begins a line: Cases of STEP; STEP: CASE, CASE."""

IMPOSSIBLE = "not possible here"


@dataclass
class Result:
    step: str
    verdict: str
    seconds: float
    passed: int = 0
    cases: list[str] = field(default_factory=list)
    """those that passed on every rank that reported"""
    not_run: dict[str, str] = field(default_factory=dict)
    """cases that a rank could not try, and why"""
    failures: dict[str, str] = field(default_factory=dict)
    figures: list[Any] = field(default_factory=list)
    """of each rank that reported"""


def run(step: Step, limit: float, device: str, patience: float = 1) -> Result:
    kept = {name: os.environ[name] for name in CARRIED if name in os.environ}
    own = {"SMDDP_TEST_DEVICE": device, "SMDDP_TEST_PATIENCE": str(patience)}
    env = {**own, "TORCH_CPP_LOG_LEVEL": "ERROR", "XDG_CACHE_HOME": CACHE, **kept, **step.env}
    started, before = time.monotonic(), conftest.below()
    ranks = conftest.run(
        f"gpu.{step.function}", len(step.nodes), nodes=step.nodes, env=env, each=step.each, limit=limit
    )
    result = Result(step.name, "passed", round(time.monotonic() - started, 1))
    for number, report in enumerate(ranks.collected):
        cases = report["cases"]
        result.passed += sum(1 for wrong in cases.values() if not wrong)
        result.failures |= {f"report {number}: {name}": wrong for name, wrong in cases.items() if wrong}
        if not cases and "impossible" not in report:
            result.failures[f"report {number}"] = "no case was run"
        result.not_run |= report.get("not run", {})
        result.figures.append(report.get("figures"))
    reports = [report["cases"] for report in ranks.collected]
    result.cases = [name for name in (reports or [{}])[0] if all(cases.get(name) == "" for cases in reports)]
    try:
        ranks.check(step.dead)
    except AssertionError as wrong:
        result.failures["how the ranks ended"] = str(wrong)[-6000:]
    if left := conftest.end_leftovers(before):
        result.failures["processes left behind"] = "\n".join(left)
    if result.failures:
        result.verdict = "FAILED"
    elif whys := [report["impossible"] for report in ranks.collected if "impossible" in report]:
        result.verdict = f"{IMPOSSIBLE}: {whys[0]}"
    return result


def run_all(steps: list[Step], device: str, patience: float) -> Iterator[list[Result]]:
    """The results so far, whenever there is another. What shares a GPU is left out where torch's NCCL says that it
    cannot, and where that was not to be found out."""
    end = time.monotonic() + TOTAL * patience
    results: list[Result] = []
    sharing: Result | None = None
    for step in steps:
        if step.shares and sharing is None:
            sharing = run(SHARING, SHARING.limit * patience, device, patience)
            results.append(sharing)
            yield results
        limit = step.limit * patience
        if step.shares and sharing.verdict.startswith(IMPOSSIBLE):
            results.append(Result(step.name, sharing.verdict, 0))
        elif step.shares and sharing.verdict != "passed":
            results.append(Result(step.name, f"not run: {SHARING.name}: {sharing.verdict}", 0))
        elif time.monotonic() + limit > end:
            # Less than its limit would look as if it had hung.
            results.append(Result(step.name, "not run: no time left", 0))
        else:
            results.append(run(step, limit, device, patience))
        yield results


def machine(device: str) -> dict[str, str]:
    """What the results were made on."""
    import torch

    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": platform.python_version(),
             "torch": torch.__version__, "cpus": str(os.cpu_count()), "device": device}  # fmt: skip
    if device != "cpu":
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        version = Path("/proc/driver/nvidia/version")
        found["driver"] = version.read_text().splitlines()[0] if version.exists() else "unknown"
    return found


def markdown(about: dict[str, str], results: list[Result]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in about.items()) + ".", ""]
    lines += ["| step | outcome | checks passed | seconds |", "| --- | --- | --: | --: |"]
    lines += [f"| {r.step} | {r.verdict} | {r.passed} | {r.seconds} |" for r in results]
    alike: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        if result.cases:
            alike.setdefault(tuple(result.cases), []).append(result.step)
    lines += [f"\n{CASES_OF} {'; '.join(steps)}: {', '.join(cases)}." for cases, steps in alike.items()]
    lines += [f"\nNot run in {r.step}: {name}: {why}." for r in results for name, why in r.not_run.items()]
    for result in results:
        for figures in [f for f in result.figures if f and "rows" in f][:1]:
            table, legend = figures["rows"], figures.get("columns")
            names = list(table[0])
            lines += ["", f"**{result.step}**" + (f": {legend}" if legend else ""), ""]
            lines += ["| " + " | ".join(names) + " |", "| " + "--: | " * len(names)]
            lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in table]
    for result in results:
        for name, wrong in result.failures.items():
            lines += ["", f"**{result.step}: {name}**", "", "```", wrong[-3000:], "```"]
    return "\n".join(lines) + "\n"


def cases_by_step(page: str) -> dict[str, set[str]]:
    """Step: the cases that passed in it, as `markdown` wrote them."""
    found = {}
    for steps, cases in re.findall(rf"^{CASES_OF} (.+?): (.+)\.$", page, re.MULTILINE):
        found |= {step: set(cases.split(", ")) for step in steps.split("; ")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--patience", type=float, default=1, help="multiplies time limits: under tools that slow down")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    conftest.adopt_orphans()
    about, results = machine(given.device), []
    print(json.dumps(about), flush=True)
    steps = [step for step in STEPS if given.only in step.name and not (given.device == "cpu" and step.env)]
    for results in run_all(steps, given.device, given.patience):
        last = results[-1]
        print(f"{last.verdict:12} {last.seconds:6} s {last.passed:5} checks  {last.step}", flush=True)
        for name, why in last.not_run.items():
            print(f"    {name}: not run: {why}", flush=True)
        for name, wrong in last.failures.items():
            print(f"    {name}: {wrong.strip().splitlines()[-1] if wrong.strip() else ''}", flush=True)
        whole = {"machine": about, "results": [vars(r) for r in results]}
        (given.out / "gpu-results.json").write_text(json.dumps(whole, indent=1))
        (given.out / "gpu-results.md").write_text(markdown(about, results))
    failed = sum(r.verdict.startswith(("FAILED", "not run")) for r in results)
    print(f"{len(results) - failed} steps as expected, {failed} not", flush=True)
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
