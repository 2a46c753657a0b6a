"""The order of streams, and memory that is still in use."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import smdistributed_rs
from gpu.common import DEVICE, ON_GPU, NotRun, Suite, case, full, is_all, run_suite, still_works, synchronize, total

STREAMS: Suite = {}


def streams() -> dict[str, Any]:
    return run_suite(STREAMS)


def busy(times: int = 30) -> None:
    """Keeps the current stream busy for some milliseconds."""
    side = 2048 if ON_GPU else 128
    a = torch.ones(side, side, device=DEVICE)
    for _ in range(times):
        a = (a @ a).clamp_(max=1)


def asleep(cycles: int) -> None:
    """Stops the current stream, for longer where a tool slows the host down."""
    torch.cuda._sleep(int(cycles * float(os.environ.get("SMDDP_TEST_PATIENCE", "1"))))


@case(STREAMS)
def what_is_computed_before_is_summed_and_what_comes_after_sees_it() -> None:
    rank = dist.get_rank()
    found = []
    for i in range(10):
        tensor = full(300_000, 0)
        busy()
        tensor.add_(rank + 1 + i)
        work = dist.all_reduce(tensor, async_op=True)
        work.wait()
        found.append(tensor * 2)
        tensor.fill_(-1)
    for i, tensor in enumerate(found):
        is_all(tensor, 2 * (total() + i * dist.get_world_size()))


@case(STREAMS, gpu=True)
def calls_on_a_side_stream() -> None:
    side = torch.cuda.Stream()
    for asynchronous in (False, True):
        with torch.cuda.stream(side):
            tensor = full(200_000, 0)
            busy()
            tensor.add_(dist.get_rank() + 1)
            work = dist.all_reduce(tensor, async_op=asynchronous)
            if asynchronous:
                work.wait()
            doubled = tensor * 2
        side.synchronize()
        is_all(doubled, 2 * total())


@case(STREAMS, gpu=True)
def waited_for_on_another_stream() -> None:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        tensor = full(500_000, dist.get_rank() + 1)
        busy()
        work = dist.all_reduce(tensor, async_op=True)
    with torch.cuda.stream(second):
        work.wait()
        doubled = tensor * 2
    second.synchronize()
    is_all(doubled, 2 * total())


def _the_host_may_go_on() -> None:
    if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ:
        raise NotRun("CUDA_DEVICE_MAX_CONNECTIONS is set, where the host waits so that no computing stream is stopped")


@case(STREAMS, gpu=True)
def the_host_does_not_wait() -> None:
    """Until the sleeping stream reaches the call, the host has long gone on."""
    _the_host_may_go_on()
    for asynchronous in (True, False):
        tensor = full(100_000, dist.get_rank() + 1)
        torch.cuda.synchronize()
        asleep(1_000_000_000)
        work = dist.all_reduce(tensor, async_op=asynchronous)
        if work is not None:
            assert not work.is_completed()
            work.wait()
        assert not torch.cuda.current_stream().query(), "the host has waited for the stream"
        is_all(tensor, total())


@case(STREAMS, gpu=True)
def a_wait_with_a_limit() -> None:
    """The host waits as long as it was told to, and not without being told."""
    _the_host_may_go_on()
    tensor = full(100_000, dist.get_rank() + 1)
    torch.cuda.synchronize()
    asleep(1_000_000_000)
    work = dist.all_reduce(tensor, async_op=True)
    told = ""
    try:
        work.wait(timedelta(milliseconds=20))
    except smdistributed_rs.errors.TimeoutError as error:
        told = str(error)
    assert "all_reduce" in told, f"no TimeoutError of all_reduce after 20 ms: {told}"
    assert work.wait(timedelta(seconds=20))
    assert work.is_completed()
    is_all(tensor, total())


@case(STREAMS)
def inputs_dropped_right_after_the_call() -> None:
    """Their memory must not be given to others before the call is over."""
    rank, size = dist.get_rank(), dist.get_world_size()
    outputs, works = [], []
    for i in range(60):
        count = 50_000 + 1000 * (i % 3)
        output = full(count * size, -1)
        works.append(dist.all_gather_into_tensor(output, full(count, rank + i), async_op=True))
        outputs.append(output)
        # Whatever was freed too early would be overwritten by these.
        for _ in range(3):
            full(count, -7)
    for work in works:
        work.wait()
    for i, output in enumerate(outputs):
        for r, part in enumerate(output.view(size, -1)):
            is_all(part, r + i)


@case(STREAMS)
def works_nobody_waits_for() -> None:
    for i in range(40):
        dist.all_reduce(full(100_000, i), async_op=True)
        full(100_000, -3)
    tensor = full(1000, dist.get_rank() + 1)
    dist.all_reduce(tensor)
    is_all(tensor, total())


@case(STREAMS)
def many_at_once() -> None:
    tensors = [full(10 + i, dist.get_rank() + 1) for i in range(300)]
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    for work in works:
        work.wait()
    for tensor in tensors:
        is_all(tensor, total())
    for work in works:
        assert work.is_completed()
        assert work.is_success()


@case(STREAMS)
def futures_have_the_result() -> None:
    tensor = full(200_000, 0)
    busy()
    tensor.add_(dist.get_rank() + 1)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    is_all(future.then(lambda f: f.value()[0] * 3).wait(), 3 * total())
    is_all(future.wait()[0], total())


@case(STREAMS, gpu=True)
def the_allocator_gives_memory_back_meanwhile() -> None:
    """cudaFree waits for the device; the calls must end nevertheless."""
    ends = threading.Event()

    def churn() -> None:
        torch.cuda.set_device(torch.cuda.current_device())
        while not ends.is_set():
            torch.empty(300 << 20, dtype=torch.uint8, device=DEVICE)
            torch.cuda.empty_cache()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            tensor = full(2_000_000, dist.get_rank() + 1)
            dist.all_reduce(tensor, async_op=True).wait()
            is_all(tensor, total())
    finally:
        ends.set()
        thread.join()


@case(STREAMS)
def cpu_tensors_in_between() -> None:
    for _ in range(20):
        there, here = full(30_000, dist.get_rank() + 1), torch.full((30_000,), float(dist.get_rank() + 1))
        works = [dist.all_reduce(t, async_op=True) for t in (there, here)]
        for work in works:
            work.wait()
        is_all(there, total())
        is_all(here, total())


@case(STREAMS)
def large_ones() -> None:
    count = (64 << 20) + 5 if ON_GPU else (1 << 20) + 5
    tensor = torch.arange(count, dtype=torch.float32, device=DEVICE).remainder_(97).add_(dist.get_rank())
    dist.all_reduce(tensor)
    size = dist.get_world_size()
    wanted = torch.arange(count, dtype=torch.float32, device=DEVICE).remainder_(97) * size + sum(range(size))
    assert torch.equal(tensor, wanted)


@case(STREAMS)
def every_collective_in_many_pieces() -> None:
    """Blocks of 3 MiB and a bit, which no slot holds."""
    rank, size, count = dist.get_rank(), dist.get_world_size(), 800_003
    block = full(count, rank + 1)
    every = [full(count, r + 1) for r in range(size)]

    whole = full(count * size, 0)
    dist.all_gather_into_tensor(whole, block)
    assert torch.equal(whole, torch.cat(every))

    mine = full(count, 0)
    dist.reduce_scatter_tensor(mine, torch.cat([full(count, rank + to) for to in range(size)]))
    is_all(mine, sum(r + rank for r in range(size)))

    swapped = full(count * size, 0)
    dist.all_to_all_single(swapped, torch.cat([full(count, 10 * rank + to) for to in range(size)]))
    assert torch.equal(swapped, torch.cat([full(count, 10 * source + rank) for source in range(size)]))

    # Blocks that have an allocation of their own each, which may happen to lie one behind another.
    own = (16 << 20) // 4 if ON_GPU else 1000
    outputs = [full(own, -1) for _ in range(size)]
    dist.all_to_all(outputs, [full(own, 10 * rank + to) for to in range(size)])
    for source, output in enumerate(outputs):
        is_all(output, 10 * source + rank)

    for root in {0, size - 1}:
        told = full(count, rank)
        dist.broadcast(told, root)
        is_all(told, root)
        added = full(count, rank + 1)
        dist.reduce(added, root)
        is_all(added, total() if rank == root else rank + 1)
        gathered = [full(count, 0) for _ in range(size)] if rank == root else None
        dist.gather(block, gathered, root)
        assert all(torch.equal(a, b) for a, b in zip(gathered or [], every, strict=False))
        handed = full(count, 0)
        dist.scatter(handed, every if rank == root else None, root)
        is_all(handed, rank + 1)


def _calls_are_captured() -> None:
    if os.environ.get("SMDDP_CUDA") != "nccl":
        raise NotRun("SMDDP_CUDA is not nccl: only what NCCL carries is captured")


@case(STREAMS, gpu=True)
def calls_in_a_graph() -> None:
    """Synchronous and asynchronous ones, replayed on other numbers."""
    _calls_are_captured()
    size = dist.get_world_size()
    given, summed, doubled = full(50_000, 0), full(50_000, 0), full(50_000, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        summed.copy_(given)
        dist.all_reduce(summed)
        summed.add_(1)
        work = dist.all_reduce(summed, async_op=True)
        work.wait()
        doubled.copy_(summed).mul_(2)
    assert not work.is_completed()
    for value in range(5):
        given.fill_(value)
        graph.replay()
        is_all(doubled, 2 * size * (size * value + 1))
    still_works()
    # Before its group, which waits for it.
    synchronize()
    del graph


@case(STREAMS, gpu=True)
def calls_in_a_graph_while_others_are_pending() -> None:
    """An eager call on the group's stream lies behind a sleeping one when the capture begins, and ends after it."""
    _calls_are_captured()
    given, doubled = full(50_000, 0), full(50_000, 0)
    tensors = [full(100_000, dist.get_rank() + 1) for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    synchronize()
    asleep(4_000_000_000)
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin()
        doubled.copy_(given)
        dist.all_reduce(doubled)
        captured = dist.all_reduce(doubled, async_op=True)
        # Asking for it must leave the capture alone.
        assert not works[0].is_completed()
        captured.wait()
        doubled.mul_(2)
        graph.capture_end()
    assert not works[0].is_completed(), "the capture has waited for the eager call"
    for work in works:
        work.wait()
    for tensor in tensors:
        is_all(tensor, total())
    for value in range(3):
        given.fill_(value)
        graph.replay()
        is_all(doubled, 2 * dist.get_world_size() ** 2 * value)
    still_works()
    synchronize()
    del graph
