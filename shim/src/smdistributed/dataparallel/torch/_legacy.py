"""What the modules of SMDDP 1.x share: the warning, and that importing them registers the backend."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from smdistributed.dataparallel.torch import torch_smddp  # noqa: F401  registers the backend

_OURS = str(Path(__file__).parent)


def warn(module: str, instead: str) -> None:
    """Says, at the user's line that imports `module`, what to write instead."""
    warnings.warn(
        f"smdistributed.dataparallel.torch.{module} is the API of SMDDP 1.x and deprecated: use {instead} with "
        "'import smdistributed.dataparallel.torch.torch_smddp' and init_process_group(backend=\"smddp\")",
        DeprecationWarning,
        stacklevel=_level(),
    )


def _level() -> int:
    """Frames from `warn` to the first that is not of this package, as `warnings` counts: the import's own left out."""
    frame, level = sys._getframe(1), 0
    while frame is not None:
        name = frame.f_code.co_filename
        if not ("importlib" in name and "_bootstrap" in name):
            level += 1
            if not name.startswith(_OURS):
                break
        frame = frame.f_back
    return level
