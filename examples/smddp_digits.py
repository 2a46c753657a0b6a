#!/usr/bin/env python3
"""Handwritten digits, in the style of AWS's SMDDP examples: the imports, the calls and their order are theirs.

    smddprun -np 2 smddp_digits.py
    torchrun --nproc-per-node 2 smddp_digits.py
    mpirun -n 2 python smddp_digits.py

On SageMaker, with an image that has smdistributed_rs, smdistributed-shim and scikit-learn:

    PyTorch(entry_point="smddp_digits.py", image_uri=..., instance_type="ml.p4d.24xlarge", instance_count=2,
            distribution={"smdistributed": {"dataparallel": {"enabled": True}}}, ...).fit()

The data, 8x8 pixels each, ships with scikit-learn: nothing is downloaded.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import smdistributed.dataparallel.torch.torch_smddp  # noqa: F401

dist.init_process_group(backend="smddp")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="over all ranks")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model-dir", type=Path, default=Path(os.environ.get("SM_MODEL_DIR", ".")))
    return parser.parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.first, self.last = nn.Linear(16 * 4 * 4, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.last(F.relu(self.first(x.flatten(1))))


def data() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[300:], order[:300]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    model.train()
    total = torch.zeros((), device=device)
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        total += loss.detach()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size() / len(loader)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset, device: torch.device) -> float:
    model.eval()
    images, labels = dataset.tensors
    return float((model(images.to(device)).argmax(1) == labels.to(device)).float().mean())


def main() -> None:
    args = arguments()
    rank, size, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    print(f"rank {rank} of {size}, local rank {local_rank}, on {device}", flush=True)

    torch.manual_seed(args.seed)
    train_set, test_set = data()
    sampler = DistributedSampler(train_set, num_replicas=size, rank=rank, seed=args.seed)
    loader = DataLoader(train_set, batch_size=max(1, args.batch_size // size), sampler=sampler)
    model = DDP(Net().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        loss = train(model, loader, optimizer, device)
        if rank == 0:
            print(
                f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy(model.module, test_set, device):.3f}", flush=True
            )
    if rank == 0:
        torch.save(model.module.state_dict(), args.model_dir / "model.pt")
        print(f"saved {args.model_dir / 'model.pt'}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
