"""What the modules of SMDDP 1.x share: the warning, and that importing them registers the backend."""

from __future__ import annotations

import warnings

from smdistributed.dataparallel.torch import torch_smddp  # noqa: F401  registers the backend


def warn(module: str, instead: str) -> None:
    """Says, at the line that imports `module`, what to write instead."""
    # The frames between are those of the import system, which `warnings` passes over.
    warnings.warn(
        f"smdistributed.dataparallel.torch.{module} is the API of SMDDP 1.x and deprecated: use {instead} with "
        "'import smdistributed.dataparallel.torch.torch_smddp' and init_process_group(backend=\"smddp\")",
        DeprecationWarning,
        stacklevel=3,
    )
