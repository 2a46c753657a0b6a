"""The members of a new group find one another in torch's store, whatever an earlier attempt left there.

A store outlives attempts: torchrun keeps it when it restarts its workers, and a process may destroy a group and make
it again. So nothing read from it may be trusted to be of this attempt. Members append to a log; rank 0 reads all of
it and offers its fresh token to every nonce it meets; only a living member answers an offer. When all have answered,
the token is the group's, and unique to this attempt.

Invariants
1. A member leaves with a token only if every member holds the same one.
2. Entries of dead attempts cost time, never agreement: their nonces answer no offer.
3. Every wait ends at the time limit, and the error names the ranks that did not come.
4. Once the members are connected nobody reads what the meeting left, and rank 0 deletes it before any of them goes on:
   the log begins anew only when nobody can append to the old one.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import BootstrapError, SmddpError, TimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import Store

_GRACE = 2.0
"""Seconds a member waits beyond its limit for rank 0 to say who is missing, and rank 0 for those it tells so."""


def meet(store: Store, rank: int, size: int, limit: float, name: str) -> tuple[str, float]:
    """(key prefix unique to this attempt, seconds of `limit` that are left). Every member calls it."""
    start = time.monotonic()
    if size == 1:
        return f"smddp/{secrets.token_hex(8)}", limit
    log, end = _Log(store), start + limit
    try:
        token = _lead(log, size, end, name) if rank == 0 else _follow(log, rank, size, end, name)
    except TimeoutError as late:
        late.waited = time.monotonic() - start
        raise
    except SmddpError:
        raise
    except RuntimeError as error:
        hint = "Is the process that serves it (rank 0, or torchrun's agent) alive and reachable?"
        raise BootstrapError(f"joining group '{name}': the store failed: {error}. {hint}") from error
    return f"smddp/{token}", max(1.0, start + limit - time.monotonic())


def forget(store: Store, rank: int, size: int, prefix: str) -> None:
    """Deletes what `meet` left. Called when the members are connected, by all, before they go on together."""
    if size == 1 or rank != 0:
        return
    keys = ["smddp/log", f"smddp/go/{prefix.removeprefix('smddp/')}"]
    for number in range(1, store.add("smddp/log", 0) + 1):
        entry = f"smddp/log/{number}"
        keys.append(entry)
        if store.check([entry]):
            said = json.loads(store.get(entry))
            keys += [f"smddp/offer/{said['join']}"] if "join" in said else []
    delete(store, keys)


def delete(store: Store, keys: Iterable[str]) -> None:
    """Deletes keys from a store; one that cannot keeps them."""
    try:
        for key in keys:
            store.delete_key(key)
    except (RuntimeError, NotImplementedError):
        pass


class Recorder:
    """A store that knows which keys this process made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.keys: dict[str, None] = {}
        self.wait, self.get = store.wait, store.get

    def set(self, key: str, value: bytes) -> None:
        self.keys[key] = None
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        self.keys[key] = None
        return self._store.add(key, amount)


