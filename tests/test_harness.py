"""The tests' own tools tell what went wrong with ranks."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import conftest
import gpu.run
from test_differential import Pool


def ends(how: dict[str, str]) -> str:
    """After the report: as a rank whose interpreter crashes on its way out."""
    way = how.get(os.environ["RANK"], "well")
    if way == "badly":
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    if way == "never":
        atexit.register(lambda: time.sleep(600))
    if way == "without a word":
        os._exit(5)
    return way


@pytest.mark.parametrize(
    ("way", "limit", "words"),
    [
        ("badly", 30, r"statuses \{1: -11\}"),
        ("never", 2, r"processes \[(0, )?1\] had to be killed"),
        ("without a word", 30, r"statuses \{1: 5\}"),
    ],
)
def test_a_rank_that_does_not_end_well_is_told(way: str, limit: float, words: str) -> None:
    ranks = conftest.run(ends, 2, how={"1": way}, limit=limit)
    with pytest.raises(AssertionError, match=r"check\(\)"):
        ranks.reports  # noqa: B018
    with pytest.raises(AssertionError, match=words):
        ranks.check()


def test_a_rank_that_is_to_die_must_die_so() -> None:
    ranks = conftest.run(ends, 2, how={"1": "without a word"}, limit=30)
    assert ranks.check({1: 5}).reports == ["well"]
    for wrong in ({1: 0}, {1: -9}, {0: 5}):
        with pytest.raises(AssertionError, match="statuses"):
            ranks.check(wrong)


def test_a_rank_that_is_to_die_must_not_report() -> None:
    ranks = conftest.run(ends, 2, how={"1": "badly"}, limit=30)
    with pytest.raises(AssertionError, match="2 of 2 reported"):
        ranks.check({1: -signal.SIGSEGV})


def leaves_a_child() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def test_what_ranks_leave_behind_is_found_and_killed() -> None:
    before = conftest.below()
    # A grandchild too, and of a process that is not the server's.
    served, executed = (conftest.run(leaves_a_child, 1, executed=e).check().reports for e in (False, True))
    left = conftest.end_leftovers(before, patience=0.1)
    assert sorted(int(line.split(":")[0]) for line in left) == sorted(served + executed), left
    assert not any(Path(f"/proc/{pid}").exists() for pid in served + executed)
    assert conftest.below() == before


def test_what_a_test_leaves_in_folders_is_found_and_removed() -> None:
    before = conftest.files_left()
    left = [
        Path(tempfile.mkdtemp(prefix="smddp-test-")),
        conftest.SHARED_MEMORY / f"left-by-{os.getpid()}",
        # Not ours, and what MPIs do.
        Path(tempfile.mkdtemp(prefix="other-")),
        conftest.SHARED_MEMORY / f"mpich_shm_{os.getpid()}",
    ]
    for path in left[1::2]:
        path.touch()
    assert conftest.remove_left(before, patience=0.1) == sorted(map(str, left[:2]))
    assert [path.exists() for path in left] == [False, False, True, True]
    left[2].rmdir()
    left[3].unlink()


def test_ports_are_out_of_the_kernels_reach_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {conftest.free_port() for _ in range(20)}
    assert len(ports) == 20
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < lowest
    used, free = sorted(ports)[:2]
    monkeypatch.setattr(conftest, "port_block", lambda: iter([used, free]))
    with socket.socket() as taken:
        taken.bind(("", used))
        assert conftest.free_port() == free


def test_a_pool_that_does_not_end_well_is_told() -> None:
    pool = Pool("1node")
    assert pool.failure({"groups": [], "fresh": False, "delay": 0, "steps": []}) == ""
    os.kill(pool._pids[1], signal.SIGKILL)
    with pytest.raises(AssertionError, match="the pool ended with status 1"):
        pool.__exit__(None)


SKIPPING = """
import pytest

def test_for_want_of_a_tool():
    pytest.skip("some tool is missing")

def test_what_this_machine_cannot():
    pytest.skip("this machine's loader knows no libfabric")
