"""Arrays of any library as the native half wants them: address, count, element type.

In order of preference: the array interface (NumPy and its kin), DLPack (`__dlpack__`: torch, JAX, CuPy, ...), the
buffer protocol (bytearray, array.array, memoryview, ...).
"""

from __future__ import annotations

import ctypes
import math
import sys
from operator import index
from typing import Any, NamedTuple, NoReturn

from . import _core
from ._codes import DTYPES, MOVERS
from .errors import ArgumentError, UnsupportedError


class View(NamedTuple):
    """A dense array in memory."""

    address: int
    numel: int
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    owner: object
    """keeps the memory alive"""

    @property
    def memory(self) -> tuple[int, int]:
        return self.address, self.numel * self.itemsize

    def mover(self) -> tuple[int, int]:
        """(element type code, such elements per element) to move it without computing."""
        code = DTYPES.get(self.dtype)
        if code is not None:
            return code, 1
        if self.itemsize in MOVERS:
            return MOVERS[self.itemsize], 1
        return DTYPES["uint8"], self.itemsize

    def reducer(self, op: str, reduction: str) -> tuple[int, int]:
        """(element type code, such elements per element) to compute with it."""
        code = DTYPES.get(self.dtype)
        if code is not None:
            return code, 1
        if self.dtype in ("complex64", "complex128"):
            if reduction in ("sum", "avg"):
                return DTYPES["float32" if self.dtype == "complex64" else "float64"], 2
            raise UnsupportedError.of_dtype(op, reduction, self.dtype, is_complex=True)
        raise UnsupportedError.of_dtype(op, reduction, self.dtype, is_complex=False)


def view(op: str, argument: str, array: Any, *, written: bool) -> View:
    """What `array` is in memory; refused, naming `argument`, when it is not dense, not here, or not writable."""
    interface = getattr(array, "__array_interface__", None)
    # Without an address there, the elements are where the buffer protocol says.
    if interface is not None and isinstance(interface.get("data"), tuple):
        return _from_interface(op, argument, array, interface, written)
    if hasattr(array, "__dlpack__"):
        return _from_dlpack(op, argument, array, written)
    return _from_buffer(op, argument, array, written)


_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}


def _from_interface(op: str, argument: str, array: Any, interface: dict[str, Any], written: bool) -> View:
    address, read_only = interface["data"]
    if read_only and written:
        _refuse(op, argument, "a writable array", "a read-only one", "Pass a copy")
    is_scalar = isinstance(array, getattr(sys.modules.get("numpy"), "generic", ()))
    # A record has a base where it is part of an array.
    if written and is_scalar and array.base is None:
        hint = "Make an array of it with numpy.array(x), and pass that"
        _refuse(op, argument, "an array, which can be written to", f"a scalar, {type(array).__name__}", hint)
    if interface.get("strides") is not None:
        _refuse_strides(op, argument)
    typestr = interface["typestr"]
    kind = typestr[1]
    own = getattr(array, "dtype", None)
    if typestr[0] == ">":
        _refuse(op, argument, "native byte order", f"dtype {typestr}", "Convert it with array.astype")
    if kind == "O" or getattr(own, "hasobject", False):
        _refuse(
            op, argument, "elements that are plain bytes", "Python objects", "Their addresses mean nothing elsewhere"
        )
    if kind in _KINDS:
        itemsize = int(typestr[2:])
        dtype = "bool" if kind == "b" else f"{_KINDS[kind]}{itemsize * 8}"
    elif own is not None:
        # Texts, dates, records; and types NumPy does not know itself (bfloat16 of ml_dtypes) but has a name for.
        itemsize, dtype = own.itemsize, own.name
    else:
        _refuse(op, argument, "a known element type", f"'{typestr}'", "Pass a NumPy array")
    shape = tuple(interface["shape"])
    # A NumPy scalar's address is that of a copy, which its interface alone keeps.
    return View(address, math.prod(shape), dtype, itemsize, shape, (array, interface))


_ON_THE_HOST = (1, 3)
"""DLPack's numbers of the CPU, and of its memory that is pinned for CUDA."""


