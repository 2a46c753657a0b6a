"""The numbers the native half knows calls, element types and reductions by."""

from __future__ import annotations

from typing import Final

ALL_REDUCE: Final = 1
REDUCE_SCATTER: Final = 2
ALL_GATHER: Final = 3
ALL_TO_ALL: Final = 4
BROADCAST: Final = 5
REDUCE: Final = 6
GATHER: Final = 7
SCATTER: Final = 8
BARRIER: Final = 9

NAMES: Final[dict[int, str]] = {
    ALL_REDUCE: "all_reduce",
    REDUCE_SCATTER: "reduce_scatter",
    ALL_GATHER: "all_gather",
    ALL_TO_ALL: "all_to_all",
    BROADCAST: "broadcast",
    REDUCE: "reduce",
    GATHER: "gather",
    SCATTER: "scatter",
    BARRIER: "barrier",
}

DTYPES: Final[dict[str, int]] = {
    "bool": 0,
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float16": 6,
    "bfloat16": 7,
    "float32": 8,
    "float64": 9,
}

MOVERS: Final[dict[int, int]] = {1: 1, 2: 3, 4: 4, 8: 5}
"""Element type that moves elements of so many bytes when nothing is computed: uint8, int16, int32, int64."""

OPS: Final[dict[str, int]] = {
    "sum": 0,
    "avg": 1,
    "product": 2,
    "min": 3,
    "max": 4,
    "band": 5,
    "bor": 6,
    "bxor": 7,
}
