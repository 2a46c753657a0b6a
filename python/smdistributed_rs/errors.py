"""The errors of this package. All are `SmddpError`, hence `RuntimeError`, as torch's own backends raise.

The text says what was wrong, what was expected, what was given, and what to do; the same facts are attributes. Besides
these, arguments of a wrong Python type may raise TypeError, and a Work's `source_rank()` without a source RuntimeError.
"""

from __future__ import annotations

import builtins

from ._codes import DTYPES

__all__ = [
    "AbortedError",
    "ArgumentError",
    "BootstrapError",
    "InternalError",
    "LibraryError",
    "MismatchError",
    "PeerLostError",
    "ResourceError",
    "SettingError",
    "SmddpError",
    "TimeoutError",
    "TransportError",
    "UnsupportedError",
]


class SmddpError(RuntimeError):
    """Base of all errors of this package."""


class ArgumentError(SmddpError, ValueError):
    """A call was given something it cannot work with: attributes op, argument, expected, given."""

    op: str
    argument: str
    expected: str
    given: str

    @classmethod
    def of(cls, op: str, argument: str, expected: str, given: object, hint: str) -> ArgumentError:
        """The error of a check made in Python, in the words of the native half."""
        error = cls(f"{op}: argument '{argument}': expected {expected}, given {given}. {hint}")
        error.op, error.argument, error.expected, error.given = op, argument, expected, str(given)
        return error


class UnsupportedError(SmddpError, ValueError):
    """A reduction is not defined for a dtype, or neither exists here; or the installed torch cannot do this. Attributes
    op, reduction, dtype; the last two are empty where they are not the reason."""

    op: str
    reduction: str
    dtype: str

    @classmethod
    def of(cls, op: str, reduction: str, dtype: object, why: str) -> UnsupportedError:
        error = cls(f"{op}: {_pair(reduction, dtype)}: {why}")
        error.op, error.reduction, error.dtype = op, reduction, str(dtype)
        return error

    @classmethod
    def of_dtype(cls, op: str, reduction: str, dtype: object, *, is_complex: bool) -> UnsupportedError:
        """The error of a dtype that reductions, or of complex ones this reduction, are not defined for."""
        supported = ", ".join([*DTYPES, "complex64", "complex128"])
        other = f"not a dtype reductions are defined for; these are: {supported}"
        return cls.of(op, reduction, dtype, "complex numbers can be summed and averaged only" if is_complex else other)


def _pair(reduction: str, dtype: object) -> str:
    return f"reduction '{reduction}' with dtype {dtype}" if reduction else f"dtype {dtype}"


class MismatchError(SmddpError):
    """Ranks called different things: attributes rank, group, op, seq, ours, peer, theirs."""

    rank: int
    group: str
    op: str
    seq: int
    ours: str
    peer: int
    theirs: str


class TimeoutError(SmddpError, builtins.TimeoutError):
    """A time limit passed: attributes rank, group, op, seq, waited (seconds), missing (the ranks waited for). While a
    group is made, op is empty and seq 0. A monitored_barrier has no number: its seq is 0."""

    rank: int
    group: str
    op: str
    seq: int
    waited: float
    missing: list[int]


class PeerLostError(SmddpError, ConnectionError):
    """A rank that a call waits for is gone, as reason says: attributes rank, group, op, seq, peer, node, reason."""

    rank: int
    group: str
    op: str
    seq: int
    peer: int
    node: str
    reason: str


class AbortedError(SmddpError):
    """The group was aborted or shut down, another rank failed, or the group had failed before: attributes rank, group,
    op, seq, reason. A call refused before it had a number has seq 0."""

    rank: int
    group: str
    op: str
    seq: int
    reason: str

    @classmethod
    def of(cls, rank: int, group: str, op: str, reason: str) -> AbortedError:
        """The error of a call that is refused in Python, in the words of the native half."""
        error = cls(f"rank {rank} of group '{group}': {op}: aborted: {reason}. To go on, make a new group")
        error.rank, error.group, error.op, error.seq, error.reason = rank, group, op, 0, reason
        return error


class SettingError(SmddpError, ValueError):
    """An `SMDDP_…` variable is unknown or has an impossible value: attributes name, given."""

    name: str
    given: str


class BootstrapError(SmddpError):
    """The ranks of the job could not find each other."""


class LibraryError(SmddpError):
    """A library found at run time (MPI, libfabric, CUDA's driver, NCCL) is missing or unusable."""


class ResourceError(SmddpError):
    """The machine has too little of something: shared memory, file descriptors, registered memory."""


class TransportError(SmddpError):
    """A transport failed in a way that has no better name."""


class InternalError(SmddpError):
    """A mistake in this package."""
