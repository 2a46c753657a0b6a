#!/usr/bin/env python3
"""What one call through torch.distributed costs beyond torch's own part.

    ./scripts/bench --call                     the ratio, in turns, fastest batch of each
    python benches/cost_of_a_call.py --batches 200 --at-most 1.4

Times an all_reduce of 4 bytes in a group of one rank, beside the same call to a group that does nothing at all: what is
left is ours. Prints both and their ratio; with --at-most fails when the ratio is larger.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work, distributed_c10d

import smdistributed_rs  # noqa: F401 (registers the backend)

CALLS = 2000
"""a batch"""


class Nothing(Work):
    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class IdleGroup(ProcessGroup):
    """Answers every all_reduce with a Work that is done."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._work = Nothing()
        self._name = ""

    def allreduce(self, *_: Any) -> Work:
        return self._work

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def getBackendName(self) -> str:
        return "idle"

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, text: str) -> None:
        pass


def batch(call: Callable[[], Any]) -> float:
    """Microseconds a call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100, help="of each side, in turns")
    parser.add_argument("--at-most", type=float, help="fail when the ratio is larger")
    options = parser.parse_args()

    dist.Backend.register_backend("idle", lambda _, __: IdleGroup(0, 1), extended_api=True, devices=["cpu"])
    dist.init_process_group("smddp", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    groups = {"idle": dist.new_group(backend="idle"), "smddp": world}
    tensor = torch.ones(1)
    fastest = dict.fromkeys(groups, float("inf"))
    for _ in range(options.batches):
        for name, group in groups.items():
            # As scripts call it: without naming the group.
            distributed_c10d._update_default_pg(group)
            fastest[name] = min(fastest[name], batch(lambda: dist.all_reduce(tensor)))
    distributed_c10d._update_default_pg(world)
    ratio = fastest["smddp"] / fastest["idle"]
    for name, cost in fastest.items():
        print(f"{name:6} {cost:6.2f} us a call")
    print(f"ratio  {ratio:6.2f}")
    dist.destroy_process_group()
    if options.at_most is not None and ratio > options.at_most:
        print(f"the ratio is above {options.at_most}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
