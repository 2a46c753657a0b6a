"""The backend "smddp" of torch.distributed: registration, and what torch gets when it asks for a group.

Two carriers of the same collectives, over one native communicator:

- `SmddpProcessGroup` replaces torch's group. `torch.distributed` functions then call our methods directly, which is
  the cheapest way from Python. It also holds a `SmddpBackend`, for those who ask the group for a device's backend.
- `SmddpBackend` alone sits inside torch's own group. Every call passes through torch, so its hooks see it. Chosen when
  somebody asked for such a hook (TORCH_DISTRIBUTED_DEBUG=DETAIL, TORCH_DIST_NAN_CHECK=1), or when another backend
  serves another device of the group ("cpu:gloo,cuda:smddp"); SMDDP_TORCH_GROUP=backend or =group decides otherwise.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from . import _core
from ._libraries import library_dirs
from ._meeting import meet
from .process_group import SmddpBackend, SmddpProcessGroup

if TYPE_CHECKING:
    pass

NAME = "smddp"


def register() -> None:
    """Makes "smddp" known to torch.distributed. Doing it twice is harmless."""
    if NAME.upper() not in dist.Backend._plugins:
        _core.use_tensor_type(torch.Tensor)
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


def create(options: dist.distributed_c10d._DistributedBackendOptions, _: object = None) -> object:
    """What torch calls on every member of a new group; meets the others and connects to them."""
    members = list(options.global_ranks_in_group)
    name = options.group_id or "default"
    store, rank, size = options.store, options.group_rank, options.group_size
    limit = options.timeout
    scope, left = meet(store, rank, size, limit.total_seconds(), name)
    communicator = _core.Communicator.connect(store, rank, size, name, scope, left, library_dirs())
    communicator.set_timeout(limit.total_seconds())
    carrier = SmddpBackend(communicator, limit, members)
    if _hooks_must_see_calls():
        return carrier
    return SmddpProcessGroup(store, communicator, carrier)


def _hooks_must_see_calls() -> bool:
    forced = os.environ.get("SMDDP_TORCH_GROUP", "")
    if forced in ("group", "backend"):
        return forced == "backend"
    return (
        dist.get_debug_level() == dist.DebugLevel.DETAIL
        or os.environ.get("TORCH_DIST_NAN_CHECK", "0") == "1"
        or _other_backends_in_group()
    )


def _other_backends_in_group() -> bool:
    """Whether the group being made has another backend for another device.

    Torch tells a creator its own device's part only, and a group we return would end its loop over the others, so
    that they would silently not exist. The map is a local variable of the function that calls us: read there, with
    care; where it is not found, nothing is known and the answer is no.
    """
    frame = sys._getframe()
    for _ in range(6):
        frame = frame.f_back
        if frame is None:
            return False
        if frame.f_code.co_name == "_new_process_group_helper":
            config = frame.f_locals.get("backend_config")
            get_map = getattr(config, "get_device_backend_map", dict)
            return len(set(get_map().values())) > 1
    return False
