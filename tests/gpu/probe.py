"""What a GPU machine does that the CUDA path relies on: facts, one JSON object a line, with no code of this package.

    python tests/gpu/probe.py                every step, each in a process of its own with a time limit, 150 s in all
    python tests/gpu/probe.py --seconds 60   the same in a minute: what comes last may be left out
    python tests/gpu/probe.py overlap        one step, in this process

It needs torch with CUDA and libcuda.so.1; the NCCL is the one torch has loaded. A step that fails or hangs is a fact
too, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from by_hand import PORTABLE_MAPPED, WRITE_COMBINED, Cuda, Nccl, Releaser, UniqueId, address_of, config, handle, until

TOTAL = 150.0
_step = "?"


def fact(name: str, value: object, **more: object) -> None:
    print(json.dumps({"step": _step, "fact": name, "value": value, **more}), flush=True)


def attempt(name: str, what: Callable[[], object]) -> None:
    """States what `what` returns, or why it raised."""
    try:
        fact(name, what())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the fact
        fact(name, None, error=f"{type(error).__name__}: {error}")


# ---- steps


def memops() -> None:
    cuda = Cuda()
    torch = cuda.torch
    driver = ctypes.c_int()
    cuda.call("cuDriverGetVersion", ctypes.byref(driver))
    fact("versions", {"torch": torch.__version__, "driver": driver.value, "gpu": torch.cuda.get_device_name()})
    names = {91: "registered_host_pointer_is_device_pointer", 98: "wait_value_flush", 122: "memops_64_bit",
             123: "memops_nor", 124: "dmabuf", 134: "host_numa_id", 40: "copy_engines", 16: "processors"}  # fmt: skip
    for number, name in names.items():
        attempt(f"attribute {number} {name}", lambda number=number: cuda.attribute(number))
    words = cuda.words(mmap.mmap(-1, 4096))
    stream = cuda.stream()

    def write() -> bool:
        cuda.write_value(stream, words[0], 7)
        return until(lambda: words[0].get() == 7, 2)

    def wait() -> dict[str, bool]:
        cuda.wait_value(stream, words[1], 1)
        time.sleep(0.05)
        parked = not stream.query()
        words[1].set(1)
        return {"parked": parked, "released": until(stream.query, 2)}

    def wait_for_a_stream() -> dict[str, bool]:
        other = cuda.stream()
        cuda.wait_value(stream, words[5], 1)
        time.sleep(0.05)
        parked = not stream.query()
        cuda.write_value(other, words[5], 1)
        return {"parked": parked, "released": until(stream.query, 2)}

    def round_trip() -> dict[str, float]:
        took = []
        for i in range(2, 202):
            cuda.wait_value(stream, words[2], i)
            cuda.write_value(stream, words[3], i)
            time.sleep(0.0005)
            start = time.perf_counter()
            words[2].set(i)
            assert until(lambda i=i: words[3].get() == i, 2)
            took.append((time.perf_counter() - start) * 1e6)
        took.sort()
        return {"median_us": round(took[100], 2), "p99_us": round(took[197], 2)}

    def cyclic() -> bool:
        words[4].set(5)
        cuda.wait_value(stream, words[4], 0xFFFFFFF0)
        return until(stream.query, 2)

    attempt("write-value is seen by the host", write)
    attempt("wait-value parks and a host store releases it", wait)
    attempt("another stream's write-value releases it", wait_for_a_stream)
    attempt("host to GPU to host", round_trip)
    attempt("5 is cyclically >= 0xFFFFFFF0", cyclic)
    attempt("the current stream from C", lambda: _current_stream(torch))


def _current_stream(torch: Any) -> dict[str, bool]:
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cuda.so"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pointer = ctypes.c_void_p()
        code = library.aoti_torch_get_current_cuda_stream(ctypes.c_int32(0), ctypes.byref(pointer))
        raw = torch._C._cuda_getCurrentRawStream(0)
    return {"ok": code == 0, "equals_raw": pointer.value == raw, "raw_is_stream": raw == stream.cuda_stream}


def overlap() -> None:
    """How many other streams go on while one waits."""
    cuda = Cuda()
    torch = cuda.torch
    setting = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    words = cuda.words(mmap.mmap(-1, 4096))
    data = torch.ones(1 << 16, device="cuda")
    parked = [cuda.stream(-1) for _ in range(2)]
    # torch hands its streams out of a pool of 32; what is made beyond that is one of them again.
    others = [torch.cuda.Stream() for _ in range(24)]
    for stream in others:
        with torch.cuda.stream(stream):
            data.mul(1.0)
    torch.cuda.synchronize()
    for value, copies in enumerate((False, True), 1):
        for stream in parked:
            cuda.wait_value(stream, words[0], value)
        for count in (1, 4, 8, 16, 24):
            for stream in others[:count]:
                with torch.cuda.stream(stream):
                    data.mul(1.0)
                    if copies:
                        data[:1024].clone()
            ended = until(lambda count=count: all(s.query() for s in others[:count]), 0.4)
            went_on = sum(s.query() for s in others[:count])
            fact("streams that go on beside 2 parked ones", went_on, of=count, copies=copies,
                 connections=setting, all=ended)  # fmt: skip
        words[0].set(value)
        fact("all end after release", until(lambda: all(s.query() for s in [*others, *parked]), 3), connections=setting)


def blockers() -> None:
    """Which calls wait while a stream is parked. Each is released from outside after 0.4 s."""
    releaser = Releaser()
    cuda = Cuda()
    torch = cuda.torch
    nccl = Nccl()
    word = cuda.words(releaser.memory)[0]
    stream, other = cuda.stream(), cuda.stream()
    data = torch.ones(1 << 20, device="cuda")

    def first_use() -> object:
        with torch.cuda.stream(other):
            return torch.special.bessel_y1(data[:64])

    def free() -> None:
        pointer = ctypes.c_uint64()
        cuda.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(1 << 22))
        cuda.call("cuMemFree_v2", pointer)

    def pageable() -> None:
        with torch.cuda.stream(other):
            data[:1024].cpu()

    def cached() -> None:
        torch.empty(64 << 20, device="cuda")
        torch.cuda.empty_cache()

    actions: dict[str, Callable[[], object]] = {
        "event record and query on another stream": lambda: other.record_event().query(),
        "kernel on the current stream, waited for": lambda: data[:8].sum().item(),
        "first use of a kernel": first_use,
        "cuMemAlloc and cuMemFree": free,
        "allocation of 1 GiB": lambda: torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        "empty_cache": cached,
        "pinned allocation": lambda: torch.empty(1 << 20, pin_memory=True),
        "copy to pageable memory on another stream": pageable,
        "new stream": lambda: torch.cuda.Stream(priority=-1),
        "new NCCL communicator": lambda: nccl.communicator(),
    }
    for value, (name, action) in enumerate(actions.items(), 1):
        cuda.wait_value(stream, word, value)
        releaser.release(value, 0.4)
        start = time.perf_counter()
        try:
            action()
            error = None
        except Exception as e:  # noqa: BLE001
            error = str(e)
        took = time.perf_counter() - start
        fact(name, "waited" if took > 0.38 else "went on", seconds=round(took, 3), error=error)
        until(lambda: releaser.done() and stream.query(), 5)
    releaser.end()


MANY = 20_000


def depth() -> None:
    """How many operations a parked stream takes before its host waits, of MANY. Released from outside after 1 s."""
    releaser = Releaser()
    cuda = Cuda()
    torch = cuda.torch
    word, spare = cuda.words(releaser.memory)[:2]
    host = address_of(memory := mmap.mmap(-1, 1 << 20))
    cuda.pin(memory)
    _kept.append(memory)
    data = torch.ones(1 << 18, device="cuda")
    at = data.data_ptr()
    event = torch.cuda.Event()
    other = cuda.stream()
    other.record_event(event)

    def piece(stream: Any) -> None:
        stream.wait_event(event)
        cuda.rows_to_host(stream, host, at, 1 << 14, 1 << 12, 4)
        cuda.write_value(stream, spare, 1)
        event.record(stream)

    def kernel(stream: Any) -> None:
        with torch.cuda.stream(stream):
            data.mul_(1.0)

    kinds: dict[str, Callable[[Any], object]] = {
        "kernels": kernel,
        "event records": lambda stream: event.record(stream),
        "waits for an event": lambda stream: stream.wait_event(event),
        "write-values": lambda stream: cuda.write_value(stream, spare, 1),
        "wait-values": lambda stream: cuda.wait_value(stream, spare, 0),
        "copies to the host": lambda stream: cuda.to_host(stream, host, at, 1 << 12),
        "copies of 4 rows to the host": lambda stream: cuda.rows_to_host(stream, host, at, 1 << 14, 1 << 12, 4),
        "pieces of 4 operations": piece,
    }
    kernel(other)
    torch.cuda.synchronize()
    for value, (name, push) in enumerate(kinds.items(), 1):
        stream = cuda.stream()
        cuda.wait_value(stream, word, value)
        releaser.release(value, 1.0)
        taken, longest = 0, 0.0
        while taken < MANY and longest < 0.3 and not releaser.done():
            start = time.perf_counter()
            push(stream)
            longest = time.perf_counter() - start
            taken += 1
        waited = longest >= 0.3
        then = "the host waited" if waited else "it took more" if taken == MANY else "1 s was over"
        fact("operations a parked stream takes", taken - waited, of=name, then=then)
        until(lambda stream=stream: releaser.done() and stream.query(), 5)
    releaser.end()


def ranges() -> None:
    """Whether a copy may go over two allocations, one behind the other."""
    cuda = Cuda()
    nbytes = 2 << 20
    made = []
    for _ in range(64):
        address = ctypes.c_uint64()
        cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        made.append(address.value)
    first = next((at for at in sorted(made) if at + nbytes in made), None)
    fact("neighbouring allocations of 2 MiB", first is not None)
    if first is None:
        return
    host = address_of(memory := mmap.mmap(-1, 2 * nbytes))
    cuda.pin(memory)
    stream, half = cuda.stream(), nbytes // 2
    copies: dict[str, Callable[[], None]] = {
        "within one": lambda: cuda.to_host(stream, host, first, nbytes),
        "over two": lambda: cuda.to_host(stream, host, first + half, nbytes),
        "over two, rows that each lie in one": lambda: cuda.rows_to_host(stream, host, first, half, half // 2, 4),
    }
    for name, copy in copies.items():
        attempt(name, lambda copy=copy: copy() or stream.synchronize())


def rates() -> None:
    """Of copies between the device and several kinds of pinned memory, one way and both at once."""
    cuda = Cuda()
    size = 64 << 20
    kinds: dict[str, int] = {}

    def registered(name: str, huge: bool) -> None:
        memory = mmap.mmap(-1, size)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        ctypes.memset(address_of(memory), 1, size)
        start = time.perf_counter()
        cuda.pin(memory)
        fact("cuMemHostRegister of 64 MiB, ms", round((time.perf_counter() - start) * 1e3, 2), memory=name)
        kinds[name] = address_of(memory)
        _kept.append(memory)

    def allocated(name: str, flags: int) -> None:
        pointer = ctypes.c_void_p()
        cuda.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), flags)
        kinds[name] = pointer.value or 0

    makers: dict[str, Callable[[str], None]] = {
        "registered": lambda name: registered(name, huge=False),
        "registered, huge pages": lambda name: registered(name, huge=True),
        "cuMemHostAlloc": lambda name: allocated(name, PORTABLE_MAPPED),
        "write-combined": lambda name: allocated(name, PORTABLE_MAPPED | WRITE_COMBINED),
    }
    for name, make in makers.items():
        try:
            make(name)
        except RuntimeError as error:
            fact("memory", None, memory=name, error=str(error))
    for name, host in kinds.items():
        for nbytes in (64 << 10, 512 << 10, 1 << 20, 4 << 20, 32 << 20):
            fact("GB/s", _rates(cuda, host, size // 2, nbytes), memory=name, nbytes=nbytes)


def _rates(cuda: Cuda, host: int, half: int, nbytes: int) -> dict[str, float]:
    """Pieces of `nbytes`, to the first half of host memory and from the second."""
    torch = cuda.torch
    down, up = cuda.stream(), cuda.stream()
    device = torch.empty(2 * nbytes, dtype=torch.uint8, device="cuda")
    at = device.data_ptr()
    calls: dict[str, Callable[[], None]] = {
        "d2h": lambda: cuda.to_host(down, host, at, nbytes),
        "h2d": lambda: cuda.to_device(up, at + nbytes, host + half, nbytes),
    }
    times = max(1, min(200, (256 << 20) // nbytes))
    found = {}
    for what, names in {"d2h": ["d2h"], "h2d": ["h2d"], "each of both": ["d2h", "h2d"]}.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            for name in names:
                calls[name]()
        torch.cuda.synchronize()
        found[what] = round(nbytes * times / (time.perf_counter() - start) / 1e9, 2)
    return found


_kept: list[Any] = []


def costs() -> None:
    """Host microseconds a call."""
    cuda = Cuda()
    torch = cuda.torch
    words = cuda.words(mmap.mmap(-1, 1 << 16))
    host = address_of(memory := mmap.mmap(-1, 1 << 20))
    cuda.pin(memory)
    data = torch.ones(1 << 16, device="cuda")
    a, b = cuda.stream(), cuda.stream()
    event = torch.cuda.Event()
    query = lambda: cuda.lib.cuStreamQuery(handle(a))  # noqa: E731
    calls: dict[str, Callable[[], object]] = {
        "python and ctypes alone": lambda: cuda.lib.cuDriverGetVersion(ctypes.byref(ctypes.c_int())),
        "event record": lambda: event.record(a),
        "stream waits for event": lambda: b.wait_event(event),
        "write-value": lambda: cuda.write_value(a, words[0], 1),
        "wait-value that is met": lambda: cuda.wait_value(b, words[0], 1),
        "D2H of 64 KiB": lambda: cuda.to_host(a, host, data.data_ptr(), 1 << 16),
        "D2H of 8 rows of 8 KiB, one call": lambda: cuda.rows_to_host(a, host, data.data_ptr(), 1 << 14, 1 << 13, 8),
        "D2H of 8 rows of 8 KiB, 8 calls": lambda: [
            cuda.to_host(a, host + (row << 13), data.data_ptr() + (row << 14), 1 << 13) for row in range(8)
        ],
        "H2D of 64 KiB": lambda: cuda.to_device(a, data.data_ptr(), host, 1 << 16),
        "cuStreamQuery": query,
    }
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        fact(name, round((time.perf_counter() - start) / 200 * 1e6, 2))
        torch.cuda.synchronize()


def nccl_config() -> None:
    """Whether NCCL takes the configuration of 2.18, and heeds maxCTAs."""
    cuda = Cuda()
    nccl = Nccl()
    fact("NCCL", nccl.version(), path=nccl.path)
    for ctas in (2, 8):
        start = time.perf_counter()
        communicator = nccl.communicator(max_ctas=ctas)
        fact("seconds to make a communicator", round(time.perf_counter() - start, 3), max_ctas=ctas)
        data = cuda.torch.full((1 << 20,), 3.0, device="cuda")
        nccl.all_reduce(communicator, data, cuda.torch.cuda.current_stream())
        fact("sum over one rank is right", bool((data == 3).all().item()))
        child = ctypes.c_void_p()
        attempt("ncclCommSplit", lambda child=child, c=communicator: nccl.call(
            "ncclCommSplit", c, 0, 0, ctypes.byref(child), config(1, 8)))  # fmt: skip
        nccl.call("ncclCommDestroy", communicator)


# ---- two processes on one GPU in one NCCL communicator: NCCL does nothing of the kind with one rank


def in_two(what: Callable[[int, str], None]) -> None:
    """Runs `what` in two processes, each its own NCCL_HOSTID."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_CTAS": "2", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, what.__name__, str(rank), folder],
                env={**os.environ, **env, "NCCL_HOSTID": f"host{rank}"},
            )
            for rank in range(2)
        ]
        try:
            end = time.monotonic() + 25
            for rank in ranks:
                rank.wait(max(0.1, end - time.monotonic()))
            fact("exit codes", [rank.returncode for rank in ranks])
        finally:
            for rank in ranks:
                rank.kill()


