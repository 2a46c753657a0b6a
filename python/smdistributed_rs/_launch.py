"""Launcher variables under mpirun or srun, for programs that expect torchrun's."""

from __future__ import annotations

import atexit
import os
import sys
import warnings

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
    for name, value in found:
        os.environ.setdefault(name, value)
    if found:
        atexit.register(leave)


def leave() -> None:
    """At the end of the process: finalises MPI if asking it meant starting it."""
    if not forsakes():
        _core.leave_mpi()


def forsakes() -> bool:
    """Whether the process ends by an uncaught exception. MPI is not left then, whatever goes out of use later: the
    other ranks are not at their end, and mpirun ends the job because this one is gone."""
    if getattr(sys, "last_value", None) is None:
        return False
    _core.forsake_mpi()
    return True
