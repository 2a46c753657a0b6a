"""A checkpoint written by four ranks of two nodes goes on in two ranks of one, as if nothing had happened."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import conftest
import training

BEFORE, AFTER = range(2), range(2, 4)


def sharded() -> tuple[training.Net, torch.optim.Optimizer]:
    net = training.net()
    for part in (net.first, net.middle, net.last, net):
        fully_shard(part)
    return net, training.adam(net.parameters())


def everything(net: training.Net, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    model, state = get_state_dict(net, optimizer)
    return {"model": model, "optimizer": state}


def in_full(net: training.Net, optimizer: torch.optim.Optimizer) -> dict[str, list]:
    """Parameters and the optimizer's averages."""
    tensors = everything(net, optimizer)
    averages = {
        f"{name}.{kind}": value
        for name, kinds in tensors["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    return training.state(tensors["model"] | averages)


def save(folder: str) -> dict[str, object]:
    """Writes two checkpoints of the same moment: one waits, one is written while training goes on."""
    training.start()
    net, optimizer = sharded()
    losses = training.train(net, optimizer, BEFORE)
    at_save = in_full(net, optimizer)
    dcp.save(everything(net, optimizer), checkpoint_id=f"{folder}/waited")
    # A group of its own: calls of two threads on one group have no common order on all ranks.
    aside = dist.new_group()
    under_way = dcp.async_save(everything(net, optimizer), checkpoint_id=f"{folder}/meanwhile", process_group=aside)
    losses += training.train(net, optimizer, AFTER)
    under_way.result()
    found = {"at save": at_save, "losses": losses, "at end": in_full(net, optimizer)}
    dist.destroy_process_group()
    return found


def load(folder: str) -> dict[str, dict]:
    """Goes on from both checkpoints."""
    training.start()
    found = {}
    for name in ("waited", "meanwhile"):
        net, optimizer = sharded()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        tensors = everything(net, optimizer)
        dcp.load(tensors, checkpoint_id=f"{folder}/{name}")
        set_state_dict(net, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
        loaded = in_full(net, optimizer)
        losses = training.train(net, optimizer, AFTER)
        found[name] = {"loaded": loaded, "losses": losses, "at end": in_full(net, optimizer)}
    dist.destroy_process_group()
    return found


@functools.cache
def found() -> tuple[list[dict], list[dict]]:
    with tempfile.TemporaryDirectory(prefix="smddp-test-") as folder:
        saved = conftest.run(save, 4, nodes=[0, 0, 1, 1], folder=folder).check().reports
        assert sorted(p.name for p in Path(folder, "waited").glob("*.distcp")) == [f"__{r}_0.distcp" for r in range(4)]
        return saved, conftest.run(load, 2, nodes=[0, 0], folder=folder).check().reports


def test_saving_does_not_disturb() -> None:
    saved, _ = found()
    alone = training.alone(training.adam)
    training.check([one["losses"] for one in saved], alone["losses"], training.ADAM)
    weights = [{k: v for k, v in one["at end"].items() if k in alone["state"]} for one in saved]
    training.check(weights, alone["state"], training.ADAM)


@pytest.mark.parametrize("name", ["waited", "meanwhile"])
def test_fewer_ranks_go_on(name: str) -> None:
    saved, loaded = found()
    assert len(loaded) == 2
    for one in loaded:
        assert one[name]["loaded"] == saved[0]["at save"]
    assert len(saved[0]["at save"]) > len(training.alone()["state"]), "there is no optimizer state"
    assert saved[0]["at save"] != saved[0]["at end"]
    training.check([one[name]["losses"] for one in loaded], saved[0]["losses"][len(BEFORE) :], training.ADAM)
    training.check([one[name]["at end"] for one in loaded], saved[0]["at end"], training.ADAM)
