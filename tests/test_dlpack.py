"""Arrays of libraries that are neither NumPy nor torch, by capsules made here, field by field."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import pytest

import conftest

CPU, CUDA, CUDA_HOST, INT, FLOAT, FLOAT4 = 1, 2, 3, 0, 2, 17


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


class Array:
    """Eight float32, 0 to 7, as a library of its own would show part of them."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, *, offset: int = 0, lanes: int = 1,
        code: int = FLOAT, device: int = CPU, said: int = CPU, name: bytes = b"dltensor",
        version: tuple[int, int] | None = None, flags: int = 0, bits: int = 32,
    ) -> None:  # fmt: skip
        """offset: in elements; said: the device by __dlpack_device__; version: None before there were versions."""
        self.values = (ctypes.c_float * 8)(*range(8))
        self._said, self._name = said, name if version is None else b"dltensor_versioned"
        self._version = version
        sizes = (ctypes.c_int64 * len(shape))(*shape) if shape else None
        steps = (ctypes.c_int64 * len(strides))(*strides) if strides is not None else None
        data = ctypes.addressof(self.values)
        tensor = Tensor(data, device, 0, len(shape), code, bits, lanes, sizes, steps, 4 * offset)
        self._managed = Versioned(*version, None, None, flags, tensor) if version else Managed(tensor, None, None)
        self.capsule: object = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._said, 0

    def __dlpack__(self, **wanted: object) -> object:
        if self._version is None and wanted:
            raise TypeError(f"__dlpack__() got an unexpected keyword argument, one of {list(wanted)}")
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self.capsule = make(ctypes.addressof(self._managed), self._name, None)
        return self.capsule

    def is_kept(self) -> bool:
        """Whether the capsule is still its producer's to free."""
        holds = ctypes.pythonapi.PyCapsule_IsValid
        holds.argtypes = (ctypes.py_object, ctypes.c_char_p)
        return bool(holds(self.capsule, self._name))


TAKEN = {
    "with strides": (((2, 4), (4, 1)), {}, range(8)),
    "without strides": (((2, 4),), {}, range(8)),
    "strides of what has one element": (((1, 4), (99, 1)), {}, range(4)),
    "byte_offset": (((5,),), {"offset": 3}, range(3, 8)),
    "no dimensions": (((),), {}, [0]),
    "no dimensions, byte_offset": (((), ()), {"offset": 7}, [7]),
    "no elements": (((3, 0),), {}, []),
    "version 1.0": (((2, 3),), {"offset": 1, "version": (1, 0)}, range(1, 7)),
    "version 1.1": (((2,),), {"version": (1, 1)}, range(2)),
    "pinned for CUDA": (((8,),), {"device": CUDA_HOST, "said": CUDA_HOST}, range(8)),
}
REFUSED = {
    "gaps": (((4,), (2,)), {}, "ArgumentError", "contiguous"),
    "columns first": (((2, 4), (1, 2)), {}, "ArgumentError", "contiguous"),
    "lanes": (((4,),), {"lanes": 2}, "UnsupportedError", "2 lanes"),
    "a dtype nobody knows": (((4,),), {"code": 99}, "UnsupportedError", "dlpack(99"),
    "CUDA": (((4,),), {"device": CUDA, "said": CUDA}, "ArgumentError", "DLPack device 2"),
    "CUDA, by the capsule alone": (((4,),), {"device": CUDA}, "ArgumentError", "another device"),
    "read-only": (((4,),), {"version": (1, 0), "flags": 1}, "ArgumentError", "writable"),
    "a copy": (((4,),), {"version": (1, 1), "flags": 2}, "ArgumentError", "a copy, by Array's DLPack"),
    "half bytes": (((8,),), {"code": FLOAT4, "bits": 4}, "ArgumentError", "whole bytes"),
    "version 2": (((4,),), {"version": (2, 0)}, "ValueError", "version 2.0"),
    "a used capsule": (((4,),), {"name": b"used_dltensor"}, "ValueError", "fresh DLPack capsule"),
}
PACKED: dict[str, dict[str, Any]] = {
    "two in a byte": {"lanes": 2},
    "one in a byte": {"version": (1, 1), "flags": 4},
}


def reduced() -> dict[str, list]:
    import smdistributed_rs

    found: dict[str, list] = {}
    with smdistributed_rs.init() as world:
        for name, (args, options, _) in TAKEN.items():
            given = Array(*args, **options)
            world.all_reduce(given)
            found[name] = [list(given.values), given.is_kept()]
        for name, (args, options, *_) in REFUSED.items():
            given = Array(*args, **options)
            try:
                world.all_reduce(given)
                found[name] = ["no error", ""]
            except Exception as error:
                found[name] = [type(error).__name__, str(error)]
            found[name].append(list(given.values))
        # Whatever an element is, it may be moved.
        given = Array((4,), lanes=2)
        if world.rank == 1:
            given.values[:] = [9.0] * 8
        world.broadcast(given)
        found["moved"] = list(given.values)
        # Elements of less than a byte lie packed, unless it is said that they do not.
        for name, options in PACKED.items():
            given = Array((8,), code=FLOAT4, bits=4, **options)
            if world.rank == 1:
                given.values[:] = [9.0] * 8
            world.broadcast(given, 1)
            found[name] = list(given.values)
        # Nothing is written to what is only sent.
        given, output = Array((2,), version=(1, 0), flags=1), array.array("f", [0] * 2 * world.size)
        world.all_gather(given, output)
        copied, of_copies = Array((2,), version=(1, 1), flags=2), array.array("f", [0] * 2 * world.size)
        world.all_gather(copied, of_copies)
        found["read"] = [list(given.values), list(output), list(of_copies)]
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return conftest.run(reduced, 2, limit=60).check().reports


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, found: list[dict]) -> None:
    reduced = set(TAKEN[name][2])
    for report in found:
        values, is_kept = report[name]
        assert values == [2 * v if v in reduced else v for v in range(8)]
        assert is_kept


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, found: list[dict]) -> None:
    *_, kind, words = REFUSED[name]
    for report in found:
        given, text, values = report[name]
        assert given == kind, text
        assert words in text
        assert values == list(range(8))


def test_moved(found: list[dict]) -> None:
    assert [report["moved"] for report in found] == [list(range(8))] * 2


@pytest.mark.parametrize("name", PACKED)
def test_parts_of_bytes(name: str, found: list[dict]) -> None:
    # Eight elements of a byte each: the first two numbers.
    assert found[0][name] == [9.0] * 2 + list(range(2, 8))


def test_what_is_read_only_may_be_read(found: list[dict]) -> None:
    values, gathered, of_copies = found[0]["read"]
    assert values == list(range(8))
    assert gathered == of_copies == [0, 1, 0, 1]
