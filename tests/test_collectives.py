"""Every collective through torch.distributed, against a reference, on several shapes of nodes and both carriers."""

from __future__ import annotations

import functools

import pytest

import cases_collectives
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


@pytest.mark.parametrize("case", cases_collectives.CASES)
@pytest.mark.parametrize(
    ("shape", "carrier"),
    [
        *((shape, "group") for shape in SHAPES),
        *(pytest.param(shape, "backend", marks=needs("python backends")) for shape in ("1 node x 2", "2 + 1")),
    ],
    ids=lambda value: value.replace(" ", ""),
)
def test_collective(shape: str, carrier: str, case: str) -> None:
    if len(SHAPES[shape]) == 1 and case in LONELY:
        return  # one rank has nobody to send to; the case is there for the other shapes
    ranks = outcome(shape, carrier)
    assert len(ranks.reports) == len(SHAPES[shape]), ranks.text
    for rank, report in enumerate(ranks.reports):
        assert report[case] == "", f"rank {rank}: {report[case]}\n{ranks.text[-4000:]}"
