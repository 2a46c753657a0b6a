"""What each rank does in `run`: suites of cases on tensors of its GPU; each case is "" or what went wrong.

With SMDDP_TEST_DEVICE=cpu everything that is not about streams runs on a machine without a GPU."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import cases_collectives
import smdistributed_rs
from torch_versions import TORCH

DEVICE = cases_collectives.DEVICE
ON_GPU = DEVICE != "cpu"
Suite = dict[str, Callable[[], None]]

STREAMS: Suite = {}
TRAINING: Suite = {}
MISUSE: Suite = {}
MISUSE_BY_NCCL: Suite = {}


def case(suite: Suite, *, gpu: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Adds a function to a suite; `gpu`: on a machine with one only."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        if ON_GPU or not gpu:
            suite[function.__name__] = function
        return function

    return add


def choose_device() -> None:
    if ON_GPU:
        # Ranks of the tests share a GPU where there are fewer GPUs than ranks.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.init()


def start() -> None:
    choose_device()
    torch.set_num_threads(1)
    dist.init_process_group("smddp", timeout=timedelta(seconds=40))


def run_suite(suite: Suite) -> dict[str, Any]:
    start()
    found = {}
    for name, function in suite.items():
        try:
            function()
            synchronize()
            found[name] = ""
        except Exception:  # noqa: BLE001
            found[name] = traceback.format_exc()
        print(name, "ok" if not found[name] else "FAILED", flush=True)
    figures = {"group": dist.group.WORLD.describe()}
    dist.barrier()
    dist.destroy_process_group()
    return {"cases": found, "figures": figures}


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def full(count: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype, device=DEVICE)


def total() -> float:
    """The sum of rank + 1 over all ranks."""
    return sum(range(1, dist.get_world_size() + 1))


def is_all(tensor: torch.Tensor, value: float) -> None:
    wrong = int((tensor != value).sum().item())
    assert wrong == 0, f"{wrong} of {tensor.numel()} elements are not {value}: {tensor.view(-1)[:4].tolist()} ..."


# ---- suites


def collectives() -> dict[str, Any]:
    """All that test_collectives runs, on the GPU."""
    choose_device()
    lonely = {
        "messages_match_by_tag", "send_and_receive", "batch_isend_irecv", "any_rank_leaves_what_is_awaited_by_name",
    }  # fmt: skip
    if os.environ["WORLD_SIZE"] == "1":
        for name in lonely:
            del cases_collectives.CASES[name]
    return {"cases": cases_collectives.run_all()}


def streams() -> dict[str, Any]:
    return run_suite(STREAMS)


def training() -> dict[str, Any]:
    return run_suite(TRAINING)


def backends_by_device() -> dict[str, Any]:
    """This backend for one kind of memory, another for the other, in one group and in a part of it. On a GPU only."""
    if not ON_GPU:
        return {"cases": {}}
    choose_device()
    torch.set_num_threads(1)
    found = {}
    # Torch before 2.14 must be told of this backend last.
    for backend in ("cuda:nccl,cpu:smddp", "cpu:gloo,cuda:smddp"):
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=40))
            names = dict(part.split(":") for part in backend.split(","))
            for group in (None, dist.new_group(list(range(dist.get_world_size())))):
                for device, name in names.items():
                    if TORCH >= (2, 14):  # before, a group of ours has no backends to show
                        assert (group or dist.group.WORLD)._get_backend(torch.device(device)).name() == name
                    tensor = torch.full((1000,), dist.get_rank() + 1.0, device=device)
                    dist.all_reduce(tensor, group=group)
                    is_all(tensor, total())
                    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
                    dist.all_gather(parts, tensor, group=group)
                    is_all(torch.cat(parts), total())
            dist.barrier()
            dist.destroy_process_group()
            found[backend] = ""
        except Exception:  # noqa: BLE001
            found[backend] = traceback.format_exc()
            break
    return {"cases": found}


def shares_by_nccl() -> dict[str, Any]:
    """Whether torch's own NCCL lets these ranks share a GPU, which is a matter of the machine. On a GPU only."""
    choose_device()
    dist.init_process_group("nccl", timeout=timedelta(seconds=30))
    tensor = full(1000, dist.get_rank() + 1)
    dist.all_reduce(tensor)
    is_all(tensor, total())
    dist.destroy_process_group()
    return {"cases": {"NCCL is set up": ""}}


