"""What an asynchronous call returns: torch's `Work`, over a native handle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed import Work

from ._compat import survives_halving
from .tensors import current

if TYPE_CHECKING:
    from ._core import Handle
    from .tensors import Once

NO_LIMIT = timedelta(0)
"""How torch says that a `wait` was given no time limit of its own."""


_c10d: Any = torch._C._distributed_c10d
graphs_may_wait: Callable[[], bool] = getattr(_c10d, "_allow_inflight_collective_as_graph_input", lambda: False)
"""Whether compiled graphs may be given tensors of calls under way (`allow_inflight_collective_as_graph_input_ctx`)."""


class WithResults(Protocol):
    """A work of ours, whichever device it is on."""

    _results: list[Tensor]

    def for_graphs(self) -> Work: ...


def register(work: WithResults) -> None:
    """Tells torch whose tensors they are, so that a graph's `wait_tensor` waits for the call. Torch's own group does so
    where a method is not overridden."""
    kept = work.for_graphs()
    for tensor in work._results:
        _c10d._register_work(tensor, kept)


def seconds_of(timeout: timedelta) -> float | None:
    """How long a `wait` may take; None: it was given no limit."""
    if not isinstance(timeout, timedelta):
        raise TypeError(f"wait: argument 'timeout': expected a datetime.timedelta, given {timeout!r}")
    return timeout.total_seconds() if timeout else None


@survives_halving
class SmddpWork(Work):
    """An operation under way.

    `result()` and the future's value are the list of output tensors. The memory of the operation stays alive until it
    is over, whether or not anybody keeps this object.
    """

    __slots__ = ("_finish", "_handle", "_outcome", "_results")

    def __init__(self, handle: Handle, results: list[Tensor], finish: Once | None = None) -> None:
        Work.__init__(self)
        self._handle = handle
        self._results = results
        self._finish = finish
        self._outcome: _Outcome | None = None
        if finish is not None:
            finish.follow(handle)

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Waits until the operation is over, and what was to be done `then`, and raises its error. `timeout`:
        TimeoutError after so long; 0: the group's time limit decides."""
        try:
            self._handle.wait(seconds_of(timeout))
        finally:
            if self._outcome is not None:
                self._outcome.settle(self._handle)
        if self._finish is not None:
            self._finish()
        return True

    def synchronize(self) -> None:
        """As `wait`: CPU tensors have no stream to order after."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether the operation is over, well or not."""
        if not self._handle.is_done():
            return False
        if self._outcome is not None:
            self._outcome.settle(self._handle)
        if self._finish is not None and self._handle.error() is None:
            self._finish()
        return True

    def is_success(self) -> bool:
        """Whether the operation is over and went well."""
        return self.is_completed() and self._handle.error() is None

    def exception(self) -> BaseException | None:
        """What the operation failed with."""
        return self._handle.error()

    def result(self) -> list[Tensor]:
        """The output tensors; waits for them."""
        self.wait()
        return self._results

    def source_rank(self) -> int:
        """The group rank a message came from."""
        rank = self._handle.source()
        if rank is None:
            raise RuntimeError("source_rank() is known of a receive only; of one from any rank, once it is over")
        return rank

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the output tensors. Only one that was asked for is ever completed: by a thread that takes the
        interpreter once for it, or by whoever waits."""
        if self._outcome is None:
            self._outcome = _Outcome(self._results, self._finish)
            if self._handle.is_done():
                self._outcome.settle(self._handle)
            else:
                self._handle.on_done(self._outcome.complete)
        return self._outcome.future

    getFuture = get_future

    def for_graphs(self) -> Work:
        """What torch is to keep of this for graphs that wait."""
        return ForGraphs(self)


@survives_halving
class ForGraphs(Work):
    """An operation a compiled graph may wait for, or never: torch keeps this until one does, so it lets go of the
    tensors when the operation has ended well."""

    __slots__ = ("_work",)

    def __init__(self, work: SmddpWork) -> None:
        Work.__init__(self)
        self._work: SmddpWork | None = work
        work._handle.on_done(self._let_go)

    def _let_go(self, error: BaseException | None) -> None:
        work = self._work
        if error is None and work is not None:
            work.wait()
            self._work = None

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """As the operation's."""
        work = self._work
        return work is None or work.wait(timeout)


