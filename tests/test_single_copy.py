"""Large blocks that ranks read from one another's private memory, where a rank may not be read."""

from __future__ import annotations

import ctypes
import os
import platform
import signal

import pytest

import conftest

PR_SET_DUMPABLE, CAPABILITY_VERSION = 4, 0x20080522


class _Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _is_refused(libc: ctypes.CDLL, pid: int, address: int) -> bool:
    """Whether the kernel lets this process read another's memory."""
    word = ctypes.create_string_buffer(8)
    here, there = _Part(ctypes.addressof(word), 8), _Part(address, 8)
    came = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return came < 0


def hidden(who: int) -> dict[str, object]:
    """Rank `who` becomes unreadable for the others, which have no privileges left."""
    import numpy

    import smdistributed_rs

    libc = ctypes.CDLL(None, use_errno=True)
    none = (ctypes.c_uint32 * 6)()
    assert libc.capset(ctypes.byref((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)), ctypes.byref(none)) == 0
    with smdistributed_rs.init() as world:
        if world.rank == who:
            libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        count = 200_000
        own = numpy.arange(world.size * count, dtype=numpy.float32)
        where = numpy.zeros(2 * world.size, dtype=numpy.int64)
        world.all_gather(numpy.array([os.getpid(), own.ctypes.data]), where)
        pid, address = where[2 * who :][:2]
        refused = _is_refused(libc, int(pid), int(address))
        right = []
        for turn in range(4):
            # What goes to each rank names both and the turn.
            own.reshape(world.size, count)[:] = numpy.arange(count) % 1000 + turn
            own.reshape(world.size, count)[:] += 10 * world.rank + numpy.arange(world.size)[:, None]
            came = numpy.full(count * world.size, -1, dtype=numpy.float32)
            world.all_to_all(own, came)
            blocks = came.reshape(world.size, count) - numpy.arange(count) % 1000 - turn - world.rank
            right.append(bool((blocks == 10 * numpy.arange(world.size)[:, None]).all()))
            # Here the root writes into the others' memory, there they into its own.
            part = world.scatter(own if world.rank == 0 else None, numpy.full(count, -1, dtype=numpy.float32))
            right.append(bool((part == numpy.arange(count) % 1000 + turn + world.rank).all()))
            parts = world.gather(part)
            right.append(world.rank != 0 or bool((parts.ravel() == own).all()))
        return {"refused": refused, "right": right}


def test_all_ranks_go_on_where_one_may_not_be_read() -> None:
    reports = conftest.run(hidden, 3, env={"SMDDP_SHM_SINGLE_COPY": "on"}, limit=90, who=1).check().reports
    assert [report["right"] for report in reports] == [[True] * 12] * 3
    # Its own memory a process may always read.
    assert [report["refused"] for report in reports] == [True, False, True]


# ---- whether blocks go that way at all

NUMBERS = {"x86_64": (310, 311, 317), "aarch64": (270, 271, 277)}
"""of the calls process_vm_readv, process_vm_writev and seccomp"""
PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, ALL_THREADS = 38, 1, 1
LOAD, IS_EQUAL, RETURN = 0x20, 0x15, 0x06
KILL, ALLOW = 0x80000000, 0x7FFF0000


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _dies_of_single_copies() -> None:
    """From here on the kernel kills this process when it reads or writes another's memory."""
    read, write, seccomp = NUMBERS[platform.machine()]
    lines = [
        (LOAD, 0, 0, 0),
        (IS_EQUAL, 1, 0, read),
        (IS_EQUAL, 0, 1, write),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    program = _Program(len(lines), (_Instruction * len(lines))(*lines))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.syscall(seccomp, SET_MODE_FILTER, ALL_THREADS, ctypes.byref(program)) == 0, ctypes.get_errno()


CALLS = ("all_to_all", "all_gather", "scatter", "gather", "broadcast", "message")


def some_may_not(names: list[str], who: list[int]) -> str:
    """Ranks `who` are killed for what they copy themselves; the other hears of it."""
    import numpy

    import smdistributed_rs

    with smdistributed_rs.init() as world:
        own = numpy.full(400_000, world.rank + 1.0, dtype=numpy.float32)
        both = numpy.zeros((2, own.size), dtype=numpy.float32)
        world.all_reduce(numpy.ones(1))
        if world.rank in who:
            _dies_of_single_copies()
        calls = {
            "all_to_all": lambda: world.all_to_all(numpy.concatenate([own, own]), both),
            "all_gather": lambda: world.all_gather(own, both),
            "scatter": lambda: world.scatter(numpy.stack([own, own]) if world.rank == 0 else None, both[1]),
            "gather": lambda: world.gather(own, both),
            "broadcast": lambda: world.broadcast(own),
            "message": lambda: world.send(own, 1) if world.rank == 0 else world.recv(both[0], 0),
        }
        try:
            for name in names:
                calls[name]()
                world.barrier()
        except smdistributed_rs.PeerLostError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("call", CALLS)
def test_large_blocks_go_straight(call: str) -> None:
    # A message is copied by whoever comes to it.
    who = [0, 1] if call == "message" else [1]
    ranks = conftest.run(some_may_not, 2, env={"SMDDP_SHM_SINGLE_COPY": "on"}, limit=30, names=[call], who=who)
    dead = [r for r in who if ranks.statuses[r] == -signal.SIGSYS]
    assert dead, ranks.text
    for told in ranks.check(dict.fromkeys(dead, -signal.SIGSYS)).reports:
        assert f"lost rank {dead[0]}" in told


def test_no_block_goes_straight_where_that_is_off() -> None:
    ranks = conftest.run(some_may_not, 2, env={"SMDDP_SHM_SINGLE_COPY": "off"}, limit=30, names=CALLS, who=[0, 1])
    assert ranks.check().reports == ["", ""]
