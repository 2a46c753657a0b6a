"""A job whose ranks die goes on from its checkpoint and arrives where an undisturbed one does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import conftest
import training
from common import start

STEPS = 6
DEATHS = {0: (2, 1), 1: (4, 0)}
"""life: (step, rank) of a death; rank 0 is the one that writes checkpoints"""


def die(life: int) -> None:
    """In the middle of a step, while the other rank is on its way into the same collectives."""
    if life == 0:
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def job(folder: str, deaths: int) -> dict[str, object]:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    training.start()
    found = trained(Path(folder, "checkpoint.pt"), life if life < deaths else None)
    # The same without deaths and without checkpoints: to the bit, since all else is the same.
    found["undisturbed"] = trained(None, None)
    dist.destroy_process_group()
    return {"life": life} | found


def trained(checkpoint: Path | None, life: int | None) -> dict[str, object]:
    net = training.net()
    optimizer = training.sgd(net.parameters())
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        held = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(held["net"])
        optimizer.load_state_dict(held["optimizer"])
        losses = held["losses"]
    first = len(losses)
    model = DistributedDataParallel(net)
    for n in range(first, STEPS):
        if life is not None and DEATHS[life] == (n, dist.get_rank()):
            die(life)
        losses += training.train(model, optimizer, [n])
        if checkpoint is not None and dist.get_rank() == 0:
            new = checkpoint.with_suffix(".new")
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, new)
            new.replace(checkpoint)
    return training.outcome(losses, net) | {"first": first}


@pytest.mark.parametrize(("rendezvous", "deaths"), [("static", 1), ("standalone", 2)])
def test_a_restarted_job_ends_as_an_undisturbed_one(rendezvous: str, deaths: int, tmp_path: Path) -> None:
    more = ["--standalone"] if rendezvous == "standalone" else ["--master-port", str(conftest.free_port())]
    command = conftest.torchrun(2, "--max-restarts", "2", *more)
    ranks = conftest.launch(command, job, size=2, python=(), folder=str(tmp_path), deaths=deaths, limit=150)
    ranks.check()
    for report in ranks.reports:
        assert report["life"] == deaths
        # All that was finished before the last death was kept.
        assert report["first"] == DEATHS[deaths - 1][0]
        assert report["undisturbed"]["first"] == 0
        for what in ("losses", "state"):
            assert report[what] == report["undisturbed"][what]
    ends = [{what: report[what] for what in ("losses", "state")} for report in ranks.reports]
    training.check(ends, training.alone(steps=STEPS))


def killed_once(folder: str) -> dict[str, object]:
    start()
    tensor = torch.full((100_000,), 1.0 + dist.get_rank())
    dist.all_reduce(tensor)
    if dist.get_rank() == 1:
        try:
            Path(folder, "killed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(tensor)
    found = {"sum": tensor.aminmax()[0].item(), "nodes": dist.group.WORLD._comm.nodes}
    dist.destroy_process_group()
    return found


def test_agents_on_two_nodes_restart_their_ranks(tmp_path: Path) -> None:
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{conftest.free_port()}")
    command = conftest.torchrun(1, "--nnodes", "2", "--max-restarts", "3", "--local-addr", "127.0.0.1", *where)
    agents = [{"SMDDP_NODE_ID": f"node{number}"} for number in range(2)]
    ranks = conftest.launch(command, killed_once, size=2, python=(), agents=agents, folder=str(tmp_path), limit=120)
    assert ranks.check().reports == [{"sum": 6.0, "nodes": [0, 1]}] * 2
    assert (tmp_path / "killed").exists()
