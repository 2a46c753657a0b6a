"""Torch tensors as the native half wants them: dense memory on one device, an element type it knows, and a count.

A tensor that is not dense in C order is copied to a temporary one, and back when the call is over. What cannot be done
so is refused, naming the argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ._codes import ALL_GATHER, ALL_TO_ALL, DTYPES, GATHER, MOVERS, OPS
from .errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from ._core import Handle

_NATIVE = {getattr(torch, name): code for name, code in DTYPES.items()}
_COMPLEX = {
    torch.complex32: DTYPES["float16"],
    torch.complex64: DTYPES["float32"],
    torch.complex128: DTYPES["float64"],
}


class Span(NamedTuple):
    """Memory of one argument of a call."""

    memory: tuple[int, int]
    """(address, bytes)"""
    numel: int
    """elements, of all tensors of the argument together"""
    keep: object
    """what must stay alive as long as the call uses the memory"""
    finish: Once | None = None
    """what to do when the call has ended well"""
    device: int = -1
    """number of the CUDA device the memory is on; -1: the CPU"""


NOTHING = Span((0, 0), 0, None)


def overlap(one: Span, other: Span) -> bool:
    """Whether a byte belongs to both."""
    (start, length), (other_start, other_length) = one.memory, other.memory
    return min(length, other_length) > 0 and start < other_start + other_length and other_start < start + length


class Once:
    """An action that runs once, whichever thread asks first; the others wait for it."""

    __slots__ = ("_action", "_lock")

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._action is not None:
                self._action()
                self._action = None

    def follow(self, handle: Handle) -> None:
        """Runs it when an operation has ended well, though nobody may wait for that."""
        handle.on_done(lambda error: self() if error is None else None)


def check(op: str, argument: str, tensor: object) -> Tensor:
    """`tensor`, if it is one whose memory can be used; of a functional collective's result, the tensor it is about."""
    if type(tensor) is not Tensor and hasattr(tensor, "trigger_wait"):
        tensor.trigger_wait()
        tensor = tensor.elem
    if not isinstance(tensor, Tensor):
        hint = "Convert it with torch.as_tensor"
        raise ArgumentError.of(op, argument, "a torch.Tensor", f"a {type(tensor).__name__}", hint)
    if tensor.layout is not torch.strided:
        raise ArgumentError.of(op, argument, "a dense tensor", f"layout {tensor.layout}", "Convert it with .to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        hint = "Move it to one of them"
        raise ArgumentError.of(op, argument, "a tensor on the CPU or a CUDA device", f"one on {tensor.device}", hint)
    if tensor.numel() and not _has_memory(tensor):
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            hint = "Pass the tensor it wraps (that of a DTensor is .to_local())"
            raise ArgumentError.of(op, argument, "a tensor in memory", f"a {type(tensor).__name__}, without any", hint)
        hint = "Its storage was resized to nothing (FSDP does so with what it can gather again)"
        raise ArgumentError.of(op, argument, f"a tensor in {tensor.nbytes} bytes of memory", "one in 0 bytes", hint)
    return tensor


def _has_memory(tensor: Tensor) -> bool:
    """By its storage: a view of one that was given back has its offset for an address."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:  # so torch says that there is none
        return False


def input_span(op: str, argument: str, tensor: Tensor) -> Span:
    """A tensor that is only read."""
    source = check(op, argument, tensor).detach()
    if not _dense(source):
        source = source.resolve_conj().resolve_neg().contiguous()
    return _of(source)


def apart(collective: int, source: Span, target: Span, rank: int, blocks: Sequence[int]) -> Span:
    """`source`, which overlaps the target: itself where the native half allows that, since one is the rank's own
    block of the other; else a copy. `blocks`: how the ranks' blocks compare in length."""
    if collective in (ALL_GATHER, GATHER):
        whole, part = target, source
    else:
        whole, part = source, target
    (start, _), (part_start, length) = whole.memory, part.memory
    in_place = part_start - start == length * sum(blocks[:rank]) // blocks[rank]
    if in_place and (collective != ALL_TO_ALL or len(blocks) == 1):
        return source
    kept = source.keep
    return _of(torch.cat([t.reshape(-1) for t in ([kept] if isinstance(kept, Tensor) else kept)]))  # type: ignore[attr-defined]


def output_span(op: str, argument: str, tensor: Tensor, *, also_read: bool = False) -> Span:
    """A tensor that is written; `also_read`: in place, so its contents are part of the call."""
    target = check(op, argument, tensor).detach()
    if _dense(target):
        return _of(target)
    refuse_overlap(op, argument, target)
    inside = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if also_read:
        inside.copy_(target)
    return _of(inside, Once(lambda: copy_back(target, inside)))


def input_list(op: str, argument: str, tensors: Sequence[Tensor]) -> Span:
    """Tensors that are only read, one after another."""
    sources = [check(op, f"{argument}[{i}]", t).detach() for i, t in enumerate(tensors)]
    _same_dtype(op, argument, sources)
    if all(_dense(t) for t in sources) and _adjacent(sources):
        return _of_adjacent(sources)
    return _of(torch.cat([t.resolve_conj().resolve_neg().reshape(-1) for t in sources]))


def output_list(op: str, argument: str, tensors: Sequence[Tensor], *, also_read: bool = False) -> Span:
    """Tensors that are written, one after another; `also_read`: in place."""
    targets = [check(op, f"{argument}[{i}]", t).detach() for i, t in enumerate(tensors)]
    _same_dtype(op, argument, targets)
    if all(_dense(t) for t in targets) and _adjacent(targets):
        return _of_adjacent(targets)
    for i, target in enumerate(targets):
        refuse_overlap(op, f"{argument}[{i}]", target)
    counts = [t.numel() for t in targets]
    inside = (
        torch.cat([t.reshape(-1) for t in targets])
        if also_read
        else torch.empty(sum(counts), dtype=targets[0].dtype, device=targets[0].device)
    )

    def hand_out() -> None:
        for target, part in zip(targets, inside.split(counts), strict=True):
            copy_back(target, part.view(target.shape))

    return _of(inside, Once(hand_out))


def sent_span(tensor: Tensor) -> Span:
    """A tensor that is a message. Messages between devices pass through the host."""
    if _is_on_device(tensor):
        tensor = check("send", "tensor", tensor).detach().cpu()
    return input_span("send", "tensor", tensor)


def received_span(tensor: Tensor) -> Span:
    """A tensor that a message is written to."""
    if not _is_on_device(tensor):
        return output_span("recv", "tensor", tensor)
    target = check("recv", "tensor", tensor).detach()
    refuse_overlap("recv", "tensor", target)
    inside = torch.empty(target.shape, dtype=target.dtype, device="cpu", pin_memory=True)
    stream = torch.cuda.current_stream(target.device)

    def arrive() -> None:
        # Whichever thread comes first: behind what the caller had enqueued that uses the tensor, and before it goes on.
        with current(stream):
            copy_back(target, inside)
            stream.synchronize()

    return _of(inside, Once(arrive))


@contextmanager
def current(stream: torch.cuda.Stream) -> Iterator[None]:
    """Makes `stream` current, on whichever thread. One that has no device yet, such as a callback's, would by torch's
    way alone be given device 0 afterwards, whose context takes hundreds of megabytes there; `device` makes none."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def refuse_overlap(op: str, argument: str, target: Tensor) -> None:
    """An output whose elements share memory (an expanded tensor) has no well-defined result."""
    if torch._debug_has_internal_overlap(target) == 1:
        given = f"one of shape {tuple(target.shape)} with strides {target.stride()}"
        hint = "Make a tensor of its own with .clone() or .contiguous(), and pass that"
        raise ArgumentError.of(op, argument, "a tensor whose elements do not share memory", given, hint)


def mover(tensor: Tensor) -> tuple[int, int]:
    """(element type code, such elements per element) to move a tensor of any dtype without computing."""
    dtype = tensor.dtype
    code = _NATIVE.get(dtype)
    if code is not None:
        return code, 1
    code = _COMPLEX.get(dtype)
    if code is not None:
        return code, 2
    return MOVERS[tensor.element_size()], 1


def reducer(op: str, tensor: Tensor, reduction: ReduceOp) -> tuple[int, int, int, float | Tensor | None]:
    """(element type code, such elements per element, reduction code, factor to apply first) of a reduction."""
    dtype = tensor.dtype
    code, factor = reduction_code(op, reduction, tensor)
    if factor is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise UnsupportedError.of(op, "PREMUL_SUM", dtype, "a factor is for floating-point and complex numbers")
    native = _NATIVE.get(dtype)
    if native is not None:
        return native, 1, code, factor
    real = _COMPLEX.get(dtype)
    if real is not None and code <= 1:
        return real, 2, code, factor
    raise UnsupportedError.of_dtype(op, _REDUCTION_NAMES[code], dtype, is_complex=real is not None)


_SUM = ReduceOp.SUM
REDUCTIONS = {getattr(ReduceOp, name.upper()): code for name, code in OPS.items()}
_REDUCTION_NAMES = {code: name.upper() for name, code in OPS.items()}


def reduction_code(op: str, reduction: ReduceOp, tensor: object) -> tuple[int, float | Tensor | None]:
    """(reduction code, factor to multiply inputs with first)."""
    if reduction == _SUM:
        return 0, None
    kind = getattr(reduction, "op", reduction)
    code = REDUCTIONS.get(kind)
    if code is not None:
        return code, None
    if kind == ReduceOp.PREMUL_SUM:
        return 0, reduction.__getstate__()[1]
    name = str(kind).rpartition(".")[2]
    supported = ", ".join([*_REDUCTION_NAMES.values(), "PREMUL_SUM"])
    dtype = getattr(tensor, "dtype", "unknown")
    raise UnsupportedError.of(op, name, dtype, f"there is no such reduction here; there are: {supported}")


def _is_on_device(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_cuda


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _of(tensor: Tensor, finish: Once | None = None) -> Span:
    return Span((tensor.data_ptr(), tensor.nbytes), tensor.numel(), tensor, finish, _device(tensor))


def _device(tensor: Tensor) -> int:
    return tensor.get_device() if tensor.is_cuda else -1


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether dense tensors follow one another in memory, as chunks of one tensor do. On a device they must be such
    chunks: CUDA refuses copies over two allocations, also where one begins at the other's end."""
    if tensors[0].is_cuda and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) > 1:
        return False
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end:
            return False
        end += tensor.nbytes
    return True


def _of_adjacent(tensors: Sequence[Tensor]) -> Span:
    nbytes = sum(t.nbytes for t in tensors)
    device = _device(tensors[0])
    return Span((tensors[0].data_ptr(), nbytes), sum(t.numel() for t in tensors), tensors, None, device)


def copy_back(target: Tensor, source: Tensor) -> None:
    """Puts a result where the caller wants it, on whichever thread: in inference mode only if the target is made in it,
    for other modes refuse to write to such a one."""
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(source)


def _same_dtype(op: str, argument: str, tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise ArgumentError.of(op, argument, "at least one tensor", "none", "Pass one tensor per rank of the group")
    for i, tensor in enumerate(tensors):
        if tensor.dtype != tensors[0].dtype:
            expected = f"tensors of one dtype, {tensors[0].dtype} as the first"
            hint = "Convert them, or make one call per dtype"
            raise ArgumentError.of(op, f"{argument}[{i}]", expected, f"dtype {tensor.dtype}", hint)
        if tensor.device != tensors[0].device:
            expected = f"tensors on one device, {tensors[0].device} as the first"
            hint = "Move them to one"
            raise ArgumentError.of(op, f"{argument}[{i}]", expected, f"one on {tensor.device}", hint)