class _Outcome:
    """Completes a future, as its operation ended.

    A future that fails must do so for C++ readers too (DDP's are), and crashes them if it carries an exception as its
    value, as `Future.set_exception` makes it. Torch makes a real failure only of what a `then` callback raises; so the
    future is that of a callback, and its error a RuntimeError that quotes ours."""

    __slots__ = ("_error", "_finish", "_is_complete", "_lock", "_results", "_trigger", "future")

    def __init__(self, results: list[Tensor], finish: Once | None) -> None:
        self._results, self._finish = results, finish
        self._error: BaseException | None = None
        # One that a callback may enter again, which waits for its own operation.
        self._lock = threading.RLock()
        self._is_complete = False
        self._trigger: torch.futures.Future[None] = torch.futures.Future()
        self.future = self._trigger.then(self._value)

    def complete(self, error: BaseException | None) -> None:
        """Completes the future, once, whichever thread comes first, and runs what was to be done `then`; the others
        wait for that."""
        with self._lock:
            if not self._is_complete:
                self._is_complete, self._error = True, error
                self._trigger.set_result(None)

    def settle(self, handle: Handle) -> None:
        """Completes the future if the operation is over."""
        if handle.is_done():
            self.complete(handle.error())

    def _value(self, _: object) -> list[Tensor]:
        if self._error is not None:
            raise self._error
        if self._finish is not None:
            self._finish()
        return self._results


@survives_halving
class Together(Work):
    """Several operations, waited for as one."""

    def __init__(self, works: list[Work], stream: torch.cuda.Stream | None = None) -> None:
        """stream: the one that those of them run on that are a device's."""
        Work.__init__(self)
        self._works = works
        self._stream = stream

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Waits for all of them, for at most `timeout` each, and raises the first error."""
        return all(work.wait(timeout) for work in self._works)

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether all are over."""
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Whether all are over and went well."""
        return all(work.is_success() for work in self._works)

    def exception(self) -> BaseException | None:
        """The first one's that failed."""
        return next(filter(None, (work.exception() for work in self._works)), None)

    def result(self) -> list[Tensor]:
        """The tensors of all; waits for them."""
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the tensors of all. Whoever reads it is ordered behind the device's by streams."""
        futures: Any = torch.futures.collect_all([work.get_future() for work in self._works])
        if self._stream is None:
            return futures.then(_tensors_of_all)  # type: ignore[no-any-return]
        return _on_stream(futures, self._stream)

    getFuture = get_future


def _tensors_of_all(futures: Any) -> list[Tensor]:
    return [tensor for each in futures.value() for tensor in each.value()]


def _on_stream(futures: Any, stream: torch.cuda.Stream) -> torch.futures.Future[list[Tensor]]:
    """The tensors of all futures, ready when `stream` is past what it has been given. A future for several others knows
    nothing of devices; and one that fails must do so by a callback of its own: see `_Outcome`."""
    ready: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=[stream.device])
    errors: list[BaseException] = []

    def complete(done: Any) -> None:
        tensors: list[Tensor] = []
        try:
            tensors = _tensors_of_all(done)
        except BaseException as error:
            errors.append(error)
        with current(stream):
            ready.set_result(tensors)

    def value(done: torch.futures.Future[list[Tensor]]) -> list[Tensor]:
        if errors:
            raise errors[0]
        return done.value()

    futures.add_done_callback(complete)
    return ready.then(value)


@survives_halving
class DoneWork(Work):
    """A call that was over when it returned."""

    def __init__(self, results: list[Tensor]) -> None:
        Work.__init__(self)
        self._results = results

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        return True

    is_success = is_completed

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._results

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._results)
        return future

    getFuture = get_future


DONE = DoneWork([])
"""What synchronous calls return: nobody asks it for results, and it costs no object."""