def of_two(nccl: Nccl, rank: int, folder: str, name: str, **options: int) -> ctypes.c_void_p:
    """A communicator of both, by an id in the folder."""
    path = os.path.join(folder, name)
    if rank == 0:
        id = nccl.unique_id()
        with open(path + ".new", "wb") as file:
            file.write(ctypes.string_at(ctypes.addressof(id), 128))
        os.rename(path + ".new", path)
    until(lambda: os.path.exists(path), 10)
    with open(path, "rb") as file:
        id = UniqueId.from_buffer_copy(file.read())
    return nccl.communicator(2, rank, id, max_ctas=2, **options)


def sums_of_two(rank: int, folder: str) -> None:
    cuda = Cuda()
    nccl = Nccl()
    start = time.perf_counter()
    communicator = of_two(nccl, rank, folder, "sums")
    fact("seconds to make a communicator of 2", round(time.perf_counter() - start, 3), rank=rank)
    stream = cuda.torch.cuda.current_stream()
    for numel in (1 << 10, 1 << 20):
        data = cuda.torch.full((numel,), float(rank + 1), device="cuda")
        nccl.all_reduce(communicator, data, stream)
        start = time.perf_counter()
        fact("sum of two ranks is right", bool((data == 3).all().item()), rank=rank, numel=numel)
        fact("seconds", round(time.perf_counter() - start, 4), rank=rank, numel=numel)


