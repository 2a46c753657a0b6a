"""The CUDA side of a process group: which stream a call runs on, what keeps its memory, and the `Work` it gives.

Order is kept by streams: a call waits for what the caller's current stream did before it, and `Work.wait()` makes the
current stream wait for the call. The host waits for neither, as long as streams have room. A synchronous call runs on
the current stream itself.

Messages go from device to device in groups that were connected to their device when they were made (`device_id`) and
whose calls NCCL carries alone. Then every rank knows that the others do so too, as it does not where a group connects
at the first collective, which may come before a message on one rank and behind it on another.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import Work

from ._compat import HAS_BACKENDS, survives_halving
from ._core import DeviceGroup
from ._libraries import library_dirs
from .errors import AbortedError, ArgumentError, UnsupportedError
from .tensors import current
from .work import DONE, NO_LIMIT, Together, graphs_may_wait, register, seconds_of

if TYPE_CHECKING:
    from datetime import timedelta

    from ._core import Communicator, DeviceHandle
    from .tensors import Span
    from .work import SmddpWork


def choose_device(local_rank: int) -> None:
    """Makes the local rank's device CUDA's current one as soon as CUDA is first used. Who uses CUDA before has chosen;
    who chooses later, by `torch.cuda.set_device`, has the last word. Programs that use no CUDA see nothing of it."""

    def choose() -> None:
        count = torch.cuda.device_count()
        if count:
            torch.cuda.set_device(local_rank % count)

    # What manual_seed uses: torch itself calls it back when it starts CUDA.
    if not torch.cuda.is_initialized():
        torch.cuda._lazy_call(choose)


class Message(NamedTuple):
    """To or from another rank, between devices."""

    peer: int
    is_sent: bool
    span: Span
    tensor: Tensor


class _Batch(threading.local):
    """Messages of one thread that are to move together, and works of those that went another way; None: no batch is
    open."""

    messages: list[Message] | None = None
    works: list[Work]


class CudaSide:
    """Made with the group, connected at its first call with CUDA tensors, which all members make, or by `connect`."""

    carries_messages = False
    """Whether messages between CUDA tensors go from device to device; the same on all ranks."""

    def __init__(self, communicator: Communicator, meet: Callable[[str, list[int]], Communicator]) -> None:
        """meet: connects some of the group's ranks, this one among them, under a name of theirs."""
        self._comm = communicator
        self._meet = meet
        self._own: list[Communicator] = []
        """The CUDA side's communicators beside the group's: of all ranks, and of the rail."""
        self._native: DeviceGroup | None = None
        self._device = -1
        self._ended = ""
        self._stream: Any = None
        self._batch = _Batch()
        self._foreign: deque[tuple[DeviceHandle, list[Tensor]]] = deque()
        """Of calls on the group's stream, which is past them in this order."""
        self._foreign_for_good: list[list[Tensor]] = []
        """Of calls whose end nothing tells: failed ones, and what graphs replay."""
        self._foreign_lock = threading.Lock()
        self._lock = threading.Lock()

    @property
    def device(self) -> int:
        """Number of the group's device; -1: not connected yet."""
        return self._device

    def connect(self, device: int) -> None:
        """Connects now. Every member calls it when the group is made."""
        native = self._connected("init_process_group", device)
        # An older torch does not tell us where a batch begins, and messages one by one would wait for each other.
        self.carries_messages = HAS_BACKENDS and native.carries_messages

    def message(self, name: str, message: Message) -> Work:
        """Enqueues one message, or puts it into the open batch."""
        self._connected(name, message.span.device)
        if self._batch.messages is not None:
            self._batch.messages.append(message)
            return DONE
        return self._exchange([message])

    def begin_batch(self) -> None:
        """This thread's messages move together from now on, at `end_batch`."""
        self._batch.messages, self._batch.works = [], []

    def note(self, work: SmddpWork | CudaWork) -> Work:
        """`work`, as that of an operation that is part of the open batch, if there is one, and under way already."""
        if graphs_may_wait():
            register(work)
        if self._batch.messages is not None:
            self._batch.works.append(work)
        return work

    def end_batch(self) -> Work:
        """The work of everything since `begin_batch`."""
        messages, works = self._batch.messages, self._batch.works
        self._batch.messages = None
        if messages:
            works.append(self._exchange(messages))
        return works[0] if len(works) == 1 else Together(works, self._stream) if works else DONE

    def _exchange(self, messages: list[Message]) -> Work:
        native, stream = self._connected("send and recv", self._device), self._streams(self._device, True)
        tensors = [m.tensor for m in messages]
        given = [[m.span.keep for m in messages], tensors]
        self._keep(given)
        try:
            handle = native.exchange(*stream, [(m.peer, m.is_sent, *m.span.memory) for m in messages])
        except BaseException as error:
            self._keep_of_failed(error, given)
            raise
        self._keep_foreign(handle, given)
        finishes = [m.span.finish for m in messages if m.span.finish is not None]
        if finishes:
            with current(self._stream):
                for finish in finishes:
                    finish()
            handle.extend(stream[0])
        work = CudaWork(native, handle, tensors, self._stream)
        if graphs_may_wait():
            register(work)
        return work

    def issue(
        self,
        name: str,
        device: int,
        call: tuple[Any, ...],
        source: Span,
        target: Span,
        results: list[Tensor],
        is_async: bool,
    ) -> Work:
        """Enqueues one call; `call` is what `DeviceGroup.start` takes after the streams."""
        native = self._connected(name, device)
        stream, behind = self._streams(device, is_async)
        given = [source.keep, target.keep, results]
        if is_async:
            self._keep(given)
        try:
            handle = native.start(stream, behind, *call)
        except BaseException as error:
            if is_async:
                self._keep_of_failed(error, given)
            raise
        if is_async:
            self._keep_foreign(handle, given)
        if target.finish is not None:
            with current(self._stream if is_async else torch.cuda.current_stream(device)):
                target.finish()
            handle.extend(stream)
        return self.note(CudaWork(native, handle, results, self._stream)) if is_async else DONE

    def short(
        self, collective: int, code: int, root: int, output: Tensor, input: Tensor | None, limit: float | None,
        is_async: bool,
    ) -> Work | None:  # fmt: skip
        """The short way; None: nothing was done, these tensors need the long one."""
        native = self._native
        if native is None:
            return None
        stream, behind = self._streams(self._device, is_async)
        try:
            handle = native.start_tensors(stream, behind, collective, code, root, output, input, limit)
        except BaseException as error:
            if is_async:
                self._keep([output, input])
                self._keep_of_failed(error, [output, input])
            raise
        if handle is None:
            return None
        if not is_async:
            return DONE
        output.record_stream(self._stream)
        if input is not None:
            input.record_stream(self._stream)
        if self._foreign or not (_is_torchs(output) and (input is None or _is_torchs(input))):
            self._keep_foreign(handle, [output, input])
        return self.note(CudaWork(native, handle, [output], self._stream))

    def _keep(self, given: object) -> None:
        """Their memory is given to nobody else before what the group's stream holds is over: of a call that fails too,
        since a part of it may be enqueued."""
        for tensor in _tensors(given):
            tensor.record_stream(self._stream)

    def _keep_foreign(self, handle: DeviceHandle, given: object) -> None:
        """Keeps tensors in memory that torch's allocator has not given, and so knows nothing of, until the call is
        over, whoever keeps its work; of one captured in a graph, which is never over, until the group ends."""
        foreign = _foreign(given)
        if foreign or self._foreign:
            with self._foreign_lock:
                while self._foreign and _is_over(self._foreign[0][0]):
                    self._foreign.popleft()
                if foreign and handle.is_captured():
                    self._foreign_for_good.append(foreign)
                elif foreign:
                    self._foreign.append((handle, foreign))

    def _keep_of_failed(self, error: BaseException, given: object) -> None:
        """As `_keep_foreign`, of a call that failed: a part of it may be enqueued, unless it was refused."""
        foreign = _foreign(given)
        if foreign and not isinstance(error, (ArgumentError, UnsupportedError)):
            with self._foreign_lock:
                self._foreign_for_good.append(foreign)

    def _streams(self, device: int, is_async: bool) -> tuple[int, int | None]:
        """(the one a call runs on, another it runs behind)"""
        behind = _current_stream(device)
        if not is_async:
            return behind, None
        if self._stream is None:
            # One for good, of whichever thread comes first (the program's, autograd's): memory is kept for it by name.
            with self._lock:
                if self._stream is None:
                    self._stream = torch.cuda.Stream(device, priority=-1)
        return self._stream.cuda_stream, behind

    def synchronize(self) -> None:
        """Waits until the device has done what the current stream was given: a barrier is one for devices too. Raises
        what a call has failed with, as far as is known."""
        native = self._native
        if native is None:
            return
        torch.cuda.current_stream(self._device).synchronize()
        error = native.failure()
        if error is not None:
            raise error

    def set_timeout(self, seconds: float) -> None:
        """The time limit of every later call."""
        for communicator in tuple(self._own):
            communicator.set_timeout(seconds)

    def describe(self) -> str:
        return "" if self._native is None else self._native.describe()

    def shutdown(self) -> None:
        self._end("the group was destroyed", lambda native: native.shutdown())

    def abort(self, reason: str) -> None:
        # First who waits for other ranks, with the lock: in a meeting of the CUDA sides, say.
        for communicator in tuple(self._own):
            communicator.abort(reason)
        self._end(reason, lambda native: native.abort(reason))

    def _end(self, reason: str, how: Callable[[DeviceGroup], None]) -> None:
        with self._lock:
            self._ended = reason
            native, self._native = self._native, None
            if native is not None:
                try:
                    how(native)
                except BaseException:
                    # A signal has ended the wait for what is under way: the next try waits for it again.
                    self._native = native
                    raise
            self._foreign.clear()
            self._foreign_for_good.clear()
            self._leave()

    def _connected(self, name: str, device: int) -> DeviceGroup:
        native = self._native
        if native is None:
            with self._lock:
                if self._native is None:
                    self._check_alive(name)
                    self._native = self._made(device)
                    self._device = device
                native = self._native
        if device != self._device:
            hint = "A group uses one device a process: the one of its first call with CUDA tensors"
            raise ArgumentError.of(name, "tensor", f"a tensor on cuda:{self._device}", f"one on cuda:{device}", hint)
        return native

    def _made(self, device: int) -> DeviceGroup:
        has_own, rail = DeviceGroup.wanted(self._comm)
        try:
            host = self._met("cuda", list(range(self._comm.size))) if has_own else self._comm
            return DeviceGroup(host, rail and self._met(f"rail{rail[0]}", rail), device, library_dirs())
        except BaseException:
            self._leave()
            raise

    def _met(self, label: str, ranks: list[int]) -> Communicator:
        met = self._meet(label, ranks)
        self._own.append(met)
        return met

    def _leave(self) -> None:
        """Ends the communicators of its own, later than what uses them."""
        while self._own:
            self._own.pop().shutdown()

    def _check_alive(self, name: str) -> None:
        """Nobody would come to connect a group that has ended, or failed."""
        if self._ended:
            raise AbortedError.of(self._comm.rank, self._comm.name, name, self._ended)
        error = self._comm.failure()
        if error is not None:
            raise error


