"""`DistributedDataParallel` of SMDDP 1.x, by the shorter of its two paths."""

from smdistributed.dataparallel.torch.parallel.distributed import DistributedDataParallel

__all__ = ["DistributedDataParallel"]
