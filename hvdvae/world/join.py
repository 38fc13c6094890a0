"""The steps by which a process joins a world: its device, its libraries, its communicators."""

import socket
from typing import Any, NamedTuple

import torch

from hvdvae import abort
from hvdvae.errors import ConfigError, WorldError
from hvdvae.launcher import Launch
from hvdvae.world.collectives import Alone, Collectives
from hvdvae.world.horovod import import_horovod
from hvdvae.world.roles import order_of_roles, place_on_host


def check_servers(servers: int, launch: Launch) -> None:
    """Raises ConfigError where so many ranks of this launch cannot be servers."""
    if servers < 0:
        raise ConfigError(f"{servers} parameter servers (--servers), expected at least 1")
    if not servers:
        return
    if launch.launcher == "horovodrun-gloo":
        raise ConfigError(
            "--strategy ps under horovodrun --gloo: MPI sees one process there. Start with mpirun, srun or "
            "horovodrun --mpi"
        )
    if servers >= launch.size:
        raise ConfigError(
            f"{servers} parameter servers (--servers, --replicas) of {launch.size} started ranks leave none to train, "
            f"expected at most {max(launch.size - 1, 0)}: start more, mpirun -np {servers + 1} or above"
        )


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device that --device names; auto is a GPU by local rank where there is one. Raises ConfigError."""
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = f"cuda:{local_rank % gpus}" if gpus else "cpu"
    elif name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # A device without numbers (meta) fails here.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name} cannot be used ({str(error).splitlines()[0]}): expected auto, cpu, "
            "or a GPU that this torch sees"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Joined(NamedTuple):
    """What a process has once it is in."""

    everyone: Collectives
    inquiry: Any = None
    """Of the watchdogs; None where MPI has no threads, or is not there."""
    comm: Any = None
    """The MPI communicator of all ranks, trainers first; None without MPI."""
    local_rank: int = 0
    """Among the ranks of the same role on this host."""
    local_size: int = 1


def join_mpi(launch: Launch, servers: int) -> Joined:
    """Meet the launcher's ranks, and number them so that the `servers` that serve are the last.

    Blocks; every rank must call it. Raises WorldError where MPI is missing or is not the launcher's; one rank needs
    none.
    """
    try:
        from mpi4py import MPI

        from hvdvae.world.mpi import MpiCollectives, MpiInquiry, can_ask_from_threads
    except (ImportError, RuntimeError) as error:  # mpi4py raises the latter where it finds no MPI library.
        if launch.size == 1:
            return Joined(Alone())
        raise WorldError(
            f"started by {launch.launcher} with {launch.size} ranks, but mpi4py cannot be imported ({error}): "
            "run launch/install.sh, or pip install mpi4py against the MPI that launches the job"
        ) from error
    if launch.size != MPI.COMM_WORLD.size:
        raise WorldError(
            f"{launch.launcher} started {launch.size} ranks, but MPI ({MPI.Get_library_version().split(',')[0]}) "
            f"counts {MPI.COMM_WORLD.size}: the launcher belongs to another MPI. Use that MPI's own mpirun, or "
            "`srun --mpi=pmix`; `hvdvae doctor` says which MPI is in use"
        )
    carrier = MpiCollectives(MPI.COMM_WORLD)
    place, neighbours = launch.local_rank, launch.local_size
    counts = [int(count) for count in carrier.gather_bytes(str(servers).encode())]
    if odd := [rank for rank, count in enumerate(counts) if count != counts[0]]:
        raise WorldError(
            f"rank {odd[0]} was started for {counts[odd[0]]} parameter servers, rank 0 for {counts[0]} (--strategy, "
            "--servers, --replicas): start all ranks with the same program and options"
        )
    if servers:
        hosts = [name.decode() for name in carrier.gather_bytes(socket.gethostname().encode())]
        order = order_of_roles(hosts, servers)
        mine = order.index(carrier.rank)
        carrier = MpiCollectives(MPI.COMM_WORLD.Split(0, mine))
        place, neighbours = place_on_host(hosts, order, servers)[mine]
    inquiry = MpiInquiry(carrier.comm) if carrier.size > 1 and can_ask_from_threads() else None
    abort.TELL_OTHERS[:] = [inquiry.end_others] if inquiry is not None else []
    return Joined(carrier, inquiry, carrier.comm, place, neighbours)


def join_parent() -> Any:
    """The communicator of this process, rank 0, and of the server that started it, rank 1. Blocks for that."""
    from mpi4py import MPI

    return MPI.Comm.Get_parent().Merge(high=False)


def split_roles(comm: Any, color: bool) -> Collectives:
    """Collectives of the ranks of `comm` that have the same color. Blocks; every rank must call it."""
    from hvdvae.world.mpi import MpiCollectives

    part = comm.Split(int(color), comm.rank)
    try:
        return MpiCollectives(part)
    finally:
        part.Free()


def join_gloo() -> Collectives:
    """Collectives over Horovod, where there is no MPI. Blocks; every rank must call it."""
    import_horovod()
    from hvdvae.world.gloo import HorovodCollectives

    return HorovodCollectives()
