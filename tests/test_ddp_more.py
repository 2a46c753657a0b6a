"""DistributedDataParallel beyond the plain step: hooks, accumulation, uneven inputs, buffers, sub-groups."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

import conftest
import training

SEVERAL_BUCKETS = 0.002


def ddp(model: torch.nn.Module, **options: object) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=SEVERAL_BUCKETS, **options)


def my_share(step: int) -> training.Data:
    return training.share(training.batch(step), dist.get_rank(), dist.get_world_size())


# ---- what each rank does


def fp16_hook() -> training.Outcome:
    model = ddp(net := training.net())
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return training.outcome(training.train(model, training.sgd(net.parameters())), net)


def no_sync() -> training.Outcome:
    """Each share in two halves, of which only the second communicates."""
    model = ddp(net := training.net())
    optimizer = training.sgd(net.parameters())
    losses = []
    for n in range(training.STEPS):
        first, second = halves(my_share(n))
        optimizer.zero_grad()
        with model.no_sync():
            one = training.loss_of(model, first) / 2
            one.backward()
        norms = [torch.zeros(()) for _ in range(dist.get_world_size())]
        dist.all_gather(norms, net.first.weight.grad.norm())
        assert len({x.item() for x in norms}) == len(norms), "gradients were exchanged inside no_sync"
        two = training.loss_of(model, second) / 2
        two.backward()
        optimizer.step()
        losses.append(training.mean(one + two))
    return training.outcome(losses, net)


def halves(data: training.Data) -> tuple[training.Data, training.Data]:
    (x1, x2), (y1, y2) = data[0].chunk(2), data[1].chunk(2)
    return (x1, y1), (x2, y2)


def join() -> training.Outcome:
    """Rank r has 2 + r batches; whoever has no more joins in the others' collectives with zeros."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = ddp(net := training.net())
    optimizer = training.sgd(net.parameters())
    with model.join():
        mine = [training.step(model, optimizer, my_share(n)).item() for n in range(2 + rank)]
    everyone: list[list[float]] = [[]] * size
    dist.all_gather_object(everyone, mine)
    return training.outcome([loss for one in everyone for loss in one], net)


def buffers() -> training.Outcome:
    """BatchNorm's running statistics are rank 0's, handed out before every forward."""
    model = ddp(net := training.net(norm=True))
    losses = training.train(model, training.sgd(net.parameters()))
    model.eval()
    with torch.no_grad():
        model(training.batch(0)[0])
    return training.outcome(losses, net)


def sub_group() -> training.Outcome:
    """Two groups that each lie on both nodes train the same at the same time; two ranks are one group."""
    groups = [[0, 3], [1, 2]] if dist.get_world_size() == 4 else [[0, 1]]
    made = [dist.new_group(ranks) for ranks in groups]
    group = next(g for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
    model = ddp(net := training.net(), process_group=group)
    return training.outcome(training.train(model, training.sgd(net.parameters()), group=group), net)


def post_local_sgd() -> training.Outcome:
    """Two steps with all ranks, then each pair of ranks by itself; the models are averaged every other step."""
    pair, _ = dist.new_subgroups(2)
    model = ddp(net := training.net())
    state = post_localSGD_hook.PostLocalSGDState(dist.group.WORLD, pair, start_localSGD_iter=2)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    optimizer = training.sgd(net.parameters())
    losses = []
    for n in range(training.STEPS):
        losses.append(training.mean(training.step(model, optimizer, my_share(n))))
        averager.average_parameters(net.parameters())
    return training.outcome(losses, net)


# ---- the same by one process


def plain_alone(size: int) -> training.Outcome:
    return training.alone()


def join_alone(size: int) -> training.Outcome:
    net = training.net()
    optimizer = training.sgd(net.parameters())
    losses: list[list[float]] = [[] for _ in range(size)]
    for n in range(size + 1):
        optimizer.zero_grad()
        for r in range(size):
            if n < 2 + r:
                loss = training.loss_of(net, training.share(training.batch(n), r, size))
                # The divisor stays that of all ranks.
                (loss / size).backward()
                losses[r].append(loss.item())
        optimizer.step()
    return training.outcome([loss for one in losses for loss in one], net)


def buffers_alone(size: int) -> training.Outcome:
    net = training.net(norm=True)
    optimizer = training.sgd(net.parameters())
    losses = []
    for n in range(training.STEPS):
        optimizer.zero_grad()
        before = {k: v.clone() for k, v in net.norm.state_dict().items() if "running" in k or "num" in k}
        total = 0.0
        for r in reversed(range(size)):
            net.norm.load_state_dict(before, strict=False)
            loss = training.loss_of(net, training.share(training.batch(n), r, size)) / size
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return training.outcome(losses, net)


def post_local_sgd_alone(size: int) -> training.Outcome:
    nets = [training.net() for _ in range(size // 2)]
    optimizers = [training.sgd(net.parameters()) for net in nets]
    losses = []
    for n in range(training.STEPS):
        whole = training.batch(n)
        pairs = [whole if n < 2 else training.share(whole, i, len(nets)) for i in range(len(nets))]
        each = [training.step(*one) for one in zip(nets, optimizers, pairs, strict=True)]
        losses.append(sum(loss.item() for loss in each) / len(nets))
        if n % 2:
            with torch.no_grad():
                for tensors in zip(*(net.parameters() for net in nets), strict=True):
                    average = sum(tensors) / len(nets)
                    for tensor in tensors:
                        tensor.copy_(average)
    return training.outcome(losses, nets[0])


Alone = Callable[[int], training.Outcome]
CASES: dict[str, tuple[Callable[[], training.Outcome], Alone, float]] = {
    # Gradients travel with 11 bits.
    "fp16 hook": (fp16_hook, plain_alone, 2e-3),
    "no_sync": (no_sync, plain_alone, 1e-5),
    "join": (join, join_alone, 1e-5),
    "buffers": (buffers, buffers_alone, 1e-5),
    "sub-group": (sub_group, plain_alone, 1e-5),
    "post-local SGD": (post_local_sgd, post_local_sgd_alone, 1e-5),
}


def every_case(backend: str = "smddp") -> dict[str, object]:
    return training.run_cases({name: case for name, (case, _, _) in CASES.items()}, backend)


@functools.cache
def found(shape: str) -> conftest.Ranks:
    nodes = training.SHAPES[shape]
    return conftest.run(every_case, len(nodes), nodes=nodes, limit=150)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", training.SHAPES, ids=lambda s: s.replace(" ", ""))
def test_it_trains_as_one_process_does(shape: str, name: str) -> None:
    reports = found(shape).check().reports
    size = len(training.SHAPES[shape])
    assert len(reports) == size
    _, alone, rel = CASES[name]
    training.check([report[name] for report in reports], alone(size), rel)
