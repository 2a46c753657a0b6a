"""Programs that nobody draws (see programs.py): every kind of call with every dtype, reduction and size; and the job
that plays them, in which each rank makes the same ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

import programs

SLOT = 4 << 10
TIGHT = {
    "SMDDP_SHM_SLOT": str(SLOT),
    "SMDDP_SHM_SLOTS": "2",
    "SMDDP_EAGER": "64",
    "SMDDP_STRIPE": "4K",
    "SMDDP_STAGING": "1M",
    "SMDDP_CHUNK": "8K",
}
"""Little room, so that small calls meet the ends of slots, chunks and eager messages."""

MOVING = [kind for kind, (_, fields) in programs.KINDS.items() if "moved" in fields]
REDUCING = [kind for kind, (_, fields) in programs.KINDS.items() if "reduced" in fields]
AT_A_TIME = 250


def step(kind: str, index: int, dtype: str, op: str | None, count: int) -> dict:
    """One of the others' fields, by turns."""
    return {
        "do": kind, "group": 0, "seed": index % 90, "dtype": dtype, "op": op, "count": count,
        "special": (False, True, "huge")[index % 3], "uneven": index % 2 == 1, "inside": index % 4 == 3,
        "root": index, "tag": index % 2, "in": ("dense", "odd", "stepped")[index % 3],
        "out": ("dense", "dense", "odd", "columns")[index % 4], "async": index % 5 == 4,
    }  # fmt: skip


def kinds(dtype: str) -> Iterator[tuple[str, str | None]]:
    """(kind, reduction)"""
    if dtype in programs.REDUCED:
        yield from itertools.product(REDUCING, programs.ops_of(dtype))
    yield from ((kind, None) for kind in MOVING)


def counts(dtype: str) -> list[int]:
    slot = SLOT // getattr(torch, dtype).itemsize
    return [0, 1, 91, slot - 1, slot, slot + 1]


def product(size: int) -> list[dict]:
    """Everything once."""
    every = [
        (kind, dtype, op, count)
        for dtype in programs.MOVED
        for (kind, op), count in itertools.product(kinds(dtype), counts(dtype))
    ]
    return in_programs([step(kind, i, dtype, op, count) for i, (kind, dtype, op, count) in enumerate(every)], size)


LARGE = (16, 150_000)
"""elements of float32: in slots; and straight between two ranks' memory, where that is on"""


def small_and_large(size: int) -> list[dict]:
    """Every kind with blocks of both sorts."""
    steps = []
    for count, kind in itertools.product(LARGE, (*MOVING, *REDUCING)):
        op = "SUM" if kind in REDUCING else None
        plain = {"special": False, "in": "dense", "out": "dense", "uneven": False}
        steps.append(step(kind, len(steps), "float32", op, count) | plain)
    return in_programs(steps, size)


def reductions(size: int) -> list[dict]:
    """Every reduction of every dtype, with lengths that fill no register."""
    every = [(dtype, op, count) for dtype in programs.REDUCED for op in programs.ops_of(dtype) for count in (91, 5_003)]
    return in_programs([step("all_reduce", i, *one) for i, one in enumerate(every)], size)


def in_programs(steps: list[dict], size: int) -> list[dict]:
    common = {"groups": [list(range(size))], "fresh": False, "delay": 2}
    return [common | {"steps": steps[i : i + AT_A_TIME]} for i in range(0, len(steps), AT_A_TIME)]


PROGRAMS = {"product": product, "small_and_large": small_and_large, "reductions": reductions}


def job(which: str) -> dict:
    """What this rank found wrong, and the digests of what must be the same on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("smddp", timeout=timedelta(seconds=60))
    if os.environ.get("SMDDP_SHM_SLOT") == str(SLOT) and os.environ["LOCAL_WORLD_SIZE"] != "1":
        told = dist.group.WORLD.describe()
        assert "(2 slots of 4 KiB)" in told, told
    size = dist.get_world_size()
    player = programs.Player([tuple(range(size))])
    reports = [player.play(program) for program in PROGRAMS[which](size)]
    dist.destroy_process_group()
    return {"reports": reports}