def aborts_of_two(rank: int, folder: str) -> None:
    """ncclCommAbort with a collective behind a parked wait, the flag first and the other way round; and with one whose
    peer does not come."""
    releaser = Releaser()
    cuda = Cuda()
    nccl = Nccl()
    word = cuda.words(releaser.memory)[0]
    data = cuda.torch.ones(1 << 16, device="cuda")
    for value, name in ((1, "flag first"), (2, "flag 1 s later"), (3, "the peer does not come")):
        communicator, stream = of_two(nccl, rank, folder, name), cuda.stream()
        nccl.all_reduce(communicator, data, stream)
        stream.synchronize()
        if value < 3:
            cuda.wait_value(stream, word, value)
        if value < 3 or rank == 0:
            nccl.all_reduce(communicator, data, stream)
        if value < 3:
            releaser.release(value, 0.0001 if value == 1 else 1.0)
        if value == 1:
            until(releaser.done, 1)
        time.sleep(0.2)
        start = time.perf_counter()
        nccl.call("ncclCommAbort", communicator)
        fact(f"seconds of ncclCommAbort, {name}", round(time.perf_counter() - start, 3), rank=rank)
        fact(f"stream ends, {name}", until(stream.query, 3), rank=rank)
    releaser.end()


def costs_of_two(rank: int, folder: str) -> None:
    """Host microseconds a call of a communicator that blocks, and of one that does not."""
    cuda = Cuda()
    nccl = Nccl()
    data = cuda.torch.ones(1 << 10, device="cuda")
    stream = cuda.stream()
    for blocking in (1, 0):
        communicator = of_two(nccl, rank, folder, f"blocking {blocking}", blocking=blocking)
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(20):
                nccl.all_reduce(communicator, data, stream)
                if not blocking:
                    nccl.settle(communicator)
            best = min(best, (time.perf_counter() - start) / 20)
            stream.synchronize()
        fact(f"ncclAllReduce, {'blocking' if blocking else 'not blocking'}", round(best * 1e6, 2), rank=rank)


