"""Sides that others are: raw Horovod, and PyTorch's DistributedDataParallel.

Both have the same model, objective and batches as ours, and a fused Adam, in a plain loop.
"""

import gc
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.side import Run, Side, plain_loop
from benchmarks.task import LEARNING_RATE, Task, endless
from hvdvae.vae import VAE


def _adam(model: VAE) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)


@contextmanager
def _raw_horovod(task: Task) -> Iterator[Run]:
    import horovod.torch as hvd

    hvd.init()
    try:
        model = task.network()
        optimizer = hvd.DistributedOptimizer(_adam(model), named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        yield plain_loop(task, model, optimizer, endless(task.loader(hvd.rank(), hvd.size())))
    finally:
        hvd.shutdown()


@contextmanager
def _ddp(task: Task) -> Iterator[Run]:
    from mpi4py import MPI  # Here: teams of one process must not start MPI.

    world = MPI.COMM_WORLD
    os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
    address = f"tcp://127.0.0.1:{world.bcast(_free_port() if world.rank == 0 else None)}"
    distributed.init_process_group(
        "gloo", init_method=address, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=60)
    )
    try:
        yield _ddp_loop(task, world.rank, world.size)
    finally:
        # DDP must be gone before its process group: the other way round its destructor holds the interpreter's
        # lock while it waits for a thread of Gloo's that wants it, now and then for ever.
        gc.collect()
        distributed.destroy_process_group()


def _ddp_loop(task: Task, rank: int, size: int) -> Run:
    model = task.network()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    # A convolution of one channel has strides of which one says nothing; DDP warns of it on every rank.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return plain_loop(task, parallel, _adam(model), endless(task.loader(rank, size)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])


RAW_HOROVOD = Side("raw_horovod", "raw Horovod, a hook a tensor", _raw_horovod)
DDP = Side("ddp", "PyTorch DDP (gloo), bucket views, static graph", _ddp)
