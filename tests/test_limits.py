"""What ends waiting for a rank that does not come: every kind of call, small and large, in one job a group each."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

import conftest
from common import start
from test_errors import caught

LIMIT, WORLD_LIMIT = 2.5, 120
SIZES = {"small": 8, "large": 4 << 20}
"""bytes of a rank's block"""

CALLS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
    "all_to_all_single", "gather", "scatter", "recv", "send", "async all_reduce",
)  # fmt: skip
CASES = [f"{call}, {size}" for call in CALLS for size in SIZES if (call, size) != ("send", "small")] + ["barrier"]
NOT_ALWAYS = {"reduce", "gather"}
"""what rank 1 only gives to, and may be done with"""


def call(case: str, group: object) -> Callable[[], object]:
    """A call that cannot end without rank 2."""
    import torch
    import torch.distributed as dist

    name, _, size = case.partition(", ")
    count = SIZES.get(size, 8) // 4
    block, every, rank = torch.ones(count), torch.ones(3 * count), dist.get_rank()
    how = {"group": group}
    return {
        "all_reduce": lambda: dist.all_reduce(block, **how),
        "async all_reduce": lambda: dist.all_reduce(block, async_op=True, **how).wait(),
        "reduce": lambda: dist.reduce(block, 0, **how),
        "broadcast": lambda: dist.broadcast(block, 2, **how),
        "all_gather": lambda: dist.all_gather([torch.empty(count) for _ in range(3)], block, **how),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(every, block, **how),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(block, every, **how),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(3 * count), every, **how),
        "gather": lambda: dist.gather(block, list(every.split(count)) if rank == 0 else None, 0, **how),
        "scatter": lambda: dist.scatter(block, None, 2, **how),
        "recv": lambda: dist.recv(block, 2, **how),
        "send": lambda: dist.send(block, 2, **how),
        "barrier": lambda: dist.barrier(**how),
    }[name]


def waits(how: str) -> dict[str, dict]:
    """Ranks 0 and 1 make each call in a thread and on a group of its own; rank 2 makes none."""
    import torch.distributed as dist

    start(WORLD_LIMIT)
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    limit = LIMIT if how == "limit" else 600
    groups = {case: dist.new_group(timeout=timedelta(seconds=limit)) for case in CASES}
    found: dict[str, dict] = {}
    dist.barrier()
    if rank < 2:
        calls = {case: call(case, group) for case, group in groups.items()}
        threads = [threading.Thread(target=lambda c=c: found.update({c: caught(calls[c])})) for c in CASES]
        for thread in threads:
            thread.start()
        if how == "abort":
            # All calls have been made, on both ranks; messages are not counted.
            counted = [group for case, group in groups.items() if case.split(",")[0] not in ("send", "recv")]
            while not all(group._get_sequence_number_for_group() for group in counted):
                time.sleep(0.01)
            store.set(f"waits {rank}", "")
            store.wait(["waits 0", "waits 1"])
            if rank == 0:
                for group in groups.values():
                    group.abort()
        for thread in threads:
            thread.join()
        store.set(f"done {rank}", "")
    store.wait(["done 0", "done 1"], timedelta(seconds=60))
    return found


@functools.cache
def waited(nodes: tuple[int, ...], how: str) -> conftest.Ranks:
    return conftest.run(waits, 3, nodes=nodes, how=how, limit=90)


def reports_of(case: str, nodes: tuple[int, ...], how: str) -> list[dict]:
    """Of those who cannot be done."""
    reports = [report[case] for report in waited(nodes, how).check().reports[:2]]
    if case.split(",")[0] in NOT_ALWAYS and not reports[1]["type"]:
        del reports[1]
    return reports


shapes = pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 0, 1)], ids=["1node", "2nodes"])


@shapes
@pytest.mark.parametrize("case", CASES)
def test_a_limit_ends_every_call(case: str, nodes: tuple[int, ...]) -> None:
    reports = reports_of(case, nodes, "limit")
    first_hand = [report for report in reports if report["type"] == "TimeoutError"]
    assert first_hand, reports
    for report in reports:
        assert report["type"] in ("TimeoutError", "AbortedError"), reports
        assert "timeout after" in report["text"], reports
    for report in first_hand:
        # A rank may wait for another as well that waits for the missing one; on several nodes, for that one alone.
        assert set(report["missing"]) <= {0, 1, 2} - {report["rank"]}, reports
        assert 2 in report["missing"] or nodes[2], reports
        # The group's limit, and neither less nor the world's.
        assert LIMIT <= report["waited"] < WORLD_LIMIT / 2, reports


@shapes
@pytest.mark.parametrize("case", CASES)
def test_an_abort_ends_every_call(case: str, nodes: tuple[int, ...]) -> None:
    for report in reports_of(case, nodes, "abort"):
        assert report["type"] == "AbortedError", report
        assert "abort() was called" in report["text"], report
