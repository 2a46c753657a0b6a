"""The name by which SMDDP's own deprecation warning called its replacement: torch.distributed, backend registered."""

from torch.distributed import *  # noqa: F403

from smdistributed.dataparallel.torch import torch_smddp  # noqa: F401
