"""Horovod's library: found, and started on ranks of our choice."""

import os
from typing import Any

from hvdvae.errors import WorldError


def import_horovod() -> Any:
    """Horovod's torch module, not started. Raises WorldError where it cannot be imported."""
    # Users may make process sets at any time, not only before Horovod starts.
    os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    try:
        import horovod.torch
    except Exception as error:  # Horovod raises whatever its extension raises where MPI or torch changed under it.
        raise WorldError(
            f"Horovod cannot be imported ({error}): run launch/install.sh, or choose --engine mpi or --strategy local"
        ) from error
    return horovod.torch


def start_horovod(comm: Any, size: int, seconds: float) -> Any:
    """Horovod's torch module, started on an MPI communicator, or, without one, on all that the launcher started.

    `size`: ranks that there must be. `seconds`: after which a stalled operation raises. Blocks; all must call it.
    Raises WorldError where Horovod is not installed or was built for another MPI or torch.
    """
    # Horovod then names the ranks that a stalled operation misses, and raises where it would hang.
    whole = max(1, int(seconds))
    os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(max(1, whole // 2)))
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(whole))
    hvd = import_horovod()
    hvd.init(comm=comm) if comm is not None else hvd.init()
    if hvd.size() != size:
        raise WorldError(
            f"Horovod counts {hvd.size()} ranks, the launcher {size}: it was built for another MPI; run `hvdvae doctor`"
        )
    return hvd
