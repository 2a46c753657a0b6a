"""The classes torch sees (see `backend`): each is a carrier of `Collectives`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._dynamo import not_compiled
from .collectives import METHODS, Collectives
from .work import DoneWork, SmddpWork

if TYPE_CHECKING:
    from torch.distributed import Store, Work

    from ._core import Communicator

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
HAS_BACKENDS = TORCH >= (2, 14)
"""Whether a Backend can be written in Python. Before, a group of ours carries everything."""

_TorchBackend: Any = torch._C._distributed_c10d.Backend if HAS_BACKENDS else object

_alive: dict[int, SmddpBackend] = {}
"""Every backend that is not shut down. Torch may hold only the C++ half of one (TORCH_DISTRIBUTED_DEBUG=DETAIL does),
and the Python half would be collected."""

_STORE_ENDS = 0.03
"""Seconds rank 0 may need, after a group of all ranks has ended, until the store it serves has ended too."""

_latest = threading.local()
"""`work`: what a backend's method returned last on this thread."""

_OLD_NAMES = {
    "_allgather_base", "allgather_into_tensor_coalesced", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "alltoall_base", "gather_into_tensor", "recvAnysource",
}  # fmt: skip
"""Second names of methods. Torch looks for an override under either, so only one may lead back to torch."""


@dataclass
class Seat:
    """What every carrier is made of."""

    store: Store
    communicator: Communicator
    timeout: timedelta
    members: list[int]
    """global ranks; none: the group is that of all ranks"""


class SmddpBackend(Collectives, _TorchBackend):
    """The backend of one group, as torch's C++ half calls it."""

    def __init__(self, seat: Seat) -> None:
        _TorchBackend.__init__(self, seat.communicator.rank, seat.communicator.size)
        Collectives.__init__(self, seat.communicator)
        self._options = _TorchBackend.Options("smddp", seat.timeout)
        self._options.global_ranks_in_group = seat.members
        _alive[id(self)] = self

    @property
    def options(self) -> object:
        return self._options

    def set_timeout(self, timeout: timedelta) -> None:
        Collectives.set_timeout(self, timeout)
        self._options._timeout = timeout

    def shutdown(self) -> None:
        Collectives.shutdown(self)
        _alive.pop(id(self), None)

    def abort(self) -> None:
        Collectives.abort(self)
        _alive.pop(id(self), None)


