"""Every kind of call with every dtype, reduction and length at which something changes: none is left to chance."""

from __future__ import annotations

import pytest

import fixed_programs
from test_settings import played


@pytest.mark.parametrize("nodes", [[0, 0], [0, 0, 1]], ids=["1node", "2nodes"])
def test_everything_once(nodes: list[int]) -> None:
    played("product", nodes, fixed_programs.TIGHT)


def test_it_is_everything() -> None:
    tried = {
        (step["do"], step["dtype"], step["op"], step["count"])
        for program in fixed_programs.product(2)
        for step in program["steps"]
    }
    assert len(tried) == sum(len(list(program["steps"])) for program in fixed_programs.product(2))
    for count in (0, 1, 91, 1023, 1024, 1025):
        assert ("reduce_scatter_tensor", "float32", "PREMUL_SUM", count) in tried
        assert ("all_to_all", "float32", None, count) in tried
    assert len(tried) > 3000
