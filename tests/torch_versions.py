"""Everything in the tests that depends on torch's version: what older ones spell in another way, and what they lack."""

from __future__ import annotations

from datetime import timedelta
from importlib.metadata import version
from typing import Any

import pytest

# Not torch.__version__: who asks only whether to run a test does not load torch for it.
TORCH = tuple(int(part) for part in version("torch").split(".")[:2])

LACKING = {
    "python backends": ((2, 14), "a Backend can be written in Python from torch 2.14 on"),
    "entry points": ((2, 14), "torch looks for backends nobody imported from 2.14 on"),
}
"""{what a test needs: (the first torch that has it, why)}"""


def needs(what: str) -> pytest.MarkDecorator:
    """Skips a test where torch lacks what it needs."""
    first, reason = LACKING[what]
    return pytest.mark.skipif(first > TORCH, reason=reason)


def by_group_rank(group: Any, **named: int) -> dict[str, int]:
    """{group_src: 1}, say, as arguments of a `torch.distributed` function. Torch before 2.6 takes global ranks only."""
    import torch.distributed as dist

    if TORCH >= (2, 6):
        return named
    return {name.removeprefix("group_"): dist.get_global_rank(group, rank) for name, rank in named.items()}


SAYS_WHAT_IS_SYNCHRONOUS = TORCH >= (2, 8)
"""Whether torch tells a backend that a call is waited for at once. Where not, it is a Work and a wait."""


def set_timeout(group: Any, timeout: timedelta) -> None:
    """Torch's way to set a group's time limit, which before 2.14 passes over every backend but gloo and nccl."""
    import torch.distributed as dist

    if TORCH >= (2, 14):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    else:
        group.set_timeout(timeout)


def monitored_barrier(group: Any, timeout: timedelta) -> None:
    """`torch.distributed.monitored_barrier`, which before 2.14 refuses every backend but gloo: there, what it calls."""
    import torch.distributed as dist

    if TORCH >= (2, 14):
        dist.monitored_barrier(group=group, timeout=timeout)
    else:
        group.monitored_barrier(timeout)
