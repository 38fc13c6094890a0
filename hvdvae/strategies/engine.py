"""Which library carries the allreduce, and why."""

from typing import Any, NamedTuple

from hvdvae.compression import CODECS
from hvdvae.errors import ConfigError, WorldError
from hvdvae.world import World

ENGINES = ("horovod", "mpi", "auto")


class Engine(NamedTuple):
    """A choice and its reason, for the log."""

    name: str
    reason: str


def choose_engine(
    engine: str | None,
    world: World,
    *,
    compression: str = "none",
    reduce_op: str = "average",
    process_set: Any = None,
) -> Engine:
    """Resolve `auto` and None (the default), and refuse what an engine cannot do. Pure but for the World's facts.

    Raises ConfigError or WorldError, naming the flag to change.
    """
    if engine not in (None, *ENGINES):
        raise ConfigError(f"engine (--engine) is {engine!r}, expected one of {', '.join(ENGINES)}")
    if compression not in ("none", *CODECS):
        raise ConfigError(
            f"compression (--compression) is {compression!r}, expected none or one of {', '.join(CODECS)}"
        )
    if reduce_op not in ("average", "adasum"):
        raise ConfigError(f"reduce_op (--reduce-op) is {reduce_op!r}, expected average or adasum")
    if reduce_op == "adasum" and world.size & (world.size - 1):
        raise WorldError(f"--reduce-op adasum needs a power of two of ranks, found {world.size}")
    if reduce_op == "adasum" and compression != "none":
        raise ConfigError(f"--compression {compression} does not go with --reduce-op adasum: choose one of them")
    if reduce_op == "adasum" and process_set is not None:
        raise ConfigError("process_set does not go with reduce_op (--reduce-op) adasum, which is over all ranks")
    if compression not in ("none", "fp16") and process_set is not None:
        raise ConfigError(f"process_set does not go with --compression {compression}: only fp16 does")
    if engine == "horovod" and compression not in ("none", "fp16"):
        raise ConfigError(
            f"--engine horovod carries --compression fp16 alone, found {compression}, which MPI carries: drop "
            "one of them"
        )
    alone = world.launcher == "none" and process_set is None
    if compression not in ("none", "fp16") or (compression == "fp16" and (engine == "mpi" or alone)):
        carrier = "Horovod's Gloo" if world.launcher == "horovodrun-gloo" else "MPI"
        return Engine("mpi", f"--compression {compression} is ours, its messages are carried by {carrier}")
    only_horovod = compression != "none" or reduce_op != "average" or process_set is not None
    if engine == "auto":
        return _choose(world, only_horovod)
    if engine == "mpi":
        if only_horovod:
            raise ConfigError(
                "--engine mpi averages over all ranks: --reduce-op adasum and a process_set need --engine horovod"
            )
        if world.launcher == "horovodrun-gloo":
            raise ConfigError(
                "--engine mpi under horovodrun --gloo: MPI sees one process there. Use --engine horovod, or start with "
                "mpirun, srun or horovodrun --mpi"
            )
        return Engine("mpi", "as asked (--engine mpi)")
    if world.launcher == "none":
        return Engine("none", "one process without a launcher exchanges nothing")
    return Engine("horovod", "the default" if engine is None else "as asked (--engine horovod)")


def _choose(world: World, only_horovod: bool) -> Engine:
    if only_horovod:
        return Engine("horovod", "fp16 compression, Adasum and process sets are Horovod's")
    if world.launcher == "horovodrun-gloo":
        return Engine("horovod", "horovodrun --gloo has no MPI")
    if world.device.type == "cuda":
        return Engine("horovod", "on GPUs NCCL moves gradients without passing through host memory")
    return Engine(
        "mpi",
        "on CPU ranks one MPI allreduce leaves the core to the computation; Horovod's thread takes part of it",
    )
