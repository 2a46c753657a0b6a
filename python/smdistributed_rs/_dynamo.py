"""Keeps torch.compile out of this package's methods.

C++ calls them while torch's compiler watches every Python frame (DDP's reducer does), and the compiler refuses to trace
methods of a process group. Marking their code says so without importing the compiler, which takes a second.
"""

from __future__ import annotations

from typing import Any


def not_compiled(*classes: type) -> None:
    """Marks every method of `classes` as not to be traced, nor what it calls."""
    mark = _marker()
    for cls in classes:
        for member in vars(cls).values():
            code = getattr(member, "__code__", None)
            if code is not None:
                mark(code)


def _marker() -> Any:
    from torch._C._dynamo import eval_frame

    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        return lambda code: eval_frame.set_code_exec_strategy(code, strategy)
    # Torch before 2.7 or so: marks the frame itself only.
    return getattr(eval_frame, "skip_code", lambda _: None)
