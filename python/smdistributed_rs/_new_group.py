"""What torch is making when it asks this package for its part of a group.

Torch tells a creator its own device's part only. A group we return ends its loop over the other devices, so we must
know of them, and make their backends ourselves. The map of devices is a local variable of the function that calls us:
read there, with care; where it is not found, the group is taken to be all ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from .errors import BootstrapError

_MAKER = "_new_process_group_helper"
_DEPTH = 6


@dataclass
class NewGroup:
    """The group being made."""

    devices: list[str]
    """device types this package serves"""
    others: dict[str, str] = field(default_factory=dict)
    """backend names of the other device types"""
    made: ProcessGroup | None = None
    """torch's own group, which holds the backends of the device types that came before ours"""
    store: Any = None
    backend_options: Any = None


class Other(NamedTuple):
    """Somebody else's backend in a group of ours."""

    kind: Any
    """what torch takes it for: a `BackendType`"""
    backend: Any


def group_being_made(name: str) -> NewGroup:
    """What is known of the group for which torch asks `name`, at present, for its part."""
    frame: Any = sys._getframe()
    for _ in range(_DEPTH):
        frame = frame.f_back
        if frame is None:
            break
        if frame.f_code.co_name == _MAKER:
            known = frame.f_locals
            get_map = getattr(known.get("backend_config"), "get_device_backend_map", dict)
            names = get_map()
            others = {device: other for device, other in names.items() if other != name}
            # A backend of one name for all devices may stand under a name that was re-bound to us.
            if len(set(names.values())) < 2:
                break
            ours = [device for device in names if device not in others]
            return NewGroup(ours, others, known.get("pg"), known.get("prefix_store"), known.get("backend_options"))
    return NewGroup(["cpu", "cuda"])


def backends_of_others(new: NewGroup, options: Any) -> dict[str, Other]:
    """The backends of the device types that others serve: those torch has made, and the rest made now."""
    found: dict[str, Other] = {}
    by_name: dict[str, Any] = {}
    for device, name in new.others.items():
        backend = by_name.get(name) or _made_by_torch(new.made, device) or _make(new, options, device, name)
        by_name[name] = backend
        # By the name it was asked for: "nccl", say, may be made by a backend of another name.
        kind = dist.Backend.backend_type_map.get(name, ProcessGroup.BackendType.CUSTOM)
        found[device] = Other(kind, backend)
    return found


def _made_by_torch(group: ProcessGroup | None, device: str) -> Any:
    if group is None or torch.device(device) not in group._device_types:
        return None
    return group._get_backend(torch.device(device))


def _make(new: NewGroup, options: Any, device: str, name: str) -> Any:
    """As torch's own loop would have done."""
    if hasattr(dist.Backend, "_ensure_backend_registered"):
        dist.Backend._ensure_backend_registered(name)
    plugin = dist.Backend._plugins.get(name.upper())
    if plugin is None or new.store is None:
        raise BootstrapError(
            f"making the group's backend '{device}:{name}': torch {torch.__version__} makes that one itself, and after "
            "this one. Name smddp last in the backend string, or use torch 2.14 or newer"
        )
    store = PrefixStore(f"{device}/", new.store)
    if not plugin.extended_api:
        return plugin.creator_fn(store, options.group_rank, options.group_size, options.timeout)
    theirs = type(options)()
    for attribute in (
        "group_rank", "group_size", "timeout", "group_id", "global_ranks_in_group",
        "process_group", "split_from", "enable_reconfigure",
    ):  # fmt: skip
        if hasattr(options, attribute):
            setattr(theirs, attribute, getattr(options, attribute))
    theirs.store = store
    return plugin.creator_fn(theirs, new.backend_options)
