"""The collectives of torch.distributed over one native communicator.

Methods carry torch's names, old and new: `_allgather_base` became `all_gather_single` in torch 2.14, and so on. Each
does the same: describe the memory, start the call, return a `Work`. Counts are compared, never shapes. Algorithms are
the native half's to choose: docs/how-to/measure.md.

The short way (`run_tensors`, `start_tensors`) takes a call whose tensors are dense, of a known dtype and of fitting
counts, in one step into native code; everything else comes back and goes the long way, which copies or
explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
)
from torch.distributed import ReduceOp, Work

from . import _codes as codes
from ._arrays import whole_numbers
from ._launch import know
from ._overloads import ALL_GATHER, REDUCE_SCATTER, listed, of_gather, options, paired
from .cuda import Message
from .errors import ArgumentError
from .monitored import monitored_barrier
from .profiling import Range
from .sparse import all_reduce_sparse
from .tensors import (
    NOTHING,
    Once,
    Span,
    apart,
    check,
    copy_back,
    input_list,
    input_span,
    mover,
    output_list,
    output_span,
    overlap,
    received_span,
    reducer,
    reduction_code,
    refuse_overlap,
    sent_span,
)
from .work import DONE, DoneWork, SmddpWork, Together

if TYPE_CHECKING:
    from ._core import Communicator, Handle
    from .cuda import CudaSide

_SUM = ReduceOp.SUM

METHODS = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast",
    "allgather", "allgather_coalesced", "all_gather_single", "_allgather_base", "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "gather", "gather_single", "gather_into_tensor", "scatter",
    "alltoall", "all_to_all_single", "alltoall_base",
    "barrier", "monitored_barrier", "send", "recv", "recv_anysource", "recvAnysource",
)  # fmt: skip
"""The methods below that torch calls to communicate."""

_NO_LIMIT = AllreduceOptions().timeout
"""How torch says that a call was given no time limit of its own."""


def _limit(name: str, opts: Any) -> float | None:
    """The time limit of one call in seconds; None: the group's."""
    timeout = opts.timeout
    if timeout == _NO_LIMIT:
        return None
    if timeout.days < 0:
        hint = "Leave it out to use the group's time limit"
        raise ArgumentError.of(name, "timeout", "seconds above 0", f"{timeout.total_seconds():g}", hint)
    return timeout.total_seconds() or None


if hasattr(AllreduceOptions, "asyncOp"):
    _is_async: Callable[[Any], bool] = attrgetter("asyncOp")
else:

    def _is_async(_: Any) -> bool:
        """Torch before 2.8 does not say: every call may be one whose Work is waited for later."""
        return True


