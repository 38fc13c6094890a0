"""End the whole job at once, from any rank and any state."""

import os
import sys
from typing import NoReturn


def abort_job(code: int) -> NoReturn:
    """End this process, and through MPI, where it runs, all others, with a non-zero code.

    Without MPI the launcher notices the death and ends the others. Does not return; buffers are flushed first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        mpi = sys.modules["mpi4py.MPI"]
        if mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)
