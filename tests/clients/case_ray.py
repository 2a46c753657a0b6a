"""Ray Train: its trainer makes the group by the backend's name."""

from __future__ import annotations

import os

import conftest

PYTHON = conftest.HERE.parent / "build/clients/ray/bin/python"


def run(function: str, **arguments: object) -> dict:
    paths = os.pathsep.join([str(conftest.HERE / "clients"), str(conftest.HERE)])
    env = {"PYTHONPATH": paths, "PATH": f"{PYTHON.parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    ranks = conftest.launch([], function, env=env, size=1, limit=240, python=(str(PYTHON),), **arguments)
    ranks.check()
    (report,) = ranks.reports
    return report


def test_trainer() -> None:
    """ray: TorchTrainer with TorchConfig(backend="smddp"), two workers, DDP; as one process"""
    alone, found = run("framework_jobs:plain"), run("ray_jobs:trainer")
    assert (found["backend"], found["ranks"], found["equal"]) == ("smddp", 2, True), found
    pairs = zip(found["weights"], alone["weights"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_a_worker_that_dies() -> None:
    """ray: a worker dies while the other is in a collective; the trainer ends with an error, and nothing is left"""
    found = run("ray_jobs:trainer", dies=True)
    assert "error" in found, found
