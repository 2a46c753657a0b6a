"""What calls cost, beside torch's NCCL and beside the parts of a staged call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from gpu.common import DEVICE, ON_GPU, full, start, synchronize

MEASURED = "every size was measured"
"""the only case there is"""


def timed(call: Callable[[], object], seconds: float = 0.15) -> tuple[float, float]:
    """(microseconds of the host, microseconds until the device has done it) a call; the best of batches."""
    for _ in range(3):
        call()
    synchronize()
    start_at = time.perf_counter()
    call()
    synchronize()
    times = max(2, min(200, int(0.02 / max(time.perf_counter() - start_at, 1e-6))))
    host, whole = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(host) < 3:
        start_at = time.perf_counter()
        for _ in range(times):
            call()
        host.append((time.perf_counter() - start_at) / times)
        synchronize()
        whole.append((time.perf_counter() - start_at) / times)
    return round(min(host) * 1e6, 2), round(min(whole) * 1e6, 2)


def beside_nccl() -> dict[str, Any]:
    """This backend by NCCL, and torch's, in one process of one rank: what a call costs."""
    start()
    theirs = dist.new_group([0], backend="nccl")
    rows = []
    for power in range(2, 31, 4):
        count = (1 << power) // 4
        tensor, other = full(count, 0), full(count, 0)
        calls: dict[str, Callable[[Any], object]] = {
            "all_reduce": lambda g, t=tensor: dist.all_reduce(t, group=g),
            "all_gather": lambda g, t=tensor, o=other: dist.all_gather_into_tensor(o, t, group=g),
            "reduce_scatter": lambda g, t=tensor, o=other: dist.reduce_scatter_tensor(o, t, group=g),
            "all_reduce, async": lambda g, t=tensor: dist.all_reduce(t, group=g, async_op=True).wait(),
        }
        for name, call in calls.items():
            found = {}
            for _ in range(2):
                for label, group in (("smddp", None), ("nccl", theirs)):
                    took = timed(lambda call=call, group=group: call(group), 0.04)
                    found[label] = min(found.get(label, took), took, key=lambda t: t[1])
            row = {"op": name, "bytes": 1 << power, **found}
            rows.append(row)
            print(row, flush=True)
    dist.destroy_process_group()
    columns = "[µs of the host, µs until the device has done it] per call, of the fastest batch"
    return {"cases": {MEASURED: ""}, "figures": {"columns": columns, "rows": rows}}


def staging() -> dict[str, Any]:
    """The staged all_reduce, beside its parts: pinned copies both ways at once, and the same sum on the host."""
    start()
    rows = []
    for power in (10, 16, 20, 23, 26, 28) if ON_GPU else (10, 16, 20):
        count = (1 << power) // 4
        there, here = full(count, 0), torch.zeros(count)
        row: dict[str, Any] = {"bytes": 1 << power}
        row["staged us"] = _together(lambda t=there: dist.all_reduce(t))
        row["host us"] = _together(lambda t=here: dist.all_reduce(t))
        if ON_GPU:
            row["copies us"] = _together(_copier(count))
            row["of the slower"] = round(row["staged us"] / max(row["host us"], row["copies us"]), 2)
        rows.append(row)
        print(row, flush=True)
    figures = {"rows": rows, "group": dist.group.WORLD.describe()}
    dist.barrier()
    dist.destroy_process_group()
    return {"cases": {MEASURED: ""}, "figures": figures}


def _copier(count: int) -> Callable[[], None]:
    down, up = torch.cuda.Stream(), torch.cuda.Stream()
    device = [torch.zeros(count, device=DEVICE) for _ in range(2)]
    pinned = [torch.zeros(count, device="cpu").pin_memory() for _ in range(2)]

    def copy() -> None:
        with torch.cuda.stream(down):
            pinned[0].copy_(device[0], non_blocking=True)
        with torch.cuda.stream(up):
            device[1].copy_(pinned[1], non_blocking=True)

    return copy


def _together(call: Callable[[], object]) -> float:
    """Microseconds a call of the slowest rank, all ranks at once; equal numbers of calls everywhere."""
    best = float("inf")
    for batch in range(4):
        times = 1 if batch == 0 else 4
        dist.barrier()
        start_at = time.perf_counter()
        for _ in range(times):
            call()
        synchronize()
        took: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(took, (time.perf_counter() - start_at) / times)
        if batch:
            best = min(best, max(took))
    return round(best * 1e6, 1)
