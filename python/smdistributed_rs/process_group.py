"""The two classes torch sees (see `backend`): each is a carrier of `Collectives`."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

from .collectives import Collectives

if TYPE_CHECKING:
    from torch.distributed import Store

    from ._core import Communicator

_TorchBackend = torch._C._distributed_c10d.Backend

_alive: dict[int, SmddpBackend] = {}
"""Every backend that is not shut down. Torch may hold only the C++ half of one (TORCH_DISTRIBUTED_DEBUG=DETAIL does),
and the Python half would be collected."""

_STORE_ENDS = 0.03
"""Seconds rank 0 may need, after a group of all ranks has ended, until the store it serves has ended too."""


class SmddpBackend(Collectives, _TorchBackend):
    """The backend of one group, as `torch.distributed` plugs it into a group of its own."""

    def __init__(self, communicator: Communicator, timeout: timedelta, members: list[int]) -> None:
        _TorchBackend.__init__(self, communicator.rank, communicator.size)
        Collectives.__init__(self, communicator)
        self._options = _TorchBackend.Options("smddp", timeout)
        self._options.global_ranks_in_group = members
        self._is_world = not members
        _alive[id(self)] = self

    @property
    def options(self) -> object:
        return self._options

    def set_timeout(self, timeout: timedelta) -> None:
        Collectives.set_timeout(self, timeout)
        self._options._timeout = timeout

    def shutdown(self) -> None:
        Collectives.shutdown(self)
        ended = _alive.pop(id(self), None)
        # A rank that calls init_process_group again at once would find the store that rank 0 is about to end, and be
        # left without one. (Ending a gloo group takes 20 ms, which hides the same race.)
        if ended and self._is_world and self._rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(_STORE_ENDS)

    def abort(self) -> None:
        Collectives.abort(self)
        _alive.pop(id(self), None)


class SmddpProcessGroup(Collectives, ProcessGroup):
    """A group of its own, so that `torch.distributed` calls these methods without a detour. Its backend serves those
    who ask for the backend of a device; both are over one communicator."""

    def __init__(self, store: Store, communicator: Communicator, backend: SmddpBackend) -> None:
        ProcessGroup.__init__(self, store, communicator.rank, communicator.size)
        Collectives.__init__(self, communicator)
        self._backend = backend
        self._set_default_backend(ProcessGroup.BackendType.CUSTOM)
        for device in ("cpu", "cuda"):
            self._register_backend(torch.device(device), ProcessGroup.BackendType.CUSTOM, backend)

    def set_timeout(self, timeout: timedelta) -> None:
        self._backend.set_timeout(timeout)

    def shutdown(self) -> None:
        self._backend.shutdown()

    def abort(self) -> None:
        self._backend.abort()
