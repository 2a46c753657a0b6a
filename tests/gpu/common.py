"""What suites and steps of a GPU's test share: cases, the device, and numbers to check.

With SMDDP_TEST_DEVICE=cpu everything that is not about streams runs on a machine without a GPU."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import cases_collectives

DEVICE = cases_collectives.DEVICE
ON_GPU = DEVICE != "cpu"
Suite = dict[str, Callable[[], None]]
NEEDS_GPU = {"cases": {}, "impossible": "it needs a GPU"}
"""the report of a step that has nothing to do without one"""


class NotRun(Exception):
    """Raised by a case that cannot be tried here, with why: it has neither passed nor failed."""


def case(suite: Suite, *, gpu: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Adds a function to a suite; `gpu`: on a machine with one only."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        if ON_GPU or not gpu:
            suite[function.__name__] = function
        return function

    return add


def choose_device() -> None:
    if ON_GPU:
        # Ranks of the tests share a GPU where there are fewer GPUs than ranks.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.init()


def start() -> None:
    choose_device()
    torch.set_num_threads(1)
    dist.init_process_group("smddp", timeout=timedelta(seconds=40))


def run_suite(suite: Suite) -> dict[str, Any]:
    start()
    found, not_run = {}, {}
    for name, function in suite.items():
        try:
            found[name] = outcome(function)
        except NotRun as why:
            not_run[name] = str(why)
        print(name, "not run" if name in not_run else "FAILED" if found[name] else "ok", flush=True)
    figures = {"group": dist.group.WORLD.describe()}
    dist.barrier()
    dist.destroy_process_group()
    return {"cases": found, "not run": not_run, "figures": figures}


def outcome(function: Callable[[], None]) -> str:
    """Nothing where all went well, else what went wrong."""
    try:
        function()
        synchronize()
    except NotRun:
        raise
    except Exception:  # noqa: BLE001
        return traceback.format_exc()
    return ""


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def full(count: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype, device=DEVICE)


def total() -> float:
    """The sum of rank + 1 over all ranks."""
    return sum(range(1, dist.get_world_size() + 1))


def is_all(tensor: torch.Tensor, value: float) -> None:
    wrong = int((tensor != value).sum().item())
    assert wrong == 0, f"{wrong} of {tensor.numel()} elements are not {value}: {tensor.view(-1)[:4].tolist()} ..."


def refused(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        assert not missing, f"the error does not say {missing}: {text}"
    else:
        raise AssertionError("it was not refused")


def still_works() -> None:
    tensor = full(100, dist.get_rank() + 1)
    dist.all_reduce(tensor)
    is_all(tensor, total())
