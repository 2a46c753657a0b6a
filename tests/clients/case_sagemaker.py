"""SageMaker: the SDK's arguments and the training toolkit, both real, from estimator to model and back to errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sagemaker_jobs as jobs

import conftest

EXAMPLES = conftest.HERE.parent / "examples"
DATAPARALLEL = {"smdistributed": {"dataparallel": {"enabled": True}}}
TWO_A_HOST = {"sagemaker_mpi_num_of_processes_per_host": 2}


def asked(folder: Path, *arguments: str, **more: object) -> jobs.Request:
    request = jobs.ask(folder, *arguments, **more)
    assert isinstance(request, jobs.Request), request
    return request


def places(job: jobs.Job, size: int) -> list[dict]:
    """What each rank of places.py said, by rank, on whichever host."""
    assert job.status == 0, job.log
    assert "Reporting training SUCCESS" in job.log
    found = [json.loads(file.read_text()) for file in job.folder.glob("algo-*/model/place-*.json")]
    assert sorted(int(p["RANK"]) for p in found) == list(range(size)), job.log
    assert {p["sum"] for p in found} == {size * (size + 1) / 2}
    assert {p["WORLD_SIZE"] for p in found} == {str(size)}
    return sorted(found, key=lambda place: int(place["RANK"]))


def test_a_model_is_trained_on_one_host(tmp_path: Path) -> None:
    """smdistributed, 1 host x 2 ranks: an SMDDP script trains a model."""
    more = {"hyperparameters": TWO_A_HOST | {"epochs": 3}, "distribution": DATAPARALLEL}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "smddp_digits.py", EXAMPLES, **more))
    assert job.status == 0, job.log
    assert job.model("model.pt").exists()
    assert "rank 1 of 2, local rank 1" in job.log
    accuracy = float(job.log.rpartition("accuracy ")[2].split()[0])
    assert accuracy > 0.9, job.log


def test_custom_mpi_options_on_one_host(tmp_path: Path) -> None:
    """smdistributed, 1 host x 2 ranks: custom MPI options arrive, smddprun is called, FI_PROVIDER=efa does no harm."""
    options = {"enabled": True, "custom_mpi_options": "-x MINE=option --NCCL_DEBUG WARN"}
    more = {"hyperparameters": TWO_A_HOST, "distribution": {"smdistributed": {"dataparallel": options}}}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "places.py", **more))
    for rank, place in enumerate(places(job, 2)):
        assert place["host"] == "algo-1"
        assert place["LOCAL_RANK"] == place["SMDATAPARALLEL_LOCAL_RANK"] == str(rank)
        assert (place["MINE"], place["NCCL_DEBUG"], place["FI_PROVIDER"]) == ("option", "WARN", None)
        assert place["SMDATAPARALLEL_USE_SINGLENODE"] == "1"
    assert " smddprun " in job.log
    assert "FI_PROVIDER=efa was taken out" in job.log


def test_two_hosts(tmp_path: Path) -> None:
    """smdistributed, 2 hosts x 2 ranks: own sshd, names and processes; the import asks for nothing else."""
    more = {"hyperparameters": TWO_A_HOST, "instance_count": 2, "distribution": DATAPARALLEL}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "places.py", **more))
    found = places(job, 4)
    assert [place["host"] for place in found] == ["algo-1", "algo-1", "algo-2", "algo-2"]
    assert [place["LOCAL_RANK"] for place in found] == ["0", "1", "0", "1"]
    assert {tuple(place["nodes"]) for place in found} == {(0, 0, 1, 1)}
    assert {place["SMDATAPARALLEL_SERVER_ADDR"] for place in found} == {"algo-1"}
    assert {place["SMDATAPARALLEL_USE_HOMOGENEOUS"] for place in found} == {"1"}


def test_without_smddprun(tmp_path: Path) -> None:
    """smdistributed, 1 host x 2 ranks, an image without smddprun: the import alone suffices."""
    more = {"hyperparameters": TWO_A_HOST, "distribution": DATAPARALLEL}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "places.py", **more), on_path=())
    assert [place["SMDATAPARALLEL_LOCAL_RANK"] for place in places(job, 2)] == ["0", "1"]
    assert "smddprun not being used" in job.log


@pytest.mark.parametrize("estimator", ["PyTorch", "HuggingFace"])
def test_pytorchddp(estimator: str, tmp_path: Path) -> None:
    """pytorchddp, 1 host x 2 ranks."""
    more = {"hyperparameters": TWO_A_HOST, "distribution": {"pytorchddp": {"enabled": True}}}
    if estimator == "HuggingFace":
        more["py_version"] = "py311"
    request = asked(tmp_path, estimator, "places.py", **more)
    flag = "pytorch_ddp" if estimator == "HuggingFace" else "distributed_dataparallel"
    assert request.hyperparameters[f"sagemaker_{flag}_enabled"] == "true"
    job = jobs.run(tmp_path, request)
    assert [place["LOCAL_RANK"] for place in places(job, 2)] == ["0", "1"]


@pytest.mark.parametrize("hosts", [1, 2])
def test_torch_distributed(hosts: int, tmp_path: Path) -> None:
    """torch_distributed, by torchrun: no MPI, no smddprun."""
    each = TWO_A_HOST if hosts == 1 else {}
    more = {"hyperparameters": each, "distribution": {"torch_distributed": {"enabled": True}}}
    request = asked(tmp_path, "PyTorch", "places.py", instance_count=hosts, **more)
    found = places(jobs.run(tmp_path, request), 2)
    assert [place["host"] for place in found] == (["algo-1"] * 2 if hosts == 1 else ["algo-1", "algo-2"])
    assert [place["SMDATAPARALLEL_LOCAL_RANK"] for place in found] == (["0", "1"] if hosts == 1 else ["0", "0"])


def test_mpi(tmp_path: Path) -> None:
    """mpi, 1 host x 2 ranks."""
    more = {"distribution": {"mpi": {"enabled": True, "processes_per_host": 2}}}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "places.py", **more))
    assert [place["LOCAL_RANK"] for place in places(job, 2)] == ["0", "1"]
    assert " smddprun " not in job.log


FAILURES = {
    "raise": ("ValueError", "the third layer is missing", "1"),
    "exit": ("", "", "7"),
    "kill": ("PeerLostError", "lost rank 1", None),
    "mismatch": ("MismatchError", "float32[2]", "1"),
}


@pytest.mark.parametrize("way", FAILURES)
def test_a_failing_script(way: str, tmp_path: Path) -> None:
    """smdistributed, 1 host x 2 ranks: the error's name and text, and the exit code, arrive in the failure file."""
    more = {"hyperparameters": TWO_A_HOST | {"way": way}, "distribution": DATAPARALLEL}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "failing.py", **more))
    name, text, code = FAILURES[way]
    assert job.status == 1, job.log
    assert "Reporting training SUCCESS" not in job.log
    assert name in job.failure, job.log
    assert text in job.failure, job.failure
    if code is not None:
        assert f"ExitCode {code}" in job.failure, job.failure


