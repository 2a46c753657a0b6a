"""Tensors in memory that the ranks of a node share: ranks work on each other's data where it lies, and nothing is
copied on the way. What that gains, and from which size on: docs/how-to/share-gradients.md.

    gradients = smdistributed_rs.shared.empty(1_000_000)  # every rank, in the same order, like a collective
    torch.distributed.all_reduce(gradients)  # or any part of it

    smdistributed_rs.shared.share_buckets(ddp_model)  # DistributedDataParallel, before training

all_reduce, broadcast and reduce work in such a tensor; all_gather, reduce_scatter, all_to_all and gather take their
input from one, with blocks of one length. On several nodes, what leaves the node leaves from there too; broadcast and
all_gather take such tensors as any other there, as other calls do everywhere. Every rank passes (a part of) the tensor
that the same call made, or none does: else MismatchError says who did what. Where ranks cannot see each other's
processes, they are ordinary tensors (`is_shared`).
"""

from __future__ import annotations

import ctypes
import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from . import _core
from .errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["empty", "is_shared", "share_buckets"]

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""What keeps shared memory, by the memory's address."""


def allocate(op: str, communicator: _core.Communicator, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """`nbytes` bytes that the group's ranks share, as an object with the buffer protocol. Every rank calls this.

    op: what the user called."""
    if nbytes <= 0:
        raise ArgumentError.of(op, "nbytes", "bytes from 1", str(nbytes), "Every rank gives its own number")
    kept = _core.SharedMemory.allocate(communicator, nbytes)
    kind = type("Memory", (ctypes.Array,), {"_type_": ctypes.c_char, "_length_": nbytes})
    memory = kind.from_address(kept.address)
    memory.kept = kept
    _known[kept.address] = memory
    return memory  # type: ignore[no-any-return]


def empty(
    *size: int | tuple[int, ...] | torch.Size,
    dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """A tensor of zeros in memory that the ranks of `group` (None: the default group) share. Every rank calls this.

    size, dtype: as torch.empty takes them; ranks may differ in size. The memory is freed with the last tensor on it."""
    import torch

    shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)  # type: ignore[arg-type]
    dtype = dtype or torch.get_default_dtype()
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= 0:
        raise ArgumentError.of("empty", "size", "elements from 1", str(tuple(shape)), "Use torch.empty for none")
    return torch.frombuffer(allocate("empty", _communicator("empty", group), nbytes), dtype=dtype).view(shape)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in memory that a group's ranks share."""
    kept = getattr(_known.get(tensor.untyped_storage().data_ptr()), "kept", None)
    return kept is not None and kept.why_not is None


def share_buckets(model: DistributedDataParallel) -> None:
    """Puts the gradient buckets of a model on the CPU into shared memory, from its next backward pass on. Every rank
    calls this, before training; it registers the model's communication hook, of which there can be one.

    With `gradient_as_bucket_view=True` gradients are not copied at all. Models on other devices train as before."""
    model.register_comm_hook(_Buckets(model.process_group), _average)


class _Buckets:
    """The gradient buckets of one model."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._communicator = _communicator("share_buckets", group)
        self._kept: dict[int, _Kept] = {}

    def keep(self, index: int, bucket: torch.Tensor) -> None:
        """Shares a bucket that is new. The model makes new ones after its first pass, on all ranks alike."""
        kept = self._kept.get(index)
        if kept is None or not kept.holds(bucket):
            self._kept.pop(index, None)
            self._kept[index] = _Kept(self._communicator, bucket)


class _Kept:
    """A tensor whose storage was moved into shared memory, and stays there as long as peers know of it."""

    def __init__(self, communicator: _core.Communicator, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.kept = _core.SharedMemory.over(communicator, _moved(tensor))
        if self.kept is not None:
            _known[self.kept.address] = self
            if self.kept.why_not is not None:
                warnings.warn(f"gradient buckets are reduced as ordinary memory: {self.kept.why_not}", stacklevel=2)

    def holds(self, tensor: torch.Tensor) -> bool:
        return self._tensor.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def __del__(self) -> None:
        # Before the tensor: the group forgets the memory while it is there.
        self.kept = None


def _moved(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """Moves a tensor's storage, with all views of it, to memory over a file: (descriptor, address, bytes)."""
    storage = tensor.untyped_storage()
    try:
        fd, nbytes = storage._share_fd_cpu_()
    except RuntimeError as error:
        warnings.warn(f"a gradient bucket stays in ordinary memory: {error}", stacklevel=2)
        return None
    return fd, storage.data_ptr(), nbytes


def _average(buckets, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The communication hook. Torch compares its annotations, if there are any, with classes."""
    import torch
    from torch.distributed import ReduceOp, all_reduce, get_world_size

    tensor, reduction = bucket.buffer(), ReduceOp.AVG
    if tensor.layout is not torch.strided:
        # An embedding's, say. Such tensors can be summed only.
        tensor, reduction = tensor.div_(get_world_size(buckets.group)), ReduceOp.SUM
    elif tensor.device.type == "cpu":
        buckets.keep(bucket.index(), tensor)
    work = all_reduce(tensor, reduction, buckets.group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _communicator(op: str, group: ProcessGroup | None) -> _core.Communicator:
    import torch
    from torch.distributed import distributed_c10d

    from .collectives import Collectives

    found: Any = group or distributed_c10d._get_default_group()
    if not isinstance(found, Collectives):
        found = found._get_backend(torch.device("cpu"))
    if isinstance(found, Collectives):
        return found._comm
    hint = "Make it with init_process_group('smddp') or new_group(backend='smddp')"
    raise ArgumentError.of(op, "group", "a group of backend smddp for the CPU", type(found).__name__, hint)