def two_on_one_gpu() -> None:
    in_two(sums_of_two)


def aborting() -> None:
    in_two(aborts_of_two)


def costs_of_nccl() -> None:
    in_two(costs_of_two)


def neighbour() -> None:
    """Whether a process whose stream is parked leaves the GPU to another process."""
    parked = subprocess.Popen([sys.executable, __file__, "parks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parked.stdin
    assert parked.stdout
    try:
        cuda = Cuda()
        data = cuda.torch.ones(2048, 2048, device="cuda")
        for _ in range(20):
            data @ data
        cuda.torch.cuda.synchronize()
        alone = _busy(cuda, data)
        parked.stdout.readline()
        fact("seconds of work alone", alone)
        fact("seconds of work beside a process with a parked stream", _busy(cuda, data))
        parked.stdin.close()
        fact("the parked one ends", parked.wait(5) == 0)
    finally:
        parked.kill()


def _busy(cuda: Cuda, data: Any) -> float:
    start = time.perf_counter()
    for _ in range(300):
        data @ data
    cuda.torch.cuda.synchronize()
    return round(time.perf_counter() - start, 4)


def parks() -> None:
    cuda = Cuda()
    word = cuda.words(mmap.mmap(-1, 4096))[0]
    stream = cuda.stream()
    time.sleep(1)
    cuda.wait_value(stream, word, 1)
    print("parked", flush=True)
    sys.stdin.read()
    word.set(1)
    stream.synchronize()


STEPS: dict[str, tuple[Callable[[], None], float, dict[str, str]]] = {
    "memops": (memops, 40, {}),
    "nccl_config": (nccl_config, 25, {}),
    "overlap": (overlap, 20, {}),
    "overlap, 1 connection": (overlap, 20, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    "blockers": (blockers, 25, {}),
    "neighbour": (neighbour, 20, {}),
    "aborting": (aborting, 30, {}),
    "ranges": (ranges, 20, {}),
    "costs": (costs, 20, {}),
    "costs_of_nccl": (costs_of_nccl, 30, {}),
    "depth": (depth, 30, {}),
    "rates": (rates, 25, {}),
    "two_on_one_gpu": (two_on_one_gpu, 25, {}),
    "overlap, 32 connections": (overlap, 20, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}),
}
"""name: (what, seconds at most, variables); what decides most comes first"""


def run_all(seconds: float) -> None:
    end = time.monotonic() + seconds
    for name, (step, limit, env) in STEPS.items():
        left = min(limit, end - time.monotonic())
        if left < 3:
            print(json.dumps({"step": name, "fact": "run", "value": None, "error": "no time left"}), flush=True)
            continue
        start = time.monotonic()
        # A group of its own: what a step leaves behind ends with it.
        child = subprocess.Popen(
            [sys.executable, __file__, step.__name__], env={**os.environ, **env}, start_new_session=True
        )
        try:
            outcome: object = child.wait(left)
        except subprocess.TimeoutExpired:
            outcome = f"killed after {left:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        took = round(time.monotonic() - start, 1)
        print(json.dumps({"step": name, "fact": "exit", "value": outcome, "seconds": took}), flush=True)


def main() -> None:
    global _step
    if len(sys.argv) < 2 or sys.argv[1] == "--seconds":
        run_all(float(sys.argv[2]) if len(sys.argv) > 2 else TOTAL)
        return
    _step = sys.argv[1]
    if _step in (halves := {half.__name__: half for half in (sums_of_two, aborts_of_two, costs_of_two)}):
        halves[_step](int(sys.argv[2]), sys.argv[3])
        return
    {**{step.__name__: step for step, _, _ in STEPS.values()}, "parks": parks}[_step]()


if __name__ == "__main__":
    main()
