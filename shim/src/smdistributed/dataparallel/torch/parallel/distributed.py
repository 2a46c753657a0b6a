"""`DistributedDataParallel` as SMDDP 1.x had it: torch's own, with fewer arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel as _TorchDDP

from smdistributed.dataparallel.torch._legacy import warn as _warn

_warn("parallel", "torch.nn.parallel.DistributedDataParallel")

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(_TorchDDP):
    """Averages gradients over all ranks; `no_sync()` and the rest are torch's."""

    def __init__(
        self,
        module: torch.nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        broadcast_buffers: bool = True,
        process_group: ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
    ) -> None:
        # Newer torches ask for another name where this one is given.
        buffers = {} if broadcast_buffers else {"broadcast_buffers": False}
        super().__init__(
            module,
            device_ids=device_ids,
            output_device=output_device,
            process_group=process_group,
            bucket_cap_mb=bucket_cap_mb,
            **buffers,
        )
