"""What each rank does in test_collectives: every case on a group of its own, against a reference each rank computes.

With SMDDP_TEST_DEVICE=cuda all tensors are on the rank's GPU."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions
from torch.distributed import ReduceOp
from torch.distributed import _functional_collectives as functional

import smdistributed_rs
from torch_versions import by_group_rank, monitored_barrier

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [torch.bool, *INTEGERS, *FLOATS]
MOVED = [*DTYPES, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16]
OPS = ["SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]
SIZES = [0, 1, 5, 1000, 70_001]

DEVICE = os.environ.get("SMDDP_TEST_DEVICE", "cpu")
"""Where tensors are."""

BY_NCCL = DEVICE != "cpu" and os.environ.get("SMDDP_CUDA") == "nccl"
"""Whether NCCL alone carries them, which does not know every type and reduction."""

CASES: dict[str, Callable[[Case], None]] = {}


class Case:
    """Rank, size and group of one case, and data all ranks can compute for one another."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def data(self, rank: int, count: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        with torch.device("cpu"):
            return _random(rank, count, dtype, salt).to(DEVICE)

    def mine(self, count: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
        return self.data(self.rank, count, dtype, salt)

    def everyone(self, count: int, dtype: torch.dtype, salt: int = 0) -> list[torch.Tensor]:
        return [self.data(r, count, dtype, salt) for r in range(self.size)]

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """What is done meanwhile is one call of the native half, whatever number of tensors it moves. Not so on a GPU,
        whose calls are exchanges of pieces on the host."""
        before = self.group._get_sequence_number_for_group()
        yield
        made = self.group._get_sequence_number_for_group() - before
        assert made == 1 or DEVICE != "cpu", f"{made} calls instead of one"

    def at(self, **group_rank: int) -> dict[str, object]:
        """Arguments that name the group and, say, group_src=1 in it."""
        return {"group": self.group, **by_group_rank(self.group, **group_rank)}

    def same_bits_everywhere(self, tensor: torch.Tensor) -> None:
        mine = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
        every: list[object] = [None] * self.size
        dist.all_gather_object(every, mine, group=self.group)
        assert all(one == mine for one in every), "ranks differ in bits"


def _random(rank: int, count: int, dtype: torch.dtype, salt: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank + 17)
    whole = torch.randint(0, 4, (count,), generator=generator)
    if dtype is torch.bool:
        return whole > 1
    if dtype.is_complex:
        return torch.complex(whole.double(), torch.randint(0, 4, (count,), generator=generator).double()).to(dtype)
    if dtype in FLOATS:
        return (whole.double() + torch.rand(count, generator=generator, dtype=torch.float64)).to(dtype)
    return whole.to(torch.int64).to(dtype) if dtype.is_floating_point else whole.to(dtype)


def case(function: Callable[[Case], None]) -> Callable[[Case], None]:
    CASES[function.__name__] = function
    return function


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction by definition: floats in double precision, AVG of integers truncated, SUM of bool as or."""
    dtype = parts[0].dtype
    if dtype is torch.bool:
        stack = torch.stack(parts)
        return {
            "SUM": stack.any(0), "MAX": stack.any(0), "BOR": stack.any(0),
            "PRODUCT": stack.all(0), "MIN": stack.all(0), "BAND": stack.all(0),
            "BXOR": stack.sum(0) % 2 == 1,
        }[op]  # fmt: skip
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    total = parts[0].to(wide)
    for part in (p.to(wide) for p in parts[1:]):
        total = {
            "SUM": lambda a, b: a + b, "AVG": lambda a, b: a + b, "PRODUCT": lambda a, b: a * b,
            "MIN": torch.minimum, "MAX": torch.maximum, "BAND": torch.bitwise_and,
            "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
        }[op](total, part)  # fmt: skip
    if op == "AVG":
        if wide is torch.int64:
            total = total.to(dtype).to(torch.int64)  # wraps as the type itself would, before the division
            total = torch.div(total, len(parts), rounding_mode="trunc")
        else:
            total = total / len(parts)
    return total


def defined(op: str, dtype: torch.dtype) -> bool:
    if BY_NCCL and (dtype is torch.int16 or op in ("BAND", "BOR", "BXOR")):
        return False
    if dtype is torch.bool:
        return op != "AVG"
    return not (dtype.is_floating_point and op in ("BAND", "BOR", "BXOR"))


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    """Exact for integers; floats within a few roundings of their type."""
    if given.dtype is torch.bool or not (given.dtype.is_floating_point or given.dtype.is_complex):
        assert torch.equal(given, expected.to(given.dtype)), f"{given.dtype}: {given[:8]} is not {expected[:8]}"
        return
    eps = torch.finfo(given.dtype).eps
    wide = torch.complex128 if given.dtype.is_complex else torch.float64
    torch.testing.assert_close(given.to(wide), expected.to(wide), rtol=4 * eps, atol=4 * eps)


@case
def all_reduce_every_dtype_and_reduction(c: Case) -> None:
    for dtype in DTYPES:
        for op in OPS:
            if not defined(op, dtype):
                continue
            for count in SIZES if op == "SUM" else SIZES[:-1]:
                tensor = c.mine(count, dtype)
                dist.all_reduce(tensor, getattr(ReduceOp, op), group=c.group)
                try:
                    close(tensor, reduced(c.everyone(count, dtype), op))
                except AssertionError as error:
                    raise AssertionError(f"{op} of {count} {dtype}: {error}") from None


@case
def all_reduce_same_bits(c: Case) -> None:
    for dtype in FLOATS:
        tensor = c.mine(33_333, dtype, salt=3)
        dist.all_reduce(tensor, group=c.group)
        c.same_bits_everywhere(tensor)
        again = c.mine(33_333, dtype, salt=3)
        dist.all_reduce(again, group=c.group)
        assert torch.equal(again, tensor), "two runs differ in bits"


@case
def all_reduce_large(c: Case) -> None:
    count = (8 << 20) + 3
    tensor = torch.arange(count, dtype=torch.float32).remainder_(97) + c.rank
    dist.all_reduce(tensor, group=c.group)
    expected = torch.arange(count, dtype=torch.float32).remainder_(97) * c.size + sum(range(c.size))
    assert torch.equal(tensor, expected)


@case
def all_reduce_complex(c: Case) -> None:
    for dtype in (torch.complex64, torch.complex128):
        for op in ("SUM", "AVG"):
            tensor = c.mine(100, dtype)
            dist.all_reduce(tensor, getattr(ReduceOp, op), group=c.group)
            close(tensor, reduced(c.everyone(100, dtype), op))


@case
def premul_sum(c: Case) -> None:
    tensor = c.mine(50, torch.float32)
    dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5), group=c.group)
    close(tensor, reduced(c.everyone(50, torch.float32), "SUM") * 0.5)


@case
def strided_tensors_are_copied(c: Case) -> None:
    def views(rank: int) -> list[torch.Tensor]:
        base = c.data(rank, 60, torch.float32)
        return [base.view(6, 10).t(), base.view(6, 10)[:, 2:7], base[::3], base.view(1, 6, 5, 2).permute(0, 3, 1, 2)]

    for index in range(4):
        every = [views(r)[index] for r in range(c.size)]
        outside = c.mine(60, torch.float32)
        tensor = views(c.rank)[index]
        base = tensor._base
        dist.all_reduce(tensor, group=c.group)
        close(tensor, reduced([e.contiguous() for e in every], "SUM"))
        touched = torch.zeros(60, dtype=torch.bool)
        touched[torch.arange(60).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)] = True
        assert torch.equal(base.view(-1)[~touched], outside[~touched]), "memory beside the view was written"

        tensor = views(c.rank)[index]
        dist.broadcast(tensor, **c.at(group_src=c.size - 1))
        assert torch.equal(tensor, every[-1])

        work = dist.all_reduce(tensor := views(c.rank)[index], group=c.group, async_op=True)
        work.wait()
        close(tensor, reduced([e.contiguous() for e in every], "SUM"))


@case
def broadcast_every_dtype(c: Case) -> None:
    for dtype in MOVED:
        for count in SIZES:
            for root in range(c.size):
                tensor = c.mine(count, dtype)
                dist.broadcast(tensor, **c.at(group_src=root))
                expected = c.data(root, count, dtype)
                assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), (
                    f"{dtype}[{count}] from {root}"
                )


@case
def reduce_to_every_root(c: Case) -> None:
    for dtype in (torch.int32, torch.bfloat16, torch.float32):
        for root in range(c.size):
            for count in SIZES:
                tensor = c.mine(count, dtype)
                dist.reduce(tensor, **c.at(group_dst=root))
                if c.rank == root:
                    close(tensor, reduced(c.everyone(count, dtype), "SUM"))
                else:
                    assert torch.equal(tensor, c.mine(count, dtype)), "a tensor that is not the root's was changed"


@case
def all_gather_lists(c: Case) -> None:
    for dtype in MOVED:
        for count in (0, 1, 7, 5000):
            outputs = [torch.empty(count, dtype=dtype) for _ in range(c.size)]
            dist.all_gather(outputs, c.mine(count, dtype), group=c.group)
            for output, expected in zip(outputs, c.everyone(count, dtype), strict=True):
                assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8)), dtype


@case
def all_gather_chunks_of_one_tensor(c: Case) -> None:
    whole = torch.zeros(c.size * 12)
    dist.all_gather(list(whole.chunk(c.size)), c.mine(12, torch.float32), group=c.group)
    assert torch.equal(whole, torch.cat(c.everyone(12, torch.float32)))


@case
def all_gather_uneven(c: Case) -> None:
    counts = [3 * r + 1 for r in range(c.size)]
    outputs = [torch.empty(n) for n in counts]
    dist.all_gather(outputs, c.mine(counts[c.rank], torch.float32), group=c.group)
    for r, output in enumerate(outputs):
        assert torch.equal(output, c.data(r, counts[r], torch.float32))


@case
def all_gather_into_tensor(c: Case) -> None:
    for dtype in MOVED:
        for count in (0, 1, 9, 4096):
            output = torch.empty(c.size * count, dtype=dtype)
            dist.all_gather_into_tensor(output, c.mine(count, dtype), group=c.group)
            expected = torch.cat([e.view(torch.uint8) for e in c.everyone(count, dtype)])
            assert torch.equal(output.view(torch.uint8), expected)


@case
def all_gather_n_dimensional_input_into_flat_output(c: Case) -> None:
    output = torch.empty(c.size * 12)
    dist.all_gather_into_tensor(output, c.mine(12, torch.float32).view(3, 4), group=c.group)
    assert torch.equal(output, torch.cat(c.everyone(12, torch.float32)))


@case
def reduce_scatter_tensor(c: Case) -> None:
    for dtype in DTYPES:
        for op in ("SUM", "AVG", "MAX"):
            if not defined(op, dtype):
                continue
            for count in (0, 1, 9, 4096):
                output = torch.empty(count, dtype=dtype)
                dist.reduce_scatter_tensor(output, c.mine(count * c.size, dtype), getattr(ReduceOp, op), group=c.group)
                whole = reduced(c.everyone(count * c.size, dtype), op)
                close(output, whole[c.rank * count : (c.rank + 1) * count])


@case
def reduce_scatter_lists(c: Case) -> None:
    inputs = [c.mine(8, torch.float32, salt=i) for i in range(c.size)]
    output = torch.empty(8)
    dist.reduce_scatter(output, inputs, group=c.group)
    close(output, reduced(c.everyone(8, torch.float32, salt=c.rank), "SUM"))


@case
def reduce_scatter_uneven(c: Case) -> None:
    counts = [2 * r + 1 for r in range(c.size)]
    inputs = [c.mine(n, torch.float32, salt=i) for i, n in enumerate(counts)]
    output = torch.empty(counts[c.rank])
    dist.reduce_scatter(output, inputs, group=c.group)
    close(output, reduced(c.everyone(counts[c.rank], torch.float32, salt=c.rank), "SUM"))


@case
def gather_to_every_root(c: Case) -> None:
    for dtype in (torch.float32, torch.bool, torch.complex64):
        for root in range(c.size):
            outputs = [torch.empty(11, dtype=dtype) for _ in range(c.size)] if c.rank == root else None
            dist.gather(c.mine(11, dtype), outputs, **c.at(group_dst=root))
            for output, expected in zip(outputs or [], c.everyone(11, dtype), strict=False):
                assert torch.equal(output, expected)


@case
def scatter_from_every_root(c: Case) -> None:
    for dtype in (torch.float32, torch.bool, torch.complex64):
        for root in range(c.size):
            inputs = [c.mine(11, dtype, salt=i) for i in range(c.size)] if c.rank == root else None
            output = torch.empty(11, dtype=dtype)
            dist.scatter(output, inputs, **c.at(group_src=root))
            assert torch.equal(output, c.data(root, 11, dtype, salt=c.rank))


@case
def inputs_that_are_part_of_the_output(c: Case) -> None:
    """Wherever they are: copied first, as torch's own backends do, unless the call is in place."""
    for n, at in itertools.product((6, 70_000), range(c.size)):
        expected = c.everyone(n, torch.float32)
        whole = torch.zeros(c.size * n)
        blocks = list(whole.view(c.size, n).unbind(0))
        blocks[at].copy_(expected[c.rank])
        dist.all_gather(blocks, blocks[at], group=c.group)
        assert torch.equal(whole, torch.cat(expected)), f"all_gather, block {at}"

        for is_async in (False, True):
            blocks[at].copy_(expected[c.rank])
            work = dist.all_gather_into_tensor(whole, blocks[at], group=c.group, async_op=is_async)
            if is_async:
                work.wait()
            assert torch.equal(whole, torch.cat(expected)), f"all_gather_into_tensor, block {at}"

        counts = [3 * r + 1 for r in range(c.size)]
        uneven = torch.zeros(sum(counts))
        blocks = list(uneven.split(counts))
        start = min(at, sum(counts) - counts[c.rank])
        mine = uneven[start : start + counts[c.rank]]
        mine.copy_(c.mine(counts[c.rank], torch.float32))
        dist.all_gather(blocks, mine, group=c.group)
        for r, block in enumerate(blocks):
            assert torch.equal(block, c.data(r, counts[r], torch.float32)), f"all_gather, uneven, {r} at {at}"

        if c.rank == 0:
            whole.view(c.size, n)[at].copy_(expected[0])
        input = whole.view(c.size, n)[at] if c.rank == 0 else expected[c.rank]
        outputs = list(whole.view(c.size, n).unbind(0)) if c.rank == 0 else None
        dist.gather(input, outputs, **c.at(group_dst=0))
        assert c.rank or torch.equal(whole, torch.cat(expected)), f"gather, block {at}"


@case
def outputs_that_are_part_of_the_input(c: Case) -> None:
    for n, at in itertools.product((6, 70_000), range(c.size)):
        summed = reduced(c.everyone(c.size * n, torch.float32), "SUM").view(c.size, n)[c.rank]
        sent = c.data(0, c.size * n, torch.float32).view(c.size, n)[c.rank]
        blocks = list(c.mine(c.size * n, torch.float32).view(c.size, n).unbind(0))
        dist.reduce_scatter(blocks[at], blocks, group=c.group)
        close(blocks[at], summed)

        whole = c.mine(c.size * n, torch.float32)
        dist.reduce_scatter_tensor(whole.view(c.size, n)[at], whole, group=c.group)
        close(whole.view(c.size, n)[at], summed)

        blocks = list(c.mine(c.size * n, torch.float32).view(c.size, n).unbind(0))
        output = blocks[at] if c.rank == 0 else torch.empty(n)
        dist.scatter(output, blocks if c.rank == 0 else None, **c.at(group_src=0))
        assert torch.equal(output, sent), f"scatter, block {at}"


@case
def all_to_all_on_one_tensor(c: Case) -> None:
    for n in (5, 70_000):
        expected = torch.cat([e.view(c.size, n)[c.rank] for e in c.everyone(c.size * n, torch.float32)])
        data = c.mine(c.size * n, torch.float32)
        dist.all_to_all_single(data, data, group=c.group)
        assert torch.equal(data, expected)
        data = c.mine(c.size * n, torch.float32)
        blocks = list(data.view(c.size, n).unbind(0))
        dist.all_to_all(blocks, blocks, group=c.group)
        assert torch.equal(data, expected)


@case
def all_to_all_lists(c: Case) -> None:
    # What rank a sends to rank b has a + 2b elements.
    inputs = [c.mine(c.rank + 2 * to, torch.float32, salt=to) for to in range(c.size)]
    outputs = [torch.empty(source + 2 * c.rank) for source in range(c.size)]
    dist.all_to_all(outputs, inputs, group=c.group)
    for source, output in enumerate(outputs):
        assert torch.equal(output, c.data(source, source + 2 * c.rank, torch.float32, salt=c.rank))


@case
def all_to_all_single_even(c: Case) -> None:
    for dtype in MOVED:
        output = torch.empty(c.size * 5, dtype=dtype)
        dist.all_to_all_single(output, c.mine(c.size * 5, dtype), group=c.group)
        expected = [e[c.rank * 5 : (c.rank + 1) * 5].view(torch.uint8) for e in c.everyone(c.size * 5, dtype)]
        assert torch.equal(output.view(torch.uint8), torch.cat(expected)), dtype


@case
def all_to_all_single_with_splits(c: Case) -> None:
    # Rows of 3: rank a sends a + b rows to rank b.
    send = [c.rank + b for b in range(c.size)]
    receive = [a + c.rank for a in range(c.size)]
    output = torch.empty(sum(receive), 3)
    dist.all_to_all_single(output, c.mine(3 * sum(send), torch.float32).view(-1, 3), receive, send, group=c.group)
    start = 0
    for a in range(c.size):
        rows = [a + b for b in range(c.size)]
        theirs = c.data(a, 3 * sum(rows), torch.float32).view(-1, 3).split(rows)[c.rank]
        assert torch.equal(output[start : start + rows[c.rank]], theirs)
        start += rows[c.rank]


@case
def send_and_receive(c: Case) -> None:
    for count in (0, 1, 1000, 300_000):
        for dtype in (torch.float32, torch.bool, torch.complex64):
            right, left = (c.rank + 1) % c.size, (c.rank - 1) % c.size
            sent = dist.isend(c.mine(count, dtype), **c.at(group_dst=right), tag=3)
            got = torch.empty(count, dtype=dtype)
            received = dist.irecv(got, **c.at(group_src=left), tag=3)
            sent.wait()
            received.wait()
            assert received._source_rank() == left
            assert torch.equal(got, c.data(left, count, dtype))


@case
def messages_match_by_tag(c: Case) -> None:
    if c.rank == 0:
        works = [dist.isend(torch.tensor([float(tag)]), **c.at(group_dst=1), tag=tag) for tag in (1, 2, 3)]
    elif c.rank == 1:
        got = {tag: torch.zeros(1) for tag in (3, 1, 2)}
        works = [dist.irecv(got[tag], **c.at(group_src=0), tag=tag) for tag in got]
    else:
        works = []
    for work in works:
        work.wait()
    if c.rank == 1:
        assert all(tensor.item() == tag for tag, tensor in got.items())


@case
def receive_from_any_rank(c: Case) -> None:
    for tag, count in enumerate((1, 1000, 300_000)):
        if c.rank:
            dist.send(c.mine(count, torch.float32), **c.at(group_dst=0), tag=tag)
            continue
        came = []
        for _ in range(1, c.size):
            got = torch.empty(count)
            source = dist.recv(got, group=c.group, tag=tag)
            came.append(dist.get_group_rank(c.group, source))
            assert torch.equal(got, c.data(came[-1], count, torch.float32))
        assert sorted(came) == list(range(1, c.size))


@case
def any_rank_leaves_what_is_awaited_by_name(c: Case) -> None:
    """Of two messages of a tag, one is received by its sender's rank, posted first; the other by whoever asks."""
    if c.rank == 0:
        named, other = torch.zeros(1), torch.zeros(1)
        first = dist.irecv(named, **c.at(group_src=1), tag=6)
        second = c.group.recv_anysource([other], 6)
        dist.barrier(c.group)
        first.wait()
        second.wait()
        assert (named.item(), other.item(), second._source_rank()) == (1.0, 2.0, 1)
    else:
        dist.barrier(c.group)
        if c.rank == 1:
            for value in (1.0, 2.0):
                dist.send(torch.tensor([value]), **c.at(group_dst=0), tag=6)


@case
def all_reduce_of_sparse_tensors(c: Case) -> None:
    def mine(rank: int) -> torch.Tensor:
        places = torch.tensor([[0, rank, c.size], [1, 1, rank % 2]])
        return torch.sparse_coo_tensor(places, torch.arange(6.0).view(3, 2) + rank, (c.size + 1, 2, 2))

    tensor = mine(c.rank)
    dist.all_reduce(tensor, group=c.group)
    expected = sum(mine(rank).to_dense() for rank in range(c.size))
    assert torch.equal(tensor.to_dense(), expected)
    work = dist.all_reduce(tensor := mine(c.rank), group=c.group, async_op=True)
    assert work.get_future().wait()[0] is tensor
    assert torch.equal(tensor.to_dense(), expected)


@case
def all_gather_coalesced(c: Case) -> None:
    counts = (3, 1, 0, 40)
    outputs = [[torch.empty(n) for n in counts] for _ in range(c.size)]
    inputs = [c.mine(n, torch.float32, salt=i) for i, n in enumerate(counts)]
    with c.one_call():
        c.group.allgather_coalesced(outputs, inputs).wait()
    for rank, theirs in enumerate(outputs):
        for i, output in enumerate(theirs):
            assert torch.equal(output, c.data(rank, counts[i], torch.float32, salt=i))


@case
def premul_sum_to_a_root_leaves_the_others(c: Case) -> None:
    tensor = c.mine(50, torch.float32)
    dist.reduce(tensor, op=dist._make_nccl_premul_sum(0.5), **c.at(group_dst=0))
    expected = reduced(c.everyone(50, torch.float32), "SUM") * 0.5 if c.rank == 0 else c.mine(50, torch.float32)
    close(tensor, expected)


@case
def coalescing_manager(c: Case) -> None:
    inputs = [c.mine(4, torch.float32), c.mine(7, torch.float32, salt=1)]
    outputs = [torch.empty(4 * c.size), torch.empty(7 * c.size)]
    with c.one_call(), dist.distributed_c10d._coalescing_manager(group=c.group):
        for output, input in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(output, input, group=c.group)
    for salt, output in enumerate(outputs):
        assert torch.equal(output, torch.cat(c.everyone(output.numel() // c.size, torch.float32, salt=salt)))
    tensors = [c.mine(n, torch.float32, salt=n) for n in (3, 8)]
    with c.one_call():
        with dist.distributed_c10d._coalescing_manager(group=c.group, async_ops=True) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor, group=c.group)
        manager.wait()
    for tensor in tensors:
        close(tensor, reduced(c.everyone(tensor.numel(), torch.float32, salt=tensor.numel()), "SUM"))
    coalescing_manager_of_a_device(c, False)
    coalescing_manager_of_a_device(c, True)


def coalescing_manager_of_a_device(c: Case, is_async: bool) -> None:
    """Torch takes the work of all from the group then, not from the calls."""
    inputs, outputs = [c.mine(n, torch.float32, salt=n) for n in (5, 6)], [torch.empty(n * c.size) for n in (5, 6)]
    manage = dist.distributed_c10d._coalescing_manager
    with manage(group=c.group, device=torch.device("cpu"), async_ops=is_async) as manager:
        for output, input in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(output, input, group=c.group)
    if is_async:
        manager.wait()
    for output, n in zip(outputs, (5, 6), strict=True):
        assert torch.equal(output, torch.cat(c.everyone(n, torch.float32, salt=n)))


@case
def batch_isend_irecv(c: Case) -> None:
    right, left = (c.rank + 1) % c.size, (c.rank - 1) % c.size
    got = torch.empty(100)
    ops = [
        dist.P2POp(dist.isend, c.mine(100, torch.float32), **c.at(group_peer=right)),
        dist.P2POp(dist.irecv, got, **c.at(group_peer=left)),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(got, c.data(left, 100, torch.float32))


@case
def coalesced(c: Case) -> None:
    shapes = [(3,), (2, 2), (1,)]
    tensors = [c.mine(torch.Size(s).numel(), torch.float32, salt=i).view(s) for i, s in enumerate(shapes)]
    with c.one_call():
        dist.all_reduce_coalesced(tensors, group=c.group)
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        close(tensor, reduced(c.everyone(torch.Size(shape).numel(), torch.float32, salt=i), "SUM").view(shape))

    inputs = [c.mine(4, torch.float32), c.mine(3, torch.int64)]
    outputs = [torch.empty(4 * c.size), torch.empty(3 * c.size, dtype=torch.int64)]
    with c.one_call():
        c.group.all_gather_single_coalesced(outputs, inputs, AllgatherOptions()).wait()
    assert torch.equal(outputs[0], torch.cat(c.everyone(4, torch.float32)))
    assert torch.equal(outputs[1], torch.cat(c.everyone(3, torch.int64)))

    # Numbers that begin at odd bytes of what was gathered, some of them none.
    dtypes, counts = (torch.uint8, torch.float32, torch.int64), (3, 5, 0)
    inputs = [c.mine(n, dtype) for n, dtype in zip(counts, dtypes, strict=True)]
    outputs = [torch.empty(n * c.size, dtype=dtype) for n, dtype in zip(counts, dtypes, strict=True)]
    c.group.all_gather_single_coalesced(outputs, inputs, AllgatherOptions()).wait()
    for output, n, dtype in zip(outputs, counts, dtypes, strict=True):
        assert torch.equal(output, torch.cat(c.everyone(n, dtype)))

    inputs = [c.mine(2 * c.size, torch.float32), c.mine(3 * c.size, torch.float32, salt=1)]
    outputs = [torch.empty(2), torch.empty(3)]
    with c.one_call():
        c.group.reduce_scatter_single_coalesced(outputs, inputs, ReduceScatterOptions()).wait()
    for salt, output in enumerate(outputs):
        n = output.numel()
        whole = reduced(c.everyone(n * c.size, torch.float32, salt=salt), "SUM")
        close(output, whole[c.rank * n : (c.rank + 1) * n])


@case
def inference_tensors_may_be_mixed_with_others(c: Case) -> None:
    """Made in inference mode and used outside of it, where only that mode may write to them; and the other way."""

    def tensors() -> list[torch.Tensor]:
        return [c.mine(12, torch.float32).view(3, 4).t(), c.mine(5, torch.float32, salt=1)]

    def check(tensors: list[torch.Tensor], factor: float = 1) -> None:
        for salt, tensor in enumerate(tensors):
            flat = tensor.t().reshape(-1)
            close(flat, reduced(c.everyone(flat.numel(), torch.float32, salt=salt), "SUM") * factor)

    half = dist._make_nccl_premul_sum(0.5)
    for made, used in [(True, False), (False, True), (True, True)]:
        with torch.inference_mode(made):
            lists = [tensors() for _ in range(4)]
            gathered = [torch.empty(4 * c.size), torch.empty(3 * c.size, dtype=torch.int64)]
            sparse = torch.eye(2).to_sparse()
        with torch.inference_mode(used):
            inputs = [c.mine(4, torch.float32), c.mine(3, torch.int64)]
            works = [dist.all_reduce(t, group=c.group, async_op=True) for t in lists[0]]
            works += [dist.all_reduce(t, half, group=c.group, async_op=True) for t in lists[1]]
            works.append(c.group.all_gather_single_coalesced(gathered, inputs, AllgatherOptions()))
            futures = [work.get_future() for work in works]
            futures.append(dist.all_reduce_coalesced(lists[2], group=c.group, async_op=True))
            dist.all_reduce_coalesced(lists[3], group=c.group)
            dist.all_reduce(sparse, group=c.group)
        for waited in [*futures, *works]:
            waited.wait()
        for each, factor in zip(lists, (1, 0.5, 1, 1), strict=True):
            check(each, factor)
        assert torch.equal(gathered[0], torch.cat(c.everyone(4, torch.float32)))
        assert torch.equal(gathered[1], torch.cat(c.everyone(3, torch.int64)))
        assert torch.equal(sparse.to_dense(), c.size * torch.eye(2))


@case
def object_collectives(c: Case) -> None:
    mine = {"rank": c.rank, "text": "x" * (100 * c.rank)}
    every: list[object] = [None] * c.size
    dist.all_gather_object(every, mine, group=c.group)
    assert [e["rank"] for e in every] == list(range(c.size))
    told = [mine if c.rank == 0 else None]
    dist.broadcast_object_list(told, **c.at(group_src=0))
    assert told[0]["rank"] == 0
    one: list[object] = [None]
    dist.scatter_object_list(one, [f"to {r}" for r in range(c.size)] if c.rank == 0 else None, **c.at(group_src=0))
    assert one == [f"to {c.rank}"]


@case
def asynchronous_works(c: Case) -> None:
    tensors = [c.mine(1000 * (i + 1), torch.float32, salt=i) for i in range(10)]
    works = [dist.all_reduce(t, group=c.group, async_op=True) for t in tensors]
    for work in reversed(works):
        assert work.wait(timedelta(seconds=30)) is True
    for i, (tensor, work) in enumerate(zip(tensors, works, strict=True)):
        close(tensor, reduced(c.everyone(tensor.numel(), torch.float32, salt=i), "SUM"))
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0].data_ptr() == tensor.data_ptr()


@case
def futures(c: Case) -> None:
    tensor = c.mine(5000, torch.float32)
    future = dist.all_reduce(tensor, group=c.group, async_op=True).get_future()
    halves = future.then(lambda f: f.value()[0] / 2)
    close(halves.wait(), reduced(c.everyone(5000, torch.float32), "SUM") / 2)
    outputs = [torch.empty(3) for _ in range(c.size)]
    work = dist.all_gather(outputs, c.mine(3, torch.float32), group=c.group, async_op=True)
    got = work.get_future().wait()
    assert len(got) == c.size
    work.wait()
    again = work.get_future()
    assert again.done()


@case
def a_work_nobody_keeps_owns_its_tensors(c: Case) -> None:
    for i in range(20):
        dist.all_reduce(c.mine(200_000, torch.float32, salt=i), group=c.group, async_op=True)
    kept = c.mine(100, torch.float32)
    dist.all_reduce(kept, group=c.group)
    close(kept, reduced(c.everyone(100, torch.float32), "SUM"))


@case
def a_work_nobody_keeps_fills_what_is_not_dense(c: Case) -> None:
    whole, apart = torch.zeros(100, 2), [torch.zeros(10) for _ in range(2 * c.size)][::2]
    whole[:, 0] = c.mine(100, torch.float32)
    scaled = c.mine(100, torch.float32)
    dist.all_reduce(whole[:, 0], group=c.group, async_op=True)
    dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.5), group=c.group, async_op=True)
    dist.all_gather(apart, c.mine(10, torch.float32), group=c.group, async_op=True)
    dist.barrier(group=c.group)
    total = reduced(c.everyone(100, torch.float32), "SUM").float()
    wanted = [(whole[:, 0], total), (scaled, total / 2), *zip(apart, c.everyone(10, torch.float32), strict=True)]
    until = time.monotonic() + 10
    while not all(torch.allclose(*pair) for pair in wanted):
        assert time.monotonic() < until, "an output was never filled"
        time.sleep(0.01)


@case
def a_graph_may_wait_for_tensors_under_way(c: Case) -> None:
    """What `wait_tensor` does in a compiled graph is what it does here."""
    allow = getattr(functional, "allow_inflight_collective_as_graph_input_ctx", None)
    if allow is None:
        return  # an older torch
    wait, kept = torch.ops._c10d_functional.wait_tensor, torch._C._distributed_c10d._get_work_registry_size
    before = kept()
    with allow():
        for count in (3, 100_000):
            if c.rank == 0:
                time.sleep(0.1)
            tensor, view = c.mine(count, torch.float32), c.mine(2 * count, torch.float32)[::2]
            apart = [torch.zeros(count) for _ in range(c.size)]
            dist.all_reduce(tensor, group=c.group, async_op=True)
            dist.all_reduce(view, group=c.group, async_op=True)
            dist.all_gather(apart, c.mine(count, torch.float32), group=c.group, async_op=True)
            close(wait(tensor), reduced(c.everyone(count, torch.float32), "SUM"))
            close(wait(view), reduced([t[::2] for t in c.everyone(2 * count, torch.float32)], "SUM"))
            for rank, output in enumerate(apart):
                assert torch.equal(wait(output), c.data(rank, count, torch.float32))
            if c.size > 1:
                right, left = (c.rank + 1) % c.size, (c.rank - 1) % c.size
                got, sent = torch.empty(count), c.mine(count, torch.float32)
                dist.irecv(got, **c.at(group_src=left))
                dist.isend(sent, **c.at(group_dst=right))
                assert torch.equal(wait(got), c.data(left, count, torch.float32))
                wait(sent)
        assert kept() == before
        if type(c.group).__name__ == "SmddpProcessGroup":
            # Waited for by hand, a call leaves no tensors behind in torch's registry.
            tensor = c.mine(10, torch.float32)
            gone, work = weakref.ref(tensor), dist.all_reduce(tensor, group=c.group, async_op=True)
            work.wait()
            del tensor, work
            gc.collect()
            until = time.monotonic() + 10
            while gone() is not None:
                assert time.monotonic() < until, "the registry keeps the tensor"
                time.sleep(0.01)


@case
def what_is_done_then_is_done_when_a_wait_returns(c: Case) -> None:
    for wait in ("wait", "is_completed"):
        done: list[object] = []
        # Large enough not to be over before the callback is known.
        work = dist.all_reduce(c.mine(1_000_000, torch.float32), group=c.group, async_op=True)

        def then(_: object, work: dist.Work = work, done: list[object] = done) -> None:
            time.sleep(0.05)
            done.append(work.wait())

        work.get_future().then(then)
        while not getattr(work, wait)():
            time.sleep(0.001)
        assert done == [True], wait


@case
def several_groups_at_once(c: Case) -> None:
    ranks = dist.get_process_group_ranks(c.group)
    others = [dist.new_group(ranks, timeout=timedelta(seconds=30)) for _ in range(3)]
    tensors = [c.mine(50_000, torch.float32, salt=i) for i in range(3)]
    works = [dist.all_reduce(t, group=g, async_op=True) for t, g in zip(tensors, others, strict=True)]
    for work in reversed(works):
        work.wait()
    for i, tensor in enumerate(tensors):
        close(tensor, reduced(c.everyone(50_000, torch.float32, salt=i), "SUM"))
    for group in others:
        dist.destroy_process_group(group)


@case
def barriers(c: Case) -> None:
    for _ in range(5):
        dist.barrier(group=c.group)
    dist.barrier(group=c.group, async_op=True).wait()
    monitored_barrier(c.group, timedelta(seconds=30))


@case
def coalesced_reduce_scatters_may_differ_in_dtype(c: Case) -> None:
    dtypes = [torch.float32, torch.int64, torch.float32]
    inputs = [c.mine(c.size * (3 + i), dtype) for i, dtype in enumerate(dtypes)]
    outputs = [torch.empty(3 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    c.group.reduce_scatter_tensor_coalesced(outputs, inputs, ReduceScatterOptions()).wait()
    for i, (output, dtype) in enumerate(zip(outputs, dtypes, strict=True)):
        close(output, reduced(c.everyone(c.size * (3 + i), dtype), "SUM").chunk(c.size)[c.rank])


@case
def both_spellings_exist(c: Case) -> None:
    output, mine = torch.empty(4 * c.size), c.mine(4, torch.float32)
    c.group._allgather_base(output, mine, AllgatherOptions()).wait()
    assert torch.equal(output, torch.cat(c.everyone(4, torch.float32)))
    for old, new in [
        ("_allgather_base", "all_gather_single"),
        ("_reduce_scatter_base", "reduce_scatter_single"),
        ("alltoall_base", "all_to_all_single"),
        ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    ]:
        assert hasattr(c.group, old), old
        assert hasattr(c.group, new), new


def run_all() -> dict[str, str]:
    """Runs every case on a fresh group; {case: "" or what went wrong}."""
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    dist.init_process_group("smddp", timeout=timedelta(seconds=60))
    outcome = {}
    ranks = list(range(dist.get_world_size()))
    for name, function in CASES.items():
        group = dist.new_group(ranks, timeout=timedelta(seconds=20))
        start = time.monotonic()
        try:
            function(Case(group))
            outcome[name] = ""
            print(f"{time.monotonic() - start:7.2f} s {name}", flush=True)
        except Exception:
            outcome[name] = traceback.format_exc()
        dist.destroy_process_group(group)
    expected = os.environ.get("EXPECT_GROUP")
    if expected:
        assert type(dist.group.WORLD).__name__ == expected
    dist.destroy_process_group()
    return outcome


assert smdistributed_rs
