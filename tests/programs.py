"""Programs of collectives: what each rank does in one, and what every tensor must hold afterwards.

A program is plain data: {"groups": [[world ranks], ...], "fresh": make the groups anew, "delay": steps an asynchronous
call may stay under way, "steps": [{"do": kind, "group": index, ...}, ...]}. All ranks know all of it and, by the seeds
of its steps, everybody's data: what must come out is computed on the spot, without communication.

As a program of its own this file is a pool of ranks (see test_differential.Pool): it imports torch once, forks one
process per rank, and each runs the programs that come through its pipe.
"""

from __future__ import annotations

import faulthandler
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

import smdistributed_rs

INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
REDUCED = ("float32", "bool", *INTEGERS, "float16", "bfloat16", "float64", "complex64")
MOVED = (*REDUCED, "complex128", "float8_e4m3fn", "uint16")
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
LAYOUTS = ("dense", "odd", "deep", "stepped", "transposed", "columns")

GROUP_LIMIT = 20
FILL = 0xA5
"""What every byte beside a tensor holds, and every byte of an output before the call."""

Done = tuple[list, Callable[[], None]]
"""Works under way, and the check for when they are over."""

KINDS: dict[str, tuple[Callable[[Call], Done], tuple[str, ...]]] = {}
"""Each kind of step: what a rank does, and the fields of the step beside do, group and seed."""


def kind(*fields: str) -> Callable:
    def add(function: Callable[[Call], Done]) -> Callable[[Call], Done]:
        KINDS[function.__name__] = (function, fields)
        return function

    return add


def ops_of(dtype: str) -> tuple[str, ...]:
    if dtype == "bool":
        return tuple(op for op in OPS if op != "AVG")
    if dtype == "complex64":
        return ("SUM", "AVG")
    return (*OPS[:5], "PREMUL_SUM") if dtype in FLOATS else OPS


class Wrong(AssertionError):
    """A tensor does not hold what it must."""


# ---- memory


