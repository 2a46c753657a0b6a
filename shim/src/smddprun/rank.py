"""One rank, inside mpirun or srun: sets its variables, binds it, and becomes the user's program or watches it.

Nothing here may start MPI, nor import what does: the program that follows in this process's place will.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from smddprun import devices, program, watch
from smddprun.errors import UsageError

_Names = tuple[str, str, str, str | None]
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None)


@dataclass(frozen=True)
class Place:
    """What mpirun, or srun, says of this rank. A launcher that tells no local numbers leaves them None."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands in an mpirun, or among several tasks of an srun; None outside of one."""
    names = _names(environment)
    if names is None:
        return None
    told = {name: environment[name] for name in names if name is not None and name in environment}
    wrong = [f"{name}={value}" for name, value in told.items() if not value.isdecimal()]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: expected numbers, which mpirun or srun sets: unset what is not its own")
    rank, size, local_rank, local_size = (int(told[name]) if name in told else None for name in names)
    assert rank is not None
    assert size is not None
    return Place(rank, size, local_rank, local_size)


def _names(environment: Mapping[str, str]) -> _Names | None:
    """The variables that tell the place."""
    # With --mpi=pmi2 srun sets PMI's too, whatever it starts; MPICH's mpirun within a step sets more of them.
    of_srun = "SLURM_STEP_ID" in environment and "MPI_LOCALRANKID" not in environment
    for names in (_OPEN_MPI, _SRUN if of_srun else _PMI):
        if names[0] in environment and names[1] in environment:
            # A step of one task may be an allocation's shell, from which a job is to be started.
            return None if names is _SRUN and environment[names[1]] == "1" else names
    return None


def become(options: argparse.Namespace, here: Place) -> int:
    """Does not return but when the program is watched, or cannot be started."""
    say = _Say(here, options.verbose)
    set_variables(os.environ, here)
    share = _bind(options.bind or "none", here, say)
    set_fabric(os.environ, options.nics, share, devices.efa_devices(), say)
    try:
        words = program.words(options)
    except UsageError as error:
        raise UsageError(f"rank {here.rank}: {error}", error.status) from error
    if options.watch:
        return watch.run(words, options.watch, here.rank, here.local_rank or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, which the program would inherit.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)  # noqa: S606
    except OSError as error:
        raise UsageError(f"rank {here.rank}: {words[0]}: {error.strerror}", 126) from error


class _Say:
    """Lines about this host, by one rank of it."""

    def __init__(self, here: Place, verbose: bool) -> None:
        self._first, self._verbose, self._rank = not here.local_rank, verbose, here.rank

    def note(self, text: str) -> None:
        """What the user should know."""
        if self._first:
            print(f"smddprun: {text}", file=sys.stderr)

    def detail(self, text: str) -> None:
        """What they may want to know."""
        if self._verbose:
            print(f"smddprun: rank {self._rank}: {text}", file=sys.stderr)


def set_variables(environment: MutableMapping[str, str], here: Place) -> None:
    """Torch's names and SMDDP's, where they are not set, or set to nothing. MASTER_ADDR and MASTER_PORT are left to the
    import of smdistributed_rs, which can ask MPI."""
    told = {
        "RANK": here.rank,
        "WORLD_SIZE": here.size,
        "LOCAL_RANK": here.local_rank,
        "LOCAL_WORLD_SIZE": here.local_size,
        "SMDATAPARALLEL_LOCAL_RANK": here.local_rank,
    }
    for name, value in told.items():
        if value is not None and not environment.get(name):
            environment[name] = str(value)


def _bind(how: str, here: Place, say: _Say) -> list[devices.Core]:
    """Takes this rank's share of the cores; returns the cores it runs on."""
    all_cores = devices.cores()
    if how == "none" or here.local_rank is None or here.local_size is None:
        return all_cores
    share = devices.share_of(all_cores, here.local_rank, here.local_size)
    cpus = sorted(cpu for core in share for cpu in core.cpus)
    os.sched_setaffinity(0, cpus)
    say.detail(f"CPUs {','.join(map(str, cpus))}")
    return share


def set_fabric(
    environment: MutableMapping[str, str],
    nics: str,
    share: list[devices.Core],
    efa: list[devices.Efa],
    say: _Say,
) -> None:
    """libfabric's variables, for the hardware that is here and no other."""
    if efa:
        for name, value in (("FI_PROVIDER", "efa"), ("FI_EFA_USE_DEVICE_RDMA", "1"), ("RDMAV_FORK_SAFE", "1")):
            environment.setdefault(name, value)
    elif environment.get("FI_PROVIDER") == "efa":
        del environment["FI_PROVIDER"]
        say.note("FI_PROVIDER=efa was taken out: this host has no EFA device")
    if nics == "auto":
        chosen = [device.domain for device in devices.near(efa, share)]
        wanted = ",".join(chosen) if len(chosen) < len(efa) else ""
    else:
        wanted = "" if nics == "all" else nics
    if wanted:
        environment.setdefault("SMDDP_NICS", wanted)
        say.detail(f"NICs {environment['SMDDP_NICS']}")
