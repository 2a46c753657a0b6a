"""Starts ranks by fork from a process that has torch loaded: loading it takes a rank 2 to 5 s of a core.

A rank started so differs from one of its own in that it was not executed: variables that are read when a process
starts, or when torch is loaded, have no effect on it (`can_serve`), and its memory is laid out as the server's but for
a shift by chance. Launchers (mpirun, torchrun) start theirs as for users.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOADED = ("numpy", "pytest", "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint")
# What may differ from the server's own environment: read when a group is made, or by the test itself.
LATE = ("SMDDP_", "FI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "NODE_RANK", "GROUP_", "PYTEST_", "XDG_CACHE_HOME")
MESSAGE = 1 << 17
PATIENCE = 60.0
"""seconds for the server to start a rank, the loading of torch included"""


class Forked:
    """A rank of the server's, as far as `subprocess.Popen` is used for ranks."""

    def __init__(self, server: Server, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode

    def wait(self) -> int:
        """Only after `kill`, or once it is known to end."""
        while (status := self.poll()) is None:
            time.sleep(0.005)
        return status

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Server:
    """The server's other side."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._ended: dict[int, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=self._environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self.pid = self._process.pid
        atexit.register(self.close)

    def can_serve(self, environment: Mapping[str, str]) -> bool:
        names = environment.keys() | self._environment.keys()
        changed = [n for n in names if environment.get(n) != self._environment.get(n)]
        return all(n.startswith(LATE) for n in changed)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """Runs worker.py's `main` with these arguments; standard output and error go to `log`."""
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log),
            "folder": os.getcwd(),
        }
        self._socket.send(json.dumps(request).encode())
        end = time.monotonic() + PATIENCE
        while (started := self._hear(end - time.monotonic())) is None:
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"the server of ranks started none in {PATIENCE} s or ended")
        return Forked(self, started)

    def status(self, pid: int) -> int | None:
        while select.select([self._socket], [], [], 0)[0]:
            self._hear(0)
        return self._ended.get(pid)

    def _hear(self, limit: float) -> int | None:
        """Takes one message; the number of a process that was started, if it tells of one."""
        if not select.select([self._socket], [], [], max(limit, 0))[0]:
            return None
        data = self._socket.recv(MESSAGE)
        if not data:
            raise RuntimeError("the server of ranks has ended")
        news = json.loads(data)
        if "status" not in news:
            return news["pid"]
        self._ended[news["pid"]] = news["status"]
        return None

    def close(self) -> None:
        """Ends the server, which kills what ranks are left."""
        self._socket.close()
        self._process.wait()


def serve(control: socket.socket) -> None:
    """Returns in each rank; the server itself ends with its other side."""
    ranks: set[int] = set()
    while True:
        if select.select([control], [], [], 0.01 if ranks else None)[0]:
            data = control.recv(MESSAGE)
            if not data:
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                control.close()
                return become(json.loads(data))
            ranks.add(pid)
            control.send(json.dumps({"pid": pid}).encode())
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.remove(pid)
                control.send(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def become(request: dict) -> None:
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["worker.py", *request["arguments"]]
    # Ranks of a job do not have their memory at the same addresses.
    random.seed(os.getpid())
    globals()["_shift"] = [bytearray(random.randrange(1 << 12, 1 << 16)), bytearray(random.randrange(1 << 20, 1 << 24))]


def main() -> None:
    for name in LOADED:
        importlib.import_module(name)
    import worker

    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    worker.main()


if __name__ == "__main__":
    main()
