"""A rank's program under watch: when it fails, one line on stderr tells the `smddprun` that started the job which rank,
how, and its last words. That smddprun takes the line out of what the user sees (`Reports`).

Invariants
1. The program dies with its watcher, whatever kills that: PR_SET_PDEATHSIG. The watcher stops it when mpirun, or its
   daemon, has gone: Open MPI's ranks would go on without one that was killed.
2. A program that was told to stop does, in time: not every mpirun sees to it.
3. A rank that was told to stop reports nothing: it is not what went wrong.
4. A report is one write of less than a pipe's atomic size, so that mpirun passes it on in one piece.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
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
    told_to_stop = _pass_signals(child, parent)
    words: collections.deque[bytes] = collections.deque(maxlen=_LINES)
    reader = threading.Thread(target=_copy, args=(child, words), daemon=True)
    reader.start()
    status = child.wait()
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


def _pass_signals(child: subprocess.Popen[bytes], parent: int) -> list[int]:
    """Passes signals on to the program, and SIGTERM when `parent` has ended; the list fills with those that tell it to
    stop."""
    stopping: list[int] = []

    def handler(number: int, _: object) -> None:
        if number in _STOPPING:
            stopping.append(number)
            signal.alarm(_GRACE)
        child.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, handler)
    signal.signal(signal.SIGALRM, lambda *_: child.kill())

    def orphaned(*_: object) -> None:
        if os.getppid() != parent:
            handler(signal.SIGTERM, None)

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
