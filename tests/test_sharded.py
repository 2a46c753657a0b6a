"""Training whose parameters, optimizer or layers are spread over ranks, by every way torch has for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import conftest
import training

CLIP = 0.2
"""below the norms of the gradients here"""


# ---- what each rank does


def fsdp1(strategy: ShardingStrategy, mesh: DeviceMesh | None = None) -> training.Outcome:
    net = FullyShardedDataParallel(
        training.net(),
        sharding_strategy=strategy,
        device_mesh=mesh,
        auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    losses = training.train(net, training.sgd(net.parameters()))
    with FullyShardedDataParallel.summon_full_params(net):
        names = {name.replace("_fsdp_wrapped_module.", ""): p.detach() for name, p in net.named_parameters()}
        return {"losses": losses, "state": training.state(names)}


def sharded(net: training.Net, mesh: DeviceMesh | None = None, **options: object) -> training.Net:
    for part in (net.first, net.middle, net.last, net):
        fully_shard(part, mesh=mesh, **options)
    return net


def fsdp2(mesh: DeviceMesh | None = None, **options: object) -> training.Outcome:
    net = sharded(training.net(), mesh, **options)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    losses = training.train(net, training.sgd(net.parameters()), clip=CLIP)
    return training.outcome(losses, net)


def hsdp() -> training.Outcome:
    """Replicas between the nodes, shards inside them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))
    net = sharded(training.net(), mesh)
    assert next(net.parameters()).placements == (Replicate(), Shard(0))
    assert mesh["inside"].mesh.tolist() == [[0, 1], [2, 3]][dist.get_rank() // 2]
    return training.outcome(training.train(net, training.sgd(net.parameters()), clip=CLIP), net)


def zero(**options: object) -> training.Outcome:
    """Each rank keeps the optimizer's state of some parameters only."""
    model = DistributedDataParallel(net := training.net())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01, eps=1e-4, **options)
    losses = training.train(model, optimizer)
    assert len(optimizer.optim.state) < len(list(net.parameters())), "every rank has all of the state"
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert len(optimizer.state_dict()["state"]) == len(list(net.parameters()))
    return training.outcome(losses, net)


def on_whole_batches(net: torch.nn.Module) -> training.Outcome:
    """Trains layers that are spread over all ranks: every rank sees every batch whole."""
    optimizer = training.sgd(net.parameters())
    losses = [training.step(net, optimizer, training.batch(n)).item() for n in range(training.STEPS)]
    return training.outcome(losses, net)


def tensor_parallel(mesh: DeviceMesh, net: training.Net) -> training.Net:
    # The last layer stays whole: its 5 rows are too few.
    return parallelize_module(net, mesh, {"first": ColwiseParallel(), "middle": RowwiseParallel()})


def fsdp_of_tensor_parallel() -> training.Outcome:
    """Layers are split inside the nodes, and each part is sharded between them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "layer"))
    net = tensor_parallel(mesh["layer"], training.net())
    for part in (net.first, net.middle, net.last):
        fully_shard(part, mesh=mesh["data"])
    assert net.first.weight.device_mesh.ndim == 2
    return training.outcome(training.train(net, training.sgd(net.parameters()), group=mesh["data"].get_group()), net)


def pipeline(schedule: type, rounds: int) -> training.Outcome:
    """Each rank has one layer, or several; micro-batches go through them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = training.net()
    layers = [net.first, torch.nn.Tanh(), net.middle, torch.nn.Tanh(), net.last, torch.nn.Identity()]
    cuts = {2: [0, 2, 6], 4: [0, 2, 4, 5, 6]}[size]
    mine = torch.nn.Sequential(*layers[cuts[rank] : cuts[rank + 1]])
    stage = PipelineStage(mine, rank, size, torch.device("cpu"))
    runner = schedule(stage, rounds, loss_fn=torch.nn.functional.cross_entropy)
    # Every layer's parameters, of which those that have no gradient stay as they are.
    optimizer = training.sgd(net.parameters())
    losses = []
    for n in range(training.STEPS):
        x, y = training.batch(n)
        optimizer.zero_grad()
        each: list[torch.Tensor] = []
        runner.step(*([x] if rank == 0 else []), **({"target": y, "losses": each} if rank == size - 1 else {}))
        optimizer.step()
        told = [sum(loss.item() for loss in each) / rounds if each else 0.0]
        dist.broadcast_object_list(told, src=size - 1)
        losses.append(told[0])
    for part, layer in enumerate(layers):
        owner = next(r for r in range(size) if cuts[r] <= part < cuts[r + 1])
        for p in layer.parameters():
            dist.broadcast(p.detach(), src=owner)
    return training.outcome(losses, net)


