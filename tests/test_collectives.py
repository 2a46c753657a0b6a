"""Every collective through torch.distributed, against a reference, on several shapes of nodes and both carriers."""

from __future__ import annotations

import functools

import pytest

import cases_collectives
import common
import conftest
from torch_versions import needs

SHAPES = {
    "1 node x 1": [0],
    "1 node x 2": [0, 0],
    "1 node x 4": [0, 0, 0, 0],
    "2 nodes x 2": [0, 0, 1, 1],
    "2 + 1": [0, 0, 1],
    "1 + 2, interleaved": [0, 1, 0],
}
LONELY = {
    "messages_match_by_tag", "send_and_receive", "batch_isend_irecv", "any_rank_leaves_what_is_awaited_by_name",
}  # fmt: skip
"""cases that need a second rank"""


@functools.cache
def outcome(shape: str, carrier: str) -> conftest.Ranks:
    nodes = SHAPES[shape]
    expected = "SmddpProcessGroup" if carrier == "group" else "HookedProcessGroup"
    env = {"SMDDP_TORCH_GROUP": carrier, "EXPECT_GROUP": expected}
    return conftest.run(cases_collectives.run_all, len(nodes), nodes=nodes, env=env, limit=240)


def cases_of(shape: str) -> list[str]:
    return [case for case in cases_collectives.CASES if len(SHAPES[shape]) > 1 or case not in LONELY]


@pytest.mark.parametrize(
    ("shape", "carrier", "case"),
    [
        *((shape, "group", case) for shape in SHAPES for case in cases_of(shape)),
        *(
            pytest.param(shape, "backend", case, marks=needs("python backends"))
            for shape in ("1 node x 2", "2 + 1")
            for case in cases_of(shape)
        ),
    ],
    ids=lambda value: value.replace(" ", ""),
)
def test_collective(shape: str, carrier: str, case: str) -> None:
    ranks = outcome(shape, carrier)
    ranks.check()
    for rank, report in enumerate(ranks.reports):
        assert report[case] == "", f"rank {rank}: {report[case]}\n{ranks.text[-4000:]}"


# ---- tensors whose memory holds the negatives of their elements


def negatives() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    common.start()
    me, peer = dist.get_rank(), 1 - dist.get_rank()

    def values(bit: str) -> torch.Tensor:
        """Dense ones, whose elements are -1 and up."""
        if bit == "conjugate":
            return torch.complex(torch.zeros(4), 1.0 - torch.arange(4.0)).conj().imag
        return torch._neg_view(1 - torch.arange(4, dtype=torch.int64 if bit == "integers" else torch.float32))

    found: dict[str, object] = {}
    for bit in ("floats", "integers", "conjugate"):
        mine = values(bit)
        assert mine.is_neg(), bit
        both = mine.new_empty(8)
        dist.all_gather_into_tensor(both, mine)
        found[f"all_gather, {bit}"] = both.tolist()
        swapped = mine.new_empty(4)
        dist.all_to_all_single(swapped, mine)
        found[f"all_to_all, {bit}"] = swapped.tolist()
        got = mine.new_empty(4)
        works = [dist.isend(mine, peer), dist.irecv(got, peer)]
        for work in works:
            work.wait()
        found[f"send, {bit}"] = got.tolist()
        into = values(bit)
        dist.recv(into, peer) if me else dist.send(got + 1, peer)
        found[f"recv, {bit}"] = into.tolist()
        dist.broadcast(mine if me else (sent := got + 5), src=0)
        found[f"broadcast, {bit}"] = (mine if me else sent).tolist()
        largest = values(bit)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found[f"max, {bit}"] = largest.tolist()
        work = dist.all_reduce(total := values(bit), async_op=True)
        work.wait()
        found[f"sum, {bit}"] = total.tolist()
    dist.destroy_process_group()
    return found


