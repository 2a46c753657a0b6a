#!/usr/bin/env python3
"""PyTorch's own tests of torch.distributed, run on any backend for CPU tensors.

The tests are those inside the torch wheel (torch.testing._internal.distributed.distributed_test). Most of them are
gated on the names of torch's own backends; three modes open the gates:

  alias    the suite believes it tests gloo, and every rank has the name "gloo" bound to the backend under test
  native   the suite is told the backend's own name, and that it can do what gloo can; checks its profiler labels
  mpi      as alias; opens the all_to_all tests the suite keeps for MPI

Ranks are forked from a process that has imported torch and the backend's package.

  suite.py --backend gloo --world-size 2 --json gloo.json
  suite.py --backend smddp --mode alias --world-size 4 --ranks-per-node 2 --baseline gloo.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import Any

PACKAGES = {"smddp": "smdistributed_rs"}
"""what to import for a backend"""
ALIAS = "gloo"
GRACE = 12.0
"""seconds the other ranks get once one has died, and RAISED of it less where it had raised an exception"""
RAISED = 9.0
KILL_WITH_PARENT = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smddp")
    parser.add_argument("--mode", choices=["alias", "native", "mpi"], default="alias")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=0, help="emulate nodes of so many ranks (0: one node)")
    parser.add_argument("--timeout", type=int, default=90, help="seconds until a test is killed")
    parser.add_argument("-k", "--match", default="", help="regular expression: only these tests")
    parser.add_argument("--json", default="", help="where to write the results")
    parser.add_argument("--logs", default="", help="folder for what failed tests printed")
    parser.add_argument("--baseline", default="", help="results of another run to compare with; fails on losses only")
    parser.add_argument("--may-lose", default="", help="regular expression: tests whose loss is expected")
    parser.add_argument("--quiet", action="store_true", help="print only what failed, and the totals")
    return parser.parse_args()


class Config:
    """The command line, as ranks need it (they are forked)."""

    given: argparse.Namespace
    entered = False
    output = ""


def attach_backend() -> None:
    """Imports the backend's package, and binds the name of gloo to it unless its own name is used."""
    import torch.distributed as dist

    backend = Config.given.backend
    if backend in PACKAGES:
        importlib.import_module(PACKAGES[backend])
    if Config.given.mode == "native" or backend == ALIAS:
        return
    plugins = dist.Backend._plugins
    plugins[ALIAS.upper()] = plugins[backend.upper()]
    # Who asks for a backend by type must not find a real gloo.
    dist.Backend.backend_type_map[ALIAS] = dist.Backend.backend_type_map[backend]


