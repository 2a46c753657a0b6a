"""`torch.distributed` as SMDDP 1.x had it. Every call is torch's own, on the group of all ranks."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch.distributed as _dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from smdistributed.dataparallel.torch._legacy import warn as _warn

_warn("distributed", "torch.distributed")

__all__ = [
    "ReduceOp",
    "all_gather",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "group",
    "init_process_group",
    "is_available",
    "is_initialized",
]


class ReduceOp:
    """The reductions of SMDDP 1.x."""

    SUM = _dist.ReduceOp.SUM
    MIN = _dist.ReduceOp.MIN
    MAX = _dist.ReduceOp.MAX
    AVERAGE = _dist.ReduceOp.AVG


class group:  # noqa: N801  the name it had
    """The only group of this API: all ranks. Torch calls it None."""

    WORLD = None


def is_available() -> bool:
    """Whether this process was started as one of a distributed job."""
    return _dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_process_group(*args: Any, **kwargs: Any) -> None:
    """Joins the job. Torch's arguments are taken; the backend is "smddp", whatever was named."""
    named = args[0] if args else kwargs.pop("backend", None)
    if named not in (None, "smddp"):
        log = logging.getLogger("smdistributed.dataparallel")
        log.warning("init_process_group: backend %r has no effect: this module's is 'smddp'", named)
    _dist.init_process_group("smddp", *args[1:], **kwargs)


def is_initialized() -> bool:
    """Whether `init_process_group` was called."""
    return _dist.is_initialized()


def get_world_size(group: ProcessGroup | None = group.WORLD) -> int:
    """Ranks in the job."""
    return _dist.get_world_size(group)


def get_rank(group: ProcessGroup | None = group.WORLD) -> int:
    """This process's number in the job."""
    return _dist.get_rank(group)


def get_local_rank() -> int:
    """This process's number on its node."""
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        raise RuntimeError(
            "get_local_rank: LOCAL_RANK is not set: start the script by mpirun, smddprun, torchrun or srun, or set it"
        )
    return int(local)


def all_reduce(
    tensor: Tensor,
    op: _dist.ReduceOp.RedOpType = ReduceOp.SUM,
    group: ProcessGroup | None = group.WORLD,
    async_op: bool = False,
) -> Work | None:
    """As in torch."""
    return _dist.all_reduce(tensor, op, group, async_op)


def broadcast(
    tensor: Tensor, src: int = 0, group: ProcessGroup | None = group.WORLD, async_op: bool = False
) -> Work | None:
    """As in torch."""
    return _dist.broadcast(tensor, src, group, async_op)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: ProcessGroup | None = group.WORLD, async_op: bool = False
) -> Work | None:
    """As in torch."""
    return _dist.all_gather(tensor_list, tensor, group, async_op)


def all_to_all_single(
    output_t: Tensor,
    input_t: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: ProcessGroup | None = group.WORLD,
    async_op: bool = False,
) -> Work | None:
    """As in torch."""
    return _dist.all_to_all_single(output_t, input_t, output_split_sizes, input_split_sizes, group, async_op)


def barrier(group: ProcessGroup | None = group.WORLD, async_op: bool = False) -> Work | None:
    """As in torch."""
    return _dist.barrier(group, async_op)