def dtensors(mesh: DeviceMesh | None) -> dict[str, list]:
    """Products, sums and moves of tensors spread over `mesh`, with gradients; without a mesh of plain ones."""
    data = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=data, dtype=torch.float64) for shape in [(8, 6), (6, 10)])
    # Uneven: 6 and 10 are no multiples of 4.
    ways = [(Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Shard(1)), (Replicate(), Replicate())]
    found = {}
    for number, (of_a, of_b) in enumerate(ways):
        if mesh is None:
            one, two = a.clone().requires_grad_(), b.clone().requires_grad_()
            product = one @ two
        else:
            last = mesh.ndim - 1
            one = distribute_tensor(a, mesh, [Shard(0)] * last + [of_a]).requires_grad_()
            two = distribute_tensor(b, mesh, [Replicate()] * last + [of_b]).requires_grad_()
            product = one @ two
            if number == 1:
                assert isinstance(product.placements[-1], Partial)
            for to in (Shard(1), Shard(0), Replicate()):
                product = product.redistribute(mesh, [to] * mesh.ndim)
        norm = product.sin().sum()
        norm.backward()
        tensors = {"product": product.detach(), "sum": norm.detach().reshape(1), "one": one.grad, "two": two.grad}
        found[str(number)] = training.state(tensors)
    return found


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside"))


# ---- the same by one process


def clipped_alone() -> training.Outcome:
    return training.alone(clip=CLIP)


def adam_alone() -> training.Outcome:
    return training.alone(training.adam)


CASES: dict[str, tuple[Callable[[], object], Callable[[], object], float]] = {
    "FSDP1": (lambda: fsdp1(ShardingStrategy.FULL_SHARD), training.alone, 1e-5),
    "FSDP1, gradients only": (lambda: fsdp1(ShardingStrategy.SHARD_GRAD_OP), training.alone, 1e-5),
    "FSDP2": (fsdp2, clipped_alone, 1e-5),
    "FSDP2, kept after forward": (lambda: fsdp2(reshard_after_forward=False), clipped_alone, 1e-5),
    "ZeRO": (zero, adam_alone, training.ADAM),
    "ZeRO, one buffer": (lambda: zero(parameters_as_bucket_view=True), adam_alone, training.ADAM),
    "tensor parallel": (
        lambda: on_whole_batches(tensor_parallel(line(), training.net())),
        training.alone,
        1e-5,
    ),
    "pipeline, GPipe": (lambda: pipeline(ScheduleGPipe, 4), training.alone, 1e-5),
    "pipeline, 1F1B": (lambda: pipeline(Schedule1F1B, 8), training.alone, 1e-5),
    "DTensor": (lambda: dtensors(line()), lambda: dtensors(None), 1e-12),
}
ON_SQUARE = {
    "FSDP1, hybrid": (lambda: fsdp1(ShardingStrategy.HYBRID_SHARD, square()), training.alone, 1e-5),
    "HSDP": (hsdp, clipped_alone, 1e-5),
    "FSDP of tensor parallel": (fsdp_of_tensor_parallel, training.alone, 1e-5),
    "DTensor, 2-D": (lambda: dtensors(square()), lambda: dtensors(None), 1e-12),
}
"""meshes of two dimensions, over two nodes of two ranks"""


def every_case(on_square: bool, backend: str = "smddp") -> dict[str, object]:
    cases = CASES | (ON_SQUARE if on_square else {})
    return training.run_cases({name: case for name, (case, _, _) in cases.items()}, backend)


@functools.cache
def found(shape: str) -> conftest.Ranks:
    nodes = training.SHAPES[shape]
    return conftest.run(every_case, len(nodes), nodes=nodes, limit=150, on_square=len(nodes) == 4)


@pytest.mark.parametrize(
    ("shape", "name"),
    [*((shape, name) for shape in training.SHAPES for name in CASES), *(("2 nodes x 2", name) for name in ON_SQUARE)],
    ids=lambda s: s.replace(" ", ""),
)
def test_it_trains_as_one_process_does(shape: str, name: str) -> None:
    reports = found(shape).check().reports
    assert len(reports) == len(training.SHAPES[shape])
    _, alone, rel = (CASES | ON_SQUARE)[name]
    training.check([report[name] for report in reports], alone(), rel)
