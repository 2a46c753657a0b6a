"""The ways torch lets a group's methods be called, beside those its functions use: `broadcast(tensor, root)`, say.

Torch's C++ methods are overloaded; ours take options, and what is given in their place is made into options here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

ALL_GATHER, REDUCE_SCATTER = AllgatherOptions(), ReduceScatterOptions()
"""Options of calls that are given none. Nobody changes them."""


def options(kind: Any, given: Any, timeout: timedelta | None = None, *, root: Any = None, op: Any = None) -> Any:
    """`given`, if it is options of this kind; else such made of it, a root, a reduction or a time limit by its place,
    and of the rest."""
    if isinstance(given, kind):
        return given
    made = kind()
    if isinstance(given, timedelta):
        timeout = given
    elif given is not None and hasattr(made, "rootRank"):
        root = given
    elif given is not None:
        op = given
    for name, value in (("rootRank", root), ("reduceOp", op), ("timeout", timeout)):
        if value is not None:
            setattr(made, name, value)
    return made


def listed(tensors: Any) -> Any:
    """The list of one tensor, where a tensor stands for it."""
    return [tensors] if isinstance(tensors, Tensor) else tensors


def paired(lists: Any, tensors: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The lists of one list and one tensor, where these stand for them."""
    return ([lists], [tensors]) if isinstance(tensors, Tensor) else (lists, tensors)


def of_gather(opts: Any) -> AllgatherOptions:
    """Options of a gather that is part of a call with `opts`: what it gathers is needed at once."""
    made = AllgatherOptions()
    made.timeout = opts.timeout
    if hasattr(made, "asyncOp"):
        made.asyncOp = False
    return made
