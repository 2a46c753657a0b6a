#!/usr/bin/env python3
"""A script of SMDDP 1.x, unchanged: its own `distributed` module and its own DistributedDataParallel.

    smddprun -np 2 smddp_legacy.py

It learns which of its inputs is the largest. New scripts use torch's names: see smddp_digits.py. SageMaker starts it
as it does that one.
"""

import torch
from torch import nn

from smdistributed.dataparallel.torch import distributed as dist
from smdistributed.dataparallel.torch.parallel.distributed import DistributedDataParallel as DDP

dist.init_process_group()


def main() -> None:
    rank, size, local_rank = dist.get_rank(), dist.get_world_size(), dist.get_local_rank()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = DDP(nn.Linear(8, 8).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = torch.Generator().manual_seed(rank)
    loss = torch.zeros((), device=device)
    for step in range(100):
        inputs = torch.randn(64 // size, 8, generator=data).to(device)
        loss = nn.functional.cross_entropy(model(inputs), inputs.argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            mean = loss.detach().clone()
            dist.all_reduce(mean, op=dist.ReduceOp.AVERAGE)
            if rank == 0:
                print(f"step {step + 1}: loss {mean.item():.3f}", flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
