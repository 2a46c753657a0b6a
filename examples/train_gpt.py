#!/usr/bin/env python3
"""Trains a small GPT, byte by byte, on the text of Python's own standard library, data-parallel over all ranks.

    python train_gpt.py                                     one process
    mpirun -n 4 python train_gpt.py                         four, started by any MPI
    torchrun --nproc-per-node 4 train_gpt.py                four, started by torchrun
    mpirun -n 4 python train_gpt.py --backend gloo          the same by gloo, for comparison

It trains on GPUs where there is one for each rank, else on CPUs. The global batch, its order and the initial weights
depend on the arguments alone, so the loss curve is the same, but for rounding, whatever the number of ranks. Nothing is
downloaded.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import smdistributed_rs  # noqa: F401  registers the backend; under mpirun also sets RANK and the like

VOCABULARY = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smddp", choices=["smddp", "gloo"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where each rank has a GPU, else cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over all ranks")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of *.py files")
    parser.add_argument("--text-mb", type=float, default=4.0, help="read at most so much of it")
    parser.add_argument("--bucket-mb", type=float, default=1.0, help="size of DDP's gradient buckets")
    parser.add_argument("--threads", type=int, default=0, help="per rank; 0: the cores shared out among local ranks")
    parser.add_argument("--checkpoint", type=Path, default=Path("train_gpt.pt"), help="written at the end")
    parser.add_argument("--summary", type=Path, help="write losses, tokens/s and more as JSON")
    return parser.parse_args()


# ---- the model


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attention_in(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


# ---- the text


def read_text(folder: Path, megabytes: float) -> Tensor:
    """The files of `folder` by name, joined, as bytes."""
    limit, text = int(megabytes * 1e6), bytearray()
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if len(text) >= limit:
            break
        if file.is_file() and "site-packages" not in file.parts:
            text += file.read_bytes()
    if len(text) < 100_000:
        sys.exit(f"--text {folder}: only {len(text)} bytes of *.py files there; name a folder with more")
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def check_same_text(text: Tensor) -> None:
    """Ranks that read different text would train on different data, and nobody would notice."""
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, digest)
    odd = [rank for rank, other in enumerate(every) if other != every[0]]
    if odd:
        sys.exit(f"ranks {odd} read another text than rank 0: use the same Python on every node, or --text")


class Batches:
    """The global batch of every step, the same for any number of ranks; a rank takes its rows of it."""

    def __init__(self, text: Tensor, options: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.text, self.options, self.device = text, options, device
        self.rows = slice(rank * options.batch // world, (rank + 1) * options.batch // world)

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
        last = len(self.text) - self.options.length - 1
        starts = torch.randint(0, last, (self.options.batch,), generator=generator)[self.rows]
        picked = torch.stack([self.text[s : s + self.options.length + 1] for s in starts.tolist()])
        picked = picked.to(self.device).long()
        return picked[:, :-1], picked[:, 1:]


# ---- clocks and reports


class CommunicationClock:
    """How long the steps wait for communication that nothing hides: from the moment the backward pass has handed over
    its last bucket of gradients until all of them are reduced. On a GPU that is time of the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last_bucket: float | torch.cuda.Event | None = None
        self.waits: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        """since `waited` was asked last"""
        self.before = 0.0

    def now(self) -> float | torch.cuda.Event:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hook(self, group: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future = allreduce_hook(group, bucket)
        self.last_bucket = self.now()
        return future

    def backward_ended(self) -> None:
        if self.last_bucket is not None:
            self.waits.append((self.last_bucket, self.now()))
            self.last_bucket = None

    def waited(self) -> float:
        """Seconds so far; waits for the GPU."""
        if self.device.type == "cpu":
            self.before += sum(end - start for start, end in self.waits)
        else:
            torch.cuda.synchronize(self.device)
            self.before += sum(start.elapsed_time(end) for start, end in self.waits) / 1e3
        self.waits.clear()
        return self.before


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.steps, self.quiet, self.bar = steps, quiet, sys.stderr.isatty()
        self.every = 1 if self.bar else max(1, steps // 10)

    def is_due(self, step: int) -> bool:
        """Asked for first: what is shown of a GPU's work is waited for."""
        done = step + 1
        return not self.quiet and (done % self.every == 0 or done == self.steps)

    def show(self, step: int, loss: float, speed: float, share: float) -> None:
        done = step + 1
        text = f"step {done:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s"
        text += f"  waiting for communication {share:5.1%}"
        if self.bar:
            filled = 24 * done // self.steps
            text = f"\r[{'#' * filled}{'.' * (24 - filled)}] {text} " + ("\n" if done == self.steps else "")
        print(text, end="" if self.bar else "\n", file=sys.stderr, flush=True)


@dataclass
class Summary:
    backend: str
    world: int
    nodes: int
    parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    communication_share: float
    group: str
    checkpoint: str
    losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        first, last = self.losses[0], self.losses[-1]
        rows = [
            ("ranks", f"{self.world} on {self.nodes} node(s)"),
            ("backend", f"{self.backend}  {self.group}".rstrip()),
            ("model", f"{self.parameters:,} parameters"),
            ("steps", f"{self.steps}, {self.tokens:,} bytes of text in {self.seconds:.1f} s"),
            ("loss", f"{first:.4f} at first, {last:.4f} at last"),
            ("speed", f"{self.tokens_per_second:,.0f} tokens/s"),
            ("waiting for communication", f"{self.communication_share:.1%} of the time"),
            ("checkpoint", self.checkpoint),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


# ---- the run


def count_nodes() -> int:
    mine = os.environ.get("SMDDP_NODE_ID") or socket.gethostname()
    every = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return len(set(every))


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Beside, then renamed: a checkpoint is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, beside)
    beside.replace(path)


def train(options: argparse.Namespace, rank: int, world: int, device: torch.device) -> Summary:
    torch.manual_seed(options.seed)
    model: nn.Module = GPT(options.layers, options.width, options.heads, options.length).to(device)
    plain, clock = model, CommunicationClock(device)
    text = read_text(options.text, options.text_mb)
    if world > 1:
        check_same_text(text)
        model = DistributedDataParallel(model, bucket_cap_mb=options.bucket_mb, gradient_as_bucket_view=True)
        model.register_comm_hook(None, clock.hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95))
    batches, progress = Batches(text, options, rank, world, device), Progress(options.steps, quiet=rank > 0)
    tokens = options.batch * options.length
    losses = torch.zeros(options.steps, device=device)
    start = time.perf_counter()
    for step in range(options.steps):
        inputs, targets = batches.step(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        clock.backward_ended()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses[step] = loss.detach()
        if progress.is_due(step):
            now, waited = losses[step].item(), clock.waited()
            spent = time.perf_counter() - start
            progress.show(step, now, tokens * (step + 1) / spent, waited / spent)
    waited = clock.waited()
    seconds = time.perf_counter() - start
    nodes, group, share = 1, "", torch.tensor([waited / seconds])
    if world > 1:
        # Mean over ranks of what each saw: the loss of the whole batch.
        dist.all_reduce(losses)
        dist.all_reduce(share)
        losses, share = losses / world, share / world
        nodes = count_nodes()
        group = getattr(dist.group.WORLD, "describe", str)() if options.backend == "smddp" else ""
    if rank == 0:
        save(options.checkpoint, plain, optimizer, options.steps)
    return Summary(
        backend=options.backend if world > 1 else "none",
        world=world,
        nodes=nodes,
        parameters=sum(p.numel() for p in plain.parameters()),
        steps=options.steps,
        tokens=tokens * options.steps,
        seconds=seconds,
        tokens_per_second=tokens * options.steps / seconds,
        communication_share=share.item(),
        group=group,
        checkpoint=str(options.checkpoint),
        losses=losses.tolist(),
    )


def choose_device(wanted: str | None, local_rank: int, local_world: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if (wanted or ("cuda" if gpus >= local_world else "cpu")) == "cpu":
        return torch.device("cpu")
    if not gpus:
        sys.exit("--device cuda: torch sees no GPU here")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device


def main() -> None:
    options = arguments()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if options.batch % world:
        sys.exit(f"--batch {options.batch} cannot be shared out evenly among {world} ranks; choose a multiple")
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    device = choose_device(options.device, local_rank, local_world)
    if world > 1:
        dist.init_process_group(options.backend)
    summary = train(options, rank, world, device)
    if rank == 0:
        print(summary, flush=True)
        if options.summary:
            options.summary.parent.mkdir(parents=True, exist_ok=True)
            options.summary.write_text(json.dumps(asdict(summary), indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
