"""Messages from device to device, by NCCL. On a GPU only."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gpu.common import (
    NEEDS_GPU,
    ON_GPU,
    choose_device,
    full,
    is_all,
    outcome,
    refused,
    start,
    still_works,
    synchronize,
    total,
)
from torch_versions import TORCH


def messages() -> dict[str, Any]:
    """Of a group that was made for a device, from torch 2.14 on: an older one does not tell where a batch begins."""
    if not ON_GPU or TORCH < (2, 14):
        return {"cases": {}, "impossible": f"it needs a GPU and torch 2.14, given {TORCH}"}
    choose_device()
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("smddp", timeout=timedelta(seconds=40), device_id=device)
    rank, size = dist.get_rank(), dist.get_world_size()

    def run() -> None:
        assert dist.group.WORLD._get_backend(device).supports_coalescing
        for count in (1, 1000, 3_000_001):
            for step in range(1, size):
                to, of = (rank + step) % size, (rank - step) % size
                # Not dense: gathered before, spread afterwards.
                given = torch.full((count, 2), float(rank), device=device)[:, 1]
                into = torch.zeros(count, 2, device=device)[:, 0]
                batch = [dist.P2POp(dist.isend, given, to), dist.P2POp(dist.irecv, into, of)]
                works = dist.batch_isend_irecv(batch)
                assert len(works) == 1
                works[0].wait()
                is_all(into, of)
        for turn in range(10):
            tensor = full(5000, turn)
            if rank == 0:
                dist.send(tensor, 1)
            elif rank == 1:
                dist.recv(tensor.fill_(-1), 0)
                is_all(tensor, turn)
        tensor = full(1000, rank + 1)
        dist.all_reduce(tensor)
        is_all(tensor, total())
        refused(lambda: dist.recv(tensor), "Name the sender")
        # The host's messages are what they were.
        here = torch.full((10,), float(rank))
        batch = [dist.P2POp(dist.isend, here, (rank + 1) % size)]
        batch.append(dist.P2POp(dist.irecv, there := torch.zeros(10), (rank - 1) % size))
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        is_all(there, (rank - 1) % size)

    found = {"messages": outcome(run)}
    dist.destroy_process_group()
    return {"cases": found}


def messages_natively() -> dict[str, Any]:
    """The same by the native half itself, whichever torch is here: what `messages` needs of it."""
    if not ON_GPU:
        return NEEDS_GPU
    start()
    rank, size = dist.get_rank(), dist.get_world_size()

    def run() -> None:
        still_works()  # which connects the devices
        group: Any = dist.group.WORLD
        native = group._cuda._native
        assert native.carries_messages, group.describe()
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        for count in (1, 1000, 3_000_001):
            for step in range(1, size):
                to, of = (rank + step) % size, (rank - step) % size
                for behind in (None, current.cuda_stream):
                    given, into = full(count, rank), full(count, -1)
                    stream = current if behind is None else side
                    moved = [
                        (peer, sent, t.data_ptr(), t.nbytes) for peer, sent, t in ((to, True, given), (of, False, into))
                    ]
                    handle = native.exchange(stream.cuda_stream, behind, moved)
                    handle.order(current.cuda_stream)
                    is_all(into, of)
                    synchronize()
                    assert handle.is_past()
                    assert handle.error() is None
        for turn in range(10):
            tensor = full(5000, turn if rank == 0 else -1)
            if rank < 2:
                moved = [(1 - rank, rank == 0, tensor.data_ptr(), tensor.nbytes)]
                native.wait(native.exchange(current.cuda_stream, None, moved), 20.0)
                is_all(tensor, turn)
        for wrong in (rank, size):
            refused(
                lambda wrong=wrong: native.exchange(current.cuda_stream, None, [(wrong, True, tensor.data_ptr(), 4)])
            )
        still_works()

    found = {"messages": outcome(run)}
    dist.destroy_process_group()
    return {"cases": found}
