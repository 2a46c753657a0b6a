"""Children that a rank forks end in whatever way: the rank goes on, and its peers see nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

import conftest
from common import start

STATUS = {"nothing": 0, "exit": 7, "exception": 1, "collected": 0, "used": 0, "used later": 0, "left": 0}
"""how children end, and their statuses"""
BY_TORCH = ("nothing", "exit", "exception", "used", "used later", "left")
BY_NUMPY = ("collected", "used", "left")


def ends(how: str, world: list, reduce: Callable[[], float], leave: Callable[[], None]) -> None:
    """In a child, which goes the way of every Python process: finalizers, and what was registered for the end."""
    import smdistributed_rs

    if how == "exit":
        sys.exit(7)
    if how == "exception":
        raise ValueError("a child ends so")
    if how == "collected":
        world.clear()
        gc.collect()
    if how in ("used", "used later"):
        try:
            reduce()
            sys.exit(2)
        except smdistributed_rs.AbortedError as error:
            if "forked" not in str(error):
                raise
    if how == "left":
        leave()
    sys.exit(0)


def ended(child: int) -> int | str:
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "did not end"


def played(
    ways: tuple[str, ...], world: list, reduce: Callable[[], float], leave: Callable[[], None]
) -> dict[str, list]:
    found = {}
    for how in ways:
        before = reduce()
        if (child := os.fork()) == 0:
            ends(how, world, reduce, leave)
        # With "used later" the peers are in the call, and wait for this rank.
        status = ended(child) if how != "used later" else None
        after = [reduce() for _ in range(3)]
        found[how] = [before, ended(child) if status is None else status, *after]
    return found


def by_torch() -> dict[str, list]:
    import torch
    import torch.distributed as dist

    start()

    def reduce() -> float:
        tensor = torch.ones(70_000)
        dist.all_reduce(tensor)
        return tensor[-1].item()

    found = played(BY_TORCH, [dist.group.WORLD, dist.new_group()], reduce, dist.destroy_process_group)
    dist.destroy_process_group()
    return found


def by_numpy() -> dict[str, list]:
    import numpy as np

    import smdistributed_rs

    world = smdistributed_rs.init()

    def reduce() -> float:
        array = np.ones(70_000)
        world.all_reduce(array)
        return array[-1]

    found = played(BY_NUMPY, [world.new_group([0, 1])], reduce, world.shutdown)
    world.shutdown()
    return found


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["1node", "2nodes"])
@pytest.mark.parametrize(("job", "ways"), [(by_torch, BY_TORCH), (by_numpy, BY_NUMPY)], ids=["torch", "numpy"])
def test_children_end_as_they_like(job: Callable, ways: tuple[str, ...], nodes: list[int]) -> None:
    for report in conftest.run(job, 2, nodes=nodes, limit=90).check().reports:
        assert report == {how: [2.0, status, 2.0, 2.0, 2.0] for how, status in STATUS.items() if how in ways}