def _from_dlpack(op: str, argument: str, array: Any, written: bool) -> View:
    device = array.__dlpack_device__()[0]
    if int(device) not in _ON_THE_HOST:
        _refuse(op, argument, "an array on the CPU", f"one on DLPack device {device}", "Move it to the CPU")
    # Torch's tensors alone have these. It exports the one as if there was nothing, and refuses the other in its words.
    for bit, resolve in (("is_neg", "resolve_neg"), ("is_conj", "resolve_conj")):
        if getattr(array, bit, _no)():
            given = f"a tensor that is computed when it is read ({bit}())"
            _refuse(op, argument, "an array whose elements are in memory", given, f"Pass tensor.{resolve}()")
    seen = _core.view_capsule(_capsule(array))
    if not seen.on_cpu:
        _refuse(op, argument, "an array on the CPU", "a DLPack capsule of another device", "Move it to the CPU")
    if seen.read_only and written:
        hint = "Pass one that may be written to, such as numpy.array(x)"
        _refuse(op, argument, "a writable array", f"a read-only {type(array).__name__}", hint)
    if seen.is_copy and written:
        hint = "Pass one that gives its own memory, such as numpy.array(x)"
        _refuse(op, argument, "an array that can be written to", f"a copy, by {type(array).__name__}'s DLPack", hint)
    if not seen.dense:
        _refuse_strides(op, argument)
    if seen.itemsize is None:
        hint = "Pass the memory as another type, such as uint8"
        _refuse(op, argument, "elements of whole bytes", f"dtype {seen.dtype}", hint)
    shape = tuple(seen.shape)
    if seen.address < _core.DOUBTED and hasattr(array, "untyped_storage"):
        from .tensors import check

        own = check(op, argument, array)
        if own is not array:
            return _from_dlpack(op, argument, own, written)
    return View(seen.address, math.prod(shape), seen.dtype, seen.itemsize, shape, (seen, array))


def _capsule(array: Any) -> object:
    """Of DLPack's version 1, which tells what is read-only, where the library knows it."""
    try:
        return array.__dlpack__(max_version=(1, 0))
    except TypeError:
        return array.__dlpack__()


def _no() -> bool:
    return False


_FORMATS = {"?": "bool", "e": "float16", "f": "float32", "d": "float64", "c": "uint8"}
_INTEGERS = {**dict.fromkeys("bhilqn", "int"), **dict.fromkeys("BHILQN", "uint")}


def _from_buffer(op: str, argument: str, array: Any, written: bool) -> View:
    try:
        memory = memoryview(array)
    except TypeError:
        given = f"a {type(array).__name__}"
        hint = "NumPy arrays, torch tensors, array.array and bytearray will do"
        _refuse(op, argument, "an array (array interface, DLPack or buffer protocol)", given, hint)
    if not memory.c_contiguous:
        _refuse_strides(op, argument)
    if memory.readonly and written:
        _refuse(op, argument, "a writable buffer", "a read-only one", "Pass a bytearray or a copy")
    code = memory.format.lstrip("@=")
    if "O" in code or "P" in code:
        _refuse(op, argument, "elements that are plain bytes", f"format '{code}'", "Addresses mean nothing elsewhere")
    whole = _INTEGERS.get(code)
    dtype = f"{whole}{memory.itemsize * 8}" if whole else _FORMATS.get(code, f"format '{memory.format}'")
    # A read-only buffer gives no address to ctypes; what is only read may as well be a copy.
    owner = bytearray(memory) if memory.readonly else memory.cast("B") if memory.nbytes else memory
    address = ctypes.addressof(ctypes.c_char.from_buffer(owner)) if memory.nbytes else 0
    return View(address, memory.nbytes // memory.itemsize, dtype, memory.itemsize, memory.shape, owner)


def like(op: str, array: Any, shape: tuple[int, ...]) -> Any:
    """A new array of `array`'s library and dtype."""
    library = type(array).__module__.partition(".")[0]
    if library == "numpy":
        import numpy

        return numpy.empty(shape, array.dtype)
    if library == "torch":
        return array.new_empty(shape)
    hint = "Only for NumPy arrays and torch tensors is one made when it is left out"
    raise ArgumentError.of(op, "output", "an array to write to", "nothing", hint)


def same_dtype(op: str, argument: str, one: View, other: View) -> None:
    if one.dtype != other.dtype:
        _refuse(op, argument, f"dtype {other.dtype}, as the other side", one.dtype, "Collectives do not convert")


def whole_numbers(op: str, argument: str, given: Any) -> list[int]:
    """Numbers in any sequence, array or tensor; none of them for None. (Arrays have no truth value.)"""
    try:
        numbers = given.tolist() if hasattr(given, "tolist") else given
        return [] if numbers is None else [index(number) for number in numbers]
    except TypeError:
        _refuse(op, argument, "whole numbers, one per rank", repr(given), "A list, a NumPy array or a tensor will do")


def counted(op: str, argument: str, one: View, expected: int, meaning: str) -> None:
    if one.numel != expected:
        hint = "Element counts must fit; shapes are free"
        _refuse(op, argument, f"{expected} elements ({meaning})", f"{one.numel}", hint)


def _refuse_strides(op: str, argument: str) -> NoReturn:
    hint = "Pass a contiguous copy, such as numpy.ascontiguousarray(x)"
    _refuse(op, argument, "a contiguous array in C order", "one with gaps or another order", hint)


def _refuse(op: str, argument: str, expected: str, given: object, hint: str) -> NoReturn:
    raise ArgumentError.of(op, argument, expected, given, hint)