def messages() -> dict[str, Any]:
    """Messages from device to device, by NCCL: of a group that was made for a device. On a GPU only, and from torch
    2.14 on: an older one does not tell where a batch begins."""
    if not ON_GPU or TORCH < (2, 14):
        return {"cases": {}, "figures": {"torch": TORCH, "needed": (2, 14)}}
    choose_device()
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("smddp", timeout=timedelta(seconds=40), device_id=device)
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    try:
        assert dist.group.WORLD._get_backend(device).supports_coalescing
        for count in (1, 1000, 3_000_001):
            for step in range(1, size):
                to, of = (rank + step) % size, (rank - step) % size
                # Not dense: gathered before, spread afterwards.
                given = torch.full((count, 2), float(rank), device=device)[:, 1]
                into = torch.zeros(count, 2, device=device)[:, 0]
                batch = [dist.P2POp(dist.isend, given, to), dist.P2POp(dist.irecv, into, of)]
                works = dist.batch_isend_irecv(batch)
                assert len(works) == 1
                works[0].wait()
                is_all(into, of)
        for turn in range(10):
            tensor = full(5000, turn)
            if rank == 0:
                dist.send(tensor, 1)
            elif rank == 1:
                dist.recv(tensor.fill_(-1), 0)
                is_all(tensor, turn)
        tensor = full(1000, rank + 1)
        dist.all_reduce(tensor)
        is_all(tensor, total())
        _refused(lambda: dist.recv(tensor), "Name the sender")
        # The host's messages are what they were.
        here = torch.full((10,), float(rank))
        batch = [dist.P2POp(dist.isend, here, (rank + 1) % size)]
        batch.append(dist.P2POp(dist.irecv, there := torch.zeros(10), (rank - 1) % size))
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        is_all(there, (rank - 1) % size)
        found["messages"] = ""
    except Exception:  # noqa: BLE001
        found["messages"] = traceback.format_exc()
    synchronize()
    dist.destroy_process_group()
    return {"cases": found}


def messages_natively() -> dict[str, Any]:
    """The same by the native half itself, whichever torch is here: what `messages` needs of it. On a GPU only."""
    if not ON_GPU:
        return {"cases": {}}
    start()
    rank, size, found = dist.get_rank(), dist.get_world_size(), {}
    try:
        _still_works()  # which connects the devices
        group: Any = dist.group.WORLD
        native = group._cuda._native
        assert native.carries_messages, group.describe()
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        for count in (1, 1000, 3_000_001):
            for step in range(1, size):
                to, of = (rank + step) % size, (rank - step) % size
                for behind in (None, current.cuda_stream):
                    given, into = full(count, rank), full(count, -1)
                    stream = current if behind is None else side
                    moved = [
                        (peer, sent, t.data_ptr(), t.nbytes) for peer, sent, t in ((to, True, given), (of, False, into))
                    ]
                    handle = native.exchange(stream.cuda_stream, behind, moved)
                    handle.order(current.cuda_stream)
                    is_all(into, of)
                    synchronize()
                    assert handle.is_past()
                    assert handle.error() is None
        for turn in range(10):
            tensor = full(5000, turn if rank == 0 else -1)
            if rank < 2:
                moved = [(1 - rank, rank == 0, tensor.data_ptr(), tensor.nbytes)]
                native.wait(native.exchange(current.cuda_stream, None, moved), 20.0)
                is_all(tensor, turn)
        for wrong in (rank, size):
            _refused(
                lambda wrong=wrong: native.exchange(current.cuda_stream, None, [(wrong, True, tensor.data_ptr(), 4)])
            )
        _still_works()
        found["messages"] = ""
    except Exception:  # noqa: BLE001
        found["messages"] = traceback.format_exc()
    synchronize()
    dist.destroy_process_group()
    return {"cases": found}


def chosen_device() -> dict[str, Any]:
    """The device that is chosen when the group is made, of a script that chooses none. On a GPU only."""
    if not ON_GPU:
        return {"cases": {}}
    dist.init_process_group("smddp", timeout=timedelta(seconds=40))
    found = {}
    try:
        assert not torch.cuda.is_initialized()
        tensor = torch.full((1000,), dist.get_rank() + 1.0, device="cuda")
        wanted = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        assert (tensor.device.index, torch.cuda.current_device()) == (wanted, wanted)
        dist.all_reduce(tensor)
        is_all(tensor, total())
        found["it is the local rank's"] = ""
    except Exception:  # noqa: BLE001
        found["it is the local rank's"] = traceback.format_exc()
    dist.destroy_process_group()
    return {"cases": found}


def misuse() -> dict[str, Any]:
    return run_suite(MISUSE)


def misuse_by_nccl() -> dict[str, Any]:
    return run_suite(MISUSE_BY_NCCL)


# ---- order of streams, and memory


def busy(times: int = 30) -> None:
    """Keeps the current stream busy for some milliseconds."""
    side = 2048 if ON_GPU else 128
    a = torch.ones(side, side, device=DEVICE)
    for _ in range(times):
        a = (a @ a).clamp_(max=1)


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


