"""Calls that are refused, after which the group works as before."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gpu.common import Suite, case, full, refused, run_suite, still_works

MISUSE: Suite = {}
MISUSE_BY_NCCL: Suite = {}


def misuse() -> dict[str, Any]:
    return run_suite(MISUSE)


def misuse_by_nccl() -> dict[str, Any]:
    return run_suite(MISUSE_BY_NCCL)


@case(MISUSE, gpu=True)
def input_and_output_on_different_devices() -> None:
    size = dist.get_world_size()
    refused(lambda: dist.all_gather_into_tensor(torch.empty(4 * size), full(4, 1)), "all_gather", "cpu", "cuda")
    refused(lambda: dist.reduce_scatter_tensor(torch.empty(4), full(4 * size, 1)), "reduce_scatter", "cpu", "cuda")
    still_works()


@case(MISUSE, gpu=True)
def a_list_over_several_devices() -> None:
    outputs = [full(4, 0) if i else torch.empty(4) for i in range(dist.get_world_size())]
    refused(lambda: dist.all_gather(outputs, full(4, 1)), "cpu", "cuda")
    still_works()


@case(MISUSE)
def counts_that_do_not_fit() -> None:
    size = dist.get_world_size()
    refused(lambda: dist.all_gather_into_tensor(full(4 * size + 1, 0), full(4, 1)))
    refused(lambda: dist.reduce_scatter_tensor(full(4, 0), full(4 * size + 1, 1)))
    still_works()


@case(MISUSE)
def dtypes_that_do_not_fit() -> None:
    size = dist.get_world_size()
    refused(lambda: dist.all_gather_into_tensor(full(4 * size, 0, torch.float16), full(4, 1)))
    still_works()


@case(MISUSE)
def reductions_that_do_not_exist() -> None:
    refused(lambda: dist.all_reduce(full(4, 1), dist.ReduceOp.BXOR), "float32")
    refused(lambda: dist.all_reduce(full(4, 1).to(torch.float8_e4m3fn)), "float8_e4m3fn")
    refused(lambda: dist.all_reduce(full(4, 1).to(torch.complex64), dist.ReduceOp.MAX), "complex")
    still_works()


@case(MISUSE_BY_NCCL, gpu=True)
def reductions_nccl_lacks() -> None:
    for op in ("BAND", "BOR", "BXOR"):
        refused(lambda op=op: dist.all_reduce(full(4, 1, torch.int32), getattr(dist.ReduceOp, op)), "NCCL", op.lower())
    refused(lambda: dist.all_reduce(full(4, 1, torch.int16)), "NCCL", "int16")
    still_works()


@case(MISUSE_BY_NCCL, gpu=True)
def no_such_root() -> None:
    refused(lambda: dist.broadcast(full(4, 1), 5))
    still_works()
