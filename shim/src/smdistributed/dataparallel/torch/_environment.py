"""What importing `torch_smddp` does to the process: variables of SMDDP are taken over, explained or removed, and the
CUDA device is chosen that is current once CUDA is used."""

from __future__ import annotations

import logging
import os

# Before any part of smdistributed_rs that needs torch: what registers the backend waits for torch, and needs those too.
import torch  # noqa: F401

_log = logging.getLogger("smdistributed.dataparallel")

WITHOUT_EFFECT = {
    "SMDATAPARALLEL_OPTIMIZE_SDP": "every collective is served in one job, so there is nothing to choose",
    "SMDATAPARALLEL_LMC_ENABLE": "there is no such thing",
    "SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES": "staging memory does not depend on the size of messages (SMDDP_STAGING)",
    "SMDDP_AG_SORT_BUFFER_SIZE_BYTES": "staging memory does not depend on the size of messages (SMDDP_STAGING)",
    "USE_SMDDP_COLLECTIVES": "the backend given to init_process_group decides",
}
"""SMDDP's variables that users set and that mean nothing here. What SageMaker's toolkit sets by itself is not listed:
SMDATAPARALLEL_SERVER_ADDR and _PORT are used, the mode flags and SAGEMAKER_INSTANCE_TYPE need no word."""

_UNKNOWN_TO_US = "SMDDP_"
"""`smdistributed_rs` refuses settings of this prefix that it does not know."""


def before() -> None:
    """Before `smdistributed_rs` reads its settings."""
    for name, why in WITHOUT_EFFECT.items():
        value = os.environ.get(name)
        if value is None:
            continue
        if name.startswith(_UNKNOWN_TO_US):
            del os.environ[name]
        if _first_rank():
            _log.warning("%s=%s has no effect: %s", name, value, why)


def after() -> None:
    """After it has set the launcher's variables."""
    # `before` comes before it.
    from smdistributed_rs.cuda import choose_device

    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdecimal():
        return
    if not os.environ.get("SMDATAPARALLEL_LOCAL_RANK"):
        os.environ["SMDATAPARALLEL_LOCAL_RANK"] = local
    # Scripts of SMDDP call a barrier, or move the model to "cuda", before they choose a device of their own.
    choose_device(int(local))


def _first_rank() -> bool:
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