def test_what_tensors_say_is_moved_not_what_their_memory_holds() -> None:
    plain = [-1, 0, 1, 2]
    reports = conftest.run(negatives, 2).check().reports
    for rank, report in enumerate(reports):
        for bit in ("floats", "integers", "conjugate"):
            assert report[f"all_gather, {bit}"] == plain * 2
            assert report[f"all_to_all, {bit}"] == plain[2 * rank : 2 * rank + 2] * 2
            assert report[f"send, {bit}"] == report[f"max, {bit}"] == plain
            assert report[f"recv, {bit}"] == [x + rank for x in plain]
            assert report[f"broadcast, {bit}"] == [x + 5 for x in plain]
            assert report[f"sum, {bit}"] == [2 * x for x in plain]


def hooked_negatives() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    common.start()
    peer = 1 - dist.get_rank()
    lazy, both, got = torch._neg_view(1 - torch.arange(4.0)), torch.zeros(8), torch.zeros(4)
    dist.all_gather_into_tensor(both, lazy)
    works = [dist.isend(lazy, peer), dist.irecv(got, peer)]
    for work in works:
        work.wait()
    found: dict[str, object] = {"all_gather": both.tolist(), "send": got.tolist()}
    calls = {
        "allreduce": lambda: dist.all_reduce(lazy),
        "broadcast": lambda: dist.broadcast(lazy[1:], src=0),
        "recv": lambda: dist.irecv(lazy, peer),
        "allgather": lambda: dist.all_gather([lazy, got], got),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    dist.barrier()
    dist.destroy_process_group()
    return found


@needs("python backends")
def test_where_torch_would_lose_results_it_is_not_given_such_tensors() -> None:
    for report in conftest.run(hooked_negatives, 2, env={"SMDDP_TORCH_GROUP": "backend"}).check().reports:
        assert report["all_gather"] == [-1, 0, 1, 2] * 2
        assert report["send"] == [-1, 0, 1, 2]
        for name in ("allreduce", "broadcast", "recv", "allgather"):
            assert report[name].startswith(f"ArgumentError: {name}: argument 'tensor'"), report
            assert "resolve_neg()" in report[name]


# ---- sizes of parts


def sizes() -> dict[str, object]:
    """What every kind of sequence does as sizes for each rank."""
    import numpy as np
    import torch
    import torch.distributed as dist

    common.start()
    found: dict[str, object] = {}
    given, kept = torch.arange(4.0) + 10 * dist.get_rank(), [1 + 2 * dist.get_rank()] * 2
    kinds = {"list": list, "tuple": tuple, "array": np.array, "tensor": torch.tensor}
    for name, kind in {**kinds, "list of tensors": lambda sizes: [torch.tensor(n) for n in sizes]}.items():
        for way in (dist.all_to_all_single, dist.group.WORLD.all_to_all_single):
            output = torch.zeros(sum(kept))
            work = way(output, given, kind(kept), kind([1, 3]))
            if work is not None:
                work.wait()
            found[f"{name}, {way.__qualname__}"] = output.tolist()
    wrong: dict[str, object] = {"halves": np.array([1.5, 2.5]), "one number": np.array(4), "texts": ["a", "b"]}
    for name, parts in wrong.items():
        try:
            dist.group.WORLD.all_to_all_single(torch.zeros(sum(kept)), given, kept, parts).wait()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return found


def test_sizes_may_be_any_sequence_of_whole_numbers() -> None:
    for rank, report in enumerate(conftest.run(sizes, 2).check().reports):
        for name in ("halves", "one number", "texts"):
            error = report.pop(name)
            assert error.startswith("ArgumentError: all_to_all_single: argument 'input_split_sizes'"), error
            assert "whole numbers, one per rank" in error
        expected = [0.0, 10.0] if rank == 0 else [1.0, 2.0, 3.0, 11.0, 12.0, 13.0]
        assert report == dict.fromkeys(report, expected)
        assert len(report) == 10
