"""Collectives, and how groups come by their devices and backends."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import cases_collectives
from gpu.common import NEEDS_GPU, ON_GPU, choose_device, full, is_all, outcome, start, total
from torch_versions import TORCH


def collectives() -> dict[str, Any]:
    """All that test_collectives runs, on the GPU."""
    choose_device()
    lonely = {
        "messages_match_by_tag", "send_and_receive", "batch_isend_irecv", "any_rank_leaves_what_is_awaited_by_name",
    }  # fmt: skip
    if os.environ["WORLD_SIZE"] == "1":
        for name in lonely:
            del cases_collectives.CASES[name]
    return {"cases": cases_collectives.run_all()}


def backends_by_device() -> dict[str, Any]:
    """This backend for one kind of memory, another for the other, in one group and in a part of it. On a GPU only."""
    if not ON_GPU:
        return NEEDS_GPU
    choose_device()
    torch.set_num_threads(1)
    found = {}
    # Torch before 2.14 must be told of this backend last.
    for backend in ("cuda:nccl,cpu:smddp", "cpu:gloo,cuda:smddp"):
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=40))
            names = dict(part.split(":") for part in backend.split(","))
            for group in (None, dist.new_group(list(range(dist.get_world_size())))):
                for device, name in names.items():
                    if TORCH >= (2, 14):  # before, a group of ours has no backends to show
                        assert (group or dist.group.WORLD)._get_backend(torch.device(device)).name() == name
                    tensor = torch.full((1000,), dist.get_rank() + 1.0, device=device)
                    dist.all_reduce(tensor, group=group)
                    is_all(tensor, total())
                    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
                    dist.all_gather(parts, tensor, group=group)
                    is_all(torch.cat(parts), total())
            dist.barrier()
            dist.destroy_process_group()
            found[backend] = ""
        except Exception:  # noqa: BLE001
            found[backend] = traceback.format_exc()
            break
    return {"cases": found}


def shares_by_nccl() -> dict[str, Any]:
    """Whether torch's own NCCL lets these ranks share a GPU, which is a matter of the machine. On a GPU only."""
    choose_device()
    dist.init_process_group("nccl", timeout=timedelta(seconds=30))
    tensor = full(1000, dist.get_rank() + 1)
    try:
        dist.all_reduce(tensor)
    except dist.DistBackendError as error:
        return {"cases": {}, "impossible": f"torch's NCCL refuses: {str(error).strip().splitlines()[-1]}"}
    is_all(tensor, total())
    dist.destroy_process_group()
    return {"cases": {"NCCL is set up": ""}}


def chosen_device() -> dict[str, Any]:
    """The device that is chosen when the group is made, of a script that chooses none. On a GPU only."""
    if not ON_GPU:
        return NEEDS_GPU
    chosen: list[int] = []
    choose = torch.cuda.set_device

    def note(device: int) -> None:
        chosen.append(device)
        choose(device)

    torch.cuda.set_device = note
    dist.init_process_group("smddp", timeout=timedelta(seconds=40))

    def run() -> None:
        assert not torch.cuda.is_initialized()
        tensor = torch.full((1000,), dist.get_rank() + 1.0, device="cuda")
        wanted = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        # On a machine with one GPU it is 0 whoever chooses: that somebody did is what there is to see.
        assert chosen == [wanted], chosen
        assert (tensor.device.index, torch.cuda.current_device()) == (wanted, wanted)
        dist.all_reduce(tensor)
        is_all(tensor, total())

    found = {"it is the local rank's": outcome(run)}
    dist.destroy_process_group()
    return {"cases": found}


def made_for_a_device() -> dict[str, Any]:
    """`device_id` connects the devices when the group is made; messages of its tensors, whichever way they take."""
    if not ON_GPU:
        return NEEDS_GPU
    choose_device()
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("smddp", timeout=timedelta(seconds=40), device_id=device)

    def run() -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        group: Any = dist.group.WORLD
        assert group._cuda.device == device.index
        tensor = full(1000, rank + 1)
        dist.all_reduce(tensor)
        is_all(tensor, total())
        given, into = full(1000, rank), full(1000, -1)
        ops = [dist.P2POp(dist.isend, given, (rank + 1) % size), dist.P2POp(dist.irecv, into, (rank - 1) % size)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        is_all(into, (rank - 1) % size)

    found = {"it is connected": outcome(run)}
    dist.destroy_process_group()
    return {"cases": found}


def gpudirect() -> dict[str, Any]:
    """Wished for: sums are right with it, or without where the NIC has none; which of both it was is in the name."""
    start()
    dist.all_reduce(tensor := full(1 << 24, dist.get_rank() + 1))
    wrong = int((tensor != total()).sum().item())
    how = "with GPUDirect" if "GPUDirect" in dist.group.WORLD.describe() else "without GPUDirect"
    dist.destroy_process_group()
    return {"cases": {f"a sum {how}": f"{wrong} elements are wrong" if wrong else ""}}
