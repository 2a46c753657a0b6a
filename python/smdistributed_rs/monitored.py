"""A barrier that knows who did not come: everybody reports to rank 0, which answers when all have."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ._codes import DTYPES
from .errors import SmddpError, TimeoutError

if TYPE_CHECKING:
    from ._core import Communicator, Handle

_REPORT, _ANSWER = 1 << 62, 1 << 62 | 1
"""Tags beyond those torch passes."""
_BYTE = DTYPES["uint8"]


def monitored_barrier(group: Communicator, seconds: float, wait_all_ranks: bool) -> None:
    """Returns when all ranks have come. Raises on all ranks when one has not within `seconds`: on rank 0 naming the
    first that is missing, or all with `wait_all_ranks`."""
    if seconds <= 0:
        text = f"Rank {group.rank} timed out in monitoredBarrier after 0 ms. Give it a time limit above 0"
        raise _late(group, text, 0.0, [])
    if group.rank == 0:
        _lead(group, seconds, wait_all_ranks)
    else:
        _follow(group, seconds)


def _lead(group: Communicator, seconds: float, wait_all_ranks: bool) -> None:
    start = time.monotonic()
    reports = [_Byte(group, False, rank, _REPORT, seconds) for rank in range(1, group.size)]
    causes: dict[int, SmddpError] = {}
    for rank, report in enumerate(reports, start=1):
        try:
            report.wait(start + seconds - time.monotonic())
        except SmddpError as error:
            causes[rank] = error
    if not causes:
        for answer in [_Byte(group, True, rank, _ANSWER, seconds) for rank in range(1, group.size)]:
            answer.wait(seconds)
        return
    named = list(causes) if wait_all_ranks else list(causes)[:1]
    who = f"Rank{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"
    text = f"{who} failed to pass monitoredBarrier in {seconds * 1000:.0f} ms"
    group.abort(text)
    cause = causes[named[0]]
    raise _late(group, f"[Rank 0]: {text}: {cause}", time.monotonic() - start, list(causes)) from cause


def _follow(group: Communicator, seconds: float) -> None:
    try:
        report, answer = _Byte(group, True, 0, _REPORT, seconds), _Byte(group, False, 0, _ANSWER, seconds)
        report.wait(seconds)
        # Rank 0 may take its whole time for the others, and then says what it found.
        answer.wait(seconds * 2 + 1)
    except SmddpError as error:
        text = (
            f"Rank {group.rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
            f"from rank 0. Please check rank 0 logs for faulty rank. The error: {error}"
        )
        error.args = (text,)
        raise


def _late(group: Communicator, text: str, waited: float, missing: list[int]) -> TimeoutError:
    error = TimeoutError(text)
    error.rank, error.group, error.op, error.seq = group.rank, group.name, "monitored_barrier", 0
    error.waited, error.missing = waited, missing
    return error


class _Byte:
    """A message of one byte under way. Who waits for it has a limit of his own, whatever the group's."""

    def __init__(self, group: Communicator, sends: bool, peer: int, tag: int, seconds: float) -> None:
        from array import array

        byte = array("B", [0])
        self._handle: Handle = group.start_message_of(sends, peer, tag, _BYTE, (byte.buffer_info()[0], 1), byte)
        self._handle.set_timeout(3 * seconds + 3)

    def wait(self, seconds: float) -> None:
        self._handle.wait(max(seconds, 0.001))
