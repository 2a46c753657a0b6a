"""``import smdistributed.dataparallel.torch.torch_smddp`` registers the backend "smddp", as it did with AWS's library.

After it, the variables that scripts and frameworks read are set as far as a launcher told them: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, SMDATAPARALLEL_LOCAL_RANK, MASTER_ADDR, MASTER_PORT; and the current CUDA device, where
there is one, is that of the local rank. No device, instance or launcher is refused.
"""

from smdistributed.dataparallel.torch import _environment

_environment.before()

import smdistributed_rs  # noqa: E402, F401  registers the backend, sets the launcher's variables

_environment.after()