class SmddpProcessGroup(Collectives, ProcessGroup):
    """A group of its own, so that `torch.distributed` calls these methods without a detour. Its backend serves those
    who ask for the backend of a device; both are over one communicator."""

    def __init__(self, seat: Seat, devices: list[str], others: dict[str, Any], wrap: Callable[[Any], Any]) -> None:
        """devices: types served here; others: backends of other device types; wrap: makes of our backend the one to be
        registered."""
        size = (seat.communicator.rank, seat.communicator.size)
        if HAS_BACKENDS:
            ProcessGroup.__init__(self, seat.store, *size)
        else:
            ProcessGroup.__init__(self, *size)
        Collectives.__init__(self, seat.communicator)
        self._seat = seat
        self._devices = frozenset(devices)
        self._others = others
        self._group_name = self._group_desc = ""
        if HAS_BACKENDS:
            self._backend = SmddpBackend(seat)
            self._set_default_backend(ProcessGroup.BackendType.CUSTOM)
            ours = wrap(self._backend)
            for device in devices:
                self._register_backend(torch.device(device), ProcessGroup.BackendType.CUSTOM, ours)
        for device, backend in others.items():
            kind = getattr(ProcessGroup.BackendType, backend.name().upper(), ProcessGroup.BackendType.CUSTOM)
            self._register_backend(torch.device(device), kind, backend)

    if not HAS_BACKENDS:
        # A group with a backend keeps its name there; this one has none.
        def setGroupName(self, name: str) -> None:
            self._group_name = name

        def getGroupName(self) -> str:
            return self._group_name

        def setGroupDesc(self, text: str) -> None:
            self._group_desc = text

        def getGroupDesc(self) -> str:
            return self._group_desc

    def set_timeout(self, timeout: timedelta) -> None:
        Collectives.set_timeout(self, timeout)
        if HAS_BACKENDS:
            self._backend.set_timeout(timeout)

    def shutdown(self) -> None:
        self._end("shutdown")
        # A rank that calls init_process_group again at once would find the store that rank 0 is about to end, and be
        # left without one. (Ending a gloo group takes 20 ms, which hides the same race.)
        is_world = not self._seat.members
        if is_world and self._rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(_STORE_ENDS)

    def abort(self) -> None:
        self._end("abort")

    def _end(self, how: str) -> None:
        others = {id(backend): backend for backend in self._others.values()}
        for other in others.values():
            getattr(other, how)()
        getattr(Collectives, how)(self)
        if HAS_BACKENDS:
            getattr(self._backend, how)()

    def split_group(
        self,
        ranks: list[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: list[torch.device] | None = None,
    ) -> ProcessGroup | None:
        """A group of some of this group's ranks, who all call this; None on those who are none of its members."""
        from .backend import split

        return split(self._seat, ranks, timeout or self._seat.timeout, str(group_name), group_desc or "")


class MixedProcessGroup(SmddpProcessGroup):
    """A group in which others serve other devices: calls with their tensors go torch's own way to them."""


class HookedProcessGroup(SmddpProcessGroup):
    """A group whose calls all go through torch's C++ half to the backends, so that torch's hooks see them.

    What comes back from there is a wrapper that can only be waited for; callers get the `Work` it wraps."""


def _renamed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its code under another name: pybind finds by it that a call of the base class's method comes from
    the very method that overrides it."""
    code = function.__code__.replace(co_name=name)
    made = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    made.__doc__ = getattr(Collectives, name).__doc__
    return made


def _torch_method(name: str) -> Any:
    """The method of torch's group, if it has it; this one is looked up under a name that cannot be called."""
    return ProcessGroup.__dict__.get("recv_anysource" if name == "recvAnysource" else name)


def _told(name: str) -> Callable[..., Any]:
    """The backend's method `name`, which leaves what it returns for `HookedProcessGroup`."""
    method = getattr(Collectives, name)

    def call(self: SmddpBackend, *args: Any, **options: Any) -> Any:
        _latest.work = method(self, *args, **options)
        return _latest.work

    return _renamed(name, call)


def _by_device(name: str) -> Callable[..., Any]:
    ours, theirs = getattr(SmddpProcessGroup, name), _torch_method(name)

    def call(self: MixedProcessGroup, *args: Any, **options: Any) -> Work:
        device = _device(args)
        return (ours if device is None or device in self._devices else theirs)(self, *args, **options)

    return _renamed(name, call)


def _through_torch(name: str) -> Callable[..., Any]:
    torch_method = _torch_method(name)

    def call(self: HookedProcessGroup, *args: Any, **options: Any) -> Work:
        _latest.work = None
        wrapped = torch_method(self, *args, **options)
        ours, _latest.work = _latest.work, None
        return wrapped if ours is None else ours

    return _renamed(name, call)


def _device(args: Any) -> str | None:
    """The type of the device of the first tensor among arguments, which may be lists, or lists of lists."""
    for arg in args:
        found = arg.device.type if isinstance(arg, Tensor) else _device(arg) if isinstance(arg, (list, tuple)) else None
        if found is not None:
            return found
    return None


for _name in METHODS:
    setattr(SmddpBackend, _name, _told(_name))
    if _torch_method(_name) is not None:
        setattr(MixedProcessGroup, _name, _by_device(_name))
        setattr(HookedProcessGroup, _name, _torch_method(_name) if _name in _OLD_NAMES else _through_torch(_name))
not_compiled(Collectives, SmddpBackend, SmddpProcessGroup, MixedProcessGroup, HookedProcessGroup, SmddpWork, DoneWork)
