"""What the package does with messages between CUDA tensors, on a machine without CUDA: the native half is played."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import Work

import common
import conftest
from smdistributed_rs import cuda, tensors, work
from smdistributed_rs.collectives import Collectives
from smdistributed_rs.cuda import CudaSide, Message
from smdistributed_rs.errors import AbortedError, ArgumentError, UnsupportedError
from smdistributed_rs.tensors import Once, Span, input_list, output_list, received_span


class _Handle:
    extended = 0

    def is_captured(self) -> bool:
        return False

    def extend(self, stream: int) -> None:
        assert stream == 7
        self.extended += 1


class _Native:
    """Notes what was exchanged."""

    carries_messages = True
    failed: BaseException | None = None
    made = 0
    wanted = staticmethod(lambda _: (False, None))

    def __init__(self, *_: object) -> None:
        _Native.made += 1
        self.exchanged: list[list[tuple[int, bool, int, int]]] = []
        self.handle = _Handle()

    def failure(self) -> BaseException | None:
        return self.failed

    def abort(self, reason: str) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def exchange(self, stream: int, behind: int, messages: list[tuple[int, bool, int, int]]) -> _Handle:
        assert (stream, behind) == (7, 8)
        self.exchanged.append(messages)
        return self.handle


class _Done(Work):
    waited = 0

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        self.waited += 1
        return True

    def is_completed(self) -> bool:
        return True

    def result(self) -> list[torch.Tensor]:
        return [torch.ones(1)]


def _host(failure: BaseException | None = None) -> Any:
    return SimpleNamespace(rank=0, name="played", failure=lambda: failure)


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaSide]:
    monkeypatch.setattr(cuda, "DeviceGroup", _Native)
    monkeypatch.setattr(cuda, "CudaWork", lambda *_: _Done())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(CudaSide, "_streams", lambda *_: (7, 8))
    _Native.made = 0
    made = CudaSide(_host(), lambda: None)
    made.connect(0)
    made._stream = SimpleNamespace(cuda_stream=7, device=torch.device("cuda", 0), device_index=0)
    return made


def _message(peer: int, is_sent: bool, finish: Once | None = None, device: int = 0) -> Message:
    tensor = torch.zeros(4)
    return Message(peer, is_sent, Span((100 + peer, 16), 4, tensor, finish, device), tensor)


def test_a_batch_moves_together_and_finishes_what_it_copied(side: CudaSide) -> None:
    finished: list[int] = []
    side.begin_batch()
    assert side.message("send", _message(1, True)) is work.DONE
    assert side.message("recv", _message(2, False, Once(lambda: finished.append(2)))) is work.DONE
    native: Any = side._native
    assert native.exchanged == []
    assert finished == []
    whole = side.end_batch()
    assert native.exchanged == [[(1, True, 101, 16), (2, False, 102, 16)]]
    assert finished == [2]
    assert native.handle.extended == 1
    assert isinstance(whole, _Done)
    # Outside of a batch each moves by itself.
    side.message("send", _message(3, True))
    assert native.exchanged[1:] == [[(3, True, 103, 16)]]
    assert _Native.made == 1


def test_what_went_another_way_belongs_to_the_batch_too(side: CudaSide) -> None:
    first, second = _Done(), _Done()
    side.note(first)  # nothing is open
    side.begin_batch()
    side.note(first)
    assert side.end_batch() is first
    side.begin_batch()
    side.note(first)
    side.note(second)
    side.message("send", _message(1, True))
    whole = side.end_batch()
    assert whole.wait()
    assert (first.waited, second.waited) == (1, 1)
    assert whole.is_completed()
    assert len(whole.result()) == 3
    side.begin_batch()
    assert side.end_batch() is work.DONE


def test_a_tensor_on_another_device_is_refused(side: CudaSide) -> None:
    with pytest.raises(ArgumentError, match="a tensor on cuda:0, given one on cuda:1"):
        side.message("send", _message(1, True, device=1))


def test_a_group_whose_end_was_interrupted_can_be_ended_again(side: CudaSide) -> None:
    tried: list[str] = []

    def interrupted() -> None:
        tried.append("shutdown")
        if len(tried) == 1:
            raise KeyboardInterrupt

    native: Any = side._native
    native.shutdown = interrupted
    with pytest.raises(KeyboardInterrupt):
        side.shutdown()
    side.shutdown()
    side.shutdown()
    assert tried == ["shutdown", "shutdown"]


def test_a_sender_must_be_named(side: CudaSide) -> None:
    class OnDevice(torch.Tensor):
        is_cuda = True

    group = object.__new__(Collectives)
    group._cuda = side
    with pytest.raises(ArgumentError, match="Name the sender"):
        group.recv_anysource([torch.zeros(3).as_subclass(OnDevice)])
    assert group.supports_coalescing


def test_errors_of_any_part_are_those_of_the_whole() -> None:
    class Failed(_Done):
        def exception(self) -> BaseException | None:
            return ValueError("lost")

        def is_success(self) -> bool:
            return False

    whole = work.Together([Failed()])
    assert isinstance(whole.exception(), ValueError)
    assert not whole.is_success()


def test_a_future_of_all_is_ready_when_the_stream_is_past_them(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[object] = []
    ready: list[object] = []

    class Entered:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append(self.stream)

        def __exit__(self, *_: object) -> None:
            entered.pop()

    class OfDevices(torch.futures.Future):  # type: ignore[type-arg]
        def __new__(cls, *, devices: list[object] = ()) -> OfDevices:  # type: ignore[assignment]
            made = super().__new__(cls)
            made.devices = devices
            return made

        def __init__(self, *, devices: list[object] = ()) -> None:  # type: ignore[assignment]
            super().__init__()

        def __class_getitem__(cls, _: object) -> type:
            return cls

        def set_result(self, result: object) -> None:
            ready.append((self.devices, list(entered)))
            super().set_result(result)

    late: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()

    class Late(_Done):
        def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
            return late

    stream: Any = SimpleNamespace(device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.futures, "Future", OfDevices)
    future = work.Together([Late(), work.DoneWork([torch.ones(2)])], stream).get_future()
    assert not future.done()
    late.set_result([torch.zeros(3)])
    assert [tensor.numel() for tensor in future.wait()] == [3, 2]
    assert ready[-1] == (["cuda:0"], [stream])


def batch(carries: bool) -> dict[str, object]:
    import torch.distributed as dist

    common.start()
    world, me, peer = dist.group.WORLD, dist.get_rank(), 1 - dist.get_rank()
    # The tensors are the CPU's: their messages go the usual way, as those that are part of a batch.
    world._cuda.carries_messages = carries
    begun = []
    begin = world._cuda.begin_batch
    world._cuda.begin_batch = lambda: begun.append(1) or begin()
    given, got = torch.full((3,), 1.0 + me), torch.zeros(3)
    call = torch.ops._c10d_functional.batch_p2p_ops
    results = call(["isend", "irecv"], [peer, peer], [0, 0], [given, got], world.group_name)
    for tensor in results:
        torch.ops._c10d_functional.wait_tensor(tensor)
    found = {"got": results[1].tolist(), "batches": len(begun)}
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("carrier", ["group", "backend"])
def test_functional_batches(carrier: str, carries: bool) -> None:
    if not hasattr(torch.ops._c10d_functional, "batch_p2p_ops"):
        pytest.skip("this torch has no functional batches of messages")
    reports = conftest.run(batch, 2, env={"SMDDP_TORCH_GROUP": carrier}, carries=carries).check().reports
    assert reports == [{"got": [2.0 - rank] * 3, "batches": int(carries)} for rank in (0, 1)]


class _OnDevice(torch.Tensor):
    """Counts what keeps its memory for a stream."""

    is_cuda = True
    kept = 0

    def record_stream(self, stream: object) -> None:  # type: ignore[override]
        self.kept += 1


def test_neighbours_of_two_allocations_are_not_one_range() -> None:
    """CUDA refuses a copy over both."""
    memory = bytearray(64)
    alone = [torch.frombuffer(memory, dtype=torch.float32, count=8, offset=offset) for offset in (0, 32)]
    assert alone[0].data_ptr() + 32 == alone[1].data_ptr()
    parts = list(torch.zeros(16).chunk(2))
    for make in (input_list, output_list):
        assert make("all_to_all", "tensors", alone).memory == (alone[0].data_ptr(), 64)
        there = make("all_to_all", "tensors", [part.as_subclass(_OnDevice) for part in alone])
        assert there.memory[0] != alone[0].data_ptr()
        assert make("all_to_all", "tensors", [p.as_subclass(_OnDevice) for p in parts]).memory[0] == parts[0].data_ptr()


def test_memory_of_a_call_that_fails_is_kept_for_its_stream(side: CudaSide) -> None:
    class Full(Exception):
        pass

    def refuse(*_: object) -> None:
        raise Full

    native: Any = side._native
    native.start = native.start_tensors = native.exchange = refuse
    made = [torch.zeros(4).as_subclass(_OnDevice) for _ in range(5)]
    spans = [Span((100, 16), 4, tensor, None, 0) for tensor in made]
    with pytest.raises(Full):
        side.issue("all_gather", 0, (), spans[0], spans[1], [], True)
    with pytest.raises(Full):
        side.short(2, 0, 0, made[2], made[3], None, True)
    with pytest.raises(Full):
        side.message("send", Message(1, True, spans[4], made[4]))
    assert all(tensor.kept for tensor in made), [tensor.kept for tensor in made]
    # On the caller's own stream the allocator knows by itself.
    alone = torch.zeros(4).as_subclass(_OnDevice)
    with pytest.raises(Full):
        side.short(2, 0, 0, alone, None, None, False)
    assert not alone.kept


@pytest.mark.parametrize("is_async", [True, False])
def test_memory_of_a_call_that_is_enqueued_is_kept_for_its_stream(side: CudaSide, is_async: bool) -> None:
    """On the caller's own stream, where a synchronous call is, the allocator knows by itself."""
    native: Any = side._native
    native.start = native.start_tensors = lambda *_: native.handle
    made = [torch.zeros(4).as_subclass(_OnDevice) for _ in range(6)]
    source, target = (Span((100, 16), 4, tensor, None, 0) for tensor in made[:2])
    side.issue("all_gather", 0, (), source, target, [made[2]], is_async)
    side.short(2, 0, 0, made[3], made[4], None, is_async)
    side.short(2, 0, 0, made[5], None, None, is_async)
    assert [tensor.kept for tensor in made] == [int(is_async)] * 6


