"""The driver and NCCL by their C functions, with no code of this package."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

GEQ = 0
"""CU_STREAM_WAIT_VALUE_GEQ: cyclic greater or equal."""

PORTABLE_MAPPED = 3
WRITE_COMBINED = 4
UNDEFINED = -(2**31)
"""NCCL_CONFIG_UNDEF_INT."""


# ---- the driver


class Cuda:
    """libcuda in the context torch made current on this thread."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        self.lib = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {code} {(text.value or b'?').decode()}")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def stream(self, priority: int = 0) -> Any:
        return self.torch.cuda.Stream(priority=priority)

    def wait_value(self, stream: Any, word: Word, value: int) -> None:
        self.call("cuStreamWaitValue32_v2", handle(stream), device_pointer(word.device), ctypes.c_uint32(value), GEQ)

    def write_value(self, stream: Any, word: Word, value: int) -> None:
        self.call("cuStreamWriteValue32_v2", handle(stream), device_pointer(word.device), ctypes.c_uint32(value), 0)

    def pin(self, memory: mmap.mmap) -> int:
        """Registers memory; its device address."""
        address = address_of(memory)
        self.call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), PORTABLE_MAPPED)
        device = ctypes.c_uint64()
        self.call("cuMemHostGetDevicePointer_v2", ctypes.byref(device), ctypes.c_void_p(address), 0)
        return device.value

    def words(self, memory: mmap.mmap) -> list[Word]:
        device = self.pin(memory)
        return [Word(address_of(memory) + at, device + at) for at in range(0, len(memory), 64)]

    def to_host(self, stream: Any, host: int, device: int, nbytes: int) -> None:
        self.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host),
            device_pointer(device),
            ctypes.c_size_t(nbytes),
            handle(stream),
        )

    def rows_to_host(self, stream: Any, host: int, device: int, pitch: int, width: int, rows: int) -> None:
        """Rows `pitch` bytes apart, to where they follow one another."""
        source, target = Side(memory=2, device=device, pitch=pitch), Side(memory=1, host=host, pitch=width)
        self.call("cuMemcpy2DAsync_v2", ctypes.byref(Copy(source, target, width, rows)), handle(stream))

    def to_device(self, stream: Any, device: int, host: int, nbytes: int) -> None:
        self.call(
            "cuMemcpyHtoDAsync_v2",
            device_pointer(device),
            ctypes.c_void_p(host),
            ctypes.c_size_t(nbytes),
            handle(stream),
        )


class Side(ctypes.Structure):
    """One side of CUDA_MEMCPY2D."""

    _fields_ = [
        ("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("memory", ctypes.c_int), ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64), ("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t),
    ]  # fmt: skip


class Copy(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [("source", Side), ("target", Side), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


class Word:
    """A 32-bit word that host and GPU see."""

    def __init__(self, host: int, device: int) -> None:
        self.device = device
        self._word = ctypes.c_uint32.from_address(host)

    def get(self) -> int:
        return self._word.value

    def set(self, value: int) -> None:
        self._word.value = value


def handle(stream: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream.cuda_stream)


def device_pointer(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def until(done: Callable[[], bool], limit: float) -> bool:
    end = time.perf_counter() + limit
    while not done():
        if time.perf_counter() > end:
            return False
    return True


class Releaser:
    """A process without CUDA that stores a word after a while: what hangs this process cannot stop it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)
        self._command = ctypes.c_double.from_address(address_of(self.memory) + 2048)
        self._value = ctypes.c_uint32.from_address(address_of(self.memory) + 2112)
        self._parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            self._serve()

    def _serve(self) -> None:
        word = ctypes.c_uint32.from_address(address_of(self.memory))
        while os.getppid() == self._parent:
            if self._command.value:
                time.sleep(self._command.value)
                word.value = self._value.value
                self._command.value = 0.0
            time.sleep(0.005)
        os._exit(0)

    def release(self, value: int, after: float) -> None:
        """Stores `value` to the first word in `after` seconds."""
        self._value.value = value
        self._command.value = after

    def done(self) -> bool:
        return self._command.value == 0.0

    def end(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


# ---- NCCL


class UniqueId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


def config(blocking: int, max_ctas: int) -> ctypes.Array[ctypes.c_char]:
    """ncclConfig_t as NCCL 2.18 has it, with its padding undefined too (2.26 put trafficClass there)."""
    numbers = [blocking, UNDEFINED, UNDEFINED, max_ctas]
    packed = struct.pack("<QII4iQii", 48, 0xCAFEBEEF, 21800, *numbers, 0, UNDEFINED, UNDEFINED)
    return ctypes.create_string_buffer(packed, len(packed))


class Nccl:
    def __init__(self) -> None:
        import torch  # noqa: F401 - loads it

        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libnccl.so" in line}
        self.path = paths.pop() if paths else "libnccl.so.2"
        self.lib = ctypes.CDLL(self.path)
        self.lib.ncclGetErrorString.restype = ctypes.c_char_p
        self.lib.ncclGetLastError.restype = ctypes.c_char_p

    def call(self, name: str, *args: Any) -> int:
        code: int = getattr(self.lib, name)(*args)
        if code not in (0, 7):
            why = self.lib.ncclGetErrorString(code).decode()
            last = (self.lib.ncclGetLastError(None) or b"").decode()
            raise RuntimeError(f"{name}: {code} {why} {last}")
        return code

    def version(self) -> int:
        value = ctypes.c_int()
        self.call("ncclGetVersion", ctypes.byref(value))
        return value.value

    def unique_id(self) -> UniqueId:
        made = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return made

    def communicator(self, size: int = 1, rank: int = 0, id: UniqueId | None = None, **options: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        how = config(options.get("blocking", 1), options.get("max_ctas", 8))
        id = id or self.unique_id()
        self.call("ncclCommInitRankConfig", ctypes.byref(made), size, id, rank, how)
        self.settle(made)
        return made

    def settle(self, communicator: ctypes.c_void_p) -> None:
        state = ctypes.c_int(7)
        while state.value == 7:
            self.call("ncclCommGetAsyncError", communicator, ctypes.byref(state))
        if state.value:
            raise RuntimeError(f"communicator: {self.lib.ncclGetErrorString(state.value).decode()}")

    def all_reduce(self, communicator: ctypes.c_void_p, tensor: Any, stream: Any) -> None:
        at = ctypes.c_void_p(tensor.data_ptr())
        count = ctypes.c_size_t(tensor.numel())
        self.call("ncclAllReduce", at, at, count, 7, 0, communicator, handle(stream))
