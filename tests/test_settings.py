"""Settings that choose between ways of doing the same: whatever they say, results are right and equal on all ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import conftest
import fixed_programs
from test_differential import unlike


def played(which: str, nodes: list[int], env: dict[str, str], **more: object) -> list[dict]:
    """What ranks report that have played these programs, with nothing wrong."""
    ranks = conftest.run(fixed_programs.job, len(nodes), nodes=nodes, env=env, limit=120, which=which, **more).check()
    for number, wanted in enumerate(fixed_programs.PROGRAMS[which](len(nodes))):
        reports = [report["reports"][number] for report in ranks.reports]
        wrong = [f"rank {r}: {w}" for r, report in enumerate(reports) for w in [*report["wrong"], report["error"]] if w]
        wrong += unlike(wanted, reports)
        assert not wrong, f"program {number} of {which}, {len(wrong)} faults:\n" + "\n".join(wrong[:10])
    return ranks.reports


MORE = {"on": {"SMDDP_SHM_STREAM": "1"}, "off": {"SMDDP_SPIN": "0"}}


@pytest.mark.parametrize("single_copy", ["on", "off"])
@pytest.mark.parametrize("hand_back", ["on", "off"])
def test_ways_inside_a_node(single_copy: str, hand_back: str) -> None:
    four_pages = "on" if single_copy == hand_back else "off"
    env = {"SMDDP_SHM_SINGLE_COPY": single_copy, "SMDDP_SHM_HAND_BACK": hand_back, "SMDDP_SHM_FOUR_PAGES": four_pages}
    played("small_and_large", [0, 0], env | MORE[hand_back])


def test_ways_between_nodes() -> None:
    played("small_and_large", [0, 0, 1], {"SMDDP_RAILS": "2", "SMDDP_SHM_HAND_BACK": "on", "SMDDP_SHM_STREAM": "1"})


def test_portable_reductions_give_the_same_bits() -> None:
    """One rank alone uses them: pieces it has reduced, and those others have, make one result."""
    portable = {"each": lambda rank: {"SMDDP_SIMD": "portable"} if rank == 1 else {}}
    mixed, usual = (played("reductions", [0, 0, 0], {}, **more) for more in (portable, {}))
    assert mixed == usual


# ---- algorithms

BETWEEN_NODES = {
    "all_reduce": ["sharded", "ring", "recursive_doubling", "halving_doubling", "tree"],
    "reduce_scatter": ["direct"],
    "all_gather": ["direct", "bruck", "ring"],
    "all_to_all": ["pairwise"],
    "gather": ["pairwise"],
    "scatter": ["pairwise"],
    "broadcast": ["tree", "chain"],
    "reduce": ["tree", "chain"],
    "barrier": ["recursive_doubling"],
}
NODES = [0, 0, 1, 1, 2]


def named(turn: int) -> dict[str, str]:
    return {collective: names[turn % len(names)] for collective, names in BETWEEN_NODES.items()}


def every_collective() -> dict[str, list[str]]:
    """The algorithm of each call of each collective."""
    import smdistributed_rs

    used: dict[str, list[str]] = {}
    with smdistributed_rs.init() as world:
        for count in (1, 1000, 50_003):
            for name, algorithm in each_once(world, count).items():
                used.setdefault(name, []).append(algorithm)
    return used


def each_once(world: object, count: int) -> dict[str, str]:
    """Calls every collective, looks at what comes out; the algorithms."""
    import numpy as np

    n, me, last = world.size, world.rank, world.size - 1
    own = np.arange(count) % 1000 + 1000 * me
    every = np.arange(count) % 1000 + 1000 * np.arange(n)[:, None]
    blocks = np.arange(n)[:, None] * 10_000 + own
    reduced, told, summed = own.copy(), own.copy(), own.copy()
    calls = {
        "all_reduce": lambda: world.all_reduce(reduced),
        "reduce_scatter": lambda: world.reduce_scatter(blocks),
        "all_gather": lambda: world.all_gather(own),
        "all_to_all": lambda: world.all_to_all(blocks),
        "gather": lambda: world.gather(own, root=last),
        "scatter": lambda: world.scatter(blocks if me == last else None, np.empty_like(own), last),
        "broadcast": lambda: world.broadcast(told, last),
        "reduce": lambda: world.reduce(summed, last),
        "barrier": world.barrier,
    }
    got, used = {}, {}
    for name, call in calls.items():
        got[name] = call()
        used[name] = world._inner.last_algorithm()
    assert (reduced == every.sum(0)).all()
    assert (got["reduce_scatter"] == every.sum(0) + n * me * 10_000).all()
    assert (got["all_gather"] == every).all()
    assert (got["all_to_all"] == every + 10_000 * me).all()
    assert me != last or (got["gather"] == every).all()
    assert (got["scatter"] == every[last] + 10_000 * me).all()
    assert (told == every[last]).all()
    assert (summed == (every.sum(0) if me == last else own)).all()
    return used


@pytest.mark.parametrize("turn", range(len(BETWEEN_NODES["all_reduce"])), ids=BETWEEN_NODES["all_reduce"].__getitem__)
def test_algorithms_between_nodes(turn: int) -> None:
    chosen = named(turn)
    env = {"SMDDP_ALGORITHM": ",".join(f"{collective}={name}" for collective, name in chosen.items())}
    expected = {collective: [f"hierarchical({name})"] * 3 for collective, name in chosen.items()}
    for report in conftest.run(every_collective, len(NODES), nodes=NODES, env=env, limit=60).check().reports:
        assert report == expected


# ---- what is found out at the first starts on a machine


def starts() -> str:
    import numpy as np

    import smdistributed_rs

    with smdistributed_rs.init() as world:
        array = np.full(300_000, world.rank + 1.0)
        world.all_reduce(array)
        assert (array == 3).all()
        assert (world.all_to_all(np.repeat(np.arange(2.0), 150_000)) == world.rank).all()
    return os.environ["XDG_CACHE_HOME"]


def test_one_process_measures_at_the_first_three_starts(tmp_path: Path) -> None:
    """And keeps what it has found, if it did in the little time there is."""
    kept = tmp_path / "smdistributed_rs/slots"
    found = 0
    for _ in range(5):
        ranks = conftest.run(starts, 2, env={"XDG_CACHE_HOME": str(tmp_path)}, limit=60).check()
        assert ranks.reports == [str(tmp_path)] * 2
        found, before = kept.read_text().count("\n"), found
        assert before <= found <= min(before + 1, 3)


def segment() -> int:
    """Bytes of the memory that the ranks share, by which the slots in it are told."""
    import numpy as np

    import smdistributed_rs

    with smdistributed_rs.init() as world:
        world.barrier()
        world.all_reduce(np.ones(300_000))
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in lines if "memfd:smddp" in line]
        return sum(int(end, 16) - int(start, 16) for start, end in spans)


def shared(**env: str) -> int:
    one, other = conftest.run(segment, 2, env=env, limit=60).check().reports
    assert one == other > 0
    return one


def this_machine() -> str:
    """What a line of the file begins with, as crates/smddp/src/slots.rs has it."""
    source = (conftest.HERE.parent / "crates/smddp/src/slots.rs").read_text()
    (version,) = re.findall(r"const VERSION: u32 = (\d+);", source)
    telling = re.findall(r'"(.+?)"', source.partition("const TELLING: [&str; 9] = [")[2].partition("]")[0])
    text = Path("/proc/cpuinfo").read_text()
    pairs = [line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line]
    words = [value.strip() for name, value in pairs if name.strip() in telling]
    processors = sum(line.startswith("processor") for line in text.splitlines())
    return f"{version} {processors} x {'/'.join(words).replace('=', '-')}"


def test_what_was_found_before_is_used_and_not_measured_again(tmp_path: Path) -> None:
    kept = tmp_path / "smdistributed_rs/slots"
    kept.parent.mkdir()
    kept.write_text(lines := f"{this_machine()} = {1 << 20} 4 1 1 0\n" * 3)
    found = shared(XDG_CACHE_HOME=str(tmp_path))
    assert found == shared(SMDDP_SHM_SLOT="1M", SMDDP_SHM_SLOTS="4")
    assert found > 2 * shared()
    assert kept.read_text() == lines
