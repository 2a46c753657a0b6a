"""Launcher variables under mpirun or srun, for programs that expect torchrun's."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from typing import Any

from . import _core
from ._libraries import library_dirs
from .errors import SmddpError


def export_launcher_variables() -> None:
    """Sets those of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT that are not set and
    that the launcher of this process tells. Without a launcher nothing changes.

    What is wrong is a warning here, since a program that only imports the package has no use for the variables, and
    an error when a group is made."""
    try:
        found = _core.launcher_variables(library_dirs())
    except SmddpError as error:
        warnings.warn(f"launcher variables were not set: {error}", RuntimeWarning, stacklevel=3)
        return
    # Also over those that are set to nothing.
    os.environ.update(found)
    if found:
        atexit.register(leave)


_groups: weakref.WeakKeyDictionary[Any, _core.Communicator] = weakref.WeakKeyDictionary()


def know(group: object, communicator: _core.Communicator) -> None:
    """Has `leave` end the group, if it still lives then."""
    _groups[group] = communicator


def leave() -> None:
    """At the end of the process: has MPI finalised if asking it meant starting it. It waits for the other ranks there,
    so who waits for this one must have heard before that it has gone."""
    if _core.finalize_mpi_at_exit() and not fails():
        for communicator in list(_groups.values()):
            communicator.shutdown()


def stay_if_failing() -> None:
    """At the end of the process: what the interpreter drops after this is not left if it ends by an exception."""
    if fails():
        _core.end_without_leaving()


def fails() -> bool:
    """Whether the process ends by an uncaught exception. (That it ends by sys.exit nobody knows before exit() does.)
    Its groups are not left then: that it has ended says more to the others."""
    return getattr(sys, "last_value", None) is not None
