#!/usr/bin/env python3
"""Time of a training step of DistributedDataParallel, and how much of it is waiting for gradients.

    python benches/training.py                    2 ranks, three rounds, the sides in turns
    python benches/training.py --np 4 --rounds 5 --markdown build/training.md

A GPT of 29 million parameters, one sequence of 32 tokens a rank: little work for its gradients. Sides: gloo, smddp,
and smddp with buckets in shared memory (`shared.share_buckets`). *step* is forward, backward, all_reduce and SGD;
*without* the same under `no_sync()`; the difference is the communication that the backward pass does not hide. The
best median of the rounds counts. Every side's weights are compared with gloo's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIDES = {"gloo": ("gloo", False), "smddp": ("smddp", False), "smddp, shared buckets": ("smddp", True)}
STEPS = 12
LIMIT = 300


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--np", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def model(torch: Any) -> Any:
    class Gpt(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, words: int = 10_000, length: int = 32, width: int = 512, layers: int = 6) -> None:
            super().__init__()
            block = torch.nn.TransformerEncoderLayer
            self.words = torch.nn.Embedding(words, width)
            self.places = torch.nn.Parameter(torch.zeros(length, width))
            self.blocks = torch.nn.Sequential(
                *(block(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(layers))
            )
            self.out = torch.nn.Linear(width, words)

        def forward(self, x: Any) -> Any:
            return self.out(self.blocks(self.words(x) + self.places))

    torch.manual_seed(0)
    return Gpt()


def rank(side: str) -> None:
    """One rank of one side: rank 0 prints seconds of a step with and without communication, and a sum over weights."""
    import torch
    import torch.distributed as dist

    import smdistributed_rs

    backend, share = SIDES[side]
    torch.set_num_threads(1)
    dist.init_process_group(backend)
    net = model(torch)
    ddp = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    if share:
        smdistributed_rs.shared.share_buckets(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(dist.get_rank())

    def step() -> float:
        tokens = torch.randint(10_000, (1, 32), generator=data)
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(ddp(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    full = [step() for _ in range(STEPS)]
    weights = sum(float(p.detach().double().sum()) for p in net.parameters())
    with ddp.no_sync():
        alone = [step() for _ in range(STEPS)]
    times = torch.tensor([full, alone], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        with_it, without = (statistics.median(row) for row in times.tolist())
        print(json.dumps({"step": with_it, "without": without, "weights": weights}))
    dist.destroy_process_group()


def run(side: str, count: int) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for number in range(count):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = os.environ | {name: str(value) for name, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--side", side]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        printed = [each.communicate(timeout=LIMIT)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    if any(each.returncode for each in ranks):
        raise SystemExit(f"{side}: a rank failed")
    return json.loads(printed[0].splitlines()[-1])  # type: ignore[no-any-return]


def table(found: dict[str, list[dict[str, float]]], count: int) -> str:
    lines = [
        f"**step of DistributedDataParallel, {count} ranks** (ms, median of {STEPS} steps; best of the rounds)",
        "",
        "| side | step | without communication | exposed | gloo's step / this one | all rounds' steps |",
        "| --- | --: | --: | --: | --: | --- |",
    ]
    best = {side: min(one["step"] for one in every) for side, every in found.items()}
    for side, step in best.items():
        without = min(one["without"] for one in found[side])
        every = ", ".join(f"{1000 * one['step']:.0f}" for one in found[side])
        lines.append(
            f"| {side} | {1000 * step:.0f} | {1000 * without:.0f} | {max(0.0, 1 - without / step):.0%} "
            f"| {best['gloo'] / step:.2f}x | {every} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    options = arguments()
    if options.side:
        rank(options.side)
        return 0
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, rounds in found.items():
            rounds.append(run(side, options.np))
    wanted = found["gloo"][0]["weights"]
    wrong = [side for side, rounds in found.items() if any(abs(r["weights"] - wanted) > 1e-2 for r in rounds)]
    text = table(found, options.np)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if wrong:
        print(f"other weights than gloo's: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
