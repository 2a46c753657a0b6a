"""Checks Kubernetes manifests by the operators' own API: manifests.py FILE... prints what is wrong, and fails.

PyTorchJob, TrainJob and TrainingRuntime are read by the Python classes their operators publish: a field these do not
know does not survive. No such package has MPIJob v2beta1; its fields are listed here, after the operator's API
reference (pkg/apis/kubeflow/v2beta1 of mpi-operator 0.6). Pods are checked by Kubernetes' own schema.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as trainer
import kubernetes_validate
import yaml
from kubeflow import training

POLICY = {
    "cleanPodPolicy": str, "ttlSecondsAfterFinished": int, "activeDeadlineSeconds": int, "backoffLimit": int,
    "schedulingPolicy": dict, "suspend": bool, "managedBy": str,
}  # fmt: skip
REPLICAS = {"replicas": int, "restartPolicy": str, "template": dict}
MPI_JOB = {
    "slotsPerWorker": int, "runLauncherAsWorker": bool, "runPolicy": POLICY, "sshAuthMountPath": str,
    "launcherCreationPolicy": str, "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
    "mpiReplicaSpecs": {"Launcher": REPLICAS, "Worker": REPLICAS},
}  # fmt: skip


def unlike(given: Any, wanted: Any, where: str) -> Iterator[str]:
    """Where `given` has fields, types or values other than `wanted` allows."""
    if isinstance(wanted, set):
        if given not in wanted:
            yield f"{where}: {given!r} is none of {sorted(wanted)}"
    elif isinstance(wanted, type):
        if not isinstance(given, wanted) or (isinstance(given, bool) and wanted is int):
            yield f"{where}: {given!r} is no {wanted.__name__}"
    else:
        for name, value in given.items():
            if name not in wanted:
                yield f"{where}.{name}: there is no such field"
            else:
                yield from unlike(value, wanted[name], f"{where}.{name}")


def lost(given: Any, kept: Any, where: str) -> Iterator[str]:
    """What of `given` is missing, or another, in `kept`."""
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(kept, dict) or name not in kept:
                yield f"{where}.{name}: there is no such field"
            else:
                yield from lost(value, kept[name], f"{where}.{name}")
    elif isinstance(given, list):
        for i, value in enumerate(given):
            yield from lost(value, kept[i], f"{where}[{i}]")
    elif given != kept:
        yield f"{where}: {given!r} became {kept!r}"


class _Response:
    """What the training operator's client deserialises."""

    def __init__(self, document: Any) -> None:
        self.data = json.dumps(document)


def wrong(document: Any) -> Iterator[str]:
    kind = (document["apiVersion"], document["kind"])
    if kind == ("kubeflow.org/v2beta1", "MPIJob"):
        yield from unlike(document["spec"], MPI_JOB, "spec")
    elif kind == ("kubeflow.org/v1", "PyTorchJob"):
        client = training.ApiClient()
        made = client.deserialize(_Response(document), "KubeflowOrgV1PyTorchJob")
        yield from lost(document, client.sanitize_for_serialization(made), kind[1])
    elif kind == ("trainer.kubeflow.org/v1alpha1", "TrainJob"):
        yield from lost(document, trainer.TrainerV1alpha1TrainJob.from_dict(document).to_dict(), kind[1])
    elif kind == ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"):
        yield from lost(document, trainer.TrainerV1alpha1TrainingRuntime.from_dict(document).to_dict(), kind[1])
    else:
        yield f"{kind} is a kind nobody checks"
    for spec in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        try:
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"pod: {error.message} at {'.'.join(map(str, error.path))}"


def told(document: Any) -> Iterator[str]:
    """`wrong`, and what the operators' classes refuse."""
    try:
        yield from wrong(document)
    except (ValueError, TypeError) as error:
        yield f"{document['kind']}: {error}"


def pods(part: Any) -> Iterator[Any]:
    """The specifications of pods anywhere in a document."""
    if isinstance(part, dict):
        if "containers" in part:
            yield part
        for value in part.values():
            yield from pods(value)
    elif isinstance(part, list):
        for value in part:
            yield from pods(value)


def main() -> int:
    found = 0
    for file in map(Path, sys.argv[1:]):
        for document in yaml.safe_load_all(file.read_text()):
            for line in told(document):
                print(f"{file.name}: {line}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
