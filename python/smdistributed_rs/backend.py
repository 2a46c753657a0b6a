"""The backend "smddp" of torch.distributed: registration, and what torch gets when it asks for a group.

It gets a group of ours, over one native communicator, in one of three kinds (`process_group`):

- `SmddpProcessGroup`: `torch.distributed` functions call our methods directly, the cheapest way from Python.
- `MixedProcessGroup`: the same, where other backends serve other devices of the group ("cpu:smddp,cuda:nccl").
- `HookedProcessGroup`: every call passes through torch's C++ half, so that its hooks see it. Chosen when somebody asked
  for one (TORCH_DISTRIBUTED_DEBUG=DETAIL, TORCH_DIST_NAN_CHECK=1, TORCH_FR_BUFFER_SIZE); SMDDP_TORCH_GROUP=backend or
  =group decides otherwise.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions
from torch.distributed import PrefixStore, Store, distributed_c10d

from . import _core
from ._codes import BARRIER, DTYPES
from ._compat import HAS_BACKENDS, check_memory_layout
from ._libraries import library_dirs
from ._meeting import Recorder, delete, forget, meet
from ._new_group import NewGroup, Other, backends_of_others, group_being_made
from .cuda import CudaSide, choose_device
from .process_group import HookedProcessGroup, MixedProcessGroup, Seat, SmddpProcessGroup, records_flights
from .tensors import REDUCTIONS

NAME = "smddp"


def register() -> None:
    """Makes "smddp" known to torch.distributed. Doing it twice is harmless."""
    if NAME.upper() not in dist.Backend._plugins:
        _core.use_torch(torch.Tensor, AllreduceOptions, list(REDUCTIONS))
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def create(options: distributed_c10d._DistributedBackendOptions, _: object = None) -> SmddpProcessGroup:
    """What torch calls on every member of a new group; meets the others and connects to them."""
    check_memory_layout()
    new = group_being_made(NAME)
    name = options.group_id or "default"
    members = list(options.global_ranks_in_group)
    find_negatives()
    others = backends_of_others(new, options)
    seat = _connect(options.store, options.group_rank, options.group_size, options.timeout, name, members)
    # After the others were made: one of them may have bound a group that was not.
    seat.bound_to = getattr(getattr(options, "process_group", None), "bound_device_id", None)
    if "cuda" in new.devices and not dist.is_initialized():
        choose_device(_local_rank(seat.communicator))
    return _seated(seat, new, others, name)


@functools.cache
def find_negatives() -> bool:
    """Has the native half find out how tensors say that their memory holds the negatives of their elements. Whether it
    did; where not, it asks torch each time."""
    plain = torch.ones(2, device="cpu")
    samples = [plain, torch.ones(2, 2, dtype=torch.int8, device="cpu")[1:], torch._neg_view(plain)]
    # Where a mode makes other tensors of these, nothing is to be learnt from them.
    if not hasattr(torch._C, "_dispatch_keys") or any(type(sample) is not torch.Tensor for sample in samples):
        return False
    sets = [getattr(torch._C._dispatch_keys(sample), "raw_repr", int)() for sample in samples]
    return _core.use_key_sets(list(zip(samples, sets, strict=True)), sets[0] ^ sets[-1])


def _local_rank(world: _core.Communicator) -> int:
    """Among this machine's ranks, as the launcher numbers them; else among those of this node."""
    given = os.environ.get("LOCAL_RANK", "")
    return int(given) if given.isdecimal() else world.nodes[: world.rank].count(world.nodes[world.rank])


def split(
    seat: Seat, devices: list[str], others: dict[str, Other], ranks: list[int], limit: timedelta, name: str, text: str
) -> SmddpProcessGroup:
    """The group of some members of another, this rank among them, for some of its device types."""
    store = PrefixStore(f"{name}/", seat.store)
    parents = seat.members or list(range(seat.communicator.size))
    members = [parents[rank] for rank in ranks]
    new = _connect(store, ranks.index(seat.communicator.rank), len(ranks), limit, name, members)
    new.bound_to = seat.bound_to
    if seat.cuda.carries_messages and "cuda" in devices:
        new.cuda.connect(seat.cuda.device)
    group = _seated(new, NewGroup(devices), others, name)
    group._set_group_name(name)
    group._set_group_desc(text)
    return group


def _connect(store: Store, rank: int, size: int, limit: timedelta, name: str, members: list[int]) -> Seat:
    communicator = _meet(store, rank, size, limit, name)
    cuda = CudaSide(communicator, lambda label, ranks: _part(store, communicator, label, ranks))
    return Seat(store, communicator, limit, members, cuda)


def _meet(store: Store, rank: int, size: int, limit: timedelta, name: str) -> _core.Communicator:
    seconds = limit.total_seconds()
    prefix, left = meet(store, rank, size, seconds, name)
    recorder = Recorder(store)
    communicator = _core.Communicator.connect(recorder, rank, size, name, prefix, left, library_dirs())
    # A store lives as long as the job, and groups come and go: they leave nothing in it.
    forget(store, rank, size, prefix)
    communicator.run(BARRIER, DTYPES["uint8"], 0, 0, 0, (0, 0), (0, 0))
    delete(store, recorder.keys)
    communicator.set_timeout(seconds)
    return communicator


def _part(store: Store, group: _core.Communicator, label: str, ranks: list[int]) -> _core.Communicator:
    """Another communicator of some of the group's ranks, this one among them; `label` is theirs alone in this group."""
    limit, place = timedelta(seconds=group.timeout), f"{group.name}/{label}"
    name = group.name if len(ranks) == group.size else place
    return _meet(PrefixStore(f"{place}/", store), ranks.index(group.rank), len(ranks), limit, name)


def _seated(seat: Seat, new: NewGroup, others: dict[str, Other], name: str) -> SmddpProcessGroup:
    kind: type[SmddpProcessGroup] = SmddpProcessGroup
    if others:
        kind = MixedProcessGroup
    if HAS_BACKENDS and _hooks_must_see_calls():
        kind = HookedProcessGroup
    return kind(seat, new.devices, others, _wrapper(seat, name), split)


def _hooks_must_see_calls() -> bool:
    forced = os.environ.get("SMDDP_TORCH_GROUP", "")
    if forced in ("group", "backend"):
        return forced == "backend"
    return _in_detail() or os.environ.get("TORCH_DIST_NAN_CHECK", "0") == "1" or records_flights()


def _in_detail() -> bool:
    return bool(dist.get_debug_level() == dist.DebugLevel.DETAIL)


def _wrapper(seat: Seat, name: str) -> Callable[[Any], Any]:
    """What torch puts around backends when it is asked to compare every call of every rank."""
    size = seat.communicator.size
    if not (_in_detail() and dist.is_gloo_available()) or not HAS_BACKENDS:
        return lambda backend: backend
    return lambda backend: distributed_c10d._create_process_group_wrapper(
        wrapped_pg=backend,
        store_prefix=name,
        store=seat.store,
        rank=seat.communicator.rank,
        world_size=size,
        timeout=seat.timeout,
    )