@pytest.mark.parametrize("is_async", [True, False])
def test_a_call_lasts_until_what_it_copied_back_is_there(
    side: CudaSide, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """Copying back is enqueued behind the call, on its stream, and is then a part of it."""
    order: list[object] = []
    callers = object()

    @contextmanager
    def entered(stream: object) -> Iterator[None]:
        order.append(stream)
        yield

    def started(*_: object) -> object:
        order.append("start")
        return SimpleNamespace(extend=lambda stream: order.append(("extend", stream)))

    monkeypatch.setattr(cuda, "current", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: callers)
    native: Any = side._native
    native.start = started
    source = Span((100, 16), 4, torch.zeros(4), None, 0)
    target = Span((200, 16), 4, torch.zeros(4), Once(lambda: order.append("finish")), 0)
    side.issue("all_gather", 0, (), source, target, [], is_async)
    assert order == ["start", side._stream if is_async else callers, "finish", ("extend", 7)]


def test_a_barrier_waits_for_the_current_stream_of_the_groups_device(
    side: CudaSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    current = lambda device: SimpleNamespace(synchronize=lambda: waited.append(device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    side.synchronize()
    assert waited == [0]
    native: Any = side._native
    native.failed = ValueError("a call has failed")
    with pytest.raises(ValueError, match="a call has failed"):
        side.synchronize()
    assert waited == [0, 0]
    # Without a device there is nothing to wait for.
    CudaSide(_host(), lambda: None).synchronize()
    assert waited == [0, 0]


def test_threads_that_call_at_once_use_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def stream(*_: object, **__: object) -> object:
        made.append(len(made))
        time.sleep(0.05)
        return SimpleNamespace(cuda_stream=made[-1])

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(cuda, "_current_stream", lambda _: 8)
    side = CudaSide(_host(), lambda: None)
    with ThreadPoolExecutor(4) as threads:
        assert [one.result(10) for one in [threads.submit(side._streams, 0, True) for _ in range(4)]] == [(0, 8)] * 4
    assert made == [0]


def test_waiting_for_a_call_that_has_failed_raises() -> None:
    class Failed(_Handle):
        def error(self) -> BaseException | None:
            return ValueError("lost")

        def is_past(self) -> bool:
            return True

        def order(self, stream: int) -> None:
            raise AssertionError("ordered behind data that is not there")

    native: Any = _Native()
    handle: Any = Failed()
    stream: Any = SimpleNamespace(device_index=0)
    call = cuda.CudaWork(native, handle, [torch.zeros(1)], stream)
    for read in (call.wait, call.result, call.synchronize):
        with pytest.raises(ValueError, match="lost"):
            read()
    assert call.is_completed()
    assert not call.is_success()


def test_a_group_that_has_ended_or_failed_connects_nobody(side: CudaSide) -> None:
    def nobody_comes(*_: object) -> Any:
        raise AssertionError("ranks meet that do not come")

    side._meet = nobody_comes
    side.abort("enough")
    with pytest.raises(AbortedError, match=r"enough\. To go on, make a new group") as caught:
        side.message("send", _message(1, True))
    assert (caught.value.op, caught.value.reason) == ("send", "enough")
    failed = CudaSide(_host(ValueError("lost")), nobody_comes)
    with pytest.raises(ValueError, match="lost"):
        failed.connect(0)


def test_calls_in_a_batch_are_part_of_its_work(side: CudaSide) -> None:
    native: Any = side._native
    native.start = native.start_tensors = lambda *_: native.handle
    span = Span((100, 16), 4, torch.zeros(4), None, 0)
    side.begin_batch()
    side.issue("all_gather", 0, (), span, span, [], True)
    side.short(2, 0, 0, torch.zeros(4).as_subclass(_OnDevice), None, None, True)
    whole = side.end_batch()
    assert whole.wait()
    assert [part.waited for part in whole._works] == [1, 1]  # type: ignore[attr-defined]


def test_the_device_side_ends_before_the_group_on_the_host() -> None:
    ended: list[str] = []
    part = lambda name: SimpleNamespace(shutdown=lambda: ended.append(name))  # noqa: E731
    group: Any = SimpleNamespace(_comm=part("host"), _cuda=part("device"))
    Collectives.shutdown(group)
    assert ended == ["device", "host"]


class _Machine(threading.local):
    """Devices as CUDA's runtime and torch have them: a thread without a device has device 0, whose context is made when
    the device is set; torch's guards put a device back only where that has a context."""

    device = 0


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Devices on which this process has a context, of a rank whose device is 3."""
    made, machine = {3}, _Machine()

    def set_device(device: int) -> None:
        machine.device = device
        made.add(device)

    class Device:
        def __init__(self, device: Any) -> None:
            self._device = getattr(device, "index", device)

        def __enter__(self) -> None:
            self._before = machine.device
            set_device(self._device)

        def __exit__(self, *_: object) -> None:
            machine.device = self._before

    class Current:
        def __init__(self, stream: Any) -> None:
            self._device = stream.device_index

        def __enter__(self) -> None:
            self._before = machine.device
            set_device(self._device)

        def __exit__(self, *_: object) -> None:
            set_device(self._before)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "stream", Current)
    return made


def _on_a_new_thread(what: Callable[[], object]) -> None:
    """As a callback runs: on a thread that has no device."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(what).result(10)


def _stream_of(device: int) -> Any:
    wait: Callable[[], None] = lambda: None  # noqa: E731
    where = torch.device("cuda", device)
    return SimpleNamespace(device_index=device, device=where, cuda_stream=7, synchronize=wait)


def test_a_message_that_arrives_on_a_callbacks_thread_makes_no_context(
    monkeypatch: pytest.MonkeyPatch, contexts: set[int]
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: _stream_of(3))
    monkeypatch.setattr(tensors, "_is_on_device", lambda _: True)
    target = torch.zeros(4)
    span = received_span(target)
    span.keep.fill_(5)  # type: ignore[attr-defined]
    assert span.finish
    _on_a_new_thread(span.finish)
    assert target.tolist() == [5] * 4
    assert contexts == {3}


def test_calls_that_copy_back_make_no_context_elsewhere(side: CudaSide, contexts: set[int]) -> None:
    native: Any = side._native
    native.start = lambda *_: native.handle
    side._stream = _stream_of(3)
    finished: list[int] = []

    def span(number: int) -> Span:
        return Span((100, 16), 4, torch.zeros(4), Once(lambda: finished.append(number)), 0)

    _on_a_new_thread(lambda: side.issue("all_gather", 0, (), span(1), span(1), [], True))
    _on_a_new_thread(lambda: side._exchange([Message(1, False, span(2), torch.zeros(4))]))
    assert finished == [1, 2]
    assert contexts == {3}


def test_a_future_makes_no_context_elsewhere(monkeypatch: pytest.MonkeyPatch, contexts: set[int]) -> None:
    monkeypatch.setattr(torch.futures, "Future", lambda **_: SimpleNamespace(set_result=lambda value: None))
    call = cuda.CudaWork(_Native(), _Handle(), [torch.zeros(1)], _stream_of(3))  # type: ignore[arg-type]
    _on_a_new_thread(call.get_future)
    assert contexts == {3}


def test_a_future_of_all_makes_no_context_elsewhere(monkeypatch: pytest.MonkeyPatch, contexts: set[int]) -> None:
    completed: list[Callable[[object], None]] = []
    all_of = SimpleNamespace(add_done_callback=completed.append, value=list)
    monkeypatch.setattr(torch.futures, "collect_all", lambda _: all_of)
    ready = SimpleNamespace(set_result=lambda value: None, then=lambda value: None)
    monkeypatch.setattr(torch.futures, "Future", lambda **_: ready)
    work.Together([], _stream_of(3)).get_future()
    _on_a_new_thread(lambda: completed[0](all_of))
    assert contexts == {3}


def test_memory_that_is_not_torchs_is_kept_until_its_call_is_over(side: CudaSide) -> None:
    """torch's allocator, which keeps what it has given until a stream is past it, knows nothing of other memory."""

    class Call(_Handle):
        past = False

        def is_past(self) -> bool:
            return self.past

    def foreign() -> torch.Tensor:
        return torch.frombuffer(bytearray(16), dtype=torch.float32).as_subclass(_OnDevice)

    calls: list[Call] = []

    def start(*_: object) -> Call:
        calls.append(Call())
        return calls[-1]

    native: Any = side._native
    native.start = native.start_tensors = native.exchange = start
    given = [foreign() for _ in range(6)]
    alive = [weakref.ref(tensor) for tensor in given]
    ours = torch.zeros(4).as_subclass(_OnDevice)
    side.short(2, 0, 0, given[0], None, None, True)
    side.short(2, 0, 0, ours, given[1], None, True)
    side.issue(
        "all_gather", 0, (), Span((1, 16), 4, given[2], None, 0), Span((1, 16), 4, [given[3]], None, 0), [], True
    )
    side.message("recv", Message(1, False, Span((1, 16), 4, given[4], None, 0), given[4]))
    # A synchronous call is on the caller's own stream, as what frees the memory is.
    side.short(2, 0, 0, given[5], None, None, False)
    given.clear()
    is_kept = lambda: [tensor() is not None for tensor in alive]  # noqa: E731
    assert is_kept() == [True] * 5 + [False]
    calls[0].past = calls[1].past = True
    side.short(2, 0, 0, ours, None, None, True)
    assert is_kept() == [False, False, True, True, True, False]
    side.shutdown()
    assert is_kept() == [False] * 6
    kept = weakref.ref(ours)
    del ours
    assert kept() is None


def test_memory_that_is_not_torchs_of_a_call_that_fails_is_kept(side: CudaSide) -> None:
    """A part of the call may be enqueued, and nothing says where that ends."""

    class Full(Exception):
        pass

    def refuse(*_: object) -> None:
        raise Full

    native: Any = side._native
    native.start_tensors = refuse
    tensor = torch.frombuffer(bytearray(16), dtype=torch.float32).as_subclass(_OnDevice)
    alive = weakref.ref(tensor)
    with pytest.raises(Full):
        side.short(2, 0, 0, tensor, None, None, True)
    del tensor
    gc.collect()
    assert alive() is not None


def _foreign_tensor() -> torch.Tensor:
    return torch.frombuffer(bytearray(16), dtype=torch.float32).as_subclass(_OnDevice)


@pytest.mark.parametrize("first", ["failed", "captured"])
def test_a_call_that_is_never_over_keeps_nothing_of_later_ones(side: CudaSide, first: str) -> None:
    class Call(_Handle):
        def __init__(self, captured: bool) -> None:
            self.captured = captured

        def is_captured(self) -> bool:
            return self.captured

        def is_past(self) -> bool:
            return not self.captured

    handles: list[object] = [OSError("midway") if first == "failed" else Call(True), Call(False), Call(False)]

    def start(*_: object) -> object:
        handle = handles.pop(0)
        if isinstance(handle, OSError):
            raise handle
        return handle

    native: Any = side._native
    native.start_tensors = start
    given = [_foreign_tensor() for _ in range(3)]
    alive = [weakref.ref(tensor) for tensor in given]
    for tensor in given:
        with suppress(OSError):
            side.short(2, 0, 0, tensor, None, None, True)
    del tensor
    given.clear()
    gc.collect()
    assert [tensor() is not None for tensor in alive] == [True, False, True]
    side.shutdown()
    assert [tensor() is not None for tensor in alive] == [False] * 3


@pytest.mark.parametrize("kind", [ArgumentError, UnsupportedError])
def test_memory_that_is_not_torchs_of_a_call_that_is_refused_is_not_kept(side: CudaSide, kind: type[Exception]) -> None:
    def refuse(*_: object) -> None:
        raise kind("no")

    native: Any = side._native
    native.start_tensors = refuse
    tensor = _foreign_tensor()
    alive = weakref.ref(tensor)
    with pytest.raises(kind):
        side.short(2, 0, 0, tensor, None, None, True)
    del tensor
    gc.collect()
    assert alive() is None
