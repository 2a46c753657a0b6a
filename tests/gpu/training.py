"""Training of several ranks, beside that of one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu.common import DEVICE, Suite, case, outcome, run_suite

TRAINING: Suite = {}


def training() -> dict[str, Any]:
    return run_suite(TRAINING)


def _model() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(256, 8)).to(DEVICE)


def _train(model: torch.nn.Module, rank: int, size: int, steps: int = 6) -> list[torch.Tensor]:
    """Trains on this rank's share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x, y = torch.randn(64, 64, generator=data), torch.randint(8, (64,), generator=data)
        mine = slice(64 * rank // size, 64 * (rank + 1) // size)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[mine].to(DEVICE)), y[mine].to(DEVICE)).backward()
        optimizer.step()
    full_tensors = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().cpu() for p in full_tensors]


def _trains_alike(wrap: Callable[[torch.nn.Module], torch.nn.Module], tolerance: float = 1e-4) -> None:
    """As one process on the whole batches does, and all ranks to the bit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = _train(_model(), 0, 1)
    together = _train(wrap(_model()), rank, size)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, [t.numpy().tobytes() for t in together])
    assert all(theirs == every[0] for theirs in every), "ranks differ in bits"


def _ddp(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    # Buckets of 128 KiB: several of them.
    return torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.125, **options)


@case(TRAINING)
def ddp() -> None:
    _trains_alike(_ddp)


@case(TRAINING)
def ddp_with_views_of_buckets() -> None:
    _trains_alike(lambda model: _ddp(model, gradient_as_bucket_view=True))


@case(TRAINING)
def ddp_with_a_static_graph() -> None:
    _trains_alike(lambda model: _ddp(model, static_graph=True))


@case(TRAINING)
def ddp_in_bf16() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        wrapped = _ddp(model)
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return wrapped

    _trains_alike(wrap, tolerance=2e-2)


@case(TRAINING)
def fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(DEVICE).type, (dist.get_world_size(),))

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    _trains_alike(wrap)


# ---- programs that users start from

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZE = ["--steps", "12", "--batch", "8", "--length", "32", "--layers", "2", "--width", "32", "--text-mb", "0.2"]


def _run(program: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, str(EXAMPLES / program), *arguments]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=40, check=False)
    assert ended.returncode == 0, f"{program} ended with {ended.returncode}: {ended.stdout}{ended.stderr}"


def _gpt(folder: Path, env: dict[str, str] | None = None) -> list[float]:
    """The losses, of rank 0 alone."""
    files = ["--checkpoint", str(folder / "gpt.pt"), "--summary", str(folder / "gpt.json")]
    _run("train_gpt.py", *SIZE, "--bucket-mb", "0.05", "--device", torch.device(DEVICE).type, *files, env=env)
    summary = folder / "gpt.json"
    return json.loads(summary.read_text())["losses"] if summary.exists() else []


def _gpt_trains_as_one_process_does(folder: Path) -> None:
    together = _gpt(folder)
    if together:
        outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        alone = _gpt(folder, outside)
        assert len(together) == len(alone) == 12
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-3, atol=0)
        assert together[-1] < together[0] - 0.3


def _fsdp_saves_its_weights(folder: Path) -> None:
    _run("train_fsdp.py", "--steps", "10", "--model-dir", str(folder))
    if os.environ["RANK"] == "0":
        weights = torch.load(folder / "model.pt", weights_only=True)
        assert len(weights) > 10
        assert all(w.isfinite().all() for w in weights.values())


def examples() -> dict[str, Any]:
    """Each rank runs the program in a process of its own."""
    found = {}
    for function in (_gpt_trains_as_one_process_does, _fsdp_saves_its_weights):
        with tempfile.TemporaryDirectory() as folder:
            found[function.__name__] = outcome(functools.partial(function, Path(folder)))
    return {"cases": found}
