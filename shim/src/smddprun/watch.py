"""A rank's program under watch: when it fails, one line on stderr tells the `smddprun` that started the job which rank,
how, and its last words. That smddprun takes the line out of what the user sees (`Reports`).

Open MPI and MPICH make each rank the leader of a process group. The program stays in its watcher's, and so does what it
starts: a shell script's Python, say.

Invariants
1. The program dies with its watcher, whatever kills that: mpirun kills the group; where the watcher alone is killed,
   PR_SET_PDEATHSIG reaches the program. The watcher stops it when mpirun, or its daemon, has gone: Open MPI's ranks
   would go on without one that was killed.
2. A program that was told to stop does, in time, with what is left of its group: not every mpirun sees to it.
3. A rank that was told to stop reports nothing: it is not what went wrong.
4. A report is one write of less than a pipe's atomic size, so that mpirun passes it on in one piece.
5. A signal reaches the program once: what mpirun sends to a group the watcher does not pass on.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

_MARK = b"\x1esmddprun:"
_MOST = 3500
"""Bytes of a report."""
_LINES = 60
_END = 200
_GRACE = 5
"""Seconds a program has to end when told to."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ORPHANED = signal.SIGRTMIN
"""Sent when the watcher's parent ends. Not SIGTERM, since it is also sent when a mere thread of the parent ends."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """What became of a rank's program."""

    rank: int
    local_rank: int
    host: str
    status: int
    """as a shell has it: 128 + signal for one that was killed"""
    words: list[str]
    """the last lines it wrote to stderr"""

    def how(self) -> str:
        """In words."""
        if self.status > 128:
            try:
                name = signal.Signals(self.status - 128).name
                return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
            except ValueError:
                pass
        return f"exit status {self.status}"


def run(program: list[str], token: str, rank: int, local_rank: int) -> int:
    """Runs the program, returns its status."""
    parent = os.getppid()
    # File descriptors stay open: launchers talk to MPI through some.
    child = subprocess.Popen(program, stderr=subprocess.PIPE, close_fds=False, preexec_fn=dying_with_us())
    leads = os.getpgrp() == os.getpid()
    woken = _wake_by_signals()
    told_to_stop = _pass_signals(child, parent, leads)
    words: collections.deque[bytes] = collections.deque(maxlen=_LINES)
    reader = threading.Thread(target=_copy, args=(child, words), daemon=True)
    reader.start()
    while (status := child.poll()) is None:
        select.select([woken], [], [])
        os.read(woken, 4096)
    while told_to_stop and leads and _has_company():
        # Until the alarm at the latest.
        time.sleep(0.05)
    # What it started itself may hold the pipe open longer than it lives.
    reader.join(1.0)
    status = status if status >= 0 else 128 - status
    if status and not told_to_stop:
        failure = Failure(rank, local_rank, socket.gethostname(), status, _last_words(list(words)))
        _report(failure, token)
    return status


def dying_with_us(by: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """For Popen: makes the child get that signal when this process ends, however it does."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _wake_by_signals() -> int:
    """A pipe that can be read when a signal has come, the program's end too. A wait for the program alone sleeps on,
    and the handler with it, where the signal comes just before the wait."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return woken


def _has_company() -> bool:
    """Whether our process group has others that run."""
    us = os.getpid()
    for pid in (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            # The name before these may hold anything.
            state, _, group = stat.read().rpartition(") ")[2].split()[:3]
            if pid != us and state != "Z" and int(group) == us:
                return True
    return False


def _pass_signals(child: subprocess.Popen[bytes], parent: int, leads: bool) -> list[int]:
    """Passes signals on to the program, and SIGTERM when `parent` has ended; the list fills with those that tell it to
    stop. leads: the process group, which all signals but our own reach without us."""
    us = os.getpid()
    stopping: list[int] = []

    def handler(number: int, _: object) -> None:
        if number in _STOPPING:
            stopping.append(number)
            signal.alarm(_GRACE)
        if not leads:
            child.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, handler)

    def give_up(*_: object) -> None:
        if leads:
            os.killpg(us, signal.SIGKILL)
        child.kill()

    signal.signal(signal.SIGALRM, give_up)

    def orphaned(*_: object) -> None:
        if os.getppid() != parent:
            # It comes back to the handler.
            os.kill(-us if leads else us, signal.SIGTERM)

    signal.signal(_ORPHANED, orphaned)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _ORPHANED)
    # It may have ended before.
    orphaned()
    return stopping


def _copy(child: subprocess.Popen[bytes], words: collections.deque[bytes]) -> None:
    """The program's stderr to ours, its last lines to `words`."""
    assert child.stderr is not None
    rest = b""
    while data := os.read(child.stderr.fileno(), 65536):
        _write(data)
        *lines, rest = (rest + data).split(b"\n")
        words.extend(lines)
        rest = rest[-_MOST:]
    if rest:
        words.append(rest)
        # A report begins a line.
        _write(b"\n")


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stderr.fileno(), data) :]


def _last_words(lines: list[bytes]) -> list[str]:
    """From the last traceback on, if there is one."""
    texts = [line.decode(errors="replace").rstrip("\r") for line in lines]
    starts = [number for number, text in enumerate(texts) if "Traceback (most recent call last)" in text]
    return [_cut(text) for text in (texts[starts[-1] :] if starts else texts[-15:])]


def _cut(text: str) -> str:
    """The ends of a long line."""
    return text if len(text) <= 2 * _END else f"{text[:_END]} ... {text[-_END:]}"


def _report(failure: Failure, token: str) -> None:
    words = list(failure.words)
    while True:
        text = json.dumps({**asdict(failure), "words": words})
        data = _MARK + token.encode() + b":" + text.encode() + b"\n"
        if len(data) <= _MOST or not words:
            break
        # The end of a traceback says most.
        words = words[1:]
    _write(data)


class Reports:
    """Takes reports out of a stream of stderr."""

    def __init__(self, token: str) -> None:
        self._start = _MARK + token.encode() + b":"
        self._held = b""
        self.failures: list[Failure] = []

    def feed(self, data: bytes) -> bytes:
        """What the user is to see of `data`. A report that is not complete is held back."""
        data, self._held = self._held + data, b""
        shown = b""
        while True:
            at = data.find(_MARK[:1])
            if at < 0:
                return shown + data
            shown, data = shown + data[:at], data[at:]
            end = data.find(b"\n")
            whole = data if end < 0 else data[:end]
            if not (whole.startswith(self._start) or self._start.startswith(whole)):
                shown, data = shown + data[:1], data[1:]
            elif end < 0:
                self._held = data
                return shown
            else:
                self._take(whole)
                data = data[end + 1 :]

    def rest(self) -> bytes:
        """What was held back, at the end of the stream."""
        data, self._held = self._held, b""
        return data

    def _take(self, report: bytes) -> None:
        # One torn by output of another rank is lost: mpirun's own words must do.
        with contextlib.suppress(ValueError, TypeError):
            self.failures.append(Failure(**json.loads(report[len(self._start) :])))
