"""What the package needs to know and do about versions of torch."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, TypeVar

import torch
from torch.distributed import Backend, Work

from .errors import UnsupportedError

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

OLDEST = (2, 4)
"""The oldest torch that is served."""

HAS_BACKENDS = TORCH >= (2, 14)
"""Whether a Backend can be written in Python. Before, a group of ours carries everything."""

HALVES_WORKS = TORCH < (2, 7)
"""Whether torch keeps only the C++ half of a Work that a group written in Python returned."""


def refused(name: str) -> bool:
    """Whether torch is too old. Then backend `name` is one that says so; importing the package is no error."""
    if OLDEST <= TORCH:
        return False
    if name.upper() not in Backend._plugins:
        Backend.register_backend(name, _refuse)
    return True


def _refuse(*_: object) -> None:
    raise _unsupported(f"is too old for this backend: install torch {OLDEST[0]}.{OLDEST[1]} or newer")


def _unsupported(why: str) -> UnsupportedError:
    error = UnsupportedError(f"init_process_group: torch {torch.__version__} {why}")
    error.op, error.reduction, error.dtype = "init_process_group", "", ""
    return error


# ---- Works whose Python half torch lets go
#
# Before 2.7 torch keeps the C++ half alone of a Work a group written in Python returned: of that of each of DDP's
# buckets, say. The Python half would be collected, and with it all that could ever end a wait. So a Work that is
# collected while C++ holds it comes back to life, until C++ has let go of it too.

_AnyWork = TypeVar("_AnyWork", bound=type[Work])


def survives_halving(cls: _AnyWork) -> _AnyWork:
    """Decorates the package's classes of Works."""
    if not HALVES_WORKS:
        return cls
    held: set[Work] = set()
    is_the_end = sys.is_finalizing

    def come_back(work: Work) -> None:
        if is_the_end():
            return
        # Those C++ has let go of since. Of a copy, because each that goes comes by here.
        for other in tuple(held):
            if _owners(other) == 1:
                held.discard(other)
        if _owners(work) > 1:
            held.add(work)

    cls.__del__ = come_back  # type: ignore[attr-defined]
    return cls


def _owners(work: Work) -> int:
    """How many owners the C++ half has, its Python half being one. Read from memory, for nothing in Python tells it;
    the versions this is done for change no more, and `check_memory_layout` looks whether it is right."""
    half = ctypes.c_void_p.from_address(id(work) + object.__basicsize__).value or 0
    return ctypes.c_uint32.from_address(half + ctypes.sizeof(ctypes.c_void_p)).value


class _Probe(Work):
    """A Work to look at."""


def check_memory_layout() -> None:
    """Raises where the number of a Work's owners is not where it should be."""
    if HALVES_WORKS:
        work: Any = _Probe()
        numbers = [_owners(work)]
        box = work.boxed()
        numbers.append(_owners(work))
        del box
        if numbers != [1, 2]:
            raise _unsupported("keeps its Works in memory in an unknown way: install torch 2.7 or newer")