def enter_rank(rank: int) -> None:
    """What a forked rank does before its test."""
    import torch

    if Config.entered:
        return
    Config.entered = True
    output = os.open(Config.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    torch.set_num_threads(1)
    if Config.given.ranks_per_node:
        os.environ["SMDDP_NODE_ID"] = f"node{rank // Config.given.ranks_per_node}"


def patch_framework() -> None:
    """Ranks are forked, and one that died ends its test soon."""
    import torch
    import torch.testing._internal.common_distributed as common

    base = common.MultiProcessTestCase

    def spawn(self: Any) -> None:
        self.processes = []
        self._start_processes(torch.multiprocessing.get_context("fork").Process)

    def join(self: Any, name: str) -> None:
        start = time.time()
        try:
            watch(self, start)
            codes = [p.exitcode for p in self.processes]
            raised = base.TEST_ERROR_EXIT_CODE in codes
            expected = name in getattr(self, "skip_return_code_checks", []) + list(
                getattr(self, "special_return_code_checks", {})
            )
            if any(code is not None and code < 0 for code in codes) and not raised and not expected:
                raise RuntimeError(f"a rank died by a signal: exit codes {codes}")
            self._check_return_codes(name, time.time() - start)
        finally:
            for pipe in self.pid_to_pipe.values():
                pipe.close()

    base._spawn_processes = spawn
    base._join_processes = join


def watch(self: Any, start: float) -> None:
    """Waits for the ranks of a test; kills those that are left when it is late or a rank has died."""
    import torch.testing._internal.common_distributed as common

    died_at = None
    fine = {0} | {skip.exit_code for skip in common.TEST_SKIPS.values()}
    while any(p.exitcode is None for p in self.processes):
        now = time.time()
        codes = [p.exitcode for p in self.processes if p.exitcode is not None]
        if common.MultiProcessTestCase.TEST_ERROR_EXIT_CODE in codes:
            died_at = died_at or now - RAISED
        elif any(code not in fine for code in codes):
            died_at = died_at or now
        late = now - start > Config.given.timeout
        if late or (died_at and now - died_at > GRACE):
            for p in self.processes:
                if p.exitcode is None:
                    p.kill()
                p.join(5)
            if late:
                raise RuntimeError(f"timed out after {Config.given.timeout} s")
            return
        time.sleep(0.02)


def make_suite() -> type[unittest.TestCase]:
    """The suite's class, its gates set by what it reads on import."""
    import torch.testing._internal.common_distributed as common

    given = Config.given
    patch_framework()
    if given.mode == "native":
        for feature in ("ddp", "subgroup", "plugin"):
            common.DistTestCases.backend_feature.setdefault(feature, set()).add(given.backend)
    believed = os.environ["BACKEND"]
    if given.mode == "mpi":
        os.environ["BACKEND"] = "mpi"
    import torch.testing._internal.distributed.distributed_test as suite

    # Decorators go on asking the environment; the groups are made of what the suite has read.
    suite.BACKEND = believed
    if given.mode != "mpi":
        os.environ["BACKEND"] = believed
    for labelled in (suite.PROFILING_SUPPORTED_BACKENDS, suite.SEND_RECV_PROFILING_SUPPORTED_BACKENDS):
        if given.mode == "native":
            labelled.append(given.backend)
        elif given.backend != ALIAS:
            # A backend labels ranges by its own name, which native mode checks.
            labelled[:] = [name for name in labelled if name != ALIAS]

    class Suite(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()
            self._spawn_processes()

        @classmethod
        def _run(cls, rank: int, *args: Any, **options: Any) -> Any:
            enter_rank(rank)
            return super()._run(rank, *args, **options)

    return Suite


class Recorder(unittest.TestResult):
    """Keeps one row a test."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self._start = 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._start = time.time()

    def _row(self, test: unittest.TestCase, status: str, why: str = "", full: str = "") -> None:
        name = test.id().rpartition(".")[2]
        seconds = round(time.time() - self._start, 2)
        self.rows.append({"test": name, "status": status, "seconds": seconds, "why": why[:300]})
        if status == "fail" and Config.given.logs:
            printed = Path(Config.output).read_text(errors="replace") if Path(Config.output).exists() else ""
            Path(Config.given.logs, f"{name}.log").write_text(f"{full}\n---- the ranks\n{printed[-20_000:]}")
        if status == "fail" or not Config.given.quiet:
            print(f"{status:5} {seconds:7.2f} s  {name}  {why[:160]}", flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._row(test, "pass")

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._row(test, "pass", "expected failure")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._row(test, "fail", "unexpected success")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._row(test, "skip", str(reason))

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        lines = [line.strip() for line in str(err[1]).splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
        why = named[-1] if named else lines[0] if lines else repr(err[1])
        self._row(test, "fail", why, self._exc_info_to_string(err, test))

    addError = addFailure


def environment(folder: str) -> None:
    given = Config.given
    os.mkdir(os.path.join(folder, "barrier"))
    Config.output = os.path.join(folder, "ranks.log")
    os.environ.update(
        BACKEND=given.backend if given.mode == "native" else ALIAS,
        WORLD_SIZE=str(given.world_size),
        TEMP_DIR=folder,
        INIT_METHOD="env://",
        MASTER_ADDR="127.0.0.1",
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(given.timeout),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        GLOO_SOCKET_IFNAME="lo",
        TP_SOCKET_IFNAME="lo",
    )
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.argv = sys.argv[:1]  # torch's test utilities read it on import


def run(suite: type[unittest.TestCase]) -> list[dict[str, Any]]:
    tests = [suite(name) for name in unittest.defaultTestLoader.getTestCaseNames(suite)]
    pattern = Config.given.match or ("all_to_all" if Config.given.mode == "mpi" else "")
    recorder = Recorder()
    for test in tests:
        if pattern and not re.search(pattern, test.id().rpartition(".")[2]):
            continue
        with contextlib.suppress(OSError):
            os.unlink(Config.output)
        with contextlib.redirect_stderr(io.StringIO()):
            test.run(recorder)
        for process in getattr(test, "processes", []):
            process.kill()
    return recorder.rows


def compare(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> tuple[list[str], list[str], int]:
    """(tests that pass there and not here, tests that fail there and pass here, tests that pass there)."""
    there = {row["test"]: row["status"] for row in baseline}
    here = {row["test"]: row["status"] for row in rows}
    both = [name for name in here if name in there]
    lost = [name for name in both if there[name] == "pass" != here[name]]
    gained = [name for name in both if there[name] == "fail" and here[name] == "pass"]
    return lost, gained, sum(there[name] == "pass" for name in both)


def main() -> int:
    given = Config.given = arguments()
    if given.logs:
        os.makedirs(given.logs, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        environment(folder)
        import torch

        start = time.time()
        attach_backend()
        rows = run(make_suite())
    counts = {status: sum(row["status"] == status for row in rows) for status in ("pass", "fail", "skip")}
    bad = [row["test"] for row in rows if row["status"] == "fail"]
    result = {
        "torch": torch.__version__, "backend": given.backend, "mode": given.mode, "world_size": given.world_size,
        "ranks_per_node": given.ranks_per_node, **counts, "seconds": round(time.time() - start), "rows": rows,
    }  # fmt: skip
    if given.baseline:
        lost, gained, of = compare(rows, json.loads(Path(given.baseline).read_text())["rows"])
        bad = [name for name in lost if not (given.may_lose and re.search(given.may_lose, name))]
        result |= {"lost": lost, "gained": gained, "of": of}
        print(f"{of - len(lost)} of the {of} tests that pass on gloo pass here")
        for name in lost:
            print(f"  lost    {name}")
        for name in gained:
            print(f"  gained  {name}")
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1))
    print(f"{given.backend}, {given.mode}, {given.world_size} ranks: {counts}, {result['seconds']} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    faulthandler.enable()
    status = main()
    sys.stdout.flush()
    # The ranks' processes are reaped; torch's own threads may not end by themselves.
    os._exit(status)
