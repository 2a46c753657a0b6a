"""The classes torch sees (see `backend`): each is a carrier of `Collectives`."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from ._compat import HAS_BACKENDS
from ._core import AllReduce
from ._dynamo import not_compiled
from ._new_group import Other
from .collectives import METHODS, Collectives
from .errors import ArgumentError, BootstrapError, UnsupportedError
from .work import DONE, DoneWork, ForGraphs, SmddpWork

if TYPE_CHECKING:
    from torch.distributed import Store, Work

    from ._core import Communicator
    from .cuda import CudaSide

_TorchBackend: Any = torch._C._distributed_c10d.Backend if HAS_BACKENDS else object

_alive: dict[int, SmddpBackend] = {}
"""Every backend that is not shut down. Torch may hold only the C++ half of one (TORCH_DISTRIBUTED_DEBUG=DETAIL does),
and the Python half would be collected."""

_STORE_ENDS = 0.03
"""Seconds rank 0 may need, after a group of all ranks has ended, until the store it serves has ended too."""


class _Latest(threading.local):
    """What a backend's method returned last on this thread, while somebody listens."""

    listens = False
    work: Any = None


_latest = _Latest()


@dataclass
class Seat:
    """What every carrier is made of."""

    store: Store
    communicator: Communicator
    timeout: timedelta
    members: list[int]
    """global ranks; none: the group is that of all ranks"""
    cuda: CudaSide
    bound_to: torch.device | None = None
    """what torch was given as `device_id`"""


class Split(Protocol):
    """Makes the group of some members of another, this rank among them, for some of its device types."""

    def __call__(
        self,
        seat: Seat,
        devices: list[str],
        others: dict[str, Other],
        ranks: list[int],
        limit: timedelta,
        name: str,
        text: str,
    ) -> SmddpProcessGroup: ...


class SmddpBackend(Collectives, _TorchBackend):
    """The backend of one group, as torch's C++ half calls it."""

    def __init__(self, seat: Seat) -> None:
        _TorchBackend.__init__(self, seat.communicator.rank, seat.communicator.size)
        Collectives.__init__(self, seat.communicator, seat.cuda)
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


class _OfAKind:
    """What torch before 2.14 finds as the backend of a kind of device: nothing it could do something with."""

    supports_splitting = supports_coalescing = supports_time_estimate = False