class Collectives:
    """Base of the classes torch sees. Ranks are group ranks."""

    # Asked by torch before it tries. Without an answer here its C++ half would ask this object again, for ever.
    supports_splitting = True
    supports_shrinking = False
    supports_reconfigure = False
    supports_window = False
    supports_time_estimate = False
    _supports_time_estimate = False

    def __init__(self, communicator: Communicator, cuda: CudaSide) -> None:
        self._comm = communicator
        know(self, communicator)
        self._cuda = cuda
        # Not imported above: this module is loaded in the midst of torch's own import.
        self._profiler = torch.autograd.profiler
        self._size = communicator.size
        self._calls_before = communicator.calls
        self._rank = communicator.rank

    # ---- all_reduce, broadcast, reduce: one buffer, in place

    def allreduce(
        self, tensors: list[Tensor], opts: Any = None, timeout: timedelta | None = None, *, op: Any = None
    ) -> Work:
        """Reduces one tensor over all ranks, in place. AVG of integers truncates toward zero; SUM of bool is or."""
        if type(opts) is not AllreduceOptions:
            tensors, opts = listed(tensors), options(AllreduceOptions, opts, timeout, op=op)
        op = opts.reduceOp
        (tensor,) = _one("all_reduce", "tensor", tensors)
        if isinstance(tensor, Tensor) and tensor.layout is torch.sparse_coo:
            all_reduce_sparse(self, tensor, op, self._size, of_gather(opts))
            return DoneWork([tensor])
        code, factor = (0, None) if op == _SUM else reduction_code("all_reduce", op, tensor)
        if factor is None:
            work = self._short(codes.ALL_REDUCE, code, 0, tensor, None, opts)
            if work is not None:
                return work
        return self._reduce_in_place("all_reduce", codes.ALL_REDUCE, tensors, op, 0, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """all_reduce of several tensors of one dtype as one."""
        opts = opts or AllreduceCoalescedOptions()
        return self._reduce_in_place("all_reduce_coalesced", codes.ALL_REDUCE, list(tensors), opts.reduceOp, 0, opts)

    def reduce(
        self, tensors: list[Tensor], opts: Any = None, op: Any = None, timeout: timedelta | None = None, *,
        root: int | None = None,
    ) -> Work:  # fmt: skip
        """Reduces one tensor to the root, in place; the others' tensors stay as they are."""
        if type(opts) is not ReduceOptions:
            tensors, opts = listed(tensors), options(ReduceOptions, opts, timeout, root=root, op=op)
        (tensor,) = _one("reduce", "tensor", tensors)
        op = opts.reduceOp
        code, factor = reduction_code("reduce", op, tensor)
        if (root := opts.rootRank) < 0:
            self._root("reduce", opts)
        if factor is None:
            work = self._short(codes.REDUCE, code, root, tensor, None, opts)
            if work is not None:
                return work
        return self._reduce_in_place("reduce", codes.REDUCE, tensors, op, root, opts)

    def broadcast(
        self, tensors: list[Tensor], opts: Any = None, timeout: timedelta | None = None, *, root: int | None = None
    ) -> Work:
        """Copies the root's tensor to all ranks. Any dtype."""
        if type(opts) is not BroadcastOptions:
            tensors, opts = listed(tensors), options(BroadcastOptions, opts, timeout, root=root)
        (tensor,) = _one("broadcast", "tensor", tensors)
        if (root := opts.rootRank) < 0:
            self._root("broadcast", opts)
        work = self._short(codes.BROADCAST, 0, root, tensor, None, opts)
        if work is not None:
            return work
        span = output_span("broadcast", "tensor", tensor, also_read=True)
        code, each = mover(tensor)
        return self._issue(codes.BROADCAST, code, 0, root, span.numel * each, span, span, tensors, opts)

    def _reduce_in_place(
        self, name: str, collective: int, tensors: list[Tensor], op: Any, root: int, opts: Any
    ) -> Work:
        if len(tensors) == 1:
            span = output_span(name, "tensor", tensors[0], also_read=True)
        else:
            span = output_list(name, "tensors", tensors, also_read=True)
        dtype, each, code, factor = reducer(name, tensors[0], op)
        if factor is not None:
            written = collective == codes.ALL_REDUCE or root == self._rank
            span = _multiplied(span, tensors, factor, written)
        return self._issue(collective, dtype, code, root, span.numel * each, span, span, tensors, opts, given=tensors)

    # ---- all_gather

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = ALL_GATHER) -> Work:
        """Concatenates the ranks' tensors in `output`, of size() times the input's elements. Any dtype."""
        work = self._short(codes.ALL_GATHER, 0, 0, output, input, opts)
        if work is not None:
            return work
        source = input_span("all_gather_single", "input", input)
        target = output_span("all_gather_single", "output", output)
        _same_types("all_gather_single", "output", output, input)
        _count("all_gather_single", "output", target.numel, source.numel * self._size, "size() times the input's")
        code, each = mover(input)
        return self._issue(codes.ALL_GATHER, code, 0, 0, source.numel * each, source, target, [output], opts)

    _allgather_base = all_gather_single

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """Gives every rank's tensor to all; `outputs[0][r]` has the elements of rank r's. Counts may differ by rank."""
        name = "all_gather"
        (outputs, inputs), opts = paired(outputs, inputs), options(AllgatherOptions, opts, timeout)
        (input,), (into,) = _one(name, "tensor", inputs), _one(name, "tensor_list", outputs)
        self._per_rank(name, "tensor_list", into)
        source, target = input_span(name, "tensor", input), output_list(name, "tensor_list", into)
        _same_types(name, "tensor_list[0]", into[0], input)
        code, each = mover(input)
        numels = [t.numel() for t in into]
        own = f"tensor_list[{self._rank}]"
        _count(name, own, numels[self._rank], source.numel, "as many as the input's")
        counts = None if _equal(numels) else [n * each for n in numels]
        count = source.numel * each if counts is None else 0
        return self._issue(codes.ALL_GATHER, code, 0, 0, count, source, target, into, opts, counts)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """all_gather of several tensors as one; `outputs[r]` is what rank r's `inputs` are gathered in."""
        name = "all_gather_coalesced"
        self._per_rank(name, "output_tensor_lists", outputs)
        for rank, theirs in enumerate(outputs):
            argument = f"output_tensor_lists[{rank}]"
            _count(name, argument, len(theirs), len(inputs), "one per input", "tensors")
            for i, (output, input) in enumerate(zip(theirs, inputs, strict=True)):
                _same_types(name, f"{argument}[{i}]", output, input)
                _count(name, f"{argument}[{i}]", output.numel(), input.numel(), "as many as the input's")
        source = input_list(name, "input_tensor_list", inputs)
        flat = [output for theirs in outputs for output in theirs]
        target = output_list(name, "output_tensor_lists", flat)
        code, each = mover(inputs[0])
        count = source.numel * each
        return self._issue(codes.ALL_GATHER, code, 0, 0, count, source, target, flat, opts, given=inputs)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """all_gather_single of several tensors as one; dtypes may differ."""
        name = "all_gather_single_coalesced"
        _count(name, "outputs", len(outputs), len(inputs), "one per input", "tensors")
        if len(inputs) == 1:
            return self.all_gather_single(outputs[0], inputs[0], opts or ALL_GATHER)
        for i, (output, input) in enumerate(zip(outputs, inputs, strict=True)):
            check(name, f"inputs[{i}]", input)
            refuse_overlap(name, f"outputs[{i}]", check(name, f"outputs[{i}]", output))
            _same_types(name, f"outputs[{i}]", output, input)
            _count(name, f"outputs[{i}]", output.numel(), input.numel() * self._size, "size() times the input's")
        # As bytes, because nothing is computed and dtypes may differ.
        source = input_list(name, "inputs", [_as_bytes(name, f"inputs[{i}]", t) for i, t in enumerate(inputs)])
        inside = torch.empty(self._size, source.numel, dtype=torch.uint8, device=inputs[0].device)
        target = output_span(name, "outputs", inside)
        finish = _HandOut(outputs, inside, self._size).once()
        target = target._replace(finish=finish)
        code, count = codes.DTYPES["uint8"], source.numel
        return self._issue(codes.ALL_GATHER, code, 0, 0, count, source, target, outputs, opts, given=inputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    # ---- reduce_scatter

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = REDUCE_SCATTER) -> Work:
        """Reduces `input`, of size() times the output's elements, and leaves each rank its part."""
        name = "reduce_scatter_single"
        op = opts.reduceOp
        code, factor = reduction_code(name, op, input)
        if factor is None:
            work = self._short(codes.REDUCE_SCATTER, code, 0, output, input, opts)
            if work is not None:
                return work
        source, target = input_span(name, "input", input), output_span(name, "output", output)
        _same_types(name, "output", output, input)
        _count(name, "input", source.numel, target.numel * self._size, "size() times the output's")
        return self._reduce_scatter(name, source, target, [input], [output], op, opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None, timeout: timedelta | None = None,
        *, op: Any = None,
    ) -> Work:  # fmt: skip
        """Reduces the ranks' lists element by element; rank r gets `inputs[0][r]`. Counts may differ by rank."""
        name = "reduce_scatter"
        (inputs, outputs), opts = paired(inputs, outputs), options(ReduceScatterOptions, opts, timeout, op=op)
        (output,), (parts,) = _one(name, "output", outputs), _one(name, "input_list", inputs)
        self._per_rank(name, "input_list", parts)
        source, target = input_list(name, "input_list", parts), output_span(name, "output", output)
        _same_types(name, "output", output, parts[0])
        numels = [t.numel() for t in parts]
        _count(name, f"input_list[{self._rank}]", numels[self._rank], target.numel, "as many as the output's")
        counts = None if _equal(numels) else numels
        return self._reduce_scatter(name, source, target, parts, [output], opts.reduceOp, opts, counts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """reduce_scatter_single of several tensors, those of one dtype as one."""
        name = "reduce_scatter_single_coalesced"
        opts = opts or REDUCE_SCATTER
        _count(name, "outputs", len(outputs), len(inputs), "one per input", "tensors")
        if len(inputs) == 1:
            return self.reduce_scatter_single(outputs[0], inputs[0], opts)
        if not inputs:
            raise ArgumentError.of(name, "inputs", "at least one tensor", "none", "Pass one input per output")
        for i, (output, input) in enumerate(zip(outputs, inputs, strict=True)):
            check(name, f"outputs[{i}]", output)
            check(name, f"inputs[{i}]", input)
            _same_types(name, f"inputs[{i}]", input, output)
            _count(name, f"inputs[{i}]", input.numel(), output.numel() * self._size, "size() times the output's")
        dtypes = list(dict.fromkeys(input.dtype for input in inputs))
        if len(dtypes) > 1:
            alike = [[i for i, input in enumerate(inputs) if input.dtype == dtype] for dtype in dtypes]
            picked = [([outputs[i] for i in some], [inputs[i] for i in some]) for some in alike]
            return Together([self.reduce_scatter_single_coalesced(*some, opts) for some in picked])
        rows = torch.cat([t.detach().reshape(self._size, -1) for t in inputs], dim=1)
        source, target = input_span(name, "inputs", rows), output_list(name, "outputs", outputs)
        return self._reduce_scatter(name, source, target, [rows], outputs, opts.reduceOp, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(
        self,
        name: str,
        source: Span,
        target: Span,
        inputs: list[Tensor],
        outputs: list[Tensor],
        op: Any,
        opts: Any,
        counts: list[int] | None = None,
    ) -> Work:
        dtype, each, code, factor = reducer(name, inputs[0], op)
        if factor is not None:
            source = input_span(name, "input", _scaled(inputs, factor))
        count = 0 if counts is not None else target.numel * each
        counts = counts and [n * each for n in counts]
        return self._issue(codes.REDUCE_SCATTER, dtype, code, 0, count, source, target, outputs, opts, counts)

    # ---- gather, scatter

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None, timeout: timedelta | None = None,
        *, root: int | None = None,
    ) -> Work:  # fmt: skip
        """Collects the ranks' tensors, all of one count, in the root's `outputs[0]`; others pass no outputs."""
        (outputs, inputs), opts = paired(outputs, inputs), options(GatherOptions, opts, timeout, root=root)
        (input,) = _one("gather", "tensor", inputs)
        root = self._root("gather", opts)
        source, target, into = input_span("gather", "tensor", input), NOTHING, []
        if root == self._rank:
            (into,) = _one("gather", "gather_list", outputs)
            self._per_rank("gather", "gather_list", into)
            for i, part in enumerate(into):
                _same_types("gather", f"gather_list[{i}]", part, input)
                _count("gather", f"gather_list[{i}]", part.numel(), source.numel, "as many as the input's")
            target = output_list("gather", "gather_list", into)
        code, each = mover(input)
        return self._issue(codes.GATHER, code, 0, root, source.numel * each, source, target, into, opts)

    def gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
        """Concatenates the ranks' tensors in the root's `output`."""
        opts = options(GatherOptions, opts)
        root = self._root("gather_single", opts)
        source, target = input_span("gather_single", "input", input), NOTHING
        if root == self._rank:
            target = output_span("gather_single", "output", output)
            _same_types("gather_single", "output", output, input)
            expected = source.numel * self._size
            _count("gather_single", "output", target.numel, expected, "size() times the input's")
        code, each = mover(input)
        return self._issue(codes.GATHER, code, 0, root, source.numel * each, source, target, [output], opts)

    gather_into_tensor = gather_single

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None, timeout: timedelta | None = None,
        *, root: int | None = None,
    ) -> Work:  # fmt: skip
        """Gives rank r the root's `inputs[0][r]`, all of one count; others pass no inputs."""
        (inputs, outputs), opts = paired(inputs, outputs), options(ScatterOptions, opts, timeout, root=root)
        (output,) = _one("scatter", "tensor", outputs)
        source, target = NOTHING, output_span("scatter", "tensor", output)
        if opts.rootRank == self._rank:
            (parts,) = _one("scatter", "scatter_list", inputs)
            self._per_rank("scatter", "scatter_list", parts)
            for i, part in enumerate(parts):
                _same_types("scatter", f"scatter_list[{i}]", part, output)
                _count("scatter", f"scatter_list[{i}]", part.numel(), target.numel, "as many as the output's")
            source = input_list("scatter", "scatter_list", parts)
        code, each = mover(output)
        return self._issue(
            codes.SCATTER, code, 0, self._root("scatter", opts), target.numel * each, source, target, outputs, opts
        )

    # ---- all_to_all

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Any, input_splits: Any, opts: Any = None,
        timeout: timedelta | None = None,
    ) -> Work:  # fmt: skip
        """Rank r gets the r-th part of every rank's `input`. Splits are sizes along dimension 0; none: equal parts."""
        name = "all_to_all_single"
        if type(opts) is not AllToAllOptions:
            opts = options(AllToAllOptions, opts, timeout)
        if type(output_splits) is not list or type(input_splits) is not list:
            output_splits = whole_numbers(name, "output_split_sizes", output_splits)
            input_splits = whole_numbers(name, "input_split_sizes", input_splits)
        if not output_splits and not input_splits and self._whole_rows(input) and self._whole_rows(output):
            work = self._short(codes.ALL_TO_ALL, 0, 0, output, input, opts)
            if work is not None:
                return work
        source, target = input_span(name, "input", input), output_span(name, "output", output)
        _same_types(name, "output", output, input)
        code, each = mover(input)
        send = self._split(name, "input", input, input_splits)
        receive = self._split(name, "output", output, output_splits)
        if not output_splits and not input_splits:
            _count(name, "output", target.numel, source.numel, "as many as the input's")
            return self._issue(codes.ALL_TO_ALL, code, 0, 0, send[0] * each, source, target, [output], opts)
        self._own_part(name, send, receive)
        splits = ([n * each for n in send], [n * each for n in receive])
        return self._issue(codes.ALL_TO_ALL, code, 0, 0, 0, source, target, [output], opts, None, splits)

    alltoall_base = all_to_all_single

    def alltoall(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None, timeout: timedelta | None = None
    ) -> Work:
        """Rank r gets every rank's `inputs[r]`; counts are free, but each must be what its receiver expects."""
        name, opts = "all_to_all", options(AllToAllOptions, opts, timeout)
        self._per_rank(name, "input_tensor_list", inputs)
        self._per_rank(name, "output_tensor_list", outputs)
        source = input_list(name, "input_tensor_list", inputs)
        target = output_list(name, "output_tensor_list", outputs)
        _same_types(name, "output_tensor_list[0]", outputs[0], inputs[0])
        code, each = mover(inputs[0])
        send, receive = [t.numel() for t in inputs], [t.numel() for t in outputs]
        self._own_part(name, send, receive)
        # Always with splits: whether sizes differ is known to no rank for the others.
        splits = ([n * each for n in send], [n * each for n in receive])
        return self._issue(codes.ALL_TO_ALL, code, 0, 0, 0, source, target, outputs, opts, None, splits)

    def _whole_rows(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.size(0) % self._size == 0

    def _own_part(self, name: str, send: Sequence[int], receive: Sequence[int]) -> None:
        """What a rank sends to itself is what it receives from itself."""
        meaning = f"what rank {self._rank} sends to itself"
        _count(name, "output", receive[self._rank], send[self._rank], meaning)

    def _split(self, name: str, argument: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        """Elements for each rank."""
        rows = tensor.size(0) if tensor.dim() else tensor.numel()
        row = tensor.numel() // rows if rows else 0
        if not splits:
            if rows % self._size:
                given = f"shape {tuple(tensor.shape)}"
                hint = f"Pass {argument}_split_sizes to cut it unevenly"
                raise ArgumentError.of(name, argument, f"a size in dimension 0 divisible by {self._size}", given, hint)
            return [rows // self._size * row] * self._size
        argument = f"{argument}_split_sizes"
        splits = whole_numbers(name, argument, splits)
        _count(name, argument, len(splits), self._size, "one per rank", "sizes")
        if sum(splits) != rows or min(splits) < 0:
            hint = "They are sizes along dimension 0"
            raise ArgumentError.of(name, argument, f"sizes that add up to {rows}", list(splits), hint)
        return [n * row for n in splits]

    # ---- barrier

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Work:
        """Returns when all ranks have come, and their devices have done what their current streams were given."""
        opts = options(BarrierOptions, opts, timeout)
        self._cuda.synchronize()
        return self._issue(codes.BARRIER, codes.DTYPES["uint8"], 0, 0, 0, NOTHING, NOTHING, [], opts)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose error names the ranks that did not come: the first of them, or all with `wait_all_ranks`."""
        # Torch's group passes a time, its C++ half passes options.
        limit = timeout if isinstance(timeout, timedelta) or timeout is None else timeout.timeout
        seconds = self._comm.timeout if limit is None or limit == _NO_LIMIT else limit.total_seconds()
        monitored_barrier(self._comm, seconds, wait_all_ranks)

    # ---- point to point

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Work:
        """Sends one tensor of any dtype to rank `dst`; messages match by tag, in order."""
        (tensor,) = _one("send", "tensor", tensors)
        to, tag = self._group_rank("send", "dst", dst), _tag("send", tag)
        if self._by_device(tensor):
            return self._between_devices("send", Message(to, True, input_span("send", "tensor", tensor), tensor))
        work = self._short_message(True, to, tag, tensors)
        if work is not None:
            return work
        span = sent_span(tensor)
        code, _ = mover(tensor)
        start = lambda: self._comm.start_message_of(True, to, tag, code, span.memory, span)  # noqa: E731
        return self._message("send", span, tensors, start)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Work:
        """Receives one tensor of any dtype from rank `src`."""
        (tensor,) = _one("recv", "tensor", tensors)
        of, tag = self._group_rank("recv", "src", src), _tag("recv", tag)
        if self._by_device(tensor):
            return self._between_devices("recv", Message(of, False, output_span("recv", "tensor", tensor), tensor))
        work = self._short_message(False, of, tag, tensors)
        if work is not None:
            return work
        span = received_span(tensor)
        code, _ = mover(tensor)
        start = lambda: self._comm.start_message_of(False, of, tag, code, span.memory, span)  # noqa: E731
        return self._message("recv", span, tensors, start)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        """Receives one tensor of any dtype from whichever rank's message of `tag` comes first."""
        (tensor,) = _one("recv", "tensor", tensors)
        if self._by_device(tensor):
            hint = "Name the sender; or make the group without device_id: its messages go through the host"
            raise ArgumentError.of("recv", "src", "a rank, where messages go from device to device", "none", hint)
        span = received_span(tensor)
        code, _ = mover(tensor)
        tag = _tag("recv", tag)
        start = lambda: self._comm.start_recv_any(tag, code, span.memory, span)  # noqa: E731
        return self._message("recvAnySource", span, tensors, start)

    recvAnysource = recv_anysource

    def _message(self, name: str, span: Span, tensors: list[Tensor], start: Callable[[], Handle]) -> Work:
        if self._profiler._is_profiler_enabled:
            work = _recorded(name, span.keep, span, tensors, start)
        else:
            work = SmddpWork(start(), tensors, span.finish)
        return self._cuda.note(work)

    def _by_device(self, tensor: object) -> bool:
        return self._cuda.carries_messages and isinstance(tensor, Tensor) and tensor.is_cuda

    def _between_devices(self, name: str, message: Message) -> Work:
        if self._profiler._is_profiler_enabled:
            with self._profiler.record_function(f"smddp:{name}"):
                return self._cuda.message(name, message)
        return self._cuda.message(name, message)

    @property
    def supports_coalescing(self) -> bool:
        """Whether `batch_isend_irecv` is to tell where its messages begin and end."""
        return self._cuda.carries_messages

    def start_coalescing(self, device: torch.device | None = None) -> None:
        """The messages and calls that follow are one batch."""
        self._cuda.begin_batch()

    def end_coalescing(self, device: torch.device | None = None) -> Work:
        """Starts the batch; the `Work` of all of it."""
        return self._cuda.end_batch()

    # Python has one name for it, and C++ looks for the other: with a device in a group, without in a backend.
    _start_coalescing, _end_coalescing = start_coalescing, end_coalescing

    # ---- the group itself

    def getBackendName(self) -> str:
        return "smddp"

    name = _get_backend_name = getBackendName

    def set_timeout(self, timeout: timedelta) -> None:
        """The time limit of every later operation."""
        self._comm.set_timeout(timeout.total_seconds())
        self._cuda.set_timeout(timeout.total_seconds())

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.set_timeout(timeout)

    def shutdown(self) -> None:
        """Ends the group; waits a little for what is under way on the host, and for all that is on the device."""
        # Calls on CUDA tensors need the group on the host to their end.
        self._cuda.shutdown()
        self._comm.shutdown()

    def abort(self) -> None:
        """Ends the group now: whoever waits, on any rank, gets AbortedError."""
        self._comm.abort("abort() was called")
        self._cuda.abort("abort() was called")
        self._comm.shutdown()

    def eager_connect_single_device(self, device: torch.device | None) -> None:
        """Connects the CUDA side too, which else the first call with CUDA tensors does. Torch calls this on all members
        of a new group that was given a `device_id`."""
        if device is not None and device.type == "cuda":
            self._cuda.connect(torch.cuda.current_device() if device.index is None else device.index)

    def perform_nocolor_split(self, device: torch.device) -> None:
        """Nothing: torch calls it on who is in no part of a group that is split, and only members meet here."""

    def _set_sequence_number_for_group(self) -> None:
        """Sequence numbers start at 0 on every rank."""

    def _get_sequence_number_for_group(self) -> int:
        return self._comm.calls - self._calls_before

    setSequenceNumberForGroup = _set_sequence_number_for_group
    getSequenceNumberForGroup = _get_sequence_number_for_group

    def describe(self) -> str:
        """Transports, provider and shape of this group, for people."""
        return "; ".join(filter(None, (self._comm.describe(), self._cuda.describe())))

    # ---- below all of them

    def _short(
        self, collective: int, code: int, root: int, output: Tensor, input: Tensor | None, opts: Any
    ) -> Work | None:
        """The short way; None: these tensors, or a profiler, need the long one."""
        if self._profiler._is_profiler_enabled:
            return None
        if isinstance(output, Tensor) and output.is_cuda:
            limit = _limit(codes.NAMES[collective], opts)
            return self._cuda.short(collective, code, root, output, input, limit, _is_async(opts))
        if _is_async(opts):
            handle = self._comm.start_tensors(
                collective, code, root, output, input, _limit(codes.NAMES[collective], opts)
            )
            return None if handle is None else self._cuda.note(SmddpWork(handle, [output]))
        if self._comm.run_tensors(collective, code, root, output, input, _limit(codes.NAMES[collective], opts)):
            return DONE
        return None

    def _short_message(self, sends: bool, peer: int, tag: int, tensors: list[Tensor]) -> Work | None:
        """The short way of a message; None: its tensor, or a profiler, needs the long one."""
        if self._profiler._is_profiler_enabled:
            return None
        handle = self._comm.start_message(sends, peer, tag, tensors[0])
        return None if handle is None else self._cuda.note(SmddpWork(handle, tensors))

    def _issue(
        self,
        collective: int,
        dtype: int,
        code: int,
        root: int,
        count: int,
        source: Span,
        target: Span,
        results: list[Tensor],
        opts: Any,
        counts: list[int] | None = None,
        splits: tuple[list[int], list[int]] | None = None,
        given: Sequence[Tensor] | None = None,
    ) -> Work:
        """The long way's last step. `count` as the native half counts it; 0 when `counts` or `splits` say more.
        `given`: what a profiler is to see, where the source is made of several tensors."""
        if source is not target and overlap(source, target):
            source = apart(collective, source, target, self._rank, counts or [1] * self._size)
        limit = None if opts is None else _limit(codes.NAMES[collective], opts)
        call = (collective, dtype, code, root, count, source.memory, target.memory, limit, counts, splits)
        if source.device >= 0 or target.device >= 0:
            return self._issue_on_device(call, source, target, results, opts)
        if self._profiler._is_profiler_enabled:
            name, shown = codes.NAMES[collective], source.keep if given is None else given
            work = _recorded(name, shown, target, results, lambda: self._comm.start(*call, (source, target)))
            if opts is None or _is_async(opts):
                return self._cuda.note(work)
            work.wait()
            return work
        if opts is None or _is_async(opts):
            return self._cuda.note(SmddpWork(self._comm.start(*call, (source, target)), results, target.finish))
        self._comm.run(*call)
        if target.finish is not None:
            target.finish()
        return DONE

    def _issue_on_device(
        self, call: tuple[Any, ...], source: Span, target: Span, results: list[Tensor], opts: Any
    ) -> Work:
        name = codes.NAMES[call[0]]
        if source.device != target.device and NOTHING not in (source, target):
            given = [f"cuda:{span.device}" if span.device >= 0 else "cpu" for span in (source, target)]
            raise ArgumentError.of(
                name, "tensors", "input and output on one device", f"{given[0]} and {given[1]}", "Move one of them"
            )
        device = max(source.device, target.device)
        is_async = opts is None or _is_async(opts)
        if self._profiler._is_profiler_enabled:
            with self._profiler.record_function(f"smddp:{name}"):
                return self._cuda.issue(name, device, call, source, target, results, is_async)
        return self._cuda.issue(name, device, call, source, target, results, is_async)

    def _group_rank(self, name: str, argument: str, rank: int) -> int:
        if rank < 0:
            expected = f"a rank of the group, 0 to {self._size - 1}"
            raise ArgumentError.of(name, argument, expected, rank, "Ranks are counted from 0")
        return rank

    def _root(self, name: str, opts: Any) -> int:
        return self._group_rank(name, "root", opts.rootRank)

    def _per_rank(self, name: str, argument: str, tensors: Sequence[Tensor]) -> None:
        _count(name, argument, len(tensors), self._size, "one per rank", "tensors")


def _recorded(name: str, given: object, target: Span, results: list[Tensor], start: Callable[[], Handle]) -> SmddpWork:
    """Starts a call as a range of the profiler."""
    recorded = Range(name, given)
    try:
        handle = start()
    except BaseException:
        recorded.end()
        raise
    recorded.end_with(handle)

    def finish() -> None:
        if target.finish is not None:
            target.finish()
        recorded.wait()

    return SmddpWork(handle, results, Once(finish))


def _one(name: str, argument: str, given: Sequence[Any]) -> Sequence[Any]:
    if len(given) != 1:
        hint = "Lists of several tensors per call were for several GPUs per process; make one call for each"
        raise ArgumentError.of(name, argument, "one tensor", f"a list of {len(given)}", hint)
    return given


def _count(name: str, argument: str, given: int, expected: int, meaning: str, what: str = "elements") -> None:
    if given != expected:
        hint = "Element counts must fit; shapes are free"
        raise ArgumentError.of(name, argument, f"{expected} {what} ({meaning})", f"{given} {what}", hint)


def _same_types(name: str, argument: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        hint = "Collectives do not convert"
        raise ArgumentError.of(name, argument, f"dtype {other.dtype}, as the other side", f"{tensor.dtype}", hint)


def _equal(numbers: Sequence[int]) -> bool:
    return all(n == numbers[0] for n in numbers)


def _tag(name: str, tag: int) -> int:
    if tag < 0:
        raise ArgumentError.of(name, "tag", "a whole number from 0", tag, "Both sides use the same tag")
    return tag


def _as_bytes(name: str, argument: str, tensor: Tensor) -> Tensor:
    flat = input_span(name, argument, tensor).keep.reshape(-1)  # type: ignore[attr-defined]
    # One element counts as dense whatever its stride is, but cannot be seen as bytes then.
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _multiplied(span: Span, tensors: list[Tensor], factor: Any, written: bool) -> Span:
    """An in-place span whose contents are multiplied first, in a temporary, so that a failed call changes nothing.
    `written`: the result is wanted back."""
    inside = _scaled(tensors, factor)

    def hand_out() -> None:
        for tensor, part in zip(tensors, inside.split([t.numel() for t in tensors]), strict=True):
            copy_back(tensor, part.view(tensor.shape))

    finish = Once(hand_out) if written else None
    return span._replace(memory=(inside.data_ptr(), inside.nbytes), keep=inside, finish=finish)


def _scaled(tensors: list[Tensor], factor: Any) -> Tensor:
    """All elements times `factor`, in their own dtype."""
    return (torch.cat([t.detach().reshape(-1) for t in tensors]) * factor).to(tensors[0].dtype)


class _HandOut:
    """Cuts gathered rows of bytes, one per rank, into the outputs of a coalesced all_gather."""

    def __init__(self, outputs: list[Tensor], rows: Tensor, size: int) -> None:
        self._outputs, self._rows, self._size = outputs, rows, size

    def __call__(self) -> None:
        start = 0
        for output in self._outputs:
            length = output.nbytes // self._size
            # In memory of its own, for a dtype may be seen only where its elements may begin.
            part = self._rows[:, start : start + length].clone(memory_format=torch.contiguous_format)
            copy_back(output, part.view(-1).view(output.dtype).view(output.shape))
            start += length

    def once(self) -> Any:
        return Once(self)
