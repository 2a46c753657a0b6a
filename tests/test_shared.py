"""Tensors in memory that the ranks share: results as of ordinary ones, freed with the last tensor, clear errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import conftest

if TYPE_CHECKING:
    import torch

    from smdistributed_rs import _core


def _start() -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("smddp")
    return dist.get_rank(), dist.get_world_size()


def _native() -> _core.Communicator:
    from smdistributed_rs.shared import _communicator

    return _communicator("test", None)


def _algorithm() -> str:
    return _native().last_algorithm()


def reduces(one_node: bool) -> None:
    """Every dtype and reduction, parts at any offset, sync and async, beside the same call on ordinary tensors."""
    import torch
    import torch.distributed as dist

    from smdistributed_rs import shared

    rank, _ = _start()
    floats, whole = (torch.float32, torch.bfloat16, torch.float16, torch.float64), (torch.int32, torch.int64)
    for dtype in floats + whole:
        made = shared.empty(300, 1000, dtype=dtype)
        assert shared.is_shared(made)
        assert (made.shape, made.dtype, made.any()) == ((300, 1000), dtype, False)
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG):
            for part in (made, made[7:], made[rank : 200 + rank], made.view(-1)[13:20013]):
                part.copy_((torch.arange(part.numel()) % 97 * (rank + 1)).view(part.shape))
                ordinary = part.clone()
                work = dist.all_reduce(part, op, async_op=True)
                work.wait()
                assert (_algorithm() == "shared") == one_node
                dist.all_reduce(ordinary, op)
                assert _algorithm() != "shared"
                assert torch.equal(part, ordinary), (dtype, op)
    _others(made.view(-1), one_node)
    dist.destroy_process_group()


def _others(made: torch.Tensor, one_node: bool) -> None:
    """Every other collective that reads a shared tensor, beside the same call on an ordinary one."""
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    last, rows = world - 1, made.numel() // world
    made = made[: rows * world]
    into = {
        "broadcast": lambda t, _: dist.broadcast(t, last),
        "reduce": lambda t, _: dist.reduce(t, last),
        "all_gather": lambda t, out: dist.all_gather_into_tensor(out, t),
        "reduce_scatter": lambda t, out: dist.reduce_scatter_tensor(out[:rows], t),
        "all_to_all": lambda t, out: dist.all_to_all_single(out[: t.numel()], t),
        "all_gather in place": lambda t, _: dist.all_gather_into_tensor(t, t[rank * rows : (rank + 1) * rows]),
        "reduce_scatter in place": lambda t, _: dist.reduce_scatter_tensor(t[rank * rows : (rank + 1) * rows], t),
    }
    for name, call in into.items():
        found = []
        for tensor, is_shared in ((made, True), (torch.empty_like(made), False)):
            tensor.copy_(torch.arange(tensor.numel()) % 89 * (rank + 2))
            out = tensor.new_zeros(tensor.numel() * world)
            call(tensor, out)
            assert (_algorithm() == "shared") == (is_shared and one_node), name
            found.append((tensor.clone(), out))
        assert all(map(torch.equal, *found)), name
    gathered = [torch.empty_like(made) for _ in range(world)]
    made.fill_(rank)
    dist.all_gather(gathered, made)
    assert [int(each[-1]) for each in gathered] == list(range(world))
    # Blocks of different lengths go through slots.
    uneven = [torch.empty(made.numel() - r, dtype=made.dtype) for r in range(world)]
    dist.all_gather(uneven, made[rank:])
    assert _algorithm() != "shared"
    assert [int(each[-1]) for each in uneven] == list(range(world))


@pytest.mark.parametrize("nodes", [[0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1, 1]], ids=str)
def test_the_results_are_those_of_ordinary_tensors(nodes: list[int]) -> None:
    one_node = nodes[-1] == 0
    conftest.run(reduces, len(nodes), nodes=nodes, limit=120, one_node=one_node).check()


@pytest.mark.parametrize("mode", ["SMDDP_TORCH_GROUP=backend", "TORCH_DISTRIBUTED_DEBUG=DETAIL"])
def test_torchs_hooks_see_the_calls(mode: str) -> None:
    conftest.run(reduces, 2, env=dict([mode.split("=")]), limit=120, one_node=True).check()


def comes_and_goes() -> None:
    import gc

    import torch
    import torch.distributed as dist

    from smdistributed_rs import shared

    rank, world = _start()

    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("smddp-shared" in line for line in maps)

    assert mapped() == 0
    for _ in range(50):
        one = shared.empty(100_000)
        part = one[10:]
        del one
        part.fill_(rank)
        dist.all_reduce(part)
        assert part[0] == world * (world - 1) / 2
        assert mapped() == world
        del part
        gc.collect()
        assert mapped() == 0
    # A call under way keeps what it needs.
    one = shared.empty(1_000_000)
    one.fill_(1)
    work = dist.all_reduce(one, async_op=True)
    del one
    work.wait()
    del work
    # A group that is gone does not mind.
    late = shared.empty(100_000)
    dist.destroy_process_group()
    late.fill_(1)
    assert int(late.sum()) == 100_000
    del late
    gc.collect()
    assert mapped() == 0
    assert torch.ones(3).sum() == 3


def test_memory_is_freed_with_the_last_tensor() -> None:
    conftest.run(comes_and_goes, 2, limit=120).check()


def misuse() -> dict[str, str]:
    import torch
    import torch.distributed as dist

    from smdistributed_rs import errors, shared

    rank, _ = _start()
    said = {}
    for name, call in {
        "nothing": lambda: shared.empty(0, 5),
        "less": lambda: shared.empty(-5),
        "group": lambda: shared.empty(5, group=dist.new_group(backend="gloo")),
        "too much": lambda: shared.empty(1 << 50),
    }.items():
        with pytest.raises(errors.SmddpError) as caught:
            call()
        said[name] = str(caught.value)
    one, other = shared.empty(100_000), torch.zeros(100_000)
    # The rank that finds it out raises MismatchError, the other is told.
    with pytest.raises(errors.SmddpError) as mismatch:
        dist.all_reduce(one if rank == 0 else other)
    said["mixed"] = str(mismatch.value)
    return said


def test_misuse_is_told() -> None:
    for said in conftest.run(misuse, 2, limit=120).check().reports:
        assert "expected elements from 1, given (0, 5)" in said["nothing"]
        assert "empty: argument 'size': expected elements from 1, given (-5,)" in said["less"]
        assert "a group of backend smddp" in said["group"]
        assert "memory" in said["too much"]
        assert "rank 0 called all_reduce(float32[100000], sum, in shared memory)" in said["mixed"]


def _model() -> object:
    import torch

    torch.manual_seed(3)
    layers = [torch.nn.Linear(120, 120) for _ in range(4)]
    return torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.Tanh())])


def _weights(rank: int, world: int, share: bool, views: bool) -> list[float]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from smdistributed_rs import shared

    net = model = _model()
    if world > 1:
        # Buckets of several sizes, some below and some above what pays.
        model = DistributedDataParallel(net, bucket_cap_mb=0.08, gradient_as_bucket_view=views)
        if share:
            shared.share_buckets(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    data = torch.Generator().manual_seed(7)
    for _ in range(6):
        x = torch.randn(12, 120, generator=data)
        optimizer.zero_grad()
        part = x[12 * rank // world : 12 * (rank + 1) // world]
        model(part).square().mean().backward()
        optimizer.step()
    if views and share:
        assert all(shared.is_shared(p.grad) for p in net.parameters())
        assert (_algorithm() == "shared") == (len(set(_native().nodes)) == 1)
    return [float(p.detach().double().sum()) for p in net.parameters()]


def trains(views: bool) -> list[list[float]]:
    import torch.distributed as dist

    rank, world = _start()
    found = [_weights(rank, world, share, views) for share in (False, True)]
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["one node", "two nodes"])
@pytest.mark.parametrize("views", [False, True], ids=["copies", "views"])
def test_a_model_with_shared_buckets_trains_as_without(views: bool, nodes: list[int]) -> None:
    reports = conftest.run(trains, 2, nodes=nodes, limit=120, views=views).check().reports
    assert len(reports) == 2
    ordinary, in_shared_memory = reports[0]
    assert reports[1] == reports[0]
    # Two ranks: halves are exact, wherever they are taken.
    assert in_shared_memory == ordinary
    assert ordinary == pytest.approx(_weights(0, 1, False, False), rel=1e-4, abs=1e-5)


def one_rank_cannot() -> dict[str, object]:
    """Rank 1 has no room in /dev/shm."""
    import warnings

    import torch
    import torch.distributed as dist

    from smdistributed_rs import shared

    rank, world = _start()
    if rank == 1:

        def full(_: object) -> None:
            raise RuntimeError("unable to write to file: No space left on device")

        torch.UntypedStorage._share_fd_cpu_ = full
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = _weights(rank, world, share=True, views=False)
    dist.destroy_process_group()
    return {
        "said": {str(w.message) for w in caught if "memory" in str(w.message)}.pop(),
        "weights": weights,
        "shared": any(True for _ in shared._known),
    }


def test_a_rank_that_cannot_share_its_buckets_warns_and_all_train_on() -> None:
    reports = conftest.run(one_rank_cannot, 2, limit=120).check().reports
    assert "rank(s) [1] had none to share" in reports[0]["said"]
    assert "No space left on device" in reports[1]["said"]
    assert (
        reports[0]["weights"]
        == reports[1]["weights"]
        == pytest.approx(_weights(0, 1, False, False), rel=1e-4, abs=1e-5)
    )


def plain_arrays() -> float:
    import numpy

    import smdistributed_rs

    with smdistributed_rs.init() as world:
        with pytest.raises(smdistributed_rs.ArgumentError, match="shared_memory: argument 'nbytes'"):
            world.shared_memory(0)
        memory = world.shared_memory(400_000)
        array = numpy.frombuffer(memory, dtype=numpy.float32)
        array[:] = world.rank + 1
        world.all_reduce(array)
        assert world._inner.last_algorithm() == "shared"
        return float(array.mean())


def test_arrays_without_torch() -> None:
    assert conftest.run(plain_arrays, 3, limit=60).check().reports == [6.0, 6.0, 6.0]


def trains_sparsely() -> list[list[float]]:
    """An embedding's rows, of gradients that name only those that were looked up."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from smdistributed_rs import shared

    rank, world = _start()
    found = []
    for share in (False, True):
        torch.manual_seed(5)
        table = torch.nn.Embedding(10, 4, sparse=True)
        model = DistributedDataParallel(table)
        if share:
            shared.share_buckets(model)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.tensor([rank, world, (3 * step + rank) % 10])).square().sum().backward()
            optimizer.step()
        found.append(table.weight.detach().flatten().tolist())
    dist.destroy_process_group()
    return found


def test_sparse_gradients_are_averaged_as_without_sharing() -> None:
    reports = conftest.run(trains_sparsely, 2, limit=120).check().reports
    apart, shared = reports[0]
    assert shared == pytest.approx(apart)
    assert reports[1] == reports[0]
