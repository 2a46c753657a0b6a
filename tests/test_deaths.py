"""A rank is killed while every kind of call is under way, each in a thread and on a group of its own."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable

import pytest

import conftest
from common import start
from test_errors import caught

SIZES = {"small": 64, "large": 1 << 20}
"""bytes of a rank's block"""
CALLS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "messages",
)  # fmt: skip
CASES = [*(f"{call}, {size}" for call in CALLS for size in SIZES), "barrier"]
SHAPES = {"1node of 2": [0, 0], "1node of 3": [0, 0, 0], "2nodes": [0, 0, 1], "2nodes, its own mourn it": [0, 1, 1]}


def exchange(group: object, block: object, came: object) -> object:
    """With both neighbours of a ring."""
    handle = group.recv(came, (group.rank - 1) % group.size, async_op=True)
    group.send(block, (group.rank + 1) % group.size, async_op=True).wait()
    handle.wait()
    return came


def call(case: str, group: object) -> Callable[[], None]:
    """Makes the call and looks at what comes out."""
    import numpy as np

    name, _, size = case.partition(", ")
    count, n, me = SIZES.get(size, 8) // 4, group.size, group.rank
    own, ones = np.full(count, me, dtype=np.float32), np.ones((n, count), dtype=np.float32)
    ranks = np.arange(n, dtype=np.float32)[:, None]
    to_root, from_root = (lambda wanted: wanted if me == 0 else None), ones if me == 0 else None
    calls = {
        "all_reduce": (lambda: group.all_reduce(np.copyto(into, own) or into) or into, ranks.sum()),
        "reduce": (lambda: group.reduce(np.copyto(into, own) or into) or to_root(into), to_root(ranks.sum())),
        "broadcast": (lambda: group.broadcast(np.copyto(into, own) or into) or into, 0),
        "all_gather": (lambda: group.all_gather(own), ranks),
        "reduce_scatter": (lambda: group.reduce_scatter(ones), n),
        "all_to_all": (lambda: group.all_to_all(ones * me), ranks),
        "gather": (lambda: group.gather(own), to_root(ranks)),
        "scatter": (lambda: group.scatter(from_root, into), 1),
        "messages": (lambda: exchange(group, own, into), (me - 1) % n),
        "barrier": (group.barrier, None),
    }
    into = np.empty(count, dtype=np.float32)
    make, expected = calls[name]

    def check() -> None:
        got = make()
        assert (got is None) if expected is None else (got == expected).all(), f"{case}: {got}"

    return check


def until_a_rank_dies(seed: int) -> dict[str, dict]:
    import smdistributed_rs

    world = smdistributed_rs.init()
    victim = world.size - 1
    checks = {case: call(case, world.new_group(range(world.size))) for case in CASES}
    done, found = dict.fromkeys(CASES, 0), {}

    def work(case: str) -> None:
        while case not in found:
            if (what := caught(checks[case]))["type"]:
                found[case] = what
            done[case] += 1

    threads = [threading.Thread(target=work, args=(case,), daemon=True) for case in CASES]
    world.barrier()
    for thread in threads:
        thread.start()
    if world.rank == victim:
        while not all(done.values()):
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.02))
        os.kill(os.getpid(), signal.SIGKILL)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_who_is_killed_in_the_midst_is_named(shape: str, seed: int) -> None:
    nodes = SHAPES[shape]
    victim = len(nodes) - 1
    env = {"SMDDP_SHM_SINGLE_COPY": "on", "SMDDP_TIMEOUT": "100"}
    ranks = conftest.run(until_a_rank_dies, len(nodes), nodes=nodes, env=env, limit=90, seed=seed)
    for report in ranks.check({victim: -signal.SIGKILL}).reports:
        assert report.keys() == set(CASES)
        # A limit that had passed would be a TimeoutError, a wrong result an AssertionError.
        for case, found in report.items():
            assert found["type"] in ("PeerLostError", "AbortedError"), (case, found)
            assert f"lost rank {victim}" in found["text"], (case, found)


def one_fails(kind: str) -> dict:
    """Rank 1 ends by an exception that nobody catches."""
    if kind == "numpy":
        import numpy as np

        import smdistributed_rs

        world = smdistributed_rs.init()
        me, all_reduce = world.rank, lambda: world.all_reduce(np.ones(4))
    else:
        import torch
        import torch.distributed as dist

        start()
        me, all_reduce = dist.get_rank(), lambda: dist.all_reduce(torch.ones(4))
    all_reduce()
    if me == 1:
        raise ValueError("as it happens")
    return caught(all_reduce)


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["1node", "2nodes"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_who_ends_by_an_exception_has_not_left_in_good_order(kind: str, nodes: list[int]) -> None:
    ranks = conftest.run(one_fails, 2, nodes=nodes, executed=True, kind=kind, limit=60).check({1: 1})
    found = ranks.reports[0]
    assert found["type"] == "PeerLostError", found
    assert "lost rank 1" in found["text"], found
    assert "destroyed" not in found["text"], found
    # Between nodes it is a connection that ends.
    assert "its process has ended" in found["text"] or 1 in nodes, found
