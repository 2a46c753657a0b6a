"""Every rank says who it is, what it was given and what came of a collective: one line of JSON in SM_MODEL_DIR."""

import json
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

import smdistributed.dataparallel.torch.torch_smddp  # noqa: F401

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SMDATAPARALLEL_LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SMDATAPARALLEL_USE_SINGLENODE", "SMDATAPARALLEL_USE_HOMOGENEOUS", "SMDATAPARALLEL_SERVER_ADDR", "FI_PROVIDER",
    "NCCL_DEBUG", "MINE", "SM_HOSTS",
)  # fmt: skip
dist.init_process_group("smddp")
tensor = torch.ones(4) * (dist.get_rank() + 1)
dist.all_reduce(tensor)
found = {name: os.environ.get(name) for name in NAMES}
found |= {"host": socket.gethostname(), "sum": tensor[0].item(), "nodes": list(dist.group.WORLD._comm.nodes)}
Path(os.environ["SM_MODEL_DIR"], f"place-{dist.get_rank()}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
