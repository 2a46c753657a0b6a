"""The native half: arguments in, handles out. Not for users; the package checks what it passes here.

A call is (collective, dtype, op, root, count), in the codes of `_codes`; memory is (address, bytes). Time limits are in
seconds; None takes the group's.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

_Memory = tuple[int, int]

__version__: str

DOUBTED: int
"""Addresses below may be offsets of torch tensors without memory."""

@final
class Handle:
    """An operation under way. Keeps the objects whose memory it uses alive until it is over."""

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the operation is over, helping it along; raises its error. After `timeout` seconds (None: the
        group's limit decides) raises TimeoutError, and the operation goes on."""
    def set_timeout(self, seconds: float) -> None:
        """Changes the operation's time limit, counted from its start."""
    def is_done(self) -> bool:
        """Whether the operation is over, well or not."""
    def error(self) -> BaseException | None:
        """The exception the operation ended with; None when it went well or is under way."""
    def source(self) -> int | None:
        """The rank a message comes from, once that is known; None of everything but a receive."""
    def on_done(self, callback: Callable[[BaseException | None], object]) -> None:
        """Calls `callback(error or None)` once the operation is over: at once, on this thread, if it is; else on a
        callback thread."""

@final
class SharedMemory:
    """Memory of this rank that the other ranks of its group map too, where they can."""

    @staticmethod
    def allocate(group: Communicator, bytes: int) -> SharedMemory: ...
    @staticmethod
    def over(group: Communicator, memory: tuple[int, int, int] | None) -> SharedMemory | None: ...
    @property
    def address(self) -> int: ...
    @property
    def why_not(self) -> str | None: ...

@final
class Communicator:
    """A process group."""

    @staticmethod
    def connect(
        store: Any,
        rank: int,
        size: int,
        name: str,
        scope: str,
        timeout: float,
        library_dirs: Sequence[str],
    ) -> Communicator: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def nodes(self) -> list[int]: ...
    @property
    def timeout(self) -> float: ...
    @property
    def calls(self) -> int: ...
    def set_timeout(self, timeout: float) -> None: ...
    def run(
        self,
        collective: int,
        dtype: int,
        op: int,
        root: int,
        count: int,
        input: _Memory,
        output: _Memory,
        timeout: float | None = None,
        counts: Sequence[int] | None = None,
        splits: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None: ...
    def start(
        self,
        collective: int,
        dtype: int,
        op: int,
        root: int,
        count: int,
        input: _Memory,
        output: _Memory,
        timeout: float | None = None,
        counts: Sequence[int] | None = None,
        splits: tuple[Sequence[int], Sequence[int]] | None = None,
        keep: object = None,
    ) -> Handle: ...
    def run_tensors(
        self,
        collective: int,
        op: int,
        root: int,
        output: Any,
        input: Any = None,
        timeout: float | None = None,
    ) -> bool: ...
    def start_tensors(
        self,
        collective: int,
        op: int,
        root: int,
        output: Any,
        input: Any = None,
        timeout: float | None = None,
    ) -> Handle | None: ...
    def start_message(self, sends: bool, peer: int, tag: int, tensor: Any) -> Handle | None: ...
    def start_message_of(
        self, sends: bool, peer: int, tag: int, dtype: int, memory: _Memory, keep: object = None
    ) -> Handle: ...
    def start_recv_any(self, tag: int, dtype: int, memory: _Memory, keep: object = None) -> Handle: ...
    def abort(self, reason: str) -> None: ...
    def failure(self) -> BaseException | None: ...
    def shutdown(self) -> None: ...
    def last_algorithm(self) -> str: ...
    def describe(self) -> str: ...

@final
class AllReduce:
    """A group's `allreduce`; `long` is a weak method for all but the commonest call."""

    def __init__(self, group: Communicator, profiler: object, done: object, long: object) -> None: ...
    def __call__(self, *args: Any, **named: Any) -> Any: ...

@final
class DeviceGroup:
    """The CUDA side of a process group. Every member makes it at the same point."""

    def __init__(
        self, host: Communicator, rail: Communicator | None, device: int, library_dirs: Sequence[str]
    ) -> None: ...
    @staticmethod
    def wanted(group: Communicator) -> tuple[bool, list[int] | None]: ...
    def start(
        self,
        stream: int,
        behind: int | None,
        collective: int,
        dtype: int,
        op: int,
        root: int,
        count: int,
        input: _Memory,
        output: _Memory,
        timeout: float | None = None,
        counts: Sequence[int] | None = None,
        splits: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> DeviceHandle: ...
    def start_tensors(
        self,
        stream: int,
        behind: int | None,
        collective: int,
        op: int,
        root: int,
        output: Any,
        input: Any = None,
        timeout: float | None = None,
    ) -> DeviceHandle | None: ...
    @property
    def carries_messages(self) -> bool: ...
    def exchange(
        self,
        stream: int,
        behind: int | None,
        messages: Sequence[tuple[int, bool, int, int]],
        timeout: float | None = None,
    ) -> DeviceHandle: ...
    def wait(self, handle: DeviceHandle, timeout: float) -> None: ...
    def failure(self) -> BaseException | None: ...
    def describe(self) -> str: ...
    def abort(self, reason: str) -> None: ...
    def shutdown(self) -> None: ...

@final
class DeviceHandle:
    """A call enqueued on a CUDA stream."""

    def order(self, stream: int) -> None: ...
    def extend(self, stream: int) -> None: ...
    def is_past(self) -> bool: ...
    def is_captured(self) -> bool: ...
    def error(self) -> BaseException | None: ...

@final
class World:
    """All ranks of the job, found through MPI, launcher variables, or alone."""

    @staticmethod
    def init(library_dirs: Sequence[str]) -> World: ...
    def communicator(self) -> Communicator: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def how(self) -> str: ...
    def new_group(self, ranks: Sequence[int]) -> Communicator | None: ...
    def shutdown(self) -> None: ...

@final
class DlpackView:
    """What a DLPack capsule describes; holds the capsule, and with it the memory."""

    @property
    def address(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def itemsize(self) -> int | None: ...
    @property
    def dense(self) -> bool: ...
    @property
    def on_cpu(self) -> bool: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def is_copy(self) -> bool: ...
    @property
    def owner(self) -> object: ...

def view_capsule(capsule: object) -> DlpackView: ...
def stop_callbacks() -> None:
    """Lets callbacks under way end, and starts no more. For the end of the process."""

def use_torch(tensor: type, options: type, reductions: Sequence[object]) -> bool: ...
def reads_options() -> bool: ...
def use_key_sets(samples: Sequence[tuple[object, int]], bit: int) -> bool: ...
def launcher_variables(library_dirs: Sequence[str]) -> list[tuple[str, str]]: ...
def end_without_leaving() -> None:
    """Groups that are dropped from now on are not left: the others hear that this process has ended."""

def finalize_mpi_at_exit() -> bool:
    """Has MPI finalised when the process ends, if it does so with status 0. False where that is not ours to do."""
