"""What a driver does with Ray Train, in the environment `ray`; model and data are those of `framework_jobs`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def loop(settings: dict) -> None:
    """A worker: Ray has made the group."""
    import framework_jobs as jobs
    import torch
    import torch.distributed as dist
    from ray.train.torch import prepare_model

    backend, context = dist.get_backend(), ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    model = prepare_model(jobs.Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, batch in enumerate(jobs.batches_of(rank, size)):
        if settings.get("dies") and rank == 1 and number == 1:
            # The other is in this step's all_reduce, or on its way there.
            os._exit(7)
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    every: list[object] = [None] * size
    dist.all_gather_object(every, jobs.weights(model))
    found = {"weights": every[0], "equal": every[0] == every[-1], "backend": backend, "ranks": size}
    if rank == 0:
        Path(settings["found"]).write_text(json.dumps(found))


def trainer(dies: bool = False) -> dict:
    """What worker 0 found; the error of a run that failed."""
    # Workers find this folder, and nothing of the outer launcher.
    paths = os.environ["PYTHONPATH"]
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    folder = Path(tempfile.mkdtemp())
    made = TorchTrainer(
        loop,
        train_loop_config={"dies": dies, "found": str(folder / "found.json")},
        torch_config=TorchConfig(backend="smddp", timeout_s=60),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder)),
    )
    try:
        made.fit()
        return json.loads((folder / "found.json").read_text())
    except Exception as error:  # noqa: BLE001 (what it raises is Ray's choice)
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
