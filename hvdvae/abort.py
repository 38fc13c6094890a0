"""End the whole job at once, from any rank and any state."""

import os
import subprocess
import sys
from typing import NoReturn

from hvdvae.launcher import survives_deaths

GRACE_SECONDS = 2
"""That the launcher has to end the job before it is told by a signal."""


def abort_job(code: int) -> NoReturn:
    """End this process, and through MPI, where it runs, all others, with a non-zero code.

    Without MPI the launcher notices the death and ends the others. Does not return; buffers are flushed first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        mpi = sys.modules["mpi4py.MPI"]
        if mpi.Is_initialized() and not mpi.Is_finalized():
            if survives_deaths(os.environ):
                _end_launcher()
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def _end_launcher() -> None:
    """Where ranks may die and others go on, Open MPI's launcher has been seen to take an abort for one more death."""
    nowhere = subprocess.DEVNULL
    command = ["sh", "-c", f"sleep {GRACE_SECONDS}; kill -TERM {os.getppid()}"]
    subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
