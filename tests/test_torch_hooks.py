"""Torch's own watchers, switched on by environment variables or around a step, see this backend and change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import conftest
import training

# ---- what each rank does


def ddp() -> training.Outcome:
    model = DistributedDataParallel(net := training.net(), bucket_cap_mb=0.002)
    return training.outcome(training.train(model, training.sgd(net.parameters())), net)


def fsdp2() -> training.Outcome:
    net = training.net()
    for part in (net.first, net.middle, net.last, net):
        fully_shard(part)
    return training.outcome(training.train(net, training.sgd(net.parameters())), net)


def profiled() -> dict[str, object]:
    """Training with every second step in a profile, and what the profile has of communication."""
    model = DistributedDataParallel(net := training.net(), bucket_cap_mb=0.002)
    optimizer = training.sgd(net.parameters())
    losses, names = [], []
    for n in range(training.STEPS):
        if n % 2:
            with profile(activities=[ProfilerActivity.CPU]) as watched:
                losses += training.train(model, optimizer, [n])
            names.append(sorted({e.name for e in watched.events() if "all_reduce" in e.name or "allreduce" in e.name}))
        else:
            losses += training.train(model, optimizer, [n])
    return {"training": training.outcome(losses, net), "names": names}


def refused(call: Callable[[], object]) -> str:
    """What `call` raises, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def groups() -> dict[str, dist.ProcessGroup]:
    """Gloo's beside ours, for comparison."""
    return {"smddp": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}


def not_a_number() -> dict[str, dict]:
    """The rank that has a NaN is told so before anything is sent; the group is as good as before."""
    found = {}
    for name, group in groups().items():
        last = dist.get_rank() == dist.get_world_size() - 1
        bad = torch.tensor([1.0, float("nan") if last else 2.0])
        calls = {
            "all_reduce": lambda bad=bad, group=group: dist.all_reduce(bad, group=group),
            "all_gather": lambda bad=bad, group=group: dist.all_gather_into_tensor(bad.repeat(2), bad, group=group),
            "broadcast": lambda bad=bad, group=group: dist.broadcast(bad, src=1, group=group),
        }
        texts = {kind: refused(call) for kind, call in calls.items()} if last else dict.fromkeys(calls, "")
        good = torch.ones(3)
        dist.all_reduce(good, group=group)
        found[name] = {"texts": texts, "good": good.tolist()}
    return found


def mismatch() -> dict[str, list[str]]:
    """Ranks that call with different sizes, or different collectives, are all told so."""
    rank = dist.get_rank()
    found = {}
    for name, group in groups().items():
        sizes = refused(lambda group=group: dist.all_reduce(torch.ones(3 + rank), group=group))
        calls = [
            lambda group=group: dist.broadcast(torch.ones(3), src=0, group=group),
            lambda group=group: dist.all_reduce(torch.ones(3), group=group),
        ]
        found[name] = [sizes, refused(calls[rank % 2])]
    return found


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "TORCH_DISTRIBUTED_DEBUG=DETAIL": {"DDP": ddp, "FSDP2": fsdp2, "mismatch": mismatch},
    "TORCH_DIST_NAN_CHECK=1": {"DDP": ddp, "FSDP2": fsdp2, "not a number": not_a_number},
    "": {"profiled": profiled},
}
"""by setting"""


def every_case(setting: str, backend: str = "smddp") -> dict[str, object]:
    return training.run_cases(CASES[setting], backend)


@functools.cache
def found(setting: str) -> conftest.Ranks:
    name, _, value = setting.partition("=")
    env = {name: value} if name else {}
    return conftest.run(every_case, 2, nodes=[0, 1], env=env, setting=setting, limit=60)


# ---- the tests


@pytest.mark.parametrize("technique", ["DDP", "FSDP2"])
@pytest.mark.parametrize("setting", [s for s in CASES if s], ids=lambda s: s.partition("=")[0])
def test_it_trains_the_same(setting: str, technique: str) -> None:
    training.check([report[technique] for report in found(setting).check().reports], training.alone())


def test_it_trains_the_same_in_a_profile() -> None:
    reports = [report["profiled"] for report in found("").check().reports]
    for report in reports:
        assert "error" not in report, report["error"]
        assert all(report["names"]), "no all_reduce in the profile"
    training.check([report["training"] for report in reports], training.alone())


@pytest.mark.parametrize("backend", ["gloo", "smddp"])
def test_a_nan_is_reported_by_the_rank_that_has_it(backend: str) -> None:
    first, last = (report["not a number"] for report in found("TORCH_DIST_NAN_CHECK=1").check().reports)
    for report in (first, last):
        assert "error" not in report, report["error"]
        assert report[backend]["good"] == [2.0] * 3
    for kind, text in last[backend]["texts"].items():
        assert "nan" in text.lower(), (kind, text)


@pytest.mark.parametrize("backend", ["gloo", "smddp"])
def test_a_mismatch_is_reported_by_all_ranks(backend: str) -> None:
    for report in (report["mismatch"] for report in found("TORCH_DISTRIBUTED_DEBUG=DETAIL").check().reports):
        assert "error" not in report, report["error"]
        sizes, kinds = report[backend]
        assert "mismatch between collectives" in sizes, sizes
        assert "mismatch between collectives" in kinds, kinds