def test_malformed_mpi_options(tmp_path: Path) -> None:
    """smdistributed: an option mpirun does not know ends the job with mpirun's words."""
    options = {"enabled": True, "custom_mpi_options": "--no-such-option"}
    more = {"hyperparameters": TWO_A_HOST, "distribution": {"smdistributed": {"dataparallel": options}}}
    job = jobs.run(tmp_path, asked(tmp_path, "PyTorch", "places.py", **more))
    assert job.status == 1, job.log
    assert "no-such-option" in job.failure + job.log
    assert "ExitCode" in job.failure


# ---- the SDK alone


@pytest.mark.parametrize("estimator", ["PyTorch", "HuggingFace", "TensorFlow"])
def test_estimators_send_the_same(estimator: str, tmp_path: Path) -> None:
    """Hyperparameters of smdistributed, whatever the estimator."""
    options = {"enabled": True, "custom_mpi_options": "-x A=1"}
    more = {"distribution": {"smdistributed": {"dataparallel": options}}}
    if estimator != "PyTorch":
        more["py_version"] = "py311"
    sent = asked(tmp_path, estimator, "places.py", instance_type="ml.g6.12xlarge", **more).hyperparameters
    assert sent["sagemaker_distributed_dataparallel_enabled"] == "true"
    assert sent["sagemaker_distributed_dataparallel_custom_mpi_options"] == '"-x A=1"'
    assert sent["sagemaker_instance_type"] == '"ml.g6.12xlarge"'


def test_what_the_sdk_itself_refuses(tmp_path: Path) -> None:
    """P5 with smdistributed, by the SDK: torch_distributed is the way there."""
    refusal = jobs.ask(tmp_path, "PyTorch", "places.py", instance_type="ml.p5.48xlarge", distribution=DATAPARALLEL)
    assert isinstance(refusal, str)
    assert "p5" in refusal
    (tmp_path / "error.txt").unlink()
    way = {"torch_distributed": {"enabled": True}}
    sent = asked(tmp_path, "PyTorch", "places.py", instance_type="ml.p5.48xlarge", distribution=way).hyperparameters
    assert sent["sagemaker_torch_distributed_enabled"] == "true"