def _tensors(kept: object) -> Sequence[Tensor]:
    if isinstance(kept, Tensor):
        return [kept] if kept.is_cuda else []
    if isinstance(kept, (list, tuple)):
        return [tensor for part in kept for tensor in _tensors(part)]
    return []


def _is_torchs(tensor: Tensor) -> bool:
    """Whether the memory is torch's own allocator's, which hears by `record_stream` that a stream uses it: what comes
    from elsewhere (DLPack, another process) is of one size, and allocators of others need not listen."""
    return tensor.untyped_storage().resizable() and not _allocator_is_anothers()


@functools.cache
def _allocator_is_anothers() -> bool:
    """It cannot be changed once it has given memory."""
    return torch.cuda.get_allocator_backend() == "pluggable"


def _foreign(given: object) -> list[Tensor]:
    return [tensor for tensor in _tensors(given) if not _is_torchs(tensor)]


def _is_over(handle: DeviceHandle) -> bool:
    """A device that cannot be asked may be at work."""
    try:
        return handle.is_past()
    except RuntimeError:
        return False


@survives_halving
class CudaWork(Work):
    """A call on CUDA tensors, enqueued. That it is over is known to the device first."""

    __slots__ = ("_future", "_handle", "_native", "_results", "_stream")

    def __init__(
        self, native: DeviceGroup, handle: DeviceHandle, results: list[Tensor], stream: torch.cuda.Stream
    ) -> None:
        Work.__init__(self)
        self._native = native
        self._handle = handle
        self._results = results
        self._stream = stream
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Makes the current stream wait; raises the error of a call known to have failed. With a `timeout` the host
        waits too, and after so long raises TimeoutError."""
        seconds = seconds_of(timeout)
        if seconds is not None:
            self._native.wait(self._handle, seconds)
        error = self._handle.error()
        if error is not None:
            raise error
        self._handle.order(_current_stream(self._stream.device_index))
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether the device has done it, or it has failed."""
        return self._handle.is_past() or self.exception() is not None

    def is_success(self) -> bool:
        """Whether it is over and went well."""
        return self._handle.is_past() and self.exception() is None

    def exception(self) -> BaseException | None:
        """What the call, or its group, failed with, as far as is known."""
        return self._handle.error() or self._native.failure()

    def result(self) -> list[Tensor]:
        """The output tensors, ordered behind the call on the current stream."""
        self.wait()
        return self._results

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the output tensors, complete at once: whoever reads it is ordered behind the call by streams."""
        if self._future is None:
            self._future = torch.futures.Future(devices=[self._stream.device])
            with current(self._stream):
                self._future.set_result(self._results)
        return self._future

    getFuture = get_future

    def for_graphs(self) -> Work:
        """What torch is to keep of this for graphs that wait: nothing of the tensors, as none may ever do so."""
        return CudaWork(self._native, self._handle, [], self._stream)


def _current_stream(device: int) -> int:
    """Address of the caller's current stream."""
    return torch._C._cuda_getCurrentRawStream(device)
