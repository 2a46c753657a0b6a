"""The command line. One program with two parts, told apart by where it runs:

- outside of MPI it builds the line for mpirun and runs it (`mpi`, `job`);
- inside, started by mpirun or srun once per rank, it prepares that rank and becomes the user's program (`rank`). That
  is how SageMaker's training toolkit calls it: `mpirun ... smddprun python -m mpi4py train.py`.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata

from smddprun import job, rank
from smddprun.errors import UsageError

EPILOG = """
examples:
  smddprun -np 8 train.py --epochs 3                    eight ranks here
  smddprun -np 16 --hosts a,b train.py                  eight on each of two hosts
  smddprun -np 8 --hosts a:6,b:2 train.py               as told
  smddprun -np 4 --mpi-options "--tag-output" train.py  more options for mpirun
  smddprun -np 4 --dry-run train.py                     show the line, run nothing

exit status: that of the rank that failed first (128 + signal for one that was killed); 2 for a wrong command line,
127 where no mpirun is found, 128 + signal when smddprun itself was told to stop.
"""


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser().parse_args(_joined(given))
        here = rank.place()
        if here is None:
            return job.run(options)
        for_mpirun = [name for name, value in launch_options(options).items() if value]
        if for_mpirun:
            raise UsageError(
                f"{', '.join(for_mpirun)}: this is already rank {here.rank} of {here.size} of an mpirun or srun: "
                "give it there"
            )
        return rank.become(options, here)
    except UsageError as error:
        print(f"smddprun: {error}", file=sys.stderr)
        return error.status


def parser() -> argparse.ArgumentParser:
    """All options; the last are for ranks, which `job` starts by this same program."""
    cores = "cores: share out each host's cores among its ranks; none: do not bind (default: cores; none inside mpirun)"
    made = argparse.ArgumentParser(
        prog="smddprun",
        description="Starts a training script once per rank, by the mpirun that is there (Open MPI 4 or 5, MPICH, "
        "Intel MPI).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "-np",
        "-n",
        type=int,
        metavar="N",
        help="ranks in all (default: Slurm's tasks; else as many per host as this one has GPUs, or one)",
    )
    add("--hosts", metavar="A[:N],B", help="hosts, and ranks on each (default: this one)")
    add("--hostfile", metavar="FILE", help="hosts by a file: a name a line, with slots=N after it if need be")
    add("--mpirun", metavar="PATH", help="the mpirun to use (default: of PATH, else beside this Python)")
    add("--mpi-options", metavar="TEXT", default="", help="more options for mpirun, quoted as in a shell")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="variable to set, or pass on, in all ranks")
    add("--bind", choices=["cores", "none"], help=cores)
    add(
        "--nics",
        default="auto",
        metavar="auto|all|A,B",
        help="auto: the EFA devices near each rank's cores; all: all of them; or names",
    )
    add("--dry-run", action="store_true", help="print the line for mpirun and stop")
    add("--verbose", action="store_true", help="say what is run and what is set")
    add("--version", action="version", version=f"smddprun {metadata.version('smdistributed-shim')}")
    add("-m", "--module", action="store_true", help="PROGRAM is the name of a Python module")
    add("--watch", metavar="TOKEN", help=argparse.SUPPRESS)
    add("program", help="a .py file, which this Python runs; or another program")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return made


_WITH_VALUE = (
    "-np",
    "-n",
    "--hosts",
    "--hostfile",
    "--mpirun",
    "--mpi-options",
    "--env",
    "--bind",
    "--nics",
    "--watch",
)


def _joined(given: list[str]) -> list[str]:
    """`--mpi-options --tag-output` as one word, since argparse would take the second for an option of ours."""
    joined: list[str] = []
    rest = iter(given)
    for word in rest:
        value = next(rest, None) if word in _WITH_VALUE else None
        if value is not None and word.startswith("--"):
            joined.append(f"{word}={value}")
        else:
            joined += [word] if value is None else [word, value]
        if not word.startswith("-"):
            break
    return [*joined, *rest]


def launch_options(options: argparse.Namespace) -> dict[str, object]:
    """What makes sense outside of mpirun only."""
    return {
        "-np": options.np,
        "--hosts": options.hosts,
        "--hostfile": options.hostfile,
        "--mpirun": options.mpirun,
        "--mpi-options": options.mpi_options,
        "--env": options.env,
        "--dry-run": options.dry_run,
    }
