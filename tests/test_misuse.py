"""What gloo or nccl answer with an error gets one here: at the call, saying what was wrong; and no harm done.

What test_errors.py has is not repeated. Where only the root is at fault, it calls again as it should have, for the
others, who are already in the call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest

import conftest
from torch_versions import needs

BY_TORCH = ""
"""The words of torch's own checks differ between its versions."""

TORCH_FIRST = {
    "all_reduce: a number",
    "broadcast: an array",
    "reduce: a number",
    "all_gather: numbers",
    "all_gather_single: a number",
    "reduce_scatter_single: a number",
    "all_to_all_single: a number",
    "coalesced all_gather: numbers",
    "coalesced reduce_scatter: numbers",
    "send: a number",
    "recv: None",
}
"""Cases whose arguments are no tensors. Where torch's hooks must see the calls, its C++ half refuses them itself, and
names its method, the arguments it takes and those it was given."""
BY_TORCH_FIRST = "incompatible function arguments|Invoked with"


@dataclass
class Group:
    """A group of two ranks, and what calls are made of."""

    group: object

    def __post_init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist, self.op = torch, dist, dist.ReduceOp
        self.me, self.n = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.peer, self.root = 1 - self.me, self.me == 0
        self.z = torch.zeros

    def zs(self, count: int, **how: object) -> list:
        return [self.z(count, **how) for _ in range(self.n)]

    def half(self, count: int) -> object:
        return self.z(count, dtype=self.torch.float16)

    def expanded(self, count: int) -> object:
        return self.z(1).expand(count)

    def sparse(self, count: int) -> object:
        return self.z(count).to_sparse()

    def meta(self, count: int) -> object:
        return self.z(count, device="meta")

    def freed(self, count: int, before: int = 0) -> object:
        """before: elements of the same memory that come first"""
        tensor = self.z(before + count)[before:]
        tensor.untyped_storage().resize_(0)
        return tensor

    def options(self, kind: str, **fields: object) -> object:
        made = getattr(self.torch._C._distributed_c10d, f"{kind}Options")()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def premul(self, tensor: object, factor: object) -> None:
        self.dist.all_reduce(tensor, self.dist._make_nccl_premul_sum(factor), group=self.group)


def half_list(g: Group) -> list:
    return [g.z(4), g.half(4)]


O = Group.options  # noqa: E741
Case = tuple[Callable[[Group], object], str]