@case(STREAMS, gpu=True)
def the_host_does_not_wait() -> None:
    """Until the sleeping stream reaches the call, the host has long gone on."""
    if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ:
        return  # then it does, so that computing streams are not stopped
    for asynchronous in (True, False):
        tensor = full(100_000, dist.get_rank() + 1)
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        work = dist.all_reduce(tensor, async_op=asynchronous)
        if work is not None:
            assert not work.is_completed()
            work.wait()
        assert not torch.cuda.current_stream().query(), "the host has waited for the stream"
        is_all(tensor, total())


@case(STREAMS, gpu=True)
def a_wait_with_a_limit() -> None:
    """The host waits as long as it was told to, and not without being told."""
    if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ:
        return
    tensor = full(100_000, dist.get_rank() + 1)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
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


def _captures() -> bool:
    """Whether calls may be captured: NCCL carries them, of a rank alone."""
    return os.environ.get("SMDDP_CUDA") == "nccl" and dist.get_world_size() == 1


@case(STREAMS, gpu=True)
def calls_in_a_graph() -> None:
    """Synchronous and asynchronous ones, replayed on other numbers."""
    if not _captures():
        return
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
        is_all(doubled, 2 * (value + 1))
    _still_works()
    # Before its group, which waits for it.
    synchronize()
    del graph


@case(STREAMS, gpu=True)
def calls_in_a_graph_while_others_are_pending() -> None:
    """An eager call on the group's stream lies behind a sleeping one when the capture begins, and ends after it."""
    if not _captures():
        return
    given, doubled = full(50_000, 0), full(50_000, 0)
    tensors = [full(100_000, dist.get_rank() + 1) for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    synchronize()
    torch.cuda._sleep(4_000_000_000)
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
        is_all(doubled, 2 * value)
    _still_works()
    synchronize()
    del graph


# ---- training


def _model() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(256, 8)).to(DEVICE)


def _train(model: torch.nn.Module, rank: int, size: int, steps: int = 6) -> list[torch.Tensor]:
    """Trains on this rank's share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x, y = torch.randn(64, 64, generator=data), torch.randint(8, (64,), generator=data)
        mine = slice(64 * rank // size, 64 * (rank + 1) // size)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[mine].to(DEVICE)), y[mine].to(DEVICE)).backward()
        optimizer.step()
    full_tensors = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().cpu() for p in full_tensors]


def _trains_alike(wrap: Callable[[torch.nn.Module], torch.nn.Module], tolerance: float = 1e-4) -> None:
    """As one process on the whole batches does, and all ranks to the bit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = _train(_model(), 0, 1)
    together = _train(wrap(_model()), rank, size)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, [t.numpy().tobytes() for t in together])
    assert all(theirs == every[0] for theirs in every), "ranks differ in bits"


def _ddp(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    # Buckets of 128 KiB: several of them.
    return torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.125, **options)


@case(TRAINING)
def ddp() -> None:
    _trains_alike(_ddp)


@case(TRAINING)
def ddp_with_views_of_buckets() -> None:
    _trains_alike(lambda model: _ddp(model, gradient_as_bucket_view=True))


@case(TRAINING)
def ddp_with_a_static_graph() -> None:
    _trains_alike(lambda model: _ddp(model, static_graph=True))


@case(TRAINING)
def ddp_in_bf16() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        wrapped = _ddp(model)
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return wrapped

    _trains_alike(wrap, tolerance=2e-2)


@case(TRAINING)
def fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(DEVICE).type, (dist.get_world_size(),))

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    _trains_alike(wrap)


# ---- bad input


