"""Large blocks that ranks read from one another's private memory, where a rank may not be read."""

from __future__ import annotations

import ctypes
import os

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
