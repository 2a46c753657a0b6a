#!/usr/bin/env python3
"""Measures a torch.distributed backend the way ``smddp-perf`` measures the library, and writes the same CSV columns.

    python benches/collectives_torch.py --backend gloo --np 2 --csv out.csv
    python benches/collectives_torch.py --backend smddp --np 2 --csv out.csv

Starts its own ranks unless RANK and WORLD_SIZE are set. Each size is checked first on fresh data; then batches of calls
on zeros, of about ``--batch`` seconds, each starting at an instant agreed on by all ranks, count as long as their
slowest rank.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = ["label", "op", "dtype", "world", "bytes", "iters"]
COLUMNS += ["median_us", "min_us", "algbw_GBps", "busbw_GBps", "check"]
LIMIT = float(os.environ.get("BENCH_LIMIT", "900"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--label", help="name of the rows; default: the backend's")
    parser.add_argument("--np", type=int, default=2, help="ranks to start")
    parser.add_argument("--ops", default="allreduce", help="allreduce,allgather,reduce_scatter,alltoall,broadcast")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--min", type=int, default=4, help="bytes")
    parser.add_argument("--max", type=int, default=256 << 20, help="bytes")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of timing per size")
    parser.add_argument("--batch", type=float, default=0.001, help="seconds of a batch")
    parser.add_argument("--shared", action="store_true", help="tensors in smddp's shared memory; for allreduce")
    parser.add_argument("--csv", required=True)
    return parser.parse_args()


def start_ranks(count: int) -> int:
    """Runs this script once per rank; the worst exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("OMP_NUM_THREADS", "1")
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=env))
    deadline = time.monotonic() + LIMIT
    try:
        while any(r.poll() is None for r in ranks):
            if any(r.poll() for r in ranks) or time.monotonic() > deadline:
                return 1
            time.sleep(0.02)
        return max(abs(r.returncode) for r in ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


class Meeting:
    """Exchange between ranks through the rendezvous store, so that no backend measures itself."""

    def __init__(self, store: Any, rank: int, world: int, across_nodes: bool) -> None:
        self.store, self.rank, self.world, self.turn = store, rank, world, 0
        # Enough for everyone to have learnt the instant: store round trips take longer over a shaped link.
        self.lead = 0.02 if across_nodes else 0.0005

    def all_gather(self, value: list[float]) -> list[list[float]]:
        self.turn += 1
        self.store.set(f"{self.turn}/{self.rank}", ",".join(map(repr, value)))
        texts = (self.store.get(f"{self.turn}/{r}").decode() for r in range(self.world))
        return [[float(v) for v in text.split(",")] for text in texts]

    def slowest(self, values: list[float]) -> list[float]:
        return [max(column) for column in zip(*self.all_gather(values), strict=True)]

    def start_together(self) -> None:
        """Returns on all ranks at nearly the same instant; all share one clock, being on one machine."""
        at = self.slowest([time.monotonic()])[0] + self.lead
        while (left := at - time.monotonic()) > 0:
            if left > 2e-4:
                time.sleep(1e-4)


class Case:
    """Buffers of one size: whole buffer ``x``, block ``y``, what they hold and what they should hold after a call."""

    def __init__(self, torch: Any, dist: Any, op: str, dtype: Any, count: int, rank: int, world: int) -> None:
        place = torch.arange(count).remainder_(7)
        block = slice(rank * (count // world), (rank + 1) * (count // world))
        # What rank `by` brings, of one period: small, so that sums of many ranks are exact in bfloat16, too.
        period = lambda by: (torch.arange(7) + 3 * by).remainder_(13) + 1  # noqa: E731
        mine, total = period(rank)[place], sum(map(period, range(world)))[place]
        if op == "allreduce":
            self.buffers = [mine.to(dtype)]
            self.wanted, self.result = total.to(dtype), self.buffers[0]
            self.call = lambda x: dist.all_reduce(x)
        elif op == "broadcast":
            self.buffers = [mine.to(dtype)]
            self.wanted, self.result = period(0)[place].to(dtype), self.buffers[0]
            self.call = lambda x: dist.broadcast(x, 0)
        elif op == "allgather":
            self.buffers = [place[block].to(dtype), torch.full((count,), -1, dtype=dtype)]
            self.wanted, self.result = place.to(dtype), self.buffers[1]
            self.call = lambda x, y: dist.all_gather_into_tensor(y, x)
        elif op == "reduce_scatter":
            self.buffers = [mine.to(dtype), torch.full((count // world,), -1, dtype=dtype)]
            self.wanted, self.result = total[block].to(dtype), self.buffers[1]
            self.call = lambda x, y: dist.reduce_scatter_tensor(y, x)
        elif op == "alltoall":
            self.buffers = [mine.to(dtype), torch.full((count,), -1, dtype=dtype)]
            self.wanted = torch.cat([period(source)[place[block]] for source in range(world)]).to(dtype)
            self.result = self.buffers[1]
            self.call = lambda x, y: dist.all_to_all_single(y, x)
        else:
            raise SystemExit(f"--ops {op}: expected allreduce, allgather, reduce_scatter, alltoall or broadcast")

    def move_to(self, memory: Any) -> None:
        """To other memory, of a call in place."""
        memory.copy_(self.buffers[0])
        self.buffers, self.result = [memory], memory

    def right(self, torch: Any) -> bool:
        self.call(*self.buffers)
        # Sums of two bytes are rounded, in each step, where they are large.
        exact = self.wanted.dtype.itemsize > 2 or self.wanted.abs().max() < 256
        if exact:
            return torch.equal(self.result, self.wanted)
        return torch.allclose(self.result.float(), self.wanted.float(), rtol=0.02)


def batch(case: Case, calls: int) -> float:
    call, buffers = case.call, case.buffers
    start = time.perf_counter()
    for _ in range(calls):
        call(*buffers)
    return (time.perf_counter() - start) / calls


def measure(case: Case, torch: Any, meeting: Meeting, budget: float, length: float) -> tuple[int, list[float], bool]:
    """Number of calls, ascending seconds a call of the batches, and whether the check went well everywhere."""
    good = case.right(torch)
    for buffer in case.buffers:
        buffer.zero_()
    batch(case, 3)
    meeting.start_together()
    estimate = meeting.slowest([batch(case, 2)])[0]
    calls = max(1, min(20_000, int(length / estimate)))
    batches = max(7, min(401, int(budget / (estimate * calls))))
    times = []
    for _ in range(batches):
        meeting.start_together()
        times.append(batch(case, calls))
    wrong = meeting.slowest([0.0 if good else 1.0])[0]
    return calls * batches, sorted(meeting.slowest(times)), not wrong


def main() -> int:
    options = arguments()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return start_ranks(options.np)
    import torch
    import torch.distributed as dist

    if options.backend == "smddp":
        import smdistributed_rs
    torch.set_num_threads(1)
    dist.init_process_group(options.backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("bench", dist.distributed_c10d._get_default_store())
    meeting = Meeting(store, rank, world, across_nodes=int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world)
    share = (world - 1) / world
    factors = {"allreduce": 2 * share, "allgather": share, "reduce_scatter": share, "alltoall": share, "broadcast": 1.0}
    path = Path(options.csv)
    with path.open("a", newline="") if rank == 0 else open(os.devnull, "w") as file:
        writer = csv.writer(file)
        if rank == 0 and path.stat().st_size == 0:
            writer.writerow(COLUMNS)
        for op in options.ops.split(","):
            for name in options.dtypes.split(","):
                dtype = getattr(torch, name)
                size = options.min
                while size <= options.max:
                    count = size // dtype.itemsize
                    blocks = op in ("allgather", "reduce_scatter", "alltoall")
                    if count and not (blocks and count % world):
                        case = Case(torch, dist, op, dtype, count, rank, world)
                        if options.shared:
                            case.move_to(smdistributed_rs.shared.empty(count, dtype=dtype))
                        iters, times, good = measure(case, torch, meeting, options.budget, options.batch)
                        median, best = statistics.median(times), times[0]
                        algbw = size / median / 1e9
                        row = [options.label or options.backend, op, name, world, size, iters, f"{median * 1e6:.2f}"]
                        row += [f"{best * 1e6:.2f}", f"{algbw:.4f}", f"{algbw * factors[op]:.4f}"]
                        writer.writerow([*row, "ok" if good else "WRONG"])
                        file.flush()
                        del case
                    size *= options.factor
    dist.destroy_process_group()
    # The store lives in rank 0, which must leave last.
    if rank == 0:
        store.wait([f"gone/{r}" for r in range(1, world)])
    else:
        store.set(f"gone/{rank}", "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