class SmddpProcessGroup(Collectives, ProcessGroup):
    """A group of its own, so that `torch.distributed` calls these methods without a detour. Its backend serves those
    who ask for the backend of a device; both are over one communicator."""

    def __init__(
        self, seat: Seat, devices: list[str], others: dict[str, Other], wrap: Callable[[Any], Any], split: Split
    ) -> None:
        """devices: types served here; others: by the device types they serve; wrap: makes of our backend the one to be
        registered; split: makes a group of some of the members."""
        size = (seat.communicator.rank, seat.communicator.size)
        if HAS_BACKENDS:
            ProcessGroup.__init__(self, seat.store, *size)
        else:
            ProcessGroup.__init__(self, *size)
        Collectives.__init__(self, seat.communicator, seat.cuda)
        self._seat = seat
        self._make_part = split
        self._devices = frozenset(devices)
        self._others = others
        self._served = self._devices.union(others)
        self._registered: list[tuple[str, Any, Any]] = []
        self._group_name = self._group_desc = ""
        if HAS_BACKENDS:
            # Backends take it over from their group. An older torch would split groups for it that are not NCCL's.
            self.bound_device_id = seat.bound_to
            self._backend = SmddpBackend(seat)
            self._set_default_backend(ProcessGroup.BackendType.CUSTOM)
            ours = wrap(self._backend)
            self._registered += [(device, ProcessGroup.BackendType.CUSTOM, ours) for device in devices]
        self._registered += _in_slots_of_their_own(others, [kind for _, kind, _ in self._registered])
        for device, kind, backend in self._registered:
            self._register_backend(torch.device(device), kind, backend)
        if type(self) is SmddpProcessGroup:
            long = weakref.WeakMethod(self.allreduce)
            self.allreduce = AllReduce(seat.communicator, self._profiler, DONE, long)  # type: ignore[method-assign]

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

        @property
        def _device_types(self) -> list[torch.device]:
            """Checkpoints and FSDP ask for these."""
            return [torch.device(kind) for kind in sorted(self._served)]

        def _get_backend(self, device: torch.device) -> Any:
            """This group itself for one device, as which torch asks only to connect it (`device_id`). For a kind of
            device, whose backend torch asks for to split it, end it or set its limit, one that can none of these."""
            if device.type in self._devices:
                return _OfAKind if device.index is None else self
            return ProcessGroup._get_backend(self, device)

        # Torch before 2.5 does not look for those.
        _set_group_name, _set_group_desc = setGroupName, setGroupDesc
        group_name, group_desc = property(getGroupName), property(getGroupDesc)

    def set_timeout(self, timeout: timedelta) -> None:
        Collectives.set_timeout(self, timeout)
        if HAS_BACKENDS:
            self._backend.set_timeout(timeout)
        for other in self._distinct_others():
            # The old name is that of those an older torch knows to have limits.
            set_limit = getattr(other, "set_timeout", None) or getattr(other, "_set_default_timeout", None)
            if set_limit is not None:
                set_limit(timeout)

    def _distinct_others(self) -> list[Any]:
        return list({id(other.backend): other.backend for other in self._others.values()}.values())

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
        for other in self._distinct_others():
            getattr(other, how)()
        getattr(Collectives, how)(self)
        if HAS_BACKENDS:
            getattr(self._backend, how)()

    def start_coalescing(self, device: torch.device | None = None) -> None:
        if device is None or device.type in self._devices:
            Collectives.start_coalescing(self)
        else:
            self._plain._start_coalescing(device)

    def end_coalescing(self, device: torch.device | None = None) -> Work:
        if device is None or device.type in self._devices:
            return Collectives.end_coalescing(self)
        return self._plain._end_coalescing(device)

    _start_coalescing, _end_coalescing = start_coalescing, end_coalescing

    def split_group(
        self,
        ranks: list[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: list[torch.device] | None = None,
    ) -> ProcessGroup | None:
        """A group of some of this group's ranks; None on those who are none of its members. All ranks call this.
        device_types: those it serves; all of this group's if none are named."""
        limit, name, text = timeout or self._seat.timeout, str(group_name), group_desc or ""
        wanted = self._served if device_types is None else {device.type for device in device_types}
        theirs = [entry for entry in self._registered if entry[0] in wanted.intersection(self._others)]
        child = None
        if theirs:
            for device, _, backend in theirs:
                _check_splits(device, backend)
            # Torch's own group makes options for them. Nobody is left out: some backends need all ranks for a split.
            child = _plain_group(self, theirs).split_group(ranks, limit, opts, name, text)
        ours = sorted(self._devices.intersection(wanted))
        if not ours or self._rank not in ranks:
            return child
        part = lambda device: child._get_backend(torch.device(device))  # noqa: E731
        others = {device: Other(kind, part(device)) for device, kind, _ in theirs} if child else {}
        return self._make_part(self._seat, ours, others, ranks, limit, name, text)


class MixedProcessGroup(SmddpProcessGroup):
    """A group in which others serve other devices: calls with their tensors go to a group of torch's own."""

    def __init__(self, *args: Any) -> None:
        SmddpProcessGroup.__init__(self, *args)
        self._plain = _plain_group(self)


class HookedProcessGroup(SmddpProcessGroup):
    """A group whose calls all go through a group of torch's own to the backends, so that torch's hooks see them.

    What comes back from there is a wrapper that can only be waited for; callers get the `Work` it wraps. (Methods of
    the base class are no way into torch: they keep the interpreter locked while C++ blocks.)"""

    def __init__(self, *args: Any) -> None:
        SmddpProcessGroup.__init__(self, *args)
        self._plain = _plain_group(self)
        if os.environ.get("TORCH_DIST_NAN_CHECK", "0") == "1":
            distributed_c10d.NanCheckHook.attach(self._plain)
        if records_flights() and hasattr(distributed_c10d, "FlightRecorderHook"):
            ranks = self._seat.members or list(range(self._size))
            self._recorder = distributed_c10d.FlightRecorderHook.attach(self._plain, ranks)


def records_flights() -> bool:
    """Whether somebody asked for torch's flight recorder. (By default it is on, where it costs nothing extra.)"""
    size = os.environ.get("TORCH_FR_BUFFER_SIZE") or os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE") or "0"
    return size != "0"


def _in_slots_of_their_own(others: dict[str, Other], taken: list[Any]) -> list[tuple[str, Any, Any]]:
    """(device type, `BackendType`, backend) to register. A group has one backend of a type: of a second one, such as
    another that torch does not know the type of, it would make the first again."""
    found: dict[int, Any] = {}
    # Rarer ones first: some of torch's functions look for gloo's or NCCL's by their type.
    free = [kind for kind in reversed(ProcessGroup.BackendType.__members__.values()) if kind not in _NOT_FREE]
    wanted = [other.kind for other in others.values()]
    for kind, backend in others.values():
        if id(backend) not in found:
            own = kind if kind not in taken else next(one for one in free if one not in [*taken, *wanted])
            found[id(backend)] = own
            taken.append(own)
    return [(device, found[id(other.backend)], other.backend) for device, other in others.items()]


_NOT_FREE = (ProcessGroup.BackendType.UNDEFINED, ProcessGroup.BackendType.CUSTOM)


def _check_splits(device: str, backend: Any) -> None:
    if not getattr(backend, "supports_splitting", False):
        raise BootstrapError(
            f"split_group: the group's backend '{device}:{backend.name()}' cannot be split. Use new_group, or name the "
            "devices of other backends only"
        )


def _plain_group(group: SmddpProcessGroup, registered: list[tuple[str, Any, Any]] | None = None) -> ProcessGroup:
    """A group of torch's own with the backends of `group`, or some of them."""
    seat = group._seat
    plain = ProcessGroup(seat.store, seat.communicator.rank, seat.communicator.size)
    registered = registered or group._registered
    if HAS_BACKENDS:
        plain.bound_device_id = seat.bound_to
    plain._set_default_backend(registered[0][1])
    for device, kind, backend in registered:
        plain._register_backend(torch.device(device), kind, backend)
    plain._set_group_name(seat.communicator.name)
    plain._set_group_desc("")
    return plain


def _told(name: str) -> Callable[..., Any]:
    """The backend's method `name`, which leaves what it returns for `HookedProcessGroup`."""
    method = getattr(Collectives, name)

    def call(self: SmddpBackend, *args: Any, **options: Any) -> Any:
        work = method(self, *args, **options)
        if _latest.listens:
            _latest.work = work
        return work

    return _as(name, call)


def _by_device(name: str) -> Callable[..., Any]:
    ours = getattr(SmddpProcessGroup, name)

    def call(self: MixedProcessGroup, *args: Any, **options: Any) -> Work:
        first = next(_tensors(args), None)
        if first is None or first.device.type in self._devices:
            return ours(self, *args, **options)
        return getattr(self._plain, _callable(name))(*args, **options)

    return _as(name, call)


def _through_torch(name: str) -> Callable[..., Any]:
    """Where torch has no way to a backend for a call's tensors, it is ours to say what is wrong with them."""
    ours = getattr(SmddpProcessGroup, name)

    def call(self: HookedProcessGroup, *args: Any, **options: Any) -> Work:
        # For tensors of meta, torch does nothing and reports success.
        if not all(tensor.device.type in self._served for tensor in _tensors(args)):
            return ours(self, *args, **options)
        _check_written(name, args)
        listened = _latest.listens
        _latest.listens, _latest.work = True, None
        try:
            wrapped = getattr(self._plain, _callable(name))(*args, **options)
            work = _latest.work
        except NotImplementedError:
            return ours(self, *args, **options)
        finally:
            # Kept no longer: it holds its tensors.
            _latest.listens, _latest.work = listened, None
        return wrapped if work is None else work

    return _as(name, call)


def _check_written(name: str, args: tuple[Any, ...]) -> None:
    """Of a tensor that is computed when it is read, torch passes a copy on its way to the backends, with which the
    results are lost. What is only read may be one. (Everything but `send` writes to its first argument.)"""
    if name != "send" and any(tensor.is_neg() or tensor.is_conj() for tensor in _tensors(args[:1])):
        given = "one whose memory holds other values (is_neg() or is_conj()), where torch's hooks see the calls"
        hint = "Pass the tensor that resolve_neg().resolve_conj() gives"
        raise ArgumentError.of(name, "tensor", "a tensor whose elements are in memory", given, hint)


_HOOKS = ("register_pre_hook", "unregister_pre_hook", "register_post_hook", "unregister_post_hook")


def _without_hooks(name: str) -> Callable[..., Any]:
    def call(self: SmddpProcessGroup, *_: Any, **__: Any) -> None:
        error = UnsupportedError(
            f"{name}: no hook would see the calls of group '{self._comm.name}', which pass torch's C++ half by. Set "
            "SMDDP_TORCH_GROUP=backend in the environment before the group is made"
        )
        error.op, error.reduction, error.dtype = name, "", ""
        raise error

    return _named(name, call, f"Refused, as by all groups but `HookedProcessGroup`: {name} would do nothing.")


def _with_hooks(name: str) -> Callable[..., Any]:
    def call(self: HookedProcessGroup, *args: Any, **options: Any) -> None:
        getattr(self._plain, name)(*args, **options)

    return _named(name, call, "As torch's, of the group that the calls go through.")


def _named(name: str, call: Callable[..., Any], text: str) -> Callable[..., Any]:
    call.__name__, call.__doc__ = name, text
    return call


def _as(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    return _named(name, call, getattr(Collectives, name).__doc__)


def _callable(name: str) -> str:
    """The name torch's own group has a method under; C++ looks one of them up under another."""
    return "recv_anysource" if name == "recvAnysource" else name


def _tensors(args: Any) -> Iterator[Tensor]:
    """The tensors among arguments, which may be lists, or lists of lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


for _name in METHODS:
    setattr(SmddpBackend, _name, _told(_name))
    if hasattr(ProcessGroup, _callable(_name)):
        setattr(MixedProcessGroup, _name, _by_device(_name))
        setattr(HookedProcessGroup, _name, _through_torch(_name))
for _name in _HOOKS:
    # Older torches have none.
    if hasattr(ProcessGroup, _name):
        setattr(SmddpProcessGroup, _name, _without_hooks(_name))
        setattr(HookedProcessGroup, _name, _with_hooks(_name))

not_compiled(
    Collectives, SmddpBackend, SmddpProcessGroup, MixedProcessGroup, HookedProcessGroup, SmddpWork, DoneWork, ForGraphs
)
