"""The CUDA side of a process group: which stream a call runs on, what keeps its memory, and the `Work` it gives.

Order is kept by streams: a call waits for what the caller's current stream did before it, and `Work.wait()` makes the
current stream wait for the call. The host waits for neither. A synchronous call runs on the current stream itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import Work

from ._compat import survives_halving
from ._core import DeviceGroup
from ._libraries import library_dirs
from .errors import ArgumentError

if TYPE_CHECKING:
    from ._core import Communicator, Handle
    from .tensors import Span

_NO_LIMIT = timedelta(0)


class CudaSide:
    """Made with the group, connected at its first call with CUDA tensors, which all members make."""

    def __init__(self, communicator: Communicator, rail: Callable[[], Communicator | None]) -> None:
        """rail: connects the ranks with this one's local rank on all nodes; None where that makes no sense."""
        self._comm = communicator
        self._make_rail = rail
        self._rail: Communicator | None = None
        self._native: DeviceGroup | None = None
        self._device = -1
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def issue(
        self,
        name: str,
        device: int,
        call: tuple[Any, ...],
        source: Span,
        target: Span,
        results: list[Tensor],
        is_async: bool,
    ) -> CudaWork:
        """Enqueues one call; `call` is what `DeviceGroup.start` takes after the stream."""
        native = self._connected(name, device)
        current = torch.cuda.current_stream(device)
        stream = current
        if is_async:
            stream = self._own_stream(device)
            stream.wait_stream(current)
        handle = native.start(stream.cuda_stream, *call)
        if target.finish is not None:
            with torch.cuda.stream(stream):
                target.finish()
        if is_async:
            for tensor in _tensors((source.keep, target.keep, results)):
                tensor.record_stream(stream)
        return CudaWork(native, handle, results, stream)

    def synchronize(self) -> None:
        """Waits until the device has done what the current stream was given: a barrier is one for devices too."""
        if self._native is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def describe(self) -> str:
        return "" if self._native is None else self._native.describe()

    def shutdown(self) -> None:
        self._end(lambda native: native.shutdown())

    def abort(self, reason: str) -> None:
        self._end(lambda native: native.abort(reason))

    def _end(self, how: Callable[[DeviceGroup], None]) -> None:
        with self._lock:
            native, self._native = self._native, None
            if native is not None:
                how(native)
            if self._rail is not None:
                self._rail.shutdown()

    def _connected(self, name: str, device: int) -> DeviceGroup:
        native = self._native
        if native is None:
            with self._lock:
                if self._native is None:
                    self._rail = self._make_rail()
                    self._native = DeviceGroup(self._comm, self._rail, device, library_dirs())
                    self._device = device
                native = self._native
        if device != self._device:
            hint = "A group uses one device a process: the one of its first call with CUDA tensors"
            raise ArgumentError.of(name, "tensor", f"a tensor on cuda:{self._device}", f"one on cuda:{device}", hint)
        return native

    def _own_stream(self, device: int) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)
        return self._stream


def _tensors(kept: object) -> Sequence[Tensor]:
    if isinstance(kept, Tensor):
        return [kept] if kept.is_cuda else []
    if isinstance(kept, (list, tuple)):
        return [tensor for part in kept for tensor in _tensors(part)]
    return []


@survives_halving
class CudaWork(Work):
    """A call on CUDA tensors, enqueued. That it is over is known to the device first."""

    __slots__ = ("_event", "_future", "_handle", "_native", "_results", "_stream")

    def __init__(
        self, native: DeviceGroup, handle: Handle | None, results: list[Tensor], stream: torch.cuda.Stream
    ) -> None:
        Work.__init__(self)
        self._native = native
        self._handle = handle
        self._results = results
        self._stream = stream
        self._event = stream.record_event()
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Makes the current stream wait; raises the error of a call known to have failed. With a `timeout` the host
        waits too, and after so long raises TimeoutError."""
        if not isinstance(timeout, timedelta):
            raise TypeError(f"wait: argument 'timeout': expected a datetime.timedelta, given {timeout!r}")
        if timeout and self._handle is not None:
            self._handle.wait(timeout.total_seconds())
        self._raise_failure()
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether the device has done it, or it has failed."""
        return self._event.query() or self.exception() is not None

    def is_success(self) -> bool:
        """Whether it is over and went well."""
        return self._event.query() and self.exception() is None

    def exception(self) -> BaseException | None:
        """What the call, or its group, failed with, as far as is known."""
        if self._handle is not None:
            return self._handle.error()
        return self._native.failure()

    def _raise_failure(self) -> None:
        error = self._handle.error() if self._handle is not None else None
        if error is not None:
            raise error

    def result(self) -> list[Tensor]:
        """The output tensors, ordered behind the call on the current stream."""
        self.wait()
        return self._results

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the output tensors, complete at once: whoever reads it is ordered behind the call by streams."""
        if self._future is None:
            self._future = torch.futures.Future(devices=[self._stream.device])
            with torch.cuda.stream(self._stream):
                self._future.set_result(self._results)
        return self._future

    getFuture = get_future
