"""Rank 1 fails in the way told, while the others are at a collective."""

import argparse
import os
import signal
import sys

import torch
import torch.distributed as dist

import smdistributed.dataparallel.torch.torch_smddp  # noqa: F401

parser = argparse.ArgumentParser()
parser.add_argument("--way", choices=["raise", "exit", "kill", "mismatch"])
way = parser.parse_args().way

dist.init_process_group("smddp")
tensor = torch.ones(1)
dist.all_reduce(tensor)
if dist.get_rank() == 1:
    if way == "raise":
        raise ValueError("the third layer is missing")
    if way == "exit":
        sys.exit(7)
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "mismatch":
        tensor = torch.ones(2)
dist.all_reduce(tensor)
