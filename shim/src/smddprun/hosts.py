"""Where ranks go: `--hosts` and `--hostfile` read, and ranks shared out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from smddprun.errors import UsageError


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it is to have; None: not said."""

    name: str
    ranks: int | None = None


def read(hosts: str | None, hostfile: str | None) -> list[Host]:
    """The hosts asked for; none: this one."""
    if hosts is not None and hostfile is not None:
        raise UsageError("--hosts and --hostfile: give one of them")
    if hostfile is not None:
        return _counted(_file(Path(hostfile)))
    found = [_word(word, "--hosts") for word in hosts.split(",")] if hosts is not None else []
    twice = _repeated(found)
    if twice:
        raise UsageError(f"hosts: {', '.join(sorted(twice))} given twice: give it once, as NAME:RANKS")
    return found


def share(hosts: list[Host], ranks: int | None, usual: int) -> list[tuple[str, int]]:
    """(host, ranks) for every host, in order. `usual`: ranks of a host where nobody said a number."""
    hosts = hosts or [Host("localhost")]
    told = [host.ranks for host in hosts if host.ranks is not None]
    if told and len(told) < len(hosts):
        raise UsageError("hosts: give a number of ranks with every host (a:4,b:4) or with none (a,b)")
    if told:
        if ranks not in (None, sum(told)):
            raise UsageError(
                f"-np: {ranks} ranks, but the hosts have places for {sum(told)}: leave -np out, or mend one"
            )
        return [(host.name, host.ranks or 0) for host in hosts]
    if ranks is None:
        return [(host.name, usual) for host in hosts]
    if ranks < len(hosts):
        raise UsageError(f"-np: {ranks} ranks are too few for {len(hosts)} hosts: name fewer")
    each, more = divmod(ranks, len(hosts))
    return [(host.name, each + (number < more)) for number, host in enumerate(hosts)]


def _repeated(found: list[Host]) -> set[str]:
    names = [host.name for host in found]
    return {name for name in names if names.count(name) > 1}


def _counted(found: list[Host]) -> list[Host]:
    """Each host once. Where one stands on several lines, as batch systems write it, each line is a rank, or those it
    tells."""
    if not _repeated(found):
        return found
    ranks: dict[str, int] = {}
    for host in found:
        ranks[host.name] = ranks.get(host.name, 0) + (host.ranks or 1)
    return [Host(name, count) for name, count in ranks.items()]


def _word(word: str, where: str) -> Host:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?::(\d+))?", word.strip())
    ranks = int(match[2]) if match and match[2] else None
    if not match or match[1].startswith("-") or ranks == 0:
        raise UsageError(f"{where}: expected NAME or NAME:RANKS, RANKS at least 1, given '{word}'")
    return Host(match[1], ranks)


def _file(path: Path) -> list[Host]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"--hostfile: {path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, *more = words
        slots = [word.removeprefix("slots=") for word in more if word.startswith("slots=")]
        found.append(_word(f"{name}:{slots[0]}" if slots else name, f"--hostfile: {path}, line {number}"))
    if not found:
        raise UsageError(f"--hostfile: {path} names no host")
    return found