"""


def test_what_is_skipped_for_no_good_reason_has_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING)
    env = conftest.clean_environment() | {"SMDDP_TEST_STRICT": "1"}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60).stdout
    assert "1 failed, 1 skipped" in said.splitlines()[-1], said
    assert "SMDDP_TEST_STRICT is 1: Skipped: some tool is missing" in said
    assert "1 tests skipped" in said


# ---- the steps on a GPU, played without one


def reported(report: dict, size: int, status: int = 0) -> conftest.Ranks:
    return conftest.Ranks([status] * size, [""] * size, 1, collected=[report] * size, expected=size)


CANNOT = f"{gpu.run.IMPOSSIBLE}: a duplicate GPU"


@pytest.mark.parametrize(
    ("sharing", "wrong", "verdicts"),
    [
        ("works", "", ["passed", "passed", "passed"]),
        ("works", "3 of 4 elements are not 2.0", ["passed", "passed", "FAILED"]),
        ("cannot", "", ["passed", CANNOT, CANNOT]),
        ("crashes", "", ["passed", "FAILED", f"not run: {gpu.run.SHARING.name}: FAILED"]),
    ],
)
def test_only_an_nccl_that_says_it_cannot_share_excuses_a_step(
    monkeypatch: pytest.MonkeyPatch, sharing: str, wrong: str, verdicts: list[str]
) -> None:
    def play(function: str, size: int, **_: object) -> conftest.Ranks:
        if "shares" in function and sharing == "cannot":
            return reported({"cases": {}, "impossible": "a duplicate GPU"}, size)
        crashes = "shares" in function and sharing == "crashes"
        cases = {"a sum": wrong if function == "gpu.messages:messages" else ""}
        return reported({"cases": cases}, size, 1 if crashes else 0)

    monkeypatch.setattr(conftest, "run", play)
    alone = gpu.run.Step("alone", "streams:streams", [0], 30)
    two = gpu.run.Step("two", "messages:messages", [0, 0], 30, shares=True)
    (*_, results) = gpu.run.run_all([alone, two], "cuda", 1)
    assert [result.verdict for result in results] == verdicts


def test_the_page_of_a_gpu_run_names_the_cases_that_passed() -> None:
    step, about = gpu.run.Result("one", "passed", 1.0, 2, ["a", "b"]), {"date": "today"}
    other, failed = gpu.run.Result("two", "passed", 1.0, 2, ["a", "b"]), gpu.run.Result("three", "FAILED", 1.0)
    page = gpu.run.markdown(about, [step, other, failed])
    assert gpu.run.cases_by_step(page) == {"one": {"a", "b"}, "two": {"a", "b"}}


def test_a_step_that_no_longer_fits_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short it would look as if it had hung."""
    monkeypatch.setattr(gpu.run, "TOTAL", 20.0)
    limits: list[float] = []

    def play(step: gpu.run.Step, limit: float, *_: object) -> gpu.run.Result:
        limits.append(limit)
        return gpu.run.Result(step.name, "passed", 1.0)

    monkeypatch.setattr(gpu.run, "run", play)
    steps = [gpu.run.Step(name, "streams:streams", [0], limit) for name, limit in (("short", 15), ("long", 25))]
    (*_, results) = gpu.run.run_all(steps, "cuda", 1)
    assert [result.verdict for result in results] == ["passed", "not run: no time left"]
    assert limits == [15]


def test_what_a_machine_cannot_do_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(function: str, size: int, **_: object) -> conftest.Ranks:
        return reported({"cases": {}, "impossible": "it needs a newer torch"}, size)

    monkeypatch.setattr(conftest, "run", play)
    step = gpu.run.Step("messages", "messages:messages", [0, 0], 30)
    assert gpu.run.run(step, 30, "cuda").verdict == f"{gpu.run.IMPOSSIBLE}: it needs a newer torch"


@pytest.mark.parametrize("not_run", [{}, {"a graph": "NCCL does not carry it"}], ids=["none", "none that was run"])
def test_a_step_without_cases_has_failed(monkeypatch: pytest.MonkeyPatch, not_run: dict[str, str]) -> None:
    monkeypatch.setattr(conftest, "run", lambda _, size, **__: reported({"cases": {}, "not run": not_run}, size))
    result = gpu.run.run(gpu.run.Step("streams", "streams:streams", [0, 0], 30), 30, "cuda")
    assert result.verdict == "FAILED"
    assert result.failures == {f"report {number}": "no case was run" for number in range(2)}


def suite() -> dict:
    from gpu.common import NotRun, Suite, case, run_suite

    cases: Suite = {}

    @case(cases)
    def a_sum() -> None:
        pass

    @case(cases)
    def a_graph() -> None:
        raise NotRun("NCCL does not carry it")

    return run_suite(cases)


def test_a_case_that_is_not_run_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = conftest.run(suite, 1, env={"SMDDP_TEST_DEVICE": "cpu"}).check()
    monkeypatch.setattr(conftest, "run", lambda *_, **__: ranks)
    result = gpu.run.run(gpu.run.Step("streams", "streams:streams", [0], 30), 30, "cpu")
    assert (result.verdict, result.passed, result.cases) == ("passed", 1, ["a_sum"])
    assert result.not_run == {"a_graph": "NCCL does not carry it"}
    page = gpu.run.markdown({"date": "today"}, [result])
    assert gpu.run.cases_by_step(page) == {"streams": {"a_sum"}}
    assert "Not run in streams: a_graph: NCCL does not carry it." in page
