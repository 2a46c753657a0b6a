#!/usr/bin/env python3
"""Asynchronous all_reduces of many tensors at once: the throughput script SMDDP was released with, on any device.

    smddprun -np 2 smddp_throughput.py
    smddprun -np 2 smddp_throughput.py --backend gloo       the same by another backend

On SageMaker: PyTorch(entry_point="smddp_throughput.py", distribution={"smdistributed": {"dataparallel":
{"enabled": True}}}, ...).fit(), with an image that has smdistributed_rs and smdistributed-shim.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist

import smdistributed.dataparallel.torch.torch_smddp  # noqa: F401


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smddp")
    parser.add_argument("--tensors", type=int, default=20, help="all_reduces under way at once")
    parser.add_argument("--mb", type=float, default=4.0, help="size of each")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(args.backend, rank=rank, world_size=size, store=None, group_name="")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    count = int(args.mb * 2**20) // dtype.itemsize
    tensors = [torch.full((count,), 1.0 / size, dtype=dtype, device=device) for _ in range(args.tensors)]
    best = float("inf")
    for _ in range(args.rounds):
        dist.barrier()
        start = time.perf_counter()
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        # Exact for powers of two, near enough otherwise.
        assert all(torch.allclose(tensor, torch.ones_like(tensor), rtol=1e-2) for tensor in tensors)
        for tensor in tensors:
            tensor.div_(size)
    if rank == 0:
        volume = args.tensors * count * dtype.itemsize
        print(f"{args.backend}, {size} ranks: {args.tensors} x {args.mb:g} MB {args.dtype} in {best * 1e3:.1f} ms,")
        print(f"algorithm bandwidth {volume / best / 1e9:.2f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
