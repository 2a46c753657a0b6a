"""smdistributed_rs: collective communication for data-parallel training.

With PyTorch, importing the package is enough::

    import smdistributed_rs
    torch.distributed.init_process_group("smddp")

It registers the backend and, under mpirun or srun, sets the variables torch's rendezvous reads (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) where they are not set. Without PyTorch, on NumPy arrays and
whatever else has the buffer protocol or DLPack::

    world = smdistributed_rs.init()
    world.all_reduce(array)

Importing needs neither torch nor MPI, libfabric or CUDA. Errors are those of `smdistributed_rs.errors`.
"""

import atexit as _atexit

from . import shared
from ._core import Handle, __version__
from ._core import stop_callbacks as _stop_callbacks
from ._launch import export_launcher_variables
from ._launch import stay_if_failing as _stay_if_failing
from ._torch_hook import register_with_torch
from .communicator import Communicator, World, init
from .errors import (
    AbortedError,
    ArgumentError,
    BootstrapError,
    InternalError,
    LibraryError,
    MismatchError,
    PeerLostError,
    ResourceError,
    SettingError,
    SmddpError,
    TimeoutError,
    TransportError,
    UnsupportedError,
)

__all__ = [
    "AbortedError",
    "ArgumentError",
    "BootstrapError",
    "Communicator",
    "Handle",
    "InternalError",
    "LibraryError",
    "MismatchError",
    "PeerLostError",
    "ResourceError",
    "SettingError",
    "SmddpError",
    "TimeoutError",
    "TransportError",
    "UnsupportedError",
    "World",
    "__version__",
    "init",
    "shared",
]

_atexit.register(_stop_callbacks)
_atexit.register(_stay_if_failing)
export_launcher_variables()
register_with_torch()
