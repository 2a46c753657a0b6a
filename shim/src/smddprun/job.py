"""The job, outside of MPI: writes the line for mpirun, runs it, passes signals on, and says which rank failed first."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from smddprun import devices, hosts, mpi, program
from smddprun.errors import UsageError
from smddprun.watch import Failure, Reports, dying_with_us

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SMDATAPARALLEL_LOCAL_RANK")
_GRACE = 10.0
"""Seconds mpirun has to end its ranks after a signal."""
_PATIENCE = 3.0
"""Seconds mpirun has to end the job by itself when a rank has failed: MPICH's leaves the others running."""
_DRAIN = 2.0
"""Seconds its stderr may stay open after it has ended."""


def run(options: argparse.Namespace) -> int:
    """The job's exit status."""
    environment = _environment(options.env)
    # A line to be run by hand has nobody who reads reports.
    token = "" if options.dry_run else secrets.token_hex(4)
    launch = _launch(options, environment, token)
    line = mpi.line(launch)
    if options.dry_run:
        print(shlex.join(line))
        return 0
    if options.verbose:
        print(f"smddprun: {shlex.join(line)}", file=sys.stderr)
    return _Job(line, environment, token, launch).status()


def _environment(more: list[str]) -> dict[str, str]:
    """Ours, without what would pass for a rank's, and with what --env says."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    for word in more:
        name, equals, value = word.partition("=")
        if not name.replace("_", "a").isalnum() or name[0].isdigit():
            raise UsageError(f"--env: expected NAME or NAME=VALUE, given '{word}'")
        if equals:
            environment[name] = value
        elif name not in environment:
            raise UsageError(f"--env: {name} is not set here, so it cannot be passed on: give {name}=VALUE")
    return environment


def _launch(options: argparse.Namespace, environment: dict[str, str], token: str) -> mpi.Launch:
    if options.np is not None and options.np < 1:
        raise UsageError(f"-np: expected 1 or more ranks, given {options.np}")
    wanted = hosts.read(options.hosts, options.hostfile)
    gpus = devices.gpus(environment)
    tasks = None if wanted else _tasks_of_slurm(environment)
    if tasks is not None:
        _compare(tasks, gpus, options, environment)
        # mpirun knows the allocation.
        places, ranks = [], options.np or tasks
    else:
        places = hosts.share(wanted, options.np, gpus or 1)
        ranks = sum(count for _, count in places)
    named = [word.partition("=")[0] for word in options.env]
    return mpi.Launch(
        mpirun=mpi.find(options.mpirun),
        places=places,
        ranks=ranks,
        program=[*_rank_program(options, token), *program.words(options)],
        variables=sorted({*mpi.to_pass_on(environment), *named}),
        more=mpi.split_options(options.mpi_options),
        in_slurm="SLURM_JOB_ID" in environment,
    )


def _tasks_of_slurm(environment: Mapping[str, str]) -> int | None:
    """The tasks of the Slurm allocation this is in. None: in none, or in one that is this host alone and without tasks,
    or with none but the shell that we are in (`srun --pty bash`)."""
    if "SLURM_JOB_ID" not in environment:
        return None
    tasks = environment.get("SLURM_NTASKS", "")
    # salloc's shell may be on a host that is not in its allocation; Slurm's own processes know their node.
    alone = environment.get("SLURM_JOB_NUM_NODES") == "1" and "SLURMD_NODENAME" in environment
    if alone and ((tasks == "1" and "SLURM_PTY_PORT" in environment) or not tasks.isdecimal()):
        return None
    if tasks.isdecimal():
        return int(tasks)
    raise UsageError(
        f"Slurm's job {environment['SLURM_JOB_ID']} has no tasks, so it does not say how many ranks to start where: "
        "ask for one task a rank (salloc or sbatch -n 16), or give hosts (--hosts a:8,b:8)"
    )


def _compare(tasks: int, gpus: int, options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Refuses more ranks than Slurm has tasks, and speaks up where its tasks leave GPUs unused."""
    nodes = environment.get("SLURM_JOB_NUM_NODES", "")
    number = int(nodes) if nodes.isdecimal() else 1
    job = f"Slurm's job {environment['SLURM_JOB_ID']} has {tasks} task{'s' * (tasks != 1)}"

    def hint(ranks: int) -> str:
        each = -(-ranks // number)
        here = f", or give --hosts localhost:{each} for ranks on this host" if number == 1 else ""
        return f"ask for one task a rank (salloc or sbatch --ntasks-per-node={each}){here}"

    # Whoever has options for mpirun may want more ranks than slots.
    if options.np is not None and options.np > tasks and not options.mpi_options:
        raise UsageError(f"-np: {options.np} ranks, but {job}: {hint(options.np)}")
    if options.np is None and tasks < gpus * number:
        on = "this host" if number == 1 else "each host"
        print(
            f"smddprun: note: {job}, so there are as many ranks; {on} has {gpus} GPUs: {hint(gpus * number)}",
            file=sys.stderr,
        )


def _rank_program(options: argparse.Namespace, token: str) -> list[str]:
    """This program once more, as `rank` runs it."""
    script = Path(sys.executable).with_name("smddprun")
    words = [str(script)] if script.exists() else [sys.executable, "-m", "smddprun"]
    words += ["--bind", options.bind or "cores", "--nics", options.nics]
    words += ["--watch", token] if token else []
    return [*words, "--verbose"] if options.verbose else words


class _Job:
    """One run of mpirun."""

    def __init__(self, line: list[str], environment: dict[str, str], token: str, launch: mpi.Launch) -> None:
        self._launch = launch
        self._reports = Reports(token)
        self._told: list[int] = []
        self._next: tuple[float, Callable[[], None]] | None = None
        """what is to be done, and when, if mpirun has not ended by then"""
        # A session of its own: a terminal's Ctrl-C reaches mpirun once, by us, and what it must not outlive is in it.
        stdin = subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
        try:
            self._mpirun = subprocess.Popen(
                line,
                env=environment,
                stdin=stdin,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=dying_with_us(signal.SIGTERM),
            )
        except OSError as error:
            raise UsageError(f"{line[0]}: {error.strerror}", 126) from error
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            # nohup, and a shell that starts a job in its background, have some ignored.
            if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object) -> None:
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            self._mpirun.send_signal(number)
            return
        again = bool(self._told)
        self._told.append(number)
        if again:
            self._kill()
        else:
            self._stop()

    def _stop(self) -> None:
        """Asks mpirun to end the job, and sets it a time limit."""
        # SIGTERM whatever we were sent: after SIGINT some ask questions, and a hang-up they ignore.
        self._next = (time.monotonic() + _GRACE, self._kill)
        self._mpirun.terminate()

    def _kill(self) -> None:
        """mpirun and what is in its session's process group; ranks of it die with their watchers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._mpirun.pid, signal.SIGKILL)

    def status(self) -> int:
        """Waits for the end; the job's exit status."""
        self._show_until_the_end()
        try:
            # It has closed its output, so that little is left to do.
            status = self._mpirun.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._kill()
            status = self._mpirun.wait()
        status = status if status >= 0 else 128 - status
        if self._told:
            name = signal.Signals(self._told[0]).name
            print(f"smddprun: stopped by {name}", file=sys.stderr)
            return 128 + self._told[0]
        failures = self._reports.failures
        if failures:
            print(_summary(failures, self._launch.ranks), file=sys.stderr)
            return failures[0].status
        if status:
            print(self._without_report(status), file=sys.stderr)
        return status

    def _show_until_the_end(self) -> None:
        assert self._mpirun.stderr is not None
        pipe = self._mpirun.stderr.fileno()
        ended = None
        while True:
            ready, _, _ = select.select([pipe], [], [], 0.2)
            if ready:
                data = os.read(pipe, 65536)
                _show(self._reports.feed(data))
                if not data:
                    break
            now = time.monotonic()
            if ended is None and self._mpirun.poll() is not None:
                ended = now
            if ended is not None and now - ended > _DRAIN and not ready:
                break
            if self._reports.failures and self._next is None:
                self._next = (now + _PATIENCE, self._stop)
            if self._next is not None and now > self._next[0]:
                self._next[1]()
        _show(self._reports.rest())

    def _without_report(self, status: int) -> str:
        """mpirun failed, and no rank said anything."""
        text = (
            f"smddprun: mpirun ended with status {status}, and no rank reported a failure of its program: see above. "
        )
        if not self._launch.here_only and self._launch.places:
            names = ", ".join(host for host, _ in self._launch.places)
            return (
                f"{text}Can this host reach {names} by ssh without a password, and is smddprun there at the same path? "
                f"The line: {shlex.join(self._mpirun.args)}"
            )
        return f"{text}The line: {shlex.join(self._mpirun.args)}"


def _show(data: bytes) -> None:
    if data:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


def _summary(failures: list[Failure], ranks: int) -> str:
    first = failures[0]
    who = f"rank {first.rank} of {ranks} (host {first.host}, local rank {first.local_rank})"
    lines = [f"smddprun: {who} failed first: {first.how()}", *(f"    {word}" for word in first.words)]
    later = [f"{failure.rank} ({failure.how()})" for failure in failures[1:]]
    if later:
        lines.append(f"smddprun: after it: rank {', '.join(later)}")
    return "\n".join(lines)
