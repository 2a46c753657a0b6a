"""Collectives for programs without torch.distributed, on anything with an array interface, DLPack, or the buffer
protocol: NumPy arrays, torch tensors, array.array, bytearray.

Arrays must be contiguous in C order and on the CPU. Collectives are called by all ranks of the group, in one order,
with the same dtype, reduction, root and counts; ranks that disagree get MismatchError. Counts are in elements.
Everything accepts `async_op=True` (returns a `Handle` at once; the arrays must not be touched until its `wait()` has
returned) and `timeout` in seconds (None: the group's). Algorithms are chosen by shape and size: docs/how-to/measure.md.

All calls raise ArgumentError or UnsupportedError for what cannot be done, before anything moves: the group stays
usable. MismatchError, TimeoutError, PeerLostError, AbortedError and TransportError end the group
(docs/how-to/handle-failures.md).
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from . import _codes as codes
from . import _core
from ._arrays import View, counted, like, same_dtype, view, whole_numbers
from ._core import Handle
from ._launch import fails, know, leave
from ._libraries import library_dirs
from .errors import ArgumentError
from .shared import allocate

__all__ = ["Communicator", "World", "init"]

_EMPTY = View(0, 0, "uint8", 1, (0,), None)
_BYTE = codes.DTYPES["uint8"]


class Communicator:
    """A group of ranks. Made by `init()` and `World.new_group()`; usable as a context manager, which shuts it down."""

    def __init__(self, inner: _core.Communicator) -> None:
        self._inner = inner
        know(self, inner)

    @property
    def rank(self) -> int:
        """This process's number in the group, 0 to size - 1."""
        return self._inner.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._inner.size

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def nodes(self) -> list[int]:
        """The node of each rank; nodes are numbered by their lowest rank."""
        return self._inner.nodes

    @property
    def timeout(self) -> float:
        """Time limit of an operation, in seconds."""
        return self._inner.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._inner.set_timeout(seconds)

    def shared_memory(self, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """`nbytes` bytes of zeros that collectives work on without copies, for numpy.frombuffer; see `shared`."""
        return allocate("shared_memory", self._inner, nbytes)

    def all_reduce(
        self, array: Any, op: str = "sum", *, async_op: bool = False, timeout: float | None = None
    ) -> Handle | None:
        """Reduces `array` over all ranks, in place.

        op: sum, avg, product, min, max, band, bor, bxor. avg of integers truncates toward zero; sum of bool is or;
        complex arrays can be summed and averaged. 16-bit floats are summed in float32 and rounded once per hop."""
        one = view("all_reduce", "array", array, written=True)
        dtype, each = one.reducer("all_reduce", op)
        call = (codes.ALL_REDUCE, dtype, _reduction("all_reduce", op), 0, one.numel * each)
        return self._go(call, one, one, async_op, timeout)

    def reduce(
        self, array: Any, root: int = 0, op: str = "sum", *, async_op: bool = False, timeout: float | None = None
    ) -> Handle | None:
        """Reduces `array` to rank `root`, in place; the others' arrays stay as they are. `op` as in all_reduce."""
        one = view("reduce", "array", array, written=True)
        dtype, each = one.reducer("reduce", op)
        call = (codes.REDUCE, dtype, _reduction("reduce", op), self._root("reduce", root), one.numel * each)
        return self._go(call, one, one, async_op, timeout)

    def broadcast(
        self, array: Any, root: int = 0, *, async_op: bool = False, timeout: float | None = None
    ) -> Handle | None:
        """Copies rank `root`'s `array` into everyone's. Any dtype."""
        one = view("broadcast", "array", array, written=True)
        dtype, each = one.mover()
        call = (codes.BROADCAST, dtype, 0, self._root("broadcast", root), one.numel * each)
        return self._go(call, one, one, async_op, timeout)

    def all_gather(
        self,
        input: Any,
        output: Any = None,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Concatenates the ranks' `input` in `output`, of size times its elements. Any dtype.

        counts: elements of each rank's input, where they differ. Without `output` a new array of shape
        (size, *input.shape) is returned (with `counts`: flat)."""
        name = "all_gather"
        counts = self._counts(name, "counts", counts)
        source = view(name, "input", input, written=False)
        total = source.numel * self.size if counts is None else sum(counts)
        output = self._output(name, output, input, (self.size, *source.shape) if counts is None else (total,), async_op)
        target = view(name, "output", output, written=True)
        same_dtype(name, "output", target, source)
        counted(name, "output", target, total, "all ranks' inputs")
        if counts is not None:
            counted(name, "input", source, counts[self.rank], f"counts[{self.rank}]")
        dtype, each = source.mover()
        call = (codes.ALL_GATHER, dtype, 0, 0, 0 if counts else source.numel * each)
        return self._go(call, source, target, async_op, timeout, output, _scaled(counts, each))

    def reduce_scatter(
        self,
        input: Any,
        output: Any = None,
        op: str = "sum",
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Reduces `input` over all ranks and leaves each its part, in rank order, in `output`. `op` as in all_reduce.

        counts: elements of each rank's part; without it all are equal. Without `output` a new array is returned: of
        shape (input.shape[0] / size, ...) if that divides, else flat."""
        name = "reduce_scatter"
        counts = self._counts(name, "counts", counts)
        source = view(name, "input", input, written=False)
        if counts is not None:
            counted(name, "input", source, sum(counts), "the sum of counts")
        part = counts[self.rank] if counts else source.numel // self.size
        output = self._output(name, output, input, self._part_shape(source, counts, part), async_op)
        target = view(name, "output", output, written=True)
        same_dtype(name, "output", target, source)
        if counts is None:
            counted(name, "input", source, target.numel * self.size, "size times the output's")
        else:
            counted(name, "output", target, part, f"counts[{self.rank}]")
        dtype, each = source.reducer(name, op)
        call = (codes.REDUCE_SCATTER, dtype, _reduction(name, op), 0, 0 if counts else part * each)
        return self._go(call, source, target, async_op, timeout, output, _scaled(counts, each))

    def all_to_all(
        self,
        input: Any,
        output: Any = None,
        *,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Sends part r of `input` to rank r; `output` gets the parts in rank order. Any dtype.

        send_counts, recv_counts: elements to and from each rank, both or neither; neither: equal parts. Without
        `output` a new array is returned, shaped as the input (with counts: flat)."""
        name = "all_to_all"
        source = view(name, "input", input, written=False)
        uneven = send_counts is not None and recv_counts is not None
        if not uneven and (send_counts is not None or recv_counts is not None):
            given = "only one of them"
            raise ArgumentError.of(name, "send_counts", "send_counts and recv_counts, or neither", given, "Give both")
        send_counts = self._counts(name, "send_counts", send_counts)
        recv_counts = self._counts(name, "recv_counts", recv_counts)
        shape = (sum(recv_counts),) if uneven else source.shape
        output = self._output(name, output, input, shape, async_op)
        target = view(name, "output", output, written=True)
        same_dtype(name, "output", target, source)
        dtype, each = source.mover()
        if not uneven:
            counted(name, "output", target, source.numel, "as many as the input's")
            if source.numel % self.size:
                expected = f"a number of elements divisible by {self.size}"
                raise ArgumentError.of(name, "input", expected, source.numel, "Or give send_counts and recv_counts")
            call = (codes.ALL_TO_ALL, dtype, 0, 0, source.numel // self.size * each)
            return self._go(call, source, target, async_op, timeout, output)
        counted(name, "input", source, sum(send_counts), "the sum of send_counts")
        counted(name, "output", target, sum(recv_counts), "the sum of recv_counts")
        splits = (_scaled(send_counts, each), _scaled(recv_counts, each))
        return self._go((codes.ALL_TO_ALL, dtype, 0, 0, 0), source, target, async_op, timeout, output, None, splits)

    def gather(
        self, input: Any, output: Any = None, root: int = 0, *, async_op: bool = False, timeout: float | None = None
    ) -> Any:
        """Concatenates the ranks' `input` in rank `root`'s `output`; None on the others. Any dtype. Without `output`
        the root gets a new array of shape (size, *input.shape)."""
        name = "gather"
        root = self._root(name, root)
        source, target = view(name, "input", input, written=False), _EMPTY
        if self.rank == root:
            output = self._output(name, output, input, (self.size, *source.shape), async_op)
            target = view(name, "output", output, written=True)
            same_dtype(name, "output", target, source)
            counted(name, "output", target, source.numel * self.size, "size times the input's")
        dtype, each = source.mover()
        call = (codes.GATHER, dtype, 0, root, source.numel * each)
        return self._go(call, source, target, async_op, timeout, output if self.rank == root else None)

    def scatter(
        self, input: Any, output: Any, root: int = 0, *, async_op: bool = False, timeout: float | None = None
    ) -> Any:
        """Sends part r of rank `root`'s `input` to rank r's `output`; the others' `input` is not looked at (None will
        do). Any dtype. Returns `output`."""
        name = "scatter"
        root = self._root(name, root)
        source, target = _EMPTY, view(name, "output", output, written=True)
        if self.rank == root:
            source = view(name, "input", input, written=False)
            same_dtype(name, "input", source, target)
            counted(name, "input", source, target.numel * self.size, "size times the output's")
        dtype, each = target.mover()
        call = (codes.SCATTER, dtype, 0, root, target.numel * each)
        return self._go(call, source, target, async_op, timeout, output)

    def barrier(self, *, async_op: bool = False, timeout: float | None = None) -> Handle | None:
        """Returns when all ranks have come."""
        return self._go((codes.BARRIER, _BYTE, 0, 0, 0), _EMPTY, _EMPTY, async_op, timeout)

    def send(
        self, array: Any, to: int, tag: int = 0, *, async_op: bool = False, timeout: float | None = None
    ) -> Handle | None:
        """Sends `array` to rank `to`, which receives as many elements under the same tag (from 0). Any dtype."""
        one = view("send", "array", array, written=False)
        peer = self._root("send", to, "to")
        handle = self._inner.start_message_of(True, peer, tag, one.mover()[0], one.memory, one)
        return _ended(handle, async_op, timeout)

    def recv(
        self, array: Any, source: int, tag: int = 0, *, async_op: bool = False, timeout: float | None = None
    ) -> Handle | None:
        """Receives into `array` what rank `source` sends under the same tag."""
        one = view("recv", "array", array, written=True)
        peer = self._root("recv", source, "source")
        handle = self._inner.start_message_of(False, peer, tag, one.mover()[0], one.memory, one)
        return _ended(handle, async_op, timeout)

    def abort(self, reason: str = "abort() was called") -> None:
        """Ends the group now: whoever waits, on any rank, gets AbortedError."""
        self._inner.abort(reason)

    def shutdown(self) -> None:
        """Ends the group; waits up to 5 s for what is under way. Later calls are errors."""
        self._inner.shutdown()

    def describe(self) -> str:
        """Transports, provider, rails and shape, for people."""
        return self._inner.describe()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} '{self.name}': rank {self.rank} of {self.size}>"

    def _go(
        self,
        call: tuple[int, int, int, int, int],
        source: View,
        target: View,
        async_op: bool,
        timeout: float | None,
        result: Any = None,
        counts: list[int] | None = None,
        splits: tuple[list[int], list[int]] | None = None,
    ) -> Any:
        if async_op:
            keep = (source, target)
            return self._inner.start(*call, source.memory, target.memory, timeout, counts, splits, keep)
        self._inner.run(*call, source.memory, target.memory, timeout, counts, splits)
        return result

    def _root(self, name: str, rank: int, argument: str = "root") -> int:
        if not 0 <= rank < self.size:
            expected = f"a rank of the group, 0 to {self.size - 1}"
            raise ArgumentError.of(name, argument, expected, rank, "Ranks are counted within the group, from 0")
        return rank

    def _counts(self, name: str, argument: str, given: Any) -> list[int] | None:
        """Elements per rank, checked; None where they are not given."""
        if given is None:
            return None
        counts = whole_numbers(name, argument, given)
        if len(counts) != self.size or min(counts) < 0:
            hint = "The same list on every rank, for all_gather and reduce_scatter"
            raise ArgumentError.of(name, argument, f"{self.size} numbers, one per rank", counts, hint)
        return counts

    def _output(self, name: str, output: Any, input: Any, shape: tuple[int, ...], async_op: bool) -> Any:
        if output is not None:
            return output
        if async_op:
            hint = "An asynchronous call returns a handle, so it cannot return a new array"
            raise ArgumentError.of(name, "output", "an array to write to", "nothing", hint)
        return like(name, input, shape)

    def _part_shape(self, source: View, counts: Sequence[int] | None, part: int) -> tuple[int, ...]:
        if counts is None and source.shape and source.shape[0] % self.size == 0:
            return (source.shape[0] // self.size, *source.shape[1:])
        return (part,)


class World(Communicator):
    """All ranks of the job."""

    def __init__(self, inner: _core.World) -> None:
        super().__init__(inner.communicator())
        self._world = inner

    @property
    def local_rank(self) -> int:
        """This process's number on its node."""
        return self._world.local_rank

    @property
    def local_size(self) -> int:
        """Ranks on this node."""
        return self._world.local_size

    @property
    def how(self) -> str:
        """How the ranks found each other, for people: "MPI", "launcher variables and TCP", "a job of one rank", or
        "single process" and why."""
        return self._world.how

    def new_group(self, ranks: Sequence[int]) -> Communicator | None:
        """A group of `ranks` in this order; None on ranks outside it. Every rank of the world calls it, with the same
        list: groups are told apart by how many were made before."""
        made = self._world.new_group(list(ranks))
        return None if made is None else Communicator(made)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Finalised here it would wait for ranks that are in the midst of their work.
            _core.finalize_mpi_at_exit()
        self.shutdown()

    def shutdown(self) -> None:
        global _world
        self._world.shutdown()
        if _world is self:
            _world = None


_world: World | None = None


def init() -> World:
    """Joins the job and returns the group of all its ranks; every rank calls it. A second call returns the same one
    until it is shut down.

    Ranks find each other through MPI (under mpirun or srun, with whatever MPI is there), through launcher variables
    (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, or the launcher's own), or there is one rank. Settings are the
    `SMDDP_…` variables. Raises BootstrapError, SettingError, LibraryError, TimeoutError."""
    global _world
    if _world is None:
        _world = World(_core.World.init(library_dirs()))
        atexit.register(_end)
    return _world


def _end() -> None:
    """At the end of the process: leaves the job as one should, unless it ends by an exception."""
    leave()
    if _world is not None and not fails():
        _world.shutdown()


def _reduction(name: str, op: str) -> int:
    code = codes.OPS.get(op)
    if code is None:
        raise ArgumentError.of(name, "op", f"one of {', '.join(codes.OPS)}", repr(op), "Names are in lower case")
    return code


def _scaled(counts: Sequence[int] | None, each: int) -> list[int] | None:
    return None if counts is None else [n * each for n in counts]


def _ended(handle: Handle, async_op: bool, timeout: float | None) -> Handle | None:
    if async_op:
        return handle
    handle.wait(timeout)
    return None
