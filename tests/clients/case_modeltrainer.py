"""SageMaker's SDK from version 3 on: ModelTrainer's launchers, as its own drivers carry them out on emulated hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sagemaker_jobs as jobs

import conftest

EXAMPLES = conftest.HERE.parent / "examples"
LAUNCHERS = ["MPI", "Torchrun"]


def places(job: jobs.Job, size: int) -> list[dict]:
    """What each rank of places.py said, by rank, on whichever host."""
    assert job.status == 0, job.log
    assert "Training Container Execution Completed" in job.log
    found = [json.loads(file.read_text()) for file in job.folder.glob("algo-*/model/place-*.json")]
    assert sorted(int(p["RANK"]) for p in found) == list(range(size)), job.log
    assert {p["sum"] for p in found} == {size * (size + 1) / 2}
    return sorted(found, key=lambda place: int(place["RANK"]))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_model_is_trained(launcher: str, tmp_path: Path) -> None:
    """sagemaker: ModelTrainer, 1 host x 2 ranks: an SMDDP script trains a model."""
    request = jobs.ask_model_trainer(
        tmp_path, launcher, "smddp_digits.py", EXAMPLES, hyperparameters={"epochs": 3}, process_count_per_node=2
    )
    job = jobs.run(tmp_path, request)
    assert job.status == 0, job.log
    assert job.model("model.pt").exists()
    assert "rank 1 of 2, local rank 1" in job.log
    assert float(job.log.rpartition("accuracy ")[2].split()[0]) > 0.9, job.log


def test_mpi_options_of_ones_own(tmp_path: Path) -> None:
    """sagemaker: ModelTrainer's MPI, 1 host x 2 ranks: options of one's own arrive, and smddprun is not needed."""
    options = ["-x", "MINE=option", "-x", "NCCL_DEBUG=WARN"]
    request = jobs.ask_model_trainer(
        tmp_path, "MPI", "places.py", process_count_per_node=2, mpi_additional_options=options
    )
    for rank, place in enumerate(places(jobs.run(tmp_path, request, on_path=()), 2)):
        assert (place["host"], place["LOCAL_RANK"]) == ("algo-1", str(rank))
        assert (place["MINE"], place["NCCL_DEBUG"]) == ("option", "WARN")


def test_torchrun_on_two_hosts(tmp_path: Path) -> None:
    """sagemaker: ModelTrainer's Torchrun, 2 hosts x 2 ranks."""
    request = jobs.ask_model_trainer(tmp_path, "Torchrun", "places.py", hosts=2, process_count_per_node=2)
    found = places(jobs.run(tmp_path, request), 4)
    assert [place["host"] for place in found] == ["algo-1", "algo-1", "algo-2", "algo-2"]
    assert {tuple(place["nodes"]) for place in found} == {(0, 0, 1, 1)}


def test_mpi_on_two_hosts(tmp_path: Path) -> None:
    """sagemaker: ModelTrainer's MPI, 2 hosts x 2 ranks: its driver asks for those of one host unless -np follows."""
    # An image has libfabric where it is looked for; ssh hands on no variables.
    options = ["-np", "4", "-x", "SMDDP_LIBFABRIC"]
    request = jobs.ask_model_trainer(
        tmp_path, "MPI", "places.py", hosts=2, process_count_per_node=2, mpi_additional_options=options
    )
    found = places(jobs.run(tmp_path, request), 4)
    assert [place["host"] for place in found] == ["algo-1", "algo-1", "algo-2", "algo-2"]
    assert {tuple(place["nodes"]) for place in found} == {(0, 0, 1, 1)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_script(launcher: str, tmp_path: Path) -> None:
    """sagemaker: ModelTrainer, 1 host x 2 ranks: a script that raises ends the job; its words are in the log."""
    request = jobs.ask_model_trainer(
        tmp_path, launcher, "failing.py", hyperparameters={"way": "raise"}, process_count_per_node=2
    )
    job = jobs.run(tmp_path, request)
    assert job.status == 1, job.log
    assert "Training Container Execution Completed" not in job.log
    assert "ValueError: the third layer is missing" in job.log
    assert "exit status 1" in job.failure, job.failure
