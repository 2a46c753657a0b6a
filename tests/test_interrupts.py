"""Ctrl-C ends waits for ranks that do not come, beside calls, whose waits look at signals themselves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import conftest


def interrupted(wait: Callable[[], object]) -> dict:
    """What a wait ends with that a signal comes to after a second, and how long after."""
    # Whoever started the tests may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1, send)
    timer.start()
    try:
        wait()
        return {"type": "", "late": 0}
    except BaseException as error:
        return {"type": type(error).__name__, "late": time.monotonic() - sent[0] if sent else -1}


def alone(what: str) -> dict:
    """One rank of two; the other one was not started."""
    import smdistributed_rs
    from smdistributed_rs import _core

    if what == "store":
        import torch.distributed as dist

        store = dist.HashStore()
        return interrupted(lambda: _core.Communicator.connect(store, 0, 2, "group", "scope", 600.0, []))
    os.environ |= {"RANK": what[-1], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    found = interrupted(smdistributed_rs.init)
    os.environ["RANK"] = "0"
    return found


@pytest.mark.parametrize("what", ["rank 0", "rank 1", "store"])
def test_a_wait_for_a_rank_that_does_not_come(what: str) -> None:
    [report] = conftest.run(alone, 1, what=what, limit=60).check().reports
    assert report["type"] == "KeyboardInterrupt", report
    assert report["late"] < 5, report


def together(what: str, folder: str) -> dict:
    """Rank 0 waits for rank 1, which does something else until it has heard of it."""
    import smdistributed_rs

    world = smdistributed_rs.init()
    world.barrier()
    told = Path(folder, "told")
    if world.rank == 1:
        while not told.exists():
            time.sleep(0.02)
        return {}
    waits = {
        "new_group": lambda: world.new_group([0, 1]),
        "shared memory": lambda: world.shared_memory(64),
        "shutdown": world.shutdown,
    }
    found = interrupted(waits[what])
    told.touch()
    with suppress(smdistributed_rs.SmddpError):
        world.shutdown()
    return found


@pytest.mark.parametrize("what", ["new_group", "shared memory", "shutdown"])
def test_a_wait_for_a_rank_that_does_something_else(what: str, tmp_path: Path) -> None:
    report = conftest.run(together, 2, what=what, folder=str(tmp_path), limit=60).check().reports[0]
    assert report["type"] == "KeyboardInterrupt", report
    assert report["late"] < 5, report
