"""States of models and optimizers, for which torch asks a group which devices it serves."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

import conftest
import training


def saved_meanwhile(folder: str) -> bool:
    training.start()
    net = training.net()
    aside = dist.new_group()
    dcp.async_save({"model": net.state_dict()}, checkpoint_id=folder, process_group=aside).result()
    dist.destroy_process_group()
    return (Path(folder) / ".metadata").exists()


def test_a_state_is_saved_in_the_background() -> None:
    with tempfile.TemporaryDirectory(prefix="smddp-test-") as folder:
        assert conftest.run(saved_meanwhile, 2, nodes=[0, 1], folder=folder).check().reports == [True, True]


def told_by_rank_0() -> list[float]:
    training.start()
    rank = dist.get_rank()
    net = torch.nn.Linear(3, 2, bias=False)
    whole = {"weight": torch.arange(6.0).view(2, 3)} if rank == 0 else {}
    set_model_state_dict(net, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    dist.destroy_process_group()
    return net.weight.flatten().tolist()


def test_rank_0_tells_a_state() -> None:
    assert conftest.run(told_by_rank_0, 2, nodes=[0, 1]).check().reports == [[0.0, 1, 2, 3, 4, 5]] * 2


def optimizer_of_fsdp1() -> dict[str, list]:
    training.start()
    net = FullyShardedDataParallel(training.net(), device_id=torch.device("cpu"), use_orig_params=False)
    optimizer = training.adam(net.parameters())
    training.train(net, optimizer, range(1))
    found = by_name(FullyShardedDataParallel.optim_state_dict(net, optimizer)["state"])
    dist.destroy_process_group()
    return found


def by_name(state: dict) -> dict[str, list]:
    """An optimizer's state, by the names of parameters and of what it keeps of each."""
    return training.state({f"{name}.{kind}": value for name, kinds in state.items() for kind, value in kinds.items()})


def test_the_optimizers_state_under_fsdp1_is_that_of_one_process() -> None:
    net = training.net()
    optimizer = training.adam(net.parameters())
    training.step(net, optimizer, training.batch(0))
    kept = optimizer.state_dict()["state"]
    alone = by_name({name: kept[number] for number, (name, _) in enumerate(net.named_parameters())})
    one, other = conftest.run(optimizer_of_fsdp1, 2, nodes=[0, 1]).check().reports
    # Some versions of torch give it to rank 0 alone.
    training.check([one, other or one], alone, training.ADAM)
