"""Random programs of collectives against a reference: hypothesis draws them, ranks that live long run them.

DIFFERENTIAL_EXAMPLES is the number of programs per shape, DIFFERENTIAL_SEED another choice of them. A failure prints
the smallest program that shows it; this file runs one again:

    .venv/bin/python tests/test_differential.py SHAPE 'PROGRAM'        (SHAPE as in SHAPES, "-": the program from stdin)

`-k "not two_gib"` leaves out the one large case.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import conftest
import programs

EXAMPLES = int(os.environ.get("DIFFERENTIAL_EXAMPLES", "200"))
SEED = int(os.environ.get("DIFFERENTIAL_SEED", "1"))
PROGRAM_LIMIT = 60
SHRINK_LIMIT = 30
"""Seconds after the first failure in which smaller programs are looked for."""

SHAPES: dict[str, tuple[list[int], dict[str, str]]] = {
    "1node": ([0, 0, 0], {}),
    "2nodes": ([0, 0, 1, 1], {}),
    # Little room, so that small programs meet the ends of slots, chunks and eager messages; and torch's own group.
    "2nodes-tight": (
        [0, 0, 1],
        {
            "SMDDP_SHM_SLOT": "4K",
            "SMDDP_SHM_SLOTS": "2",
            "SMDDP_EAGER": "64",
            "SMDDP_STRIPE": "4K",
            "SMDDP_STAGING": "1M",
            "SMDDP_CHUNK": "8K",
            "SMDDP_TORCH_GROUP": "backend",
            "SMDDP_LOG": "info",
        },
    ),
}


# ---- programs


@st.composite
def program(draw: st.DrawFn, size: int) -> dict:
    members = st.sampled_from([list(ranks) for ranks in programs.subsets(size)])
    groups = draw(st.lists(members, min_size=1, max_size=3))
    return {
        "groups": groups,
        "fresh": draw(st.integers(0, 5)) == 5,
        "delay": draw(st.integers(0, 4)),
        "steps": draw(st.lists(step(len(groups)), min_size=1, max_size=10)),
    }


@st.composite
def step(draw: st.DrawFn, groups: int) -> dict:
    kind = draw(st.sampled_from(list(programs.KINDS)))
    made = {"do": kind, "group": draw(st.integers(0, groups - 1)), "seed": draw(st.integers(0, 99))}
    for name in programs.KINDS[kind][1]:
        made |= draw(FIELDS[name])
    return made


def field(name: str, values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda value: {name: value})


# Few elements, then about the sizes in bytes at which things change, then anything.
COUNTS = st.one_of(
    st.integers(0, 40),
    st.integers(0, 40),
    st.builds(
        lambda power, off: (1 << power) + off,
        st.integers(6, 16),
        st.sampled_from([0, -1, 1]),
    ),
    st.integers(0, 20_000),
    st.integers(0, 150_000),
)
LAYOUT = st.one_of(st.just("dense"), st.sampled_from(programs.LAYOUTS))
LAYOUT_OF_LIST = st.one_of(LAYOUT, st.just("chunks"))
FIELDS = {
    "reduced": st.sampled_from([{"dtype": d, "op": op} for d in programs.REDUCED for op in programs.ops_of(d)]),
    "moved": field("dtype", st.sampled_from(programs.MOVED)),
    "count": field("count", COUNTS),
    "special": field("special", st.booleans()),
    "uneven": field("uneven", st.booleans()),
    "inside": field("inside", st.booleans()),
    "root": field("root", st.integers(0, 3)),
    "tag": field("tag", st.sampled_from([0, 0, 7])),
    "in": field("in", LAYOUT),
    "out": field("out", LAYOUT),
    "ins": field("in", LAYOUT_OF_LIST),
    "outs": field("out", LAYOUT_OF_LIST),
    "async": field("async", st.booleans()),
}


# ---- ranks


class Lost(Exception):
    """Ranks died or did not answer; their pool is of no more use."""


class Pool:
    """Ranks of one shape, started when first needed and again after a failure that may have left them apart."""

    def __init__(self, shape: str) -> None:
        self.nodes, self._env = SHAPES[shape]
        self._process: subprocess.Popen | None = None
        self._failed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        said = self._end()
        # What failed before says more.
        assert kind or self._failed or not said, said

    def _end(self) -> str:
        """What was wrong with how the ranks ended, or nothing."""
        if self._process is None:
            return ""
        # Without requests they end by themselves.
        for line in self._requests:
            with contextlib.suppress(OSError):
                line.close()
        said = ""
        try:
            if status := self._process.wait(30):
                self._pids = []
                said = f"the pool ended with status {status}\n{self._logs()}"
        except subprocess.TimeoutExpired:
            said = f"the pool did not end\n{self._logs()}"
        self.kill()
        return said

    def failure(self, wanted: dict) -> str:
        """Runs a program; what is wrong with what the ranks found, or nothing."""
        said = self._failure(wanted)
        self._failed = self._failed or bool(said)
        return said

    def _failure(self, wanted: dict) -> str:
        try:
            if self._process is None:
                self._start()
            for line in self._requests:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(wanted), file=line, flush=True)
            reports = [json.loads(answer) for answer in self._answers(PROGRAM_LIMIT)]
        except Lost as lost:
            text = f"{lost}\n{self._logs()}"
            self.kill()
            return text
        wrong = [f"rank {r}: {w}" for r, report in enumerate(reports) for w in report["wrong"]]
        errors = [f"rank {r}: {report['error']}" for r, report in enumerate(reports) if report["error"]]
        if errors:
            self.kill()
        return "\n".join(wrong + unlike(wanted, reports) + errors)

    def kill(self) -> None:
        if self._process is not None:
            conftest.stop([self._process])
            for pipe in [*self._requests, *self._replies]:
                with contextlib.suppress(OSError):
                    pipe.close()
            self._folder.cleanup()
            self._process = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="smddp-pool-")
        port, ranks = conftest.free_port(), []
        self._requests, self._replies, theirs = [], [], []
        for rank, node in enumerate(self.nodes):
            place = [r for r, n in enumerate(self.nodes) if n == node]
            env = self._env | {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(self.nodes)),
                "LOCAL_RANK": str(place.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(place)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "SMDDP_NODE_ID": f"node{node}",
            }
            (requests, to_them), (from_them, replies) = os.pipe(), os.pipe()
            self._requests.append(os.fdopen(to_them, "w"))
            self._replies.append(os.fdopen(from_them))
            log = str(Path(self._folder.name) / f"{rank}.log")
            ranks.append({"env": env, "log": log, "requests": requests, "replies": replies})
            theirs += [requests, replies]
        config = Path(self._folder.name) / "ranks.json"
        config.write_text(json.dumps({"ranks": ranks}))
        self._process = subprocess.Popen(
            [sys.executable, programs.__file__, str(config)], env=conftest.clean_environment(), pass_fds=theirs
        )
        for end in theirs:
            os.close(end)
        self._pids: list[int] = []
        self._pids = [int(answer) for answer in self._answers(120)]
        if self._env.get("SMDDP_SHM_SLOT") == "4K":
            told = (Path(self._folder.name) / "0.log").read_text()
            assert "(2 slots of 4 KiB)" in told, told

    def _answers(self, limit: float) -> list[str]:
        """One line of each rank."""
        answers: dict[int, str] = {}
        until = time.monotonic() + limit
        with selectors.DefaultSelector() as waiting:
            for rank, reply in enumerate(self._replies):
                waiting.register(reply, selectors.EVENT_READ, rank)
            while len(answers) < len(self._replies):
                for key, _ in waiting.select(max(until - time.monotonic(), 0)):
                    line = key.fileobj.readline()
                    if not line:
                        raise Lost(f"rank {key.data} died")
                    answers[key.data] = line
                    waiting.unregister(key.fileobj)
                if time.monotonic() >= until:
                    missing = [r for r in range(len(self._replies)) if r not in answers]
                    raise Lost(f"ranks {missing} did not answer within {limit} s")
        return [answers[r] for r in range(len(self._replies))]

    def _logs(self) -> str:
        """The ranks' last words, and where they are now."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        logs = sorted(Path(self._folder.name).glob("*.log"))
        return "\n".join(f"--- rank {log.stem}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)


def unlike(wanted: dict, reports: list[dict]) -> list[str]:
    """Steps whose results must be equal in bits on all ranks of their group, and are not."""
    found = []
    for number, one in enumerate(wanted["steps"]):
        digests = {r: report["alike"].get(str(number)) for r, report in enumerate(reports)}
        digests = {r: digest for r, digest in digests.items() if digest}
        if len(set(digests.values())) > 1:
            found.append(f"step {number} ({one['do']}): ranks differ in bits: {digests}")
    return found


# ---- the tests


class Hunt:
    """Keeps the smallest program that fails. What was found once stays so, however it depends on timing."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[str, str] = {}
        self._since = 0.0
        self.programs = self.steps = 0

    def check(self, wanted: dict) -> None:
        text = json.dumps(wanted)
        if text not in self._known:
            if self._since and time.monotonic() - self._since > SHRINK_LIMIT:
                return
            self.programs, self.steps = self.programs + 1, self.steps + len(wanted["steps"])
            found = self._pool.failure(wanted)
            if found:
                self._known[text] = found
                self._since = self._since or time.monotonic()
        assert text not in self._known

    def smallest(self) -> tuple[str, str]:
        """Hypothesis seldom takes out whole steps, which have many choices each."""
        text = min(self._known, key=len)
        for i in reversed(range(len(json.loads(text)["steps"]))):
            wanted = json.loads(text)
            del wanted["steps"][i]
            if wanted["steps"] and self._fails(wanted):
                text = json.dumps(wanted)
        return text, self._known[text]

    def _fails(self, wanted: dict) -> bool:
        try:
            self.check(wanted)
        except AssertionError:
            return True
        return False


def hunt(shape: str, examples: int) -> Hunt:
    with Pool(shape) as pool:
        found = Hunt(pool)

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @seed(1000 * SEED + list(SHAPES).index(shape))
        @given(program(len(SHAPES[shape][0])))
        def run(wanted: dict) -> None:
            found.check(wanted)

        try:
            run()
            return found
        except AssertionError:
            text, what = found.smallest()
        again = "fails" if pool.failure(json.loads(text)) else "passes"
    repeat = f"{sys.executable} {__file__} {shape} '{text}'"
    pytest.fail(
        f"on shape {shape} this program:\n{text}\n{what}\nRun again it {again}. To repeat:\n{repeat}", pytrace=False
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_random_programs(shape: str) -> None:
    found = hunt(shape, EXAMPLES)
    print(f"{found.programs} programs, {found.steps} steps")
    assert found.programs > EXAMPLES // 2


def every_kind_once(size: int) -> dict:
    """All kinds on all ranks, so that none goes untried however few programs are drawn."""
    common = {"group": 0, "seed": 1, "dtype": "float32", "op": "SUM", "count": 300, "root": 1, "tag": 0}
    flags = {"special": False, "uneven": True, "inside": False, "in": "columns", "out": "stepped", "async": True}
    steps = [{"do": kind, **common, **flags} for kind in programs.KINDS]
    moved = [name for name, (_, fields) in programs.KINDS.items() if "reduced" not in fields]
    for one in steps:
        if one["do"] in moved:
            del one["op"]
    return {"groups": [list(range(size))], "fresh": True, "delay": 3, "steps": steps}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind(shape: str) -> None:
    with Pool(shape) as pool:
        assert pool.failure(every_kind_once(len(SHAPES[shape][0]))) == ""


FOUND = {
    "premul_sum of a rank that is not the root": {
        "do": "reduce", "dtype": "float16", "op": "PREMUL_SUM", "count": 6, "special": False, "root": 0, "in": "dense",
        "async": False,
    },
    "one strided element, coalesced": {
        "do": "all_gather_into_tensor_coalesced", "dtype": "float32", "count": 1, "in": "stepped", "out": "dense",
        "async": False,
    },
}  # fmt: skip
"""Steps that once went wrong."""


def test_what_was_found_before() -> None:
    with Pool("1node") as pool:
        wanted = {name: {"groups": [[0, 1, 2]], "fresh": False, "delay": 0, "steps": []} for name in FOUND}
        for name, one in FOUND.items():
            wanted[name]["steps"] = [{"group": 0, "seed": seed, **one} for seed in range(5)]
        assert {name: pool.failure(wanted[name]) for name in FOUND} == dict.fromkeys(FOUND, "")


PERIOD = (1 << 20) + 8
"""Of the large tensors' contents: a piece that lands elsewhere is seen, unless it is off by a multiple of this."""


def large() -> dict[str, float]:
    """More bytes in one call than 32 bits with a sign can count; results are compared piece by piece."""
    import torch
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("smddp")
    rank, seconds = dist.get_rank(), {}
    count = (1 << 31) + 12_345
    pattern = (torch.arange(PERIOD) % 83).to(torch.uint8)

    tensor = torch.empty(count, dtype=torch.uint8)
    mine = pattern + rank
    for piece in tensor.split(PERIOD):
        piece.copy_(mine[: len(piece)])
    start = time.monotonic()
    dist.all_reduce(tensor)
    seconds["all_reduce"] = time.monotonic() - start
    expected = 2 * pattern + 1
    *pieces, last = tensor.split(PERIOD)
    words = expected.view(torch.int64)
    assert all(torch.equal(piece.view(torch.int64), words) for piece in pieces)
    assert torch.equal(last, expected[: len(last)])

    # The same memory as the output of half as much from each; the input is where it ends up.
    halves = tensor[: count // 8 * 8].view(torch.float32).chunk(2)
    halves[rank].fill_(rank + 1.5)
    halves[1 - rank].zero_()
    start = time.monotonic()
    dist.all_gather_into_tensor(tensor[: count // 8 * 8].view(torch.float32), halves[rank])
    seconds["all_gather"] = time.monotonic() - start
    assert [[bound.item() for bound in half.aminmax()] for half in halves] == [[1.5, 1.5], [2.5, 2.5]]
    dist.destroy_process_group()
    return seconds


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["1node", "2nodes"])
def test_two_gib_in_one_call(nodes: list[int]) -> None:
    for report in conftest.run(large, 2, nodes=nodes, limit=120).check().reports:
        print(report)


def main() -> None:
    shape, text = sys.argv[1:3]
    with Pool(shape) as pool:
        print(pool.failure(json.loads(sys.stdin.read() if text == "-" else text)) or "passes")


if __name__ == "__main__":
    main()
