#!/usr/bin/env python3
"""Trains the small GPT of train_gpt.py with its weights sharded over all ranks (FSDP2), and saves them whole.

    torchrun --nproc-per-node 2 train_fsdp.py
    smddprun -np 2 train_fsdp.py

On SageMaker: PyTorch(entry_point="train_fsdp.py", source_dir="examples", distribution={"torch_distributed":
{"enabled": True}}, ...).fit(), with an image that has smdistributed_rs.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import smdistributed_rs  # noqa: F401  registers the backend
from train_gpt import GPT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a rank in a step")
    parser.add_argument("--length", type=int, default=64, help="bytes in a sequence")
    parser.add_argument("--model-dir", type=Path, default=Path(os.environ.get("SM_MODEL_DIR", ".")))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    dist.init_process_group("smddp")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = GPT(layers=2, width=64, heads=4, length=args.length).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    order = torch.Generator().manual_seed(dist.get_rank())
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.length - 1, (args.batch,), generator=order)
        rows = torch.stack([text[start : start + args.length + 1] for start in starts]).to(device)
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            mean = loss.detach().clone()
            dist.all_reduce(mean, dist.ReduceOp.AVG)
            if dist.get_rank() == 0:
                print(f"step {step + 1}: loss {mean.item():.3f}", flush=True)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(whole, args.model_dir / "model.pt")
        print(f"saved {args.model_dir / 'model.pt'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
