"""What several test modules use. It loads neither torch nor the package: some tests look at what loads them."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import timedelta


def start(seconds: float = 30) -> None:
    """Makes torch's default group, with this time limit."""
    import torch.distributed as dist

    import smdistributed_rs  # noqa: F401

    dist.init_process_group("smddp", timeout=timedelta(seconds=seconds))


def loader_knows(library: str) -> bool:
    """Whether the dynamic loader finds a library that nobody has told it the place of."""
    # In few users' PATH.
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    ldconfig = shutil.which("ldconfig", path=places)
    assert ldconfig, f"no ldconfig in {places}"
    return library in subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=30, check=True).stdout
