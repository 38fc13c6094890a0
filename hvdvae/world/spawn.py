"""New ranks in the place of those that died, where all ranks step together (MPI_Comm_spawn).

The new processes are this one's command line, and find in their environment (launcher.ENTERS) that others train
already. Whoever serves parameters has another way, in which nobody waits (ps/recruiter.py).
"""

import os
import sys
from typing import Any

from mpi4py import MPI

from hvdvae.launcher import ENTERS


def start_ranks(comm: Any, count: int) -> Any:
    """Start so many processes; the communicator of all, the new ones last, or None where they cannot be started.

    Blocks until they have started MPI; every rank of `comm` must call it.
    """
    options = MPI.Info.Create()
    options.Set("PMIX_ENVAR", f"{ENTERS}={count}")
    options.Set("wdir", os.getcwd())
    try:
        return comm.Spawn(sys.executable, sys.orig_argv[1:], maxprocs=count, info=options, root=0).Merge(high=False)
    except MPI.Exception as error:
        if comm.rank == 0:
            sys.stderr.write(
                f"hvdvae: no rank could be started in the place of one that died ({error}); the others go on: has the "
                "job a free slot (mpirun --map-by :OVERSUBSCRIBE)?\n"
            )
        return None


def join_those_that_started_me() -> Any:
    """The communicator of all. Blocks until they have come; every new process must call it."""
    return MPI.Comm.Get_parent().Merge(high=True)