class _Log:
    """Entries appended by anyone, in a store that can only set, get and add."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: set[int] = set()
        self._all_before = 1

    def append(self, entry: dict[str, Any]) -> None:
        number = self._store.add("smddp/log", 1)
        self.put(f"log/{number}", entry)

    def fresh(self) -> list[dict[str, Any]]:
        """Entries not yet read. A writer that died before it wrote leaves a hole, looked at again every time."""
        entries = []
        for number in range(self._all_before, self._store.add("smddp/log", 0) + 1):
            if number not in self._seen and self._store.check([f"smddp/log/{number}"]):
                self._seen.add(number)
                entries.append(self.get(f"log/{number}", 1.0))
        while self._all_before in self._seen:
            self._seen.discard(self._all_before)
            self._all_before += 1
        return [entry for entry in entries if entry is not None]

    def tell(self, token: str, verdict: dict[str, Any], listeners: int) -> None:
        """How an attempt ends; waits a little until so many have said that they read it: then this process, which may
        serve the store, may fail without taking the news along. Who comes meanwhile is told too."""
        self.put(f"go/{token}", verdict)
        end = time.monotonic() + _GRACE
        while self._store.add(f"smddp/go/{token}/read", 0) < listeners and time.monotonic() < end:
            for entry in self.fresh():
                self.offer(token, entry)
            time.sleep(0.01)

    def offer(self, token: str, entry: dict[str, Any]) -> bool:
        """Answers one who comes; whether `entry` was such a one's."""
        if "join" in entry:
            self.put(f"offer/{entry['join']}", {"token": token})
        return "join" in entry

    def read(self, key: str) -> None:
        """Says that what was told under `key` was read."""
        self._store.add(f"smddp/{key}/read", 1)

    def put(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(f"smddp/{key}", json.dumps(value))

    def get(self, key: str, seconds: float) -> dict[str, Any] | None:
        """The value under `key`, or None when it does not come in time."""
        end = time.monotonic() + seconds
        try:
            self._store.wait([f"smddp/{key}"], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            if time.monotonic() >= end - 0.1:
                return None
            raise
        return json.loads(self._store.get(f"smddp/{key}"))


def _lead(log: _Log, size: int, deadline: float, name: str) -> str:
    """Rank 0's part: offer the token to all who come, until all have taken it."""
    token = secrets.token_hex(8)
    came: dict[int, str] = {}
    pause = 0.0005
    while len(came) < size - 1:
        entries = log.fresh()
        for entry in entries:
            if not log.offer(token, entry) and entry.get("token") == token:
                _admit(log, token, came, entry, size, name)
        if entries:
            pause = 0.0005
            continue
        if time.monotonic() > deadline:
            missing = [r for r in range(1, size) if r not in came]
            text = f"rank(s) {', '.join(map(str, missing))} of {size} did not come within the time limit"
            log.tell(token, {"missing": missing, "error": text}, len(came))
            raise _late(name, 0, text, missing)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    log.put(f"go/{token}", {})
    return token


def _admit(log: _Log, token: str, came: dict[int, str], entry: dict[str, Any], size: int, name: str) -> None:
    """Takes one living member in, or ends the attempt for all with what is wrong."""
    rank, nonce = entry["rank"], entry["nonce"]
    wrong = ""
    if entry["size"] != size:
        wrong = f"ranks disagree on the number of ranks: rank 0 was given {size}, rank {rank} was given {entry['size']}"
    elif not 0 < rank < size:
        wrong = f"a process was given rank {rank} of {size}; ranks are 0 to {size - 1}"
    elif came.setdefault(rank, nonce) != nonce:
        wrong = f"two processes were given rank {rank} of {size}"
    if wrong:
        log.tell(token, {"error": wrong}, max(len(came) + 1, size - 1))
        raise _refused(name, wrong)


def _follow(log: _Log, rank: int, size: int, deadline: float, name: str) -> str:
    """The other members' part: say that we are here, take rank 0's token, wait for all to have it."""
    nonce = secrets.token_hex(8)
    log.append({"join": nonce})
    offer = log.get(f"offer/{nonce}", deadline - time.monotonic())
    if offer is None:
        raise _late(name, rank, "rank 0 did not come within the time limit", [0])
    token = str(offer["token"])
    log.append({"token": token, "rank": rank, "size": size, "nonce": nonce})
    verdict = log.get(f"go/{token}", deadline - time.monotonic() + _GRACE)
    if verdict is None:
        raise _late(name, rank, "rank 0 did not end the meeting within the time limit", [0])
    if verdict:
        log.read(f"go/{token}")
    if "missing" in verdict:
        raise _late(name, rank, verdict["error"], verdict["missing"])
    if "error" in verdict:
        raise _refused(name, verdict["error"])
    return token


def _refused(name: str, what: str) -> BootstrapError:
    return BootstrapError(
        f"joining group '{name}': {what}. Check RANK and WORLD_SIZE (or rank= and world_size=) of every process"
    )


def _late(name: str, rank: int, what: str, missing: list[int]) -> TimeoutError:
    error = TimeoutError(
        f"rank {rank} of group '{name}': joining: {what}. Look at what those processes do, or raise the timeout"
    )
    error.rank, error.group, error.op, error.seq, error.missing = rank, name, "", 0, missing
    return error
