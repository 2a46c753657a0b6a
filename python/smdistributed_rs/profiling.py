"""Ranges for torch.profiler: `smddp:all_reduce` and so on, with the shapes of what a call was given.

A range lasts from the call to its end, wherever that is noticed. It is ended on a thread of its own, because that is
how torch tells asynchronous ranges, as communication's are, from functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._core import Handle

_ender: ThreadPoolExecutor | None = None


class Range:
    """One call under way, as the profiler sees it."""

    def __init__(self, name: str, inputs: object) -> None:
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs if isinstance(inputs, Iterable) else ()
        self._trigger: torch.futures.Future[None] = torch.futures.Future()
        record = torch.autograd._record_function_with_args_enter(f"smddp:{name}", *tensors)
        self._ended = torch.ops.profiler._call_end_callbacks_on_jit_fut(record, self._trigger)

    def end(self, _: object = None) -> None:
        """Ends the range, on the thread for that."""
        global _ender
        if _ender is None:
            _ender = ThreadPoolExecutor(1, "smddp-profiler")
        try:
            _ender.submit(self._trigger.set_result, None)
        except RuntimeError:  # the interpreter ends, and takes no more work
            self._trigger.set_result(None)

    def end_with(self, handle: Handle) -> None:
        """Ends the range when the operation ends."""
        handle.on_done(self.end)

    def wait(self) -> None:
        """Waits until the range is in the profile: whoever waited for a call may stop the profiler next."""
        self._ended.wait()
