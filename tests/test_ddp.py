"""DistributedDataParallel over the backend trains as one process on the whole batch would."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import conftest
import training


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(20, 50)
        self.extra = torch.nn.Linear(50, 50)
        self.last = torch.nn.Linear(50, 3)

    def forward(self, x: torch.Tensor, use_extra: bool) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.extra(h)) if use_extra else h)


def _losses(rank: int, world: int, variant: str) -> list[float]:
    """Ten steps on this rank's part of each batch; the losses are those of the whole batch."""
    torch.manual_seed(1)
    net = model = Net()
    if world > 1:
        options = {
            "views": {"gradient_as_bucket_view": True},
            "static graph": {"static_graph": True},
            "unused": {"find_unused_parameters": True},
        }
        # PowerSGD starts collectives in callbacks: with several buckets, nothing orders them alike on all ranks. Where
        # it compresses nothing, those of the callbacks are empty, and need no order.
        bucket = 25 if variant == "PowerSGD" else 0.005
        model = DistributedDataParallel(net, bucket_cap_mb=bucket, **options.get(variant, {}))
        if variant == "bf16 hook":
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        if variant.startswith("PowerSGD"):
            # The full rank: compressed or not, the gradients are those of one process.
            rate = 0.1 if variant == "PowerSGD" else 100
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=50, start_powerSGD_iter=2, min_compression_rate=rate
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(7)
    losses = []
    for step in range(10):
        x, y = torch.randn(16, 20, generator=data), torch.randint(3, (16,), generator=data)
        part = slice(16 * rank // world, 16 * (rank + 1) // world)
        optimizer.zero_grad()
        extra = not (variant == "unused" and step % 2)
        loss = torch.nn.functional.cross_entropy(model(x[part], extra), y[part])
        loss.backward()
        optimizer.step()
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


VARIANTS = {
    "plain": 1e-5, "views": 1e-5, "static graph": 1e-5, "unused": 1e-5,
    "bf16 hook": 2e-2, "PowerSGD": 1e-3, "PowerSGD buckets": 1e-5,
}  # fmt: skip
"""and how far losses may be from those of one process"""


def every_variant() -> dict[str, object]:
    mine = lambda variant: _losses(dist.get_rank(), dist.get_world_size(), variant)  # noqa: E731
    return training.run_cases({variant: functools.partial(mine, variant) for variant in VARIANTS})


@functools.cache
def found(shape: str) -> conftest.Ranks:
    nodes = training.SHAPES[shape]
    return conftest.run(every_variant, len(nodes), nodes=nodes, limit=150)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", training.SHAPES, ids=lambda s: s.replace(" ", ""))
def test_the_losses_are_those_of_one_process(shape: str, variant: str) -> None:
    reports = found(shape).check().reports
    alone = _losses(0, 1, variant)
    assert alone[-1] != alone[0]
    for report in reports:
        assert report[variant] == reports[0][variant]
        assert report[variant] == pytest.approx(alone, rel=VARIANTS[variant])
