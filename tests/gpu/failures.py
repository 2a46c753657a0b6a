"""Ranks that die, disagree and abort: the others are told, and no device is left waiting."""

from __future__ import annotations

import os
import time
from typing import Any

import torch.distributed as dist

import smdistributed_rs
from gpu.common import full, start, still_works, synchronize


def _told(error: Exception | None, kind: type[Exception], words: str) -> str:
    """Nothing, if this is `kind`, or the abort that quotes it; else what is wrong."""
    if error is None:
        return "no error within 30 s"
    fits = isinstance(error, (kind, smdistributed_rs.AbortedError)) and words in str(error)
    return "" if fits else f"no {kind.__name__} that says '{words}': {type(error).__name__}: {error}"


def a_rank_that_dies() -> dict[str, Any]:
    """Rank 1 leaves without a word; the others get an error and their device is free again."""
    start()
    for _ in range(3):
        still_works()
    if dist.get_rank() == 1:
        os._exit(0)
    began, error = time.monotonic(), None
    try:
        while time.monotonic() - began < 30:
            tensor = full(100_000, 1)
            dist.all_reduce(tensor, async_op=True).wait()
            synchronize()
    except RuntimeError as raised:
        error = raised
    synchronize()
    full(10, 1).sum().item()
    wrong = _told(error, smdistributed_rs.PeerLostError, "lost rank 1")
    print(error, flush=True)
    return {"cases": {"it is told": wrong}, "figures": {"error": str(error), "seconds": time.monotonic() - began}}


def calls_that_differ() -> dict[str, Any]:
    """Every rank is told, and no device is left waiting."""
    start()
    still_works()
    error = None
    began = time.monotonic()
    try:
        work = dist.all_reduce(full(1000 + dist.get_rank(), 1), async_op=True)
        while time.monotonic() - began < 30:
            work.wait()
            synchronize()
            dist.all_reduce(full(10, 1))
    except RuntimeError as raised:
        error = raised
    synchronize()
    print(error, flush=True)
    wrong = _told(error, smdistributed_rs.MismatchError, "ranks disagree")
    return {"cases": {"it is told": wrong}, "figures": {"error": str(error)}}


def an_abort() -> dict[str, Any]:
    """Rank 0 aborts while another rank has not come: its device does not wait for it for ever."""
    start()
    still_works()
    wrong = ""
    if dist.get_rank() == 0:
        dist.all_reduce(full(1_000_000, 1), async_op=True)
        time.sleep(0.3)
        dist.group.WORLD.abort()
        synchronize()
        full(10, 1).sum().item()
    else:
        time.sleep(1)
        try:
            dist.all_reduce(full(1_000_000, 1))
            synchronize()
            dist.all_reduce(full(10, 1))
            wrong = "no error after another rank's abort"
        except RuntimeError as error:
            synchronize()
            # It may be gone already.
            words = "lost rank 0" if isinstance(error, smdistributed_rs.PeerLostError) else "abort() was called"
            wrong = _told(error, smdistributed_rs.PeerLostError, words)
    return {"cases": {"abort": wrong}}