def _refused(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        assert not missing, f"the error does not say {missing}: {text}"
    else:
        raise AssertionError("it was not refused")


def _still_works() -> None:
    tensor = full(100, dist.get_rank() + 1)
    dist.all_reduce(tensor)
    is_all(tensor, total())


@case(MISUSE, gpu=True)
def input_and_output_on_different_devices() -> None:
    size = dist.get_world_size()
    _refused(lambda: dist.all_gather_into_tensor(torch.empty(4 * size), full(4, 1)), "all_gather", "cpu", "cuda")
    _refused(lambda: dist.reduce_scatter_tensor(torch.empty(4), full(4 * size, 1)), "reduce_scatter", "cpu", "cuda")
    _still_works()


@case(MISUSE, gpu=True)
def a_list_over_several_devices() -> None:
    outputs = [full(4, 0) if i else torch.empty(4) for i in range(dist.get_world_size())]
    _refused(lambda: dist.all_gather(outputs, full(4, 1)), "cpu", "cuda")
    _still_works()


@case(MISUSE)
def counts_that_do_not_fit() -> None:
    size = dist.get_world_size()
    _refused(lambda: dist.all_gather_into_tensor(full(4 * size + 1, 0), full(4, 1)))
    _refused(lambda: dist.reduce_scatter_tensor(full(4, 0), full(4 * size + 1, 1)))
    _still_works()


@case(MISUSE)
def dtypes_that_do_not_fit() -> None:
    size = dist.get_world_size()
    _refused(lambda: dist.all_gather_into_tensor(full(4 * size, 0, torch.float16), full(4, 1)))
    _still_works()


@case(MISUSE)
def reductions_that_do_not_exist() -> None:
    _refused(lambda: dist.all_reduce(full(4, 1), dist.ReduceOp.BXOR), "float32")
    _refused(lambda: dist.all_reduce(full(4, 1).to(torch.float8_e4m3fn)), "float8_e4m3fn")
    _refused(lambda: dist.all_reduce(full(4, 1).to(torch.complex64), dist.ReduceOp.MAX), "complex")
    _still_works()


@case(MISUSE_BY_NCCL, gpu=True)
def reductions_nccl_lacks() -> None:
    for op in ("BAND", "BOR", "BXOR"):
        _refused(lambda op=op: dist.all_reduce(full(4, 1, torch.int32), getattr(dist.ReduceOp, op)), "NCCL", op.lower())
    _refused(lambda: dist.all_reduce(full(4, 1, torch.int16)), "NCCL", "int16")
    _still_works()


@case(MISUSE_BY_NCCL, gpu=True)
def no_such_root() -> None:
    _refused(lambda: dist.broadcast(full(4, 1), 5))
    _still_works()


# ---- failures


def _told(error: Exception | None, kind: type[Exception], words: str) -> str:
    """Nothing, if this is `kind`, or the abort that quotes it; else what is wrong."""
    if error is None:
        return "no error within 30 s"
    fits = isinstance(error, (kind, smdistributed_rs.AbortedError)) and words in str(error)
    return "" if fits else f"no {kind.__name__} that says '{words}': {type(error).__name__}: {error}"


def a_rank_that_dies() -> dict[str, Any]:
    """Rank 1 leaves without a word; the others get an error and their device is free again."""
    start()
    for _ in range(3):
        _still_works()
    if dist.get_rank() == 1:
        os._exit(0)
    began, error = time.monotonic(), None
    try:
        while time.monotonic() - began < 30:
            tensor = full(100_000, 1)
            dist.all_reduce(tensor, async_op=True).wait()
            synchronize()
    except RuntimeError as raised:
        error = raised
    synchronize()
    full(10, 1).sum().item()
    wrong = _told(error, smdistributed_rs.PeerLostError, "lost rank 1")
    print(error, flush=True)
    return {"cases": {"it is told": wrong}, "figures": {"error": str(error), "seconds": time.monotonic() - began}}


def calls_that_differ() -> dict[str, Any]:
    """Every rank is told, and no device is left waiting."""
    start()
    _still_works()
    error = None
    began = time.monotonic()
    try:
        work = dist.all_reduce(full(1000 + dist.get_rank(), 1), async_op=True)
        while time.monotonic() - began < 30:
            work.wait()
            synchronize()
            dist.all_reduce(full(10, 1))
    except RuntimeError as raised:
        error = raised
    synchronize()
    print(error, flush=True)
    wrong = _told(error, smdistributed_rs.MismatchError, "ranks disagree")
    return {"cases": {"it is told": wrong}, "figures": {"error": str(error)}}


def an_abort() -> dict[str, Any]:
    """Rank 0 aborts while another rank has not come: its device does not wait for it for ever."""
    start()
    _still_works()
    wrong = ""
    if dist.get_rank() == 0:
        dist.all_reduce(full(1_000_000, 1), async_op=True)
        time.sleep(0.3)
        dist.group.WORLD.abort()
        synchronize()
        full(10, 1).sum().item()
    else:
        time.sleep(1)
        try:
            dist.all_reduce(full(1_000_000, 1))
            synchronize()
            dist.all_reduce(full(10, 1))
            wrong = "no error after another rank's abort"
        except RuntimeError as error:
            synchronize()
            # It may be gone already.
            words = "lost rank 0" if isinstance(error, smdistributed_rs.PeerLostError) else "abort() was called"
            wrong = _told(error, smdistributed_rs.PeerLostError, words)
    return {"cases": {"abort": wrong}}


# ---- speed


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
    return {"cases": {}, "figures": {"columns": columns, "rows": rows}}


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
    return {"cases": {}, "figures": figures}


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
