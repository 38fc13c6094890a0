"""What Open MPI is asked for before anything of ours imports mpi4py: MPI_Init reads it. The user's settings win."""

import shutil
from collections.abc import MutableMapping

from hvdvae.launcher import detect, survives_deaths


def prefer(environ: MutableMapping[str, str]) -> None:
    """Set what is not set yet. Mutates `environ`."""
    # It waits by spinning. Yielding in the spin gives the core to whoever computes on it: Horovod's other thread, a
    # late rank, another job.
    environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Over TCP it answers "send me the rest" behind what it is sending itself, so that of two ranks that send to each
    # other one waits for the other: half the speed of a slow link. Without "put" there is no such answer.
    environ.setdefault("OMPI_MCA_btl_tcp_flags", "send,inplace")
    # Its shared windows need no UCX, which complains on every host that it does not find its way on.
    environ.setdefault("OMPI_MCA_osc", "^ucx")
    # Version 4 takes libfabric's `net`, which is newer than it and only TCP, for a fast network: matched receives
    # fail there. Version 5 leaves it out by itself. A list beside one of what to include would be refused.
    if not any(name in environ for name in _PROVIDERS):
        environ["OMPI_MCA_mtl_ofi_provider_exclude"] = "shm,sockets,tcp,udp,rstream,usnic,net"
    # Where ranks may die, not to meet once more in MPI_Finalize: its fence can wait for the dead. World.close has met.
    if survives_deaths(environ):
        environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")


def without_ports(environ: MutableMapping[str, str]) -> None:
    """Where all ranks are on one host, as Open MPI 5's launcher says, let them listen on no port. Mutates `environ`.

    They meet in shared memory. Their TCP listens on all addresses, whichever interface it is told to use. Not where new
    ranks may be started (MPI_Comm_spawn), which meet the others over TCP alone, where memory is short, or where the
    user has said what is to be used. For programs that start no ranks themselves, before MPI starts.
    """
    launch = detect(environ)
    if launch.launcher != "mpirun" or launch.joins or launch.enters or not 1 < launch.size == launch.local_size:
        return
    if survives_deaths(environ) or environ.get("OMPI_MCA_btl") or not environ.get("OMPI_VERSION", "").startswith("5."):
        return
    try:
        room = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if room > 2 * SEGMENT_BYTES * launch.size:
        environ["OMPI_MCA_btl"] = "self,sm"


SEGMENT_BYTES = 16 << 20
"""That Open MPI takes for each rank's messages to others of its host."""
_PROVIDERS = [
    f"OMPI_MCA_{part}_provider_{way}"
    for part in ("mtl_ofi", "btl_ofi", "opal_common_ofi")
    for way in ("include", "exclude")
]
"""What says which of libfabric's providers to use: names of one setting."""