# The call, and words of the error, separated by "|"; the operation comes first.
CASES: dict[str, Case] = {
    # ---- dtypes
    "all_gather: outputs of another dtype": (
        lambda g: g.group.allgather([[g.half(4), g.half(4)]], [g.z(4)], O(g, "Allgather")),
        "all_gather|'tensor_list[0]'|float32|float16",
    ),
    "all_gather: outputs of two dtypes": (
        lambda g: g.group.allgather([half_list(g)], [g.z(4)], O(g, "Allgather")),
        "all_gather|'tensor_list[1]'|float32|float16",
    ),
    "all_gather: by torch": (
        lambda g: g.dist.all_gather([g.half(4), g.half(4)], g.z(4), group=g.group),
        BY_TORCH,
    ),
    "reduce_scatter_tensor: output of another dtype": (
        lambda g: g.group.reduce_scatter_single(g.half(4), g.z(8), O(g, "ReduceScatter")),
        "reduce_scatter_single|'output'|float32|float16",
    ),
    "reduce_scatter: output of another dtype": (
        lambda g: g.group.reduce_scatter([g.half(4)], [g.zs(4)], O(g, "ReduceScatter")),
        "reduce_scatter|'output'|float32|float16",
    ),
    "reduce_scatter: inputs of two dtypes": (
        lambda g: g.group.reduce_scatter([g.z(4)], [half_list(g)], O(g, "ReduceScatter")),
        "reduce_scatter|'input_list[1]'|float32|float16",
    ),
    "all_to_all_single: output of another dtype": (
        lambda g: g.group.all_to_all_single(g.half(4), g.z(4), [], [], O(g, "AllToAll")),
        "all_to_all_single|'output'|float32|float16",
    ),
    "all_to_all: outputs of another dtype": (
        lambda g: g.group.alltoall([g.half(4), g.half(4)], g.zs(4), O(g, "AllToAll")),
        "all_to_all|'output_tensor_list[0]'|float32|float16",
    ),
    "all_to_all: outputs of two dtypes": (
        lambda g: g.group.alltoall(half_list(g), g.zs(4), O(g, "AllToAll")),
        "all_to_all|'output_tensor_list[1]'|float32|float16",
    ),
    "all_reduce_coalesced: two dtypes": (
        lambda g: g.group.allreduce_coalesced(half_list(g), O(g, "AllreduceCoalesced")),
        "all_reduce_coalesced|'tensors[1]'|float32|float16",
    ),
    "coalesced all_gather: output of another dtype": (
        lambda g: g.group.all_gather_single_coalesced([g.z(8), g.half(8)], g.zs(4), O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs[1]'|float32|float16",
    ),
    "coalesced reduce_scatter: output of another dtype": (
        lambda g: g.group.reduce_scatter_single_coalesced([g.z(4), g.half(4)], g.zs(8), O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|[1]'|float32|float16",
    ),
    # ---- counts
    "reduce_scatter: own part": (
        lambda g: g.dist.reduce_scatter(g.z(4), g.zs(3), group=g.group),
        "reduce_scatter|'input_list[|4 elements|3 elements",
    ),
    "all_to_all_single: output of another count": (
        lambda g: g.dist.all_to_all_single(g.z(4), g.z(8), group=g.group),
        "all_to_all_single|'output'|8 elements|4 elements",
    ),
    "all_to_all_single: rows that cannot be shared out": (
        lambda g: g.dist.all_to_all_single(g.z(3, 2), g.z(3, 2), group=g.group),
        "all_to_all_single|divisible by 2|(3, 2)",
    ),
    "all_to_all_single: rows of different width": (
        lambda g: g.dist.all_to_all_single(g.z(2, 2), g.z(2, 3), [1, 1], [1, 1], group=g.group),
        "all_to_all_single|2|3",
    ),
    "all_to_all_single: own part": (
        lambda g: g.dist.all_to_all_single(g.z(4), g.z(4), [1, 3], [3, 1], group=g.group),
        "all_to_all_single|3|1",
    ),
    "all_to_all_single: own part, asynchronously": (
        lambda g: g.dist.all_to_all_single(g.z(4), g.z(4), [1, 3], [3, 1], group=g.group, async_op=True),
        "all_to_all_single|3|1",
    ),
    "all_to_all: own part": (
        lambda g: g.dist.all_to_all(g.zs(4), g.zs(3), group=g.group),
        "all_to_all|4|3",
    ),
    "coalesced all_gather: count": (
        lambda g: g.group.all_gather_single_coalesced([g.z(8), g.z(5)], [g.z(4), g.z(3)], O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs[1]'|6 elements|5 elements",
    ),
    "coalesced reduce_scatter: count": (
        lambda g: g.group.reduce_scatter_single_coalesced([g.z(4), g.z(3)], [g.z(8), g.z(7)], O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|'inputs[1]'|6 elements|7 elements",
    ),
    "all_gather: count, asynchronously": (
        lambda g: g.dist.all_gather_into_tensor(g.z(9), g.z(4), group=g.group, async_op=True),
        "all_gather_single|'output'|8 elements|9 elements",
    ),
    # ---- lists
    "reduce_scatter: list too short": (
        lambda g: g.dist.reduce_scatter(g.z(4), g.zs(4)[1:], group=g.group),
        "reduce_scatter|'input_list'|2 tensors|1 tensors",
    ),
    "all_to_all: inputs too few": (
        lambda g: g.dist.all_to_all(g.zs(4), g.zs(4)[1:], group=g.group),
        "all_to_all|'input_tensor_list'|2 tensors|1 tensors",
    ),
    "all_to_all: outputs too few": (
        lambda g: g.dist.all_to_all(g.zs(4)[1:], g.zs(4), group=g.group),
        "all_to_all|'output_tensor_list'|2 tensors|1 tensors",
    ),
    "coalesced all_gather: lists of two lengths": (
        lambda g: g.group.all_gather_single_coalesced([g.z(8)], g.zs(4), O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs'|2 tensors|1 tensors",
    ),
    "coalesced reduce_scatter: lists of two lengths": (
        lambda g: g.group.reduce_scatter_single_coalesced([g.z(4)], g.zs(8), O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|'outputs'|2 tensors|1 tensors",
    ),
    "broadcast: several tensors": (
        lambda g: g.group.broadcast(g.zs(1), O(g, "Broadcast")),
        "broadcast|one tensor|a list of 2",
    ),
    "send: several tensors": (lambda g: g.group.send(g.zs(1), g.peer, 0), "send|one tensor|a list of 2"),
    "all_gather: no tensors": (
        lambda g: g.dist.all_gather([], g.z(4), group=g.group),
        "all_gather|2 tensors|0 tensors",
    ),
    "reduce_scatter: no tensors": (
        lambda g: g.dist.reduce_scatter(g.z(4), [], group=g.group),
        "reduce_scatter|2 tensors|0 tensors",
    ),
    "all_to_all: no tensors": (lambda g: g.dist.all_to_all([], [], group=g.group), "all_to_all|2 tensors|0 tensors"),
    "all_reduce_coalesced: no tensors": (
        lambda g: g.dist.all_reduce_coalesced([], group=g.group),
        "all_reduce_coalesced|'tensors'|at least one|none",
    ),
    "coalesced all_gather: no tensors": (
        lambda g: g.group.all_gather_single_coalesced([], [], O(g, "Allgather")),
        "all_gather_single_coalesced|'inputs'|at least one|none",
    ),
    "coalesced reduce_scatter: no tensors": (
        lambda g: g.group.reduce_scatter_single_coalesced([], [], O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|at least one|none",
    ),
    "all_reduce: no tensors": (lambda g: g.group.allreduce([], O(g, "Allreduce")), "all_reduce|one tensor|a list of 0"),
    "all_gather: a tuple": (lambda g: g.dist.all_gather(tuple(g.zs(4)), g.z(4), group=g.group), BY_TORCH),
    "reduce_scatter: a tuple": (lambda g: g.dist.reduce_scatter(g.z(4), tuple(g.zs(4)), group=g.group), BY_TORCH),
    "all_to_all: tuples": (lambda g: g.dist.all_to_all(tuple(g.zs(4)), tuple(g.zs(4)), group=g.group), BY_TORCH),
    # ---- things that are no tensors, or not such as can be moved
    "all_reduce: numbers": (lambda g: g.dist.all_reduce([1.0], group=g.group), BY_TORCH),
    "all_reduce: a number": (
        lambda g: g.group.allreduce([1], O(g, "Allreduce")),
        "all_reduce|'tensor'|torch.Tensor|int",
    ),
    "broadcast: an array": (
        lambda g: g.group.broadcast([g.z(3).numpy()], O(g, "Broadcast")),
        "broadcast|'tensor'|torch.Tensor|ndarray",
    ),
    "reduce: a number": (lambda g: g.group.reduce([1], O(g, "Reduce")), "reduce|'tensor'|torch.Tensor|int"),
    "all_gather: numbers": (
        lambda g: g.group.allgather([[1, 2]], [g.z(1)], O(g, "Allgather")),
        "all_gather|'tensor_list[0]'|torch.Tensor|int",
    ),
    "all_gather_single: a number": (
        lambda g: g.group.all_gather_single(1, g.z(1), O(g, "Allgather")),
        "all_gather_single|'output'|torch.Tensor|int",
    ),
    "reduce_scatter_single: a number": (
        lambda g: g.group.reduce_scatter_single(g.z(1), 1, O(g, "ReduceScatter")),
        "reduce_scatter_single|'input'|torch.Tensor|int",
    ),
    "all_to_all_single: a number": (
        lambda g: g.group.all_to_all_single(g.z(2), 1, [], [], O(g, "AllToAll")),
        "all_to_all_single|'input'|torch.Tensor|int",
    ),
    "coalesced all_gather: numbers": (
        lambda g: g.group.all_gather_single_coalesced([1, 2], [1, 2], O(g, "Allgather")),
        "all_gather_single_coalesced|torch.Tensor|int",
    ),
    "coalesced reduce_scatter: numbers": (
        lambda g: g.group.reduce_scatter_single_coalesced([1, 2], [1, 2], O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|torch.Tensor|int",
    ),
    "send: a number": (lambda g: g.group.send([1], g.peer, 0), "send|'tensor'|torch.Tensor|int"),
    "recv: None": (lambda g: g.group.recv([None], g.peer, 0), "recv|'tensor'|torch.Tensor|NoneType"),
    "broadcast: sparse": (
        lambda g: g.group.broadcast([g.sparse(4)], O(g, "Broadcast")),
        "broadcast|'tensor'|dense|sparse_coo|to_dense",
    ),
    "all_gather: sparse input": (
        lambda g: g.group.allgather([g.zs(4)], [g.sparse(4)], O(g, "Allgather")),
        "all_gather|'tensor'|dense|sparse_coo",
    ),
    "reduce_scatter_single: sparse input": (
        lambda g: g.group.reduce_scatter_single(g.z(4), g.sparse(8), O(g, "ReduceScatter")),
        "reduce_scatter_single|'input'|dense|sparse_coo",
    ),
    "coalesced all_gather: sparse outputs": (
        lambda g: g.group.all_gather_single_coalesced([g.sparse(4), g.sparse(4)], g.zs(2), O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs[0]'|dense|sparse_coo",
    ),
    "coalesced reduce_scatter: sparse inputs": (
        lambda g: g.group.reduce_scatter_single_coalesced(g.zs(2), [g.sparse(4), g.sparse(4)], O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|dense|sparse_coo",
    ),
    "send: sparse": (lambda g: g.group.send([g.sparse(4)], g.peer, 0), "send|'tensor'|dense|sparse_coo"),
    "all_gather_single: output elsewhere": (
        lambda g: g.group.all_gather_single(g.meta(8), g.z(4), O(g, "Allgather")),
        "all_gather_single|'output'|on the CPU|meta",
    ),
    "all_gather_single: input elsewhere": (
        lambda g: g.group.all_gather_single(g.z(8), g.meta(4), O(g, "Allgather")),
        "all_gather_single|'input'|on the CPU|meta",
    ),
    "reduce_scatter_single: output elsewhere": (
        lambda g: g.group.reduce_scatter_single(g.meta(4), g.z(8), O(g, "ReduceScatter")),
        "reduce_scatter_single|'output'|on the CPU|meta",
    ),
    "recv: elsewhere": (lambda g: g.group.recv([g.meta(4)], g.peer, 0), "recv|'tensor'|on the CPU|meta"),
    "coalesced all_gather: outputs elsewhere": (
        lambda g: g.group.all_gather_single_coalesced([g.meta(4), g.meta(4)], g.zs(2), O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs[0]'|on the CPU|meta",
    ),
    "coalesced reduce_scatter: inputs elsewhere": (
        lambda g: g.group.reduce_scatter_single_coalesced(g.zs(2), [g.meta(4), g.meta(4)], O(g, "ReduceScatter")),
        "reduce_scatter_single_coalesced|'inputs|on the CPU|meta",
    ),
    "all_reduce_coalesced: elsewhere": (
        lambda g: g.group.allreduce_coalesced([g.meta(2), g.z(2)], O(g, "AllreduceCoalesced")),
        "all_reduce_coalesced|'tensors[0]'|on the CPU|meta",
    ),
    "all_reduce: memory given back": (
        lambda g: g.dist.all_reduce(g.freed(4), group=g.group),
        "all_reduce|16 bytes|0 bytes",
    ),
    "all_reduce: a part of memory given back": (
        lambda g: g.dist.all_reduce(g.freed(2, before=2), group=g.group),
        "all_reduce|8 bytes|0 bytes",
    ),
    "all_gather_single: a part of memory given back": (
        lambda g: g.dist.all_gather_into_tensor(g.z(4), g.freed(2, before=2), group=g.group),
        "all_gather_single|'input'|8 bytes|0 bytes",
    ),
    "send: a part of memory given back": (
        lambda g: g.dist.send(g.freed(2, before=2), g.peer, group=g.group),
        "send|8 bytes|0 bytes",
    ),
    "send: memory given back": (lambda g: g.dist.send(g.freed(4), g.peer, group=g.group), "send|16 bytes|0 bytes"),
    # ---- outputs that overlap themselves
    "broadcast: expanded": (
        lambda g: g.dist.broadcast(g.expanded(4), group_src=0, group=g.group),
        "broadcast|'tensor'|share memory|(4,)",
    ),
    "broadcast: expanded, asynchronously": (
        lambda g: g.dist.broadcast(g.expanded(4), group_src=0, group=g.group, async_op=True),
        "broadcast|'tensor'|share memory|(4,)",
    ),
    "reduce: expanded": (
        lambda g: g.dist.reduce(g.expanded(4), group_dst=0, group=g.group),
        "reduce|'tensor'|share memory|(4,)",
    ),
    "all_gather_single: expanded": (
        lambda g: g.dist.all_gather_into_tensor(g.expanded(8), g.z(4), group=g.group),
        "all_gather_single|'output'|share memory|(8,)",
    ),
    "all_gather: expanded": (
        lambda g: g.dist.all_gather([g.expanded(4), g.expanded(4)], g.z(4), group=g.group),
        "all_gather|'tensor_list[0]'|share memory|(4,)",
    ),
    "reduce_scatter_single: expanded": (
        lambda g: g.dist.reduce_scatter_tensor(g.expanded(4), g.z(8), group=g.group),
        "reduce_scatter_single|'output'|share memory|(4,)",
    ),
    "scatter: expanded": (
        lambda g: g.dist.scatter(g.expanded(4), g.zs(4) if g.root else None, group_src=0, group=g.group),
        "scatter|'tensor'|share memory|(4,)",
    ),
    "all_to_all_single: expanded": (
        lambda g: g.dist.all_to_all_single(g.expanded(4), g.z(4), group=g.group),
        "all_to_all_single|'output'|share memory|(4,)",
    ),
    "all_to_all: expanded": (
        lambda g: g.dist.all_to_all([g.expanded(2), g.expanded(2)], g.zs(2), group=g.group),
        "all_to_all|'output_tensor_list[0]'|share memory|(2,)",
    ),
    "recv: expanded": (lambda g: g.dist.irecv(g.expanded(4), g.peer, group=g.group), "recv|'tensor'|share memory|(4,)"),
    "all_reduce_coalesced: expanded": (
        lambda g: g.dist.all_reduce_coalesced([g.expanded(2), g.expanded(2)], group=g.group),
        "all_reduce_coalesced|'tensors[0]'|share memory|(2,)",
    ),
    "coalesced all_gather: expanded": (
        lambda g: g.group.all_gather_single_coalesced([g.expanded(4), g.expanded(4)], g.zs(2), O(g, "Allgather")),
        "all_gather_single_coalesced|'outputs[0]'|share memory|(4,)",
    ),
    "coalesced reduce_scatter: expanded": (
        lambda g: g.group.reduce_scatter_single_coalesced(
            [g.expanded(2), g.expanded(2)], g.zs(4), O(g, "ReduceScatter")
        ),
        "reduce_scatter_single_coalesced|'outputs[0]'|share memory|(2,)",
    ),
    # ---- roots, peers, tags
    **{
        f"{name}: root {root}": (
            lambda g, call=call, root=root: call(g, g.n if root == "n" else -1),
            f"{name}|'root'|0 to 1|{2 if root == 'n' else -1}",
        )
        for root in ("n", "-1")
        for name, call in {
            "broadcast": lambda g, root: g.group.broadcast([g.z(1)], O(g, "Broadcast", rootRank=root)),
            "reduce": lambda g, root: g.group.reduce([g.z(1)], O(g, "Reduce", rootRank=root)),
            "gather": lambda g, root: g.group.gather([], [g.z(1)], O(g, "Gather", rootRank=root)),
            "scatter": lambda g, root: g.group.scatter([g.z(1)], [], O(g, "Scatter", rootRank=root)),
        }.items()
        if (name, root) != ("broadcast", "n")  # is in test_errors
    },
    "broadcast: root of no rank": (lambda g: g.dist.broadcast(g.z(1), 9, group=g.group), BY_TORCH),
    "recv: negative tag": (lambda g: g.dist.irecv(g.z(1), g.peer, group=g.group, tag=-1), "recv|'tag'|-1"),
    "recv from any: negative tag": (lambda g: g.group.recv_anysource([g.z(1)], -1), "recv|'tag'|-1"),
    "send: a tag of text": (lambda g: g.dist.send(g.z(1), g.peer, group=g.group, tag="a"), BY_TORCH),
    "send: to itself, by torch": (lambda g: g.dist.send(g.z(1), g.me, group=g.group), BY_TORCH),
    "recv: from itself": (lambda g: g.dist.recv(g.z(1), g.me, group=g.group), "recv|another rank"),
    "send: outside": (lambda g: g.group.send([g.z(1)], 2, 0), "send|0 to 1|2"),
    "recv: outside": (lambda g: g.group.recv([g.z(1)], 2, 0), "recv|0 to 1|2"),
    "send: to -1": (lambda g: g.group.send([g.z(1)], -1, 0), "send|a rank of the group|-1"),
    "recv: from -1": (lambda g: g.group.recv([g.z(1)], -1, 0), "recv|a rank of the group|-1"),
    "new_group: of ranks there are not": (lambda g: g.dist.new_group([0, 9]), BY_TORCH),
    "new_group: a rank twice": (lambda g: g.dist.new_group([0, 0]), BY_TORCH),
    "batch_isend_irecv: other things": (lambda g: g.dist.batch_isend_irecv([1]), BY_TORCH),
    "batch_isend_irecv: a collective": (lambda g: g.dist.P2POp(g.dist.broadcast, g.z(1), g.peer, g.group), BY_TORCH),
    # ---- reductions
    "reduce: bits of floats": (
        lambda g: g.dist.reduce(g.z(2), group_dst=0, op=g.op.BAND, group=g.group),
        "reduce|band|float32",
    ),
    "reduce_scatter: bits of halves": (
        lambda g: g.dist.reduce_scatter_tensor(g.half(2), g.half(4), g.op.BOR, group=g.group),
        "reduce_scatter|bor|float16",
    ),
    "reduce_scatter of a list: bits of floats": (
        lambda g: g.dist.reduce_scatter(g.z(2), g.zs(2), g.op.BXOR, group=g.group),
        "reduce_scatter|bxor|float32",
    ),
    "all_reduce_coalesced: bits of floats": (
        lambda g: g.dist.all_reduce_coalesced(g.zs(2), g.op.BAND, group=g.group),
        "all_reduce|band|float32",
    ),
    "all_reduce: bits of floats, asynchronously": (
        lambda g: g.dist.all_reduce(g.z(2), g.op.BAND, group=g.group, async_op=True),
        "all_reduce|band|float32",
    ),
    "all_reduce: least complex number": (
        lambda g: g.dist.all_reduce(g.z(2, dtype=g.torch.complex64), g.op.MIN, group=g.group),
        BY_TORCH,
    ),
    "reduce: greatest complex number": (
        lambda g: g.dist.reduce(g.z(2, dtype=g.torch.complex64), group_dst=0, op=g.op.MAX, group=g.group),
        "reduce|MAX|complex64",
    ),
    "reduce_scatter: average of bools": (
        lambda g: g.dist.reduce_scatter_tensor(
            g.z(2, dtype=g.torch.bool), g.z(4, dtype=g.torch.bool), g.op.AVG, group=g.group
        ),
        "reduce_scatter|avg|bool",
    ),
    "reduce: float8": (
        lambda g: g.dist.reduce(g.z(2, dtype=g.torch.float8_e4m3fn), group_dst=0, group=g.group),
        "reduce|SUM|float8_e4m3fn",
    ),
    "reduce_scatter: float8": (
        lambda g: g.dist.reduce_scatter_tensor(
            g.z(2, dtype=g.torch.float8_e4m3fn), g.z(4, dtype=g.torch.float8_e4m3fn), group=g.group
        ),
        "reduce_scatter|SUM|float8_e4m3fn",
    ),
    "premul_sum: integers": (lambda g: g.premul(g.z(2, dtype=g.torch.int32), 0.5), "all_reduce|PREMUL_SUM|int32"),
    "premul_sum: bools": (lambda g: g.premul(g.z(2, dtype=g.torch.bool), 0.5), "all_reduce|PREMUL_SUM|bool"),
    "all_reduce: a reduction of text": (lambda g: g.dist.all_reduce(g.z(2), "sum", group=g.group), BY_TORCH),
    # ---- splits
    "output splits do not add up": (
        lambda g: g.dist.all_to_all_single(g.z(2), g.z(2), [2, 2], [1, 1], group=g.group),
        "all_to_all_single|'output_split_sizes'|add up to 2|[2, 2]",
    ),
    "negative splits": (
        lambda g: g.dist.all_to_all_single(g.z(2), g.z(2), [1, 1], [-1, 3], group=g.group),
        "all_to_all_single|'input_split_sizes'|add up to 2|[-1, 3]",
    ),
    "splits of text": (lambda g: g.dist.all_to_all_single(g.z(2), g.z(2), ["a", "b"], [1, 1], group=g.group), BY_TORCH),
    # ---- time limits
    "new_group: no time at all": (lambda g: g.dist.new_group(timeout=timedelta(0)), "time limit"),
    "new_group: negative time": (lambda g: g.dist.new_group(timeout=timedelta(seconds=-1)), "time limit"),
    "new_group: a number": (lambda g: g.dist.new_group(timeout=5), BY_TORCH),
    "set_timeout: 0": (lambda g: g.group.set_timeout(timedelta(0)), "set_timeout|'timeout'|above 0|0"),
    "set_timeout: -1": (lambda g: g.group.set_timeout(timedelta(seconds=-1)), "set_timeout|'timeout'|above 0|-1"),
    "monitored_barrier: 0": (lambda g: g.dist.monitored_barrier(g.group, timedelta(0)), "monitored|above 0"),
    "monitored_barrier: -1": (
        lambda g: g.dist.monitored_barrier(g.group, timedelta(seconds=-1)),
        "monitored|above 0",
    ),
    "all_reduce: -5": (
        lambda g: g.group.allreduce([g.z(1)], O(g, "Allreduce", timeout=timedelta(seconds=-5))),
        "all_reduce|'timeout'|above 0|-5",
    ),
    "wait: -1": (
        lambda g: g.dist.all_reduce(g.z(1), group=g.group, async_op=True).wait(timedelta(seconds=-1)),
        "wait|'timeout'|above 0|-1",
    ),
    "wait: a number": (lambda g: g.dist.all_reduce(g.z(1), group=g.group, async_op=True).wait(5), "5"),
    # ---- groups
    "a group by a name": (lambda g: g.dist.all_reduce(g.z(1), group="world"), BY_TORCH),
}

ROOT_CASES: dict[str, tuple[Callable[[Group], object], Callable[[Group], object], str]] = {
    # Only the root is at fault: its call, the right one, words.
    **{
        f"gather: {name}": (
            lambda g, bad=bad: g.group.gather([bad(g)] if g.root else [], [g.z(4)], O(g, "Gather")),
            lambda g: g.group.gather([g.zs(4)], [g.z(4)], O(g, "Gather")),
            words,
        )
        for name, bad, words in [
            ("dtype", lambda g: [g.half(4), g.half(4)], "gather|'gather_list[0]'|float32|float16"),
            ("count", lambda g: g.zs(3), "gather|'gather_list[0]'|4 elements|3 elements"),
            ("too few", lambda g: g.zs(4)[1:], "gather|'gather_list'|2 tensors|1 tensors"),
            ("too many", lambda g: g.zs(4) * 2, "gather|'gather_list'|2 tensors|4 tensors"),
            ("none", lambda g: [], "gather|'gather_list'|2 tensors|0 tensors"),
            ("sparse", lambda g: [g.sparse(4)] * 2, "gather|'gather_list[0]'|dense|sparse_coo"),
            ("expanded", lambda g: [g.expanded(4)] * 2, "gather|'gather_list[0]'|share memory|(4,)"),
        ]
    },
    **{
        f"scatter: {name}": (
            lambda g, bad=bad: g.group.scatter([g.z(4)], [bad(g)] if g.root else [], O(g, "Scatter")),
            lambda g: g.group.scatter([g.z(4)], [g.zs(4)], O(g, "Scatter")),
            words,
        )
        for name, bad, words in [
            ("dtype", lambda g: [g.half(4), g.half(4)], "scatter|'scatter_list[0]'|float32|float16"),
            ("count", lambda g: g.zs(3), "scatter|'scatter_list[0]'|4 elements|3 elements"),
            ("too few", lambda g: g.zs(4)[1:], "scatter|'scatter_list'|2 tensors|1 tensors"),
            ("none", lambda g: [], "scatter|'scatter_list'|2 tensors|0 tensors"),
            ("elsewhere", lambda g: [g.meta(4)] * 2, "scatter|'scatter_list[0]'|on the CPU|meta"),
        ]
    },
    "gather: no list, by torch": (
        lambda g: g.dist.gather(g.z(4), group_dst=0, group=g.group),
        lambda g: g.dist.gather(g.z(4), g.zs(4), group_dst=0, group=g.group),
        BY_TORCH,
    ),
    "gather: a tuple": (
        lambda g: g.dist.gather(g.z(4), tuple(g.zs(4)) if g.root else None, group_dst=0, group=g.group),
        lambda g: g.dist.gather(g.z(4), g.zs(4), group_dst=0, group=g.group),
        BY_TORCH,
    ),
}


def caught(call: Callable[[], object]) -> dict:
    """The error of a call as data. A panic of the native half is no Exception."""
    try:
        call()
    except BaseException as error:
        kinds = [kind for kind in (RuntimeError, ValueError, TypeError) if isinstance(error, kind)]
        return {"type": type(error).__name__, "good": bool(kinds), "text": str(error)}
    return {"type": "", "good": False, "text": "no error"}


def waited(work: object) -> None:
    if hasattr(work, "wait"):
        work.wait()


def works(group: object) -> str:
    """Whether a group still does what it should."""
    import torch
    import torch.distributed as dist

    def sum_up() -> None:
        tensor = torch.ones(3)
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [2, 2, 2], tensor

    return caught(sum_up)["text"].replace("no error", "")


APART = [name for name in CASES if name.startswith("all_to_all") and ("own part" in name or "width" in name)]
"""Cases that could end the native half's progress, and so all that comes later in the process."""


def misused(names: list[str]) -> dict[str, dict]:
    """Every case on a group of its own, made with little time for when ranks are left apart."""
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    warnings.simplefilter("ignore")
    dist.init_process_group("smddp", timeout=timedelta(seconds=30))
    found = {}
    for name in names:
        group = dist.new_group(timeout=timedelta(seconds=5))
        g = Group(group)
        call = (CASES.get(name) or ROOT_CASES[name])[0]
        # What returns without an error is told from what raises only later, when it is waited for.
        returned: list[object] = []
        found[name] = caught(lambda: returned.append(call(g)))  # noqa: B023
        if returned and not (name in ROOT_CASES and not g.root):
            later = caught(lambda: waited(returned[0]))  # noqa: B023
            found[name]["text"] = f"the call returned; waiting for it: {later['type']} {later['text']}"
        elif returned:
            waited(returned[0])
        elif name in ROOT_CASES and g.root:
            found[name]["again"] = caught(lambda: waited(ROOT_CASES[name][1](g)))["text"]  # noqa: B023
        found[name]["afterwards"] = works(group)
        dist.destroy_process_group(group)
    found["world"] = {"afterwards": works(None)}
    dist.destroy_process_group()
    return found


@functools.cache
def outcome(apart: bool, carrier: str) -> conftest.Ranks:
    names = APART if apart else [name for name in [*CASES, *ROOT_CASES] if name not in APART]
    return conftest.run(misused, 2, limit=150, env={"SMDDP_TORCH_GROUP": carrier}, names=names)


def reports_of(name: str, carrier: str) -> list[dict]:
    ranks = outcome(name in APART, carrier)
    ranks.check()
    return [report[name] for report in ranks.reports]


carriers = pytest.mark.parametrize("carrier", ["group", pytest.param("backend", marks=needs("python backends"))])


@carriers
@pytest.mark.parametrize("name", CASES)
def test_misuse(name: str, carrier: str) -> None:
    words = BY_TORCH_FIRST if carrier == "backend" and name in TORCH_FIRST else CASES[name][1]
    for report in reports_of(name, carrier):
        check(report, words)


def test_every_case_told_by_torch_is_one() -> None:
    assert set(CASES) >= TORCH_FIRST


@carriers
@pytest.mark.parametrize("name", ROOT_CASES)
def test_misuse_at_the_root(name: str, carrier: str) -> None:
    root, other = reports_of(name, carrier)
    check(root, ROOT_CASES[name][2])
    assert root["again"] == "no error"
    assert not other["type"], "the other rank did nothing wrong"
    assert other["afterwards"] == ""


def check(report: dict, words: str) -> None:
    assert report["good"], report
    if words != BY_TORCH:
        for word in words.split("|"):
            assert word in report["text"], (word, report)
    assert report["afterwards"] == "", report


@carriers
def test_the_world_outlives_all_that(carrier: str) -> None:
    assert [report["afterwards"] for report in reports_of("world", carrier)] == ["", ""]


# ---- what is allowed, though it looks odd


def allowed() -> dict[str, object]:
    """By name, what must be true of each."""
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    warnings.simplefilter("ignore")
    dist.init_process_group("smddp", timeout=timedelta(seconds=20))
    found = odd_tensors() | odd_factors() | no_members() | gone_groups()
    found["the world is well"] = works(None) == ""
    dist.destroy_process_group()
    return found


def odd_tensors() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    ones = torch.ones
    found: dict[str, object] = {}

    leaf = ones(3, requires_grad=True)
    dist.all_reduce(leaf)
    found["a leaf, in place"] = leaf.tolist() == [2] * 3 and leaf.requires_grad and leaf.grad_fn is None

    leaf = ones(2, 3).t().requires_grad_()
    dist.all_reduce(leaf)
    found["a leaf that is not dense"] = bool((leaf == 2).all())

    with torch.inference_mode():
        tensors = [ones(3), ones(6)[::2]]
    for tensor in tensors:
        dist.all_reduce(tensor)
    found["inference tensors"] = all(t.tolist() == [2] * 3 for t in tensors)

    outputs = [torch.zeros(2, 2), torch.zeros(4, 1)]
    dist.all_gather(outputs, ones(4))
    found["other shapes of one count"] = all(bool((o == 1).all()) for o in outputs)

    output = torch.zeros(8)
    dist.all_gather_into_tensor(output, ones(1).expand(4))
    found["an expanded input"] = output.tolist() == [1] * 8

    output = torch.zeros(4)
    dist.all_gather([output] * dist.get_world_size(), ones(4))
    found["one output twice"] = output.tolist() == [1] * 4

    from torch.distributed import _functional_collectives as functional

    pending = functional.all_gather_tensor(ones(2) + dist.get_rank(), 0, dist.group.WORLD)
    dist.all_reduce(pending)
    dist.broadcast(pending[2:], src=0)
    output = torch.zeros(8)
    dist.all_gather_into_tensor(output, pending)
    dist.all_gather(list(functional.all_reduce(output, "sum", dist.group.WORLD).chunk(2)), pending)
    found["results of functional collectives"] = output.tolist() == [2, 2, 4, 4] * 2
    got, peer = torch.zeros(2), 1 - dist.get_rank()
    pending = functional.all_reduce(ones(4), "sum", dist.group.WORLD)
    for work in [dist.isend(pending[2:], peer), dist.irecv(got, peer)]:
        work.wait()
    found["results of functional collectives, as messages"] = got.tolist() == [2, 2]

    tensor = ones(2)
    dist.group.WORLD.allreduce((tensor,), Group(None).options("Allreduce")).wait()
    found["tuples, of the group itself"] = tensor.tolist() == [2] * 2
    return found


def test_what_wraps_a_tensor_is_refused_by_its_name() -> None:
    import torch

    from smdistributed_rs.tensors import check

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls) -> Wrapper:
            return torch.Tensor._make_wrapper_subclass(cls, (4,), strides=(1,), storage_offset=2)

        @classmethod
        def __torch_dispatch__(cls, *_: object) -> object:
            raise AssertionError("the tensor was computed with")

    with pytest.raises(ValueError, match="'tensor': expected a tensor in memory, given a Wrapper, without any"):
        check("all_reduce", "tensor", Wrapper())


def odd_factors() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    found: dict[str, object] = {}
    for factor in (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0], dtype=torch.float64)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            tensor = torch.ones(3, dtype=dtype)
            got = caught(lambda: dist.all_reduce(tensor, dist._make_nccl_premul_sum(factor)))["text"]  # noqa: B023
            found[f"premul_sum of {dtype} with {factor}"] = tensor.tolist() == [4] * 3 or got
    return found


def no_members() -> dict[str, object]:
    """Who is not in a group is told so by torch, and does nothing."""
    import torch
    import torch.distributed as dist

    other, one = dist.new_group([0]), torch.ones(1)
    if dist.get_rank() == 0:
        return {}
    results = [dist.all_reduce(one, group=other), dist.barrier(group=other), dist.isend(one, 0, group=other)]
    return {"not a member": results == [None] * 3 and dist.get_rank(other) == -1}


def gone_groups() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    ones, n = torch.ones, dist.get_world_size()
    gone = dist.new_group()
    dist.destroy_process_group(gone)
    calls = {
        "dist": lambda: dist.all_reduce(ones(1), group=gone),
        "broadcast": lambda: gone.broadcast([ones(1)], Group(None).options("Broadcast")),
        "send": lambda: gone.send([ones(1)], 1 - dist.get_rank(), 0),
        "barrier": lambda: gone.barrier(),
        "all_gather": lambda: gone.allgather([[ones(1)] * n], [ones(1)], Group(None).options("Allgather")),
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        report = caught(call)
        told = name == "dist" or "destroyed" in report["text"]
        found[f"after destroy: {name}"] = (report["good"] and told) or str(report)
    return found


def test_what_is_allowed_works_and_what_is_gone_says_so() -> None:
    reports = conftest.run(allowed, 2, limit=60).check().reports
    assert {k: v for r in reports for k, v in r.items() if v is not True} == {}
    assert len(reports[0]) > 20
