"""all_reduce of sparse COO tensors, as gradients of embeddings are: all gather everybody's entries and add them up."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ReduceOp, Work

from .errors import ArgumentError, UnsupportedError
from .tensors import copy_back

_GIVE_UP = "sparse tensors can be summed only; convert them with .to_dense() for other reductions"


class Gathers(Protocol):
    """What is needed of a group."""

    def all_gather_single(self, output: Tensor, input: Tensor, opts: object) -> Work: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object) -> Work: ...


def all_reduce_sparse(group: Gathers, tensor: Tensor, op: object, size: int, opts: object) -> None:
    """Sums `tensor` over all ranks, in place; the result is coalesced. Entries and their places may differ by rank;
    shapes and numbers of sparse dimensions may not. Blocks: the sizes have to be known before entries can move."""
    if op != ReduceOp.SUM:
        name = str(getattr(op, "op", op)).rpartition(".")[2]
        raise UnsupportedError.of("all_reduce", name, tensor.dtype, _GIVE_UP)
    mine = tensor.detach().coalesce()
    indices, values = mine.indices(), mine.values()
    # Shape and number of entries of every rank, in one exchange.
    said = torch.tensor([mine.sparse_dim(), *mine.shape, indices.size(1)], dtype=torch.int64, device="cpu")
    heard = torch.empty(size * said.numel(), dtype=torch.int64, device="cpu")
    group.all_gather_single(heard, said, opts).wait()
    rows = heard.view(size, -1)
    if not bool((rows[:, :-1] == said[:-1]).all()):
        given = f"{[tuple(row[1:-1].tolist()) for row in rows]} with {rows[:, 0].tolist()} sparse dimensions"
        raise ArgumentError.of(
            "all_reduce", "tensor", "sparse tensors of one shape", given, "Pass the same on all ranks"
        )
    counts = rows[:, -1].tolist()
    places = [torch.empty(indices.size(0), count, dtype=indices.dtype, device=indices.device) for count in counts]
    entries = [torch.empty(count, *values.shape[1:], dtype=values.dtype, device=values.device) for count in counts]
    group.allgather([places], [indices.contiguous()], opts).wait()
    group.allgather([entries], [values.contiguous()], opts).wait()
    # In rank order, hence the same bits on all ranks.
    # Said explicitly, or torch warns that nobody has said it.
    given = {"check_invariants": False}
    total = torch.sparse_coo_tensor(torch.cat(places, dim=1), torch.cat(entries), mine.shape, **given).coalesce()
    copy_back(tensor, total)
