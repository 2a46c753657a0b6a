"""Compiled programs communicate as the same programs do without compilation."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import conftest
import training

COMPILERS = ["aot_eager", "inductor"]
HERE = [c for c in COMPILERS if c != "inductor" or shutil.which("g++")]
compilers = pytest.mark.parametrize(
    "compiler",
    [pytest.param(c, marks=pytest.mark.skipif(c not in HERE, reason="g++ is not installed")) for c in COMPILERS],
)


def mine(*shape: int) -> torch.Tensor:
    """Whole numbers, so that the order of additions does not matter; others on each rank."""
    data = torch.Generator().manual_seed(50 + dist.get_rank())
    return torch.randint(0, 9, shape, generator=data).float()


# ---- functions of one tensor of a row per rank


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    dist.all_reduce(y)
    dist.all_reduce(y, dist.ReduceOp.MAX)
    return y + 1


def gather_and_scatter_in_place(x: torch.Tensor) -> torch.Tensor:
    n = dist.get_world_size()
    every = x.new_empty(n * x.size(0), x.size(1))
    dist.all_gather_into_tensor(every, x + 1)
    part = torch.empty_like(x)
    dist.reduce_scatter_tensor(part, every * 3)
    swapped = torch.empty_like(x)
    dist.all_to_all_single(swapped, part)
    return swapped - 1


def functional(x: torch.Tensor) -> torch.Tensor:
    every = funcol.all_gather_tensor(x + 1, 0, dist.group.WORLD)
    part = funcol.reduce_scatter_tensor(every * 2, "sum", 0, dist.group.WORLD)
    total = funcol.all_reduce(part, "avg", dist.group.WORLD)
    root = funcol.broadcast(x, 1, dist.group.WORLD)
    swapped = funcol.all_to_all_single(x, None, None, dist.group.WORLD)
    along = funcol.all_gather_tensor(x, 1, dist.group.WORLD).sum(1, keepdim=True)
    return total + root * 10 + swapped * 100 + along * 1000


def coalesced(x: torch.Tensor) -> torch.Tensor:
    one, two = funcol.all_reduce_coalesced([x, x * 2], "sum", dist.group.WORLD)
    three, four = funcol.all_gather_into_tensor_coalesced([x, x + 1], dist.group.WORLD)
    five, six = funcol.reduce_scatter_tensor_coalesced([three, four], "sum", [0, 0], dist.group.WORLD)
    return one + two * 10 + five * 100 + six * 1000


def with_gradient(x: torch.Tensor) -> torch.Tensor:
    every = funcol.all_gather_tensor_autograd(x, 0, dist.group.WORLD)
    weights = torch.arange(every.numel(), dtype=x.dtype).view_as(every)
    return funcol.reduce_scatter_tensor_autograd(every * every * weights, "sum", 0, dist.group.WORLD)


def with_breaks(x: torch.Tensor) -> torch.Tensor:
    """What the compiler leaves to Python, between the parts it compiles."""
    y = x * 2
    dist.barrier()
    parts = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, y)
    work = dist.all_reduce(y, async_op=True)
    work.wait()
    root = y + 1
    dist.broadcast(root, src=1)
    return torch.cat([*parts, y, root])


def function(program: Callable[[torch.Tensor], torch.Tensor], compiler: str) -> dict[str, list]:
    """The compiled program's results on two inputs, beside the plain one's."""
    size = dist.get_world_size()
    inputs = [mine(size, 3), mine(size, 3) + 5]

    def results(call: Callable[[torch.Tensor], torch.Tensor]) -> list:
        found = []
        for x in inputs:
            given = x.clone().requires_grad_(program is with_gradient)
            result = call(given)
            found.append(result.tolist())
            if result.requires_grad:
                result.sum().backward()
                found.append(given.grad.tolist())
        return found

    plain = results(program)
    assert len({str(one) for one in plain}) == len(plain)
    compiled = torch.compile(program, backend=compiler, fullgraph=program is not with_breaks)
    return {"compiled": results(compiled), "plain": plain}


# ---- training


def ddp(compiler: str) -> training.Outcome:
    # Several buckets, at which the compiler cuts the graph; it wants no smaller ones than the first is by default.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024
    model = DistributedDataParallel(net := training.net(), bucket_cap_mb=0.002)
    compiled = torch.compile(model, backend=compiler)
    return training.outcome(training.train(compiled, training.sgd(net.parameters())), net)


def fsdp2(compiler: str) -> training.Outcome:
    net = training.net()
    for part in (net.first, net.middle, net.last, net):
        fully_shard(part)
    compiled = torch.compile(net, backend=compiler)
    return training.outcome(training.train(compiled, training.sgd(net.parameters())), net)


PROGRAMS = [all_reduce, gather_and_scatter_in_place, functional, coalesced, with_gradient, with_breaks]
TRAININGS = [ddp, fsdp2]


def every_case(backend: str = "smddp") -> dict[str, object]:
    cases = {}
    for compiler in HERE:
        cases |= {f"{p.__name__}, {compiler}": functools.partial(function, p, compiler) for p in PROGRAMS}
        cases |= {f"{t.__name__}, {compiler}": functools.partial(t, compiler) for t in TRAININGS}
    return training.run_cases(cases, backend)


@functools.cache
def found() -> conftest.Ranks:
    # Compilers in the process itself: a pool of them for each rank costs more than it saves.
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return conftest.run(every_case, 2, nodes=[0, 1], env=env, limit=180)


@compilers
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_function(program: Callable, compiler: str) -> None:
    reports = [report[f"{program.__name__}, {compiler}"] for report in found().check().reports]
    for one in reports:
        assert "error" not in one, one["error"]
        assert one["compiled"] == one["plain"]


@compilers
@pytest.mark.parametrize("technique", TRAININGS, ids=lambda t: t.__name__)
def test_a_training(technique: Callable, compiler: str) -> None:
    reports = [report[f"{technique.__name__}, {compiler}"] for report in found().check().reports]
    training.check(reports, training.alone())