def geometry(layout: str, rows: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(shape, strides, offset) of rows x width elements."""
    flat = width == 1
    return {
        "dense": ((rows,) if flat else (rows, width), (1,) if flat else (width, 1), 16),
        "odd": ((rows,) if flat else (rows, width), (1,) if flat else (width, 1), 1),
        "deep": ((), (), 16) if rows * width == 1 else ((rows, 1, width), (width, width, 1), 16),
        "stepped": ((rows,) if flat else (rows, width), (3,) if flat else (3 * width, 3), 16),
        "transposed": ((rows, width), (1, rows), 16),
        "columns": ((rows, width), (width + 2, 1), 16),
    }[layout]


def divisor(count: int) -> int:
    return next((w for w in (7, 5, 3, 2) if count % w == 0), 1)


def raw(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    # So few elements count as contiguous whatever their stride, and yet cannot be viewed in another size.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8) if len(flat) < 2 else flat.contiguous().view(torch.uint8)


class Buffer:
    """Values in some layout, with memory around them that nobody may write."""

    def __init__(self, values: Tensor, layout: str = "dense", width: int = 0) -> None:
        self.before = values
        # Only a shape of several dimensions shows what these two are for.
        width = width or (divisor(values.numel()) if layout in ("deep", "transposed", "columns") else 1)
        shape, strides, offset = geometry(layout, values.numel() // width, width)
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.numel() else 0
        self._place = (shape, strides, offset)
        self._bytes = torch.full(((offset + last + 17) * values.element_size(),), FILL, dtype=torch.uint8)
        self.tensor = self._bytes.view(values.dtype).as_strided(*self._place)
        self.tensor.copy_(values.view(shape))

    def expect(self, values: Tensor) -> None:
        """Every bit as in `values`, and nothing written beside."""
        got, expected = raw(self.tensor), raw(values)
        if not torch.equal(got, expected):
            size = values.element_size()
            wrong = (got != expected).view(-1, size).any(1).nonzero().view(-1)
            raise Wrong(difference(self.tensor.reshape(-1), values.reshape(-1), wrong))
        self.expect_frame()

    def expect_unchanged(self) -> None:
        self.expect(self.before)

    def expect_frame(self) -> None:
        rows = self._bytes.view(-1, self.before.element_size())
        outside = torch.ones(len(rows), dtype=torch.bool)
        outside.as_strided(*self._place).fill_(False)
        if not bool((rows[outside] == FILL).all()):
            raise Wrong("memory beside the tensor was written")

    def expect_reduced(self, parts: Sequence[Tensor], op: str) -> None:
        """Near enough to the reduction of the ranks' parts."""
        got = real(self.tensor.reshape(-1))
        expected, slack = reduced([real(p) for p in parts], op)
        if slack is None:
            return self.expect(expected.to(got.dtype))
        wide = got.double()
        fits = (wide == expected) | (wide.isnan() & expected.isnan()) | ((wide - expected).abs() <= slack)
        fits |= wide == expected.to(got.dtype).double()  # infinite, where the dtype ends
        if not bool(fits.all()):
            raise Wrong(difference(got, expected, (~fits).nonzero().view(-1)))
        return self.expect_frame()


class Buffers:
    """A list of tensors, each in its memory or, with layout "chunks", all in one."""

    def __init__(self, parts: Sequence[Tensor], layout: str) -> None:
        self.before = list(parts)
        self._chunks = layout == "chunks"
        if self._chunks:
            self._buffers = [Buffer(torch.cat(self.before))]
            self.tensors = list(self._buffers[0].tensor.split([p.numel() for p in parts]))
        else:
            self._buffers = [Buffer(p, layout) for p in parts]
            self.tensors = [b.tensor for b in self._buffers]

    def expect(self, parts: Sequence[Tensor]) -> None:
        expected = [torch.cat(list(parts))] if self._chunks else parts
        for buffer, values in zip(self._buffers, expected, strict=True):
            buffer.expect(values)

    def expect_unchanged(self) -> None:
        self.expect(self.before)


def difference(got: Tensor, expected: Tensor, wrong: Tensor) -> str:
    first = int(wrong[0])
    return (
        f"{len(wrong)} of {len(got)} elements are wrong, the first at {first}, the last at {int(wrong[-1])}: "
        f"{got.dtype} {got[first : first + 4].tolist()} where {expected[first : first + 4].tolist()} was expected"
    )


# ---- data and reference


def real(values: Tensor) -> Tensor:
    return torch.view_as_real(values).reshape(-1) if values.is_complex() else values


def bits(generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
    """Any bits a value of the dtype can have, those of NaNs included."""
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    size = count * dtype.itemsize
    words = torch.randint(-(2**63), 2**63 - 1, (size // 8 + 1,), generator=generator)
    return words.view(torch.uint8)[:size].view(dtype)


def numbers(generator: torch.Generator, count: int, dtype: torch.dtype, op: str, special: bool | str | None) -> Tensor:
    """Values to reduce: integers that overflow, floats of several magnitudes whose sums stay in range. special: some
    are infinite or no number; "huge": two in three are the largest there are, of one sign on all ranks."""
    if dtype.is_complex:
        pairs = numbers(generator, 2 * count, dtype.to_real(), op, special)
        return torch.view_as_complex(pairs.view(-1, 2))
    if not dtype.is_floating_point:
        return bits(generator, count, dtype)
    values = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    values *= torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    if op != "PRODUCT":
        values *= 2.0 ** torch.randint(-3, 4, (count,), generator=generator)
    if special == "huge" and op != "AVG":
        signs = torch.arange(count) % 2 * 2.0 - 1
        values = torch.where(torch.arange(count) % 3 > 0, torch.finfo(dtype).max * signs, values)
    elif special:
        rare = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
        which = torch.randint(0, 40, (count,), generator=generator)
        values = torch.where(which < 4, rare.double()[which.clamp(max=3)], values)
    return values.to(dtype)


BITWISE = {
    "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
}  # fmt: skip
BOOLEAN = {"SUM": "BOR", "MAX": "BOR", "PRODUCT": "BAND", "MIN": "BAND"}


def reduced(parts: list[Tensor], op: str) -> tuple[Tensor, Tensor | None]:
    """The reduction by definition, floats in double precision; and how far off a result may be, None: not at all."""
    dtype, n = parts[0].dtype, len(parts)
    if dtype is torch.bool:
        op = BOOLEAN.get(op, op)
    wide = torch.float64 if dtype.is_floating_point else parts[0].dtype if dtype is torch.bool else torch.int64
    every = [p.to(wide) for p in parts]
    if op == "PREMUL_SUM":
        every, op = [p / 2 for p in every], "SUM"
    total = every[0]
    for one in every[1:]:
        total = BITWISE[op](total, one)
    if not dtype.is_floating_point:
        if op == "AVG":  # wraps as the type does, then truncates toward zero
            total = torch.div(total.to(dtype).to(wide), n, rounding_mode="trunc")
        return total, None
    # A rounding for each step, of the largest a partial sum can be.
    size = total.abs() if op in ("PRODUCT", "MIN", "MAX") else sum(p.abs() for p in every)
    slack = torch.zeros_like(total) if op in ("MIN", "MAX") else n * torch.finfo(dtype).eps * size
    if op == "AVG":
        total, slack = total / n, slack / n
    return total, torch.where(slack.isfinite(), slack, 0.0)


def part(values: Tensor, rank: int, count: int) -> Tensor:
    return values[rank * count : (rank + 1) * count]


# ---- steps


class Call:
    """One step as one rank sees it. Ranks are group ranks, unless they are called world ranks."""

    def __init__(self, step: dict, number: int, group: object) -> None:
        self.step, self.number, self.group = step, number, group
        self.me, self.n = dist.get_rank(group), dist.get_world_size(group)
        self.dtype = getattr(torch, step.get("dtype", "float32"))
        self.op = step.get("op")
        self.count = step.get("count", 0)
        self.root = step.get("root", 0) % self.n
        self.random = random.Random(step["seed"])  # the same on all ranks
        self.source, self.target = step.get("in", "dense"), step.get("out", "dense")
        self.later = bool(step.get("async"))
        self.alike: list[Tensor] = []
        """What must be equal in bits on all ranks."""

    @property
    def reduction(self) -> object:
        return dist._make_nccl_premul_sum(0.5) if self.op == "PREMUL_SUM" else getattr(ReduceOp, self.op)

    @property
    def how(self) -> dict:
        return {"group": self.group, "async_op": self.later}

    def of(self, rank: int, count: int | None = None, salt: int = 0) -> Tensor:
        """The data of a rank; another for each salt."""
        generator = torch.Generator().manual_seed((self.step["seed"] << 20) + (rank << 10) + salt)
        count = self.count if count is None else count
        if self.op is None:
            return bits(generator, count, self.dtype)
        return numbers(generator, count, self.dtype, self.op, self.step.get("special"))

    def every(self, count: int | None = None, salt: int = 0) -> list[Tensor]:
        return [self.of(r, count, salt) for r in range(self.n)]

    def blank(self, count: int) -> Tensor:
        return torch.full((count * self.dtype.itemsize,), FILL, dtype=torch.uint8).view(self.dtype)

    def counts(self) -> list[int]:
        """For each rank, different ones if the step says so."""
        uneven = self.step.get("uneven")
        return [self.random.randint(0, self.count) if uneven else self.count for _ in range(self.n)]

    def matrix(self) -> list[list[int]]:
        """counts[a][b]: from rank a to rank b."""
        return [self.counts() for _ in range(self.n)]

    def others(self) -> tuple[int, int]:
        """Two different ranks."""
        return tuple(self.random.sample(range(self.n), 2))


@kind("reduced", "count", "special", "in", "async")
def all_reduce(c: Call) -> Done:
    buffer = Buffer(c.of(c.me), c.source)
    work = dist.all_reduce(buffer.tensor, c.reduction, **c.how)
    c.alike = [buffer.tensor]
    return [work], lambda: buffer.expect_reduced(c.every(), c.op)


@kind("reduced", "count", "in", "async")
def all_reduce_coalesced(c: Call) -> Done:
    counts = [c.random.randint(0, c.count) for _ in range(c.random.randint(1, 4))]
    buffers = [Buffer(c.of(c.me, n, i), c.source) for i, n in enumerate(counts)]
    work = dist.all_reduce_coalesced([b.tensor for b in buffers], c.reduction, **c.how)
    c.alike = [b.tensor for b in buffers]

    def check() -> None:
        for i, buffer in enumerate(buffers):
            buffer.expect_reduced(c.every(counts[i], i), c.op)

    return [work], check


@kind("reduced", "count", "special", "root", "in", "async")
def reduce(c: Call) -> Done:
    buffer = Buffer(c.of(c.me), c.source)
    work = dist.reduce(buffer.tensor, group_dst=c.root, op=c.reduction, **c.how)

    def check() -> None:
        if c.me == c.root:
            buffer.expect_reduced(c.every(), c.op)
        else:
            buffer.expect_unchanged()

    return [work], check


@kind("moved", "count", "root", "in", "async")
def broadcast(c: Call) -> Done:
    buffer = Buffer(c.of(c.me), c.source)
    work = dist.broadcast(buffer.tensor, group_src=c.root, **c.how)
    c.alike = [buffer.tensor]
    return [work], lambda: buffer.expect(c.of(c.root))


@kind("moved", "count", "uneven", "in", "outs", "async")
def all_gather(c: Call) -> Done:
    counts = c.counts()
    given = Buffer(c.of(c.me, counts[c.me]), c.source)
    outputs = Buffers([c.blank(n) for n in counts], c.target)
    work = dist.all_gather(outputs.tensors, given.tensor, **c.how)
    c.alike = outputs.tensors

    def check() -> None:
        outputs.expect([c.of(r, n) for r, n in enumerate(counts)])
        given.expect_unchanged()

    return [work], check


@kind("moved", "count", "inside", "in", "out", "async")
def all_gather_into_tensor(c: Call) -> Done:
    if c.step["inside"]:  # the input is where it ends up, as FSDP has it
        before = [c.of(r) if r == c.me else c.blank(c.count) for r in range(c.n)]
        output = Buffer(torch.cat(before))
        given, source = None, part(output.tensor, c.me, c.count)
    else:
        given, output = Buffer(c.of(c.me), c.source), Buffer(c.blank(c.n * c.count), c.target)
        source = given.tensor
    work = dist.all_gather_into_tensor(output.tensor, source, **c.how)
    c.alike = [output.tensor]

    def check() -> None:
        output.expect(torch.cat(c.every()))
        if given:
            given.expect_unchanged()

    return [work], check


@kind("moved", "count", "in", "out", "async")
def all_gather_into_tensor_coalesced(c: Call) -> Done:
    counts = [c.random.randint(0, c.count) for _ in range(c.random.randint(1, 3))]
    given = [Buffer(c.of(c.me, n, i), c.source) for i, n in enumerate(counts)]
    outputs = [Buffer(c.blank(c.n * n), c.target) for n in counts]
    with dist.distributed_c10d._coalescing_manager(c.group, async_ops=c.later) as manager:
        for g, o in zip(given, outputs, strict=True):
            dist.all_gather_into_tensor(o.tensor, g.tensor, group=c.group)
    c.alike = [o.tensor for o in outputs]

    def check() -> None:
        for i, n in enumerate(counts):
            outputs[i].expect(torch.cat(c.every(n, i)))
            given[i].expect_unchanged()

    return [manager] if c.later else [], check


@kind("reduced", "count", "uneven", "ins", "out", "async")
def reduce_scatter(c: Call) -> Done:
    counts = c.counts()
    inputs = Buffers([c.of(c.me, n, i) for i, n in enumerate(counts)], c.source)
    output = Buffer(c.blank(counts[c.me]), c.target)
    work = dist.reduce_scatter(output.tensor, inputs.tensors, op=c.reduction, **c.how)

    def check() -> None:
        output.expect_reduced(c.every(counts[c.me], c.me), c.op)
        inputs.expect_unchanged()

    return [work], check


@kind("reduced", "count", "special", "inside", "in", "out", "async")
def reduce_scatter_tensor(c: Call) -> Done:
    given = Buffer(c.of(c.me, c.n * c.count), "dense" if c.step["inside"] else c.source)
    output = Buffer(c.blank(c.count), c.target)
    into = part(given.tensor, c.me, c.count) if c.step["inside"] else output.tensor
    work = dist.reduce_scatter_tensor(into, given.tensor, op=c.reduction, **c.how)

    def check() -> None:
        if c.step["inside"]:
            given.expect_frame()
            output.tensor.copy_(into.view(output.tensor.shape))
        else:
            given.expect_unchanged()
        output.expect_reduced([part(p, c.me, c.count) for p in c.every(c.n * c.count)], c.op)

    return [work], check


@kind("reduced", "count", "in", "out", "async")
def reduce_scatter_tensor_coalesced(c: Call) -> Done:
    counts = [c.random.randint(0, c.count) for _ in range(c.random.randint(1, 3))]
    given = [Buffer(c.of(c.me, c.n * n, i), c.source) for i, n in enumerate(counts)]
    outputs = [Buffer(c.blank(n), c.target) for n in counts]
    with dist.distributed_c10d._coalescing_manager(c.group, async_ops=c.later) as manager:
        for g, o in zip(given, outputs, strict=True):
            dist.reduce_scatter_tensor(o.tensor, g.tensor, op=c.reduction, group=c.group)

    def check() -> None:
        for i, n in enumerate(counts):
            outputs[i].expect_reduced([part(p, c.me, n) for p in c.every(c.n * n, i)], c.op)
            given[i].expect_unchanged()

    return [manager] if c.later else [], check


@kind("moved", "count", "root", "in", "outs", "async")
def gather(c: Call) -> Done:
    given = Buffer(c.of(c.me), c.source)
    outputs = Buffers([c.blank(c.count)] * c.n, c.target) if c.me == c.root else None
    work = dist.gather(given.tensor, outputs and outputs.tensors, group_dst=c.root, **c.how)

    def check() -> None:
        given.expect_unchanged()
        if outputs:
            outputs.expect(c.every())

    return [work], check


@kind("moved", "count", "root", "ins", "out", "async")
def scatter(c: Call) -> Done:
    inputs = Buffers([c.of(c.root, salt=r) for r in range(c.n)], c.source) if c.me == c.root else None
    output = Buffer(c.blank(c.count), c.target)
    work = dist.scatter(output.tensor, inputs and inputs.tensors, group_src=c.root, **c.how)

    def check() -> None:
        output.expect(c.of(c.root, salt=c.me))
        if inputs:
            inputs.expect_unchanged()

    return [work], check


@kind("moved", "count", "uneven", "ins", "outs", "async")
def all_to_all(c: Call) -> Done:
    counts = c.matrix()
    inputs = Buffers([c.of(c.me, counts[c.me][r], r) for r in range(c.n)], c.source)
    outputs = Buffers([c.blank(counts[r][c.me]) for r in range(c.n)], c.target)
    work = dist.all_to_all(outputs.tensors, inputs.tensors, **c.how)

    def check() -> None:
        outputs.expect([c.of(r, counts[r][c.me], c.me) for r in range(c.n)])
        inputs.expect_unchanged()

    return [work], check


@kind("moved", "count", "uneven", "in", "out", "async")
def all_to_all_single(c: Call) -> Done:
    width = 1 + c.step["seed"] % 3
    rows = c.matrix()
    receive, send = [row[c.me] for row in rows], rows[c.me]
    splits = (receive, send) if c.step["uneven"] else ()
    given = Buffer(torch.cat([c.of(c.me, n * width, r) for r, n in enumerate(send)]), c.source, width)
    output = Buffer(c.blank(sum(receive) * width), c.target, width)
    work = dist.all_to_all_single(output.tensor, given.tensor, *splits, **c.how)

    def check() -> None:
        output.expect(torch.cat([c.of(r, n * width, c.me) for r, n in enumerate(receive)]))
        given.expect_unchanged()

    return [work], check


# ---- messages, objects, barriers


@kind("moved", "count", "tag", "in", "out", "async")
def send_recv(c: Call) -> Done:
    source, target = c.others() if c.n > 1 else (-1, -1)
    where = {"group": c.group, "tag": c.step["tag"]}
    if c.me == source:
        buffer = Buffer(c.of(source), c.source)
        work = (dist.isend if c.later else dist.send)(buffer.tensor, group_dst=target, **where)
        return [work if c.later else None], buffer.expect_unchanged
    if c.me == target:
        buffer = Buffer(c.blank(c.count), c.target)
        work = (dist.irecv if c.later else dist.recv)(buffer.tensor, group_src=source, **where)
        return [work if c.later else None], lambda: buffer.expect(c.of(source))
    return [], lambda: None


@kind("moved", "count", "out", "async")
def recv_from_any(c: Call) -> Done:
    """All others send to the root, which receives whatever comes first. The tag is this step's alone."""
    root, where = c.random.randrange(c.n), {"group": c.group, "tag": 1000 + c.number}
    if c.me != root:
        buffer = Buffer(c.of(c.me), c.source)
        return [dist.isend(buffer.tensor, group_dst=root, **where)], buffer.expect_unchanged
    buffers = [Buffer(c.blank(c.count), c.target) for _ in range(c.n - 1)]
    if c.later:
        works = [dist.irecv(b.tensor, **where) for b in buffers]
    else:
        works = []
        found = [dist.get_group_rank(c.group, dist.recv(b.tensor, **where)) for b in buffers]

    def check() -> None:
        came = [w._source_rank() for w in works] if c.later else found
        if sorted(came) != [r for r in range(c.n) if r != root]:
            raise Wrong(f"messages are said to come from {came}")
        for source, buffer in zip(came, buffers, strict=True):
            buffer.expect(c.of(source))

    return works, check


@kind("moved", "count", "in", "out", "async")
def batch_isend_irecv(c: Call) -> Done:
    pairs = [(*c.others(), c.random.randint(0, c.count)) for _ in range(c.random.randint(1, 6))] if c.n > 1 else []
    ops, checks = [], []
    for i, (source, target, count) in enumerate(pairs):
        if c.me == source:
            buffer = Buffer(c.of(source, count, i), c.source)
            ops.append(dist.P2POp(dist.isend, buffer.tensor, group=c.group, group_peer=target))
            checks.append(buffer.expect_unchanged)
        elif c.me == target:
            buffer = Buffer(c.blank(count), c.target)
            ops.append(dist.P2POp(dist.irecv, buffer.tensor, group=c.group, group_peer=source))
            checks.append(lambda b=buffer, s=source, n=count, i=i: b.expect(c.of(s, n, i)))

    def check() -> None:
        for one in checks:
            one()

    return dist.batch_isend_irecv(ops) if ops else [], check


@kind("async")
def barrier(c: Call) -> Done:
    return [dist.barrier(**c.how)], lambda: None


@kind("root", "count")
def objects(c: Call) -> Done:
    def thing(rank: int, salt: int = 0) -> dict:
        return {"rank": rank, "salt": salt, "text": "x" * (c.count * (rank + salt) % 3000)}

    every, gathered, got = [None] * c.n, [None] * c.n if c.me == c.root else None, [None]
    told = [thing(c.root, i) if c.me == c.root else None for i in range(3)]
    dist.all_gather_object(every, thing(c.me), group=c.group)
    dist.broadcast_object_list(told, group_src=c.root, group=c.group)
    dist.gather_object(thing(c.me, 5), gathered, group_dst=c.root, group=c.group)
    mine = [thing(c.root, r) for r in range(c.n)] if c.me == c.root else None
    dist.scatter_object_list(got, mine, group_src=c.root, group=c.group)

    def check() -> None:
        wanted = [thing(r, 5) for r in range(c.n)] if c.me == c.root else None
        found = [every, told, gathered, got]
        if found != [
            [thing(r) for r in range(c.n)],
            [thing(c.root, i) for i in range(3)],
            wanted,
            [thing(c.root, c.me)],
        ]:
            raise Wrong(f"objects {found}")

    return [], check


# ---- a program


class Player:
    """Runs programs on one rank."""

    def __init__(self, members: Sequence[tuple[int, ...]] = ()) -> None:
        """members: of the groups that programs may use; else all there can be."""
        self.rank, size = dist.get_rank(), dist.get_world_size()
        self._standing = {ranks: new_group(ranks) for ranks in members or subsets(size)}

    def play(self, program: dict) -> dict:
        report: dict = {"wrong": [], "alike": {}, "error": ""}
        chance = random.Random(f"{json.dumps(program)} {self.rank}")
        under_way: list[tuple[int, Call, Done]] = []
        number = -1
        try:
            members = [tuple(ranks) for ranks in program["groups"]]
            groups = [new_group(ranks) if program["fresh"] else self._standing[ranks] for ranks in members]
            for number, step in enumerate(program["steps"]):
                if self.rank in members[step["group"]]:
                    call = Call(step, number, groups[step["group"]])
                    due = number + chance.randint(0, program["delay"]) if call.later else number
                    under_way.append((due, call, KINDS[step["do"]][0](call)))
                chance.shuffle(under_way)
                for one in [u for u in under_way if u[0] <= number]:
                    under_way.remove(one)
                    end(*one[1:], chance, report)
            for one in under_way:
                end(*one[1:], chance, report)
            for ranks, group in zip(members, groups, strict=True):
                if program["fresh"] and self.rank in ranks:
                    dist.destroy_process_group(group)
        except Exception:
            report["error"] = f"step {number}: {traceback.format_exc(limit=-5)}"
        return report


def end(call: Call, done: Done, chance: random.Random, report: dict) -> None:
    works, check = done
    for work in (w for w in works if w is not None):
        wait_for(work, chance)
    try:
        check()
    except Wrong as error:
        report["wrong"].append(f"step {call.number} ({call.step['do']}): {error}")
    if call.alike:
        digest = hashlib.blake2b(b"".join(bytes(raw(t).numpy()) for t in call.alike), digest_size=8)
        report["alike"][str(call.number)] = digest.hexdigest()


def wait_for(work: object, chance: random.Random) -> None:
    """In each of the ways there are."""
    way = chance.choice(["wait", "wait", "future", "poll"])
    if not hasattr(work, "get_future"):
        way = "wait"  # torch's own manager of coalesced calls
    if way == "future":
        work.get_future().wait()
        return
    limit = time.monotonic() + GROUP_LIMIT
    while way == "poll" and not work.is_completed() and time.monotonic() < limit:
        time.sleep(0)
    work.wait()


def new_group(ranks: Sequence[int]) -> object:
    return dist.new_group(list(ranks), timeout=timedelta(seconds=GROUP_LIMIT))


def subsets(size: int) -> list[tuple[int, ...]]:
    return [ranks for n in range(size, 0, -1) for ranks in itertools.combinations(range(size), n)]


# ---- what docs/support.md says of reductions


def reductions(dtypes: list[str]) -> dict[str, dict[str, str]]:
    """What becomes of every reduction of every dtype: yes, refused, WRONG, or another error."""
    dist.init_process_group("smddp", timeout=timedelta(seconds=30))
    found = {}
    for dtype in dtypes:
        for op in ["moved", *OPS, "PREMUL_SUM"]:
            step = {"do": "", "seed": 3, "dtype": dtype, "op": None if op == "moved" else op, "count": 100}
            found.setdefault(dtype, {})[op] = tried(Call(step, 0, dist.group.WORLD))
    dist.destroy_process_group()
    return found


def tried(c: Call) -> str:
    try:
        if c.op is None:
            _, check = broadcast(c)
        else:
            buffer = Buffer(c.of(c.me))
            dist.all_reduce(buffer.tensor, c.reduction)
            # Nobody halves integers; what is not refused is wrong.
            check = lambda: buffer.expect_reduced(c.every(), c.op)  # noqa: E731
        check()
    except smdistributed_rs.ArgumentError:
        return "unclear error"  # the arguments are right; the dtype is what cannot be
    except ValueError:
        return "refused"
    except Wrong:
        return "WRONG"
    except Exception as error:
        return type(error).__name__
    return "yes"


# ---- the pool's side that runs programs


def serve(requests: int, replies: int) -> None:
    """One rank: a line of JSON in, a line out, until there are no more."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("smddp", timeout=timedelta(seconds=60))
    player = Player()
    with os.fdopen(requests) as lines, os.fdopen(replies, "w") as out:
        print(os.getpid(), file=out, flush=True)
        for line in lines:
            print(json.dumps(player.play(json.loads(line))), file=out, flush=True)
    dist.destroy_process_group()


def fork(config: dict) -> None:
    """config: ranks: [{"env", "log", "requests", "replies"}, ...]"""
    ranks, children = config["ranks"], []
    for rank in ranks:
        child = os.fork()
        if child == 0:
            for other in ranks:
                if other is not rank:
                    os.close(other["requests"])
                    os.close(other["replies"])
            log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(rank["env"])
            faulthandler.enable()
            faulthandler.register(signal.SIGUSR1)
            status = 1
            try:
                serve(rank["requests"], rank["replies"])
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    for rank in ranks:
        os.close(rank["requests"])
        os.close(rank["replies"])
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    fork(json.loads(Path(sys.argv[1]).read_text()))
