"""A baseline, not ours: a parameter server as it is often written first, in the manner of mpi_learn.

Each worker sends the list of its gradients, one array a tensor, pickled; the server takes one message at a time in a
blocking receive, makes a step of the user's optimizer tensor by tensor, and sends the list of weights back, pickled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GRADIENTS, WEIGHTS = 11, 12


def serve(comm: Any, model: nn.Module, optimizer: torch.optim.Optimizer, workers: int) -> None:
    """Blocks until every worker has sent None."""
    from mpi4py import MPI

    status, left = MPI.Status(), workers
    while left:
        gradients = comm.recv(source=MPI.ANY_SOURCE, tag=GRADIENTS, status=status)
        if gradients is None:
            left -= 1
            continue
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        comm.send([parameter.detach().numpy() for parameter in model.parameters()], status.source, WEIGHTS)


def worker_loop(comm: Any, server: int, model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[int], None]:
    """A function that takes so many steps; with 0 it says goodbye."""

    def run(steps: int) -> None:
        for _ in range(steps):
            model.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            comm.send([parameter.grad.numpy() for parameter in model.parameters()], server, GRADIENTS)  # type: ignore[union-attr]
            with torch.no_grad():
                for parameter, weights in zip(model.parameters(), comm.recv(source=server, tag=WEIGHTS), strict=True):
                    parameter.copy_(torch.from_numpy(weights))
        if not steps:
            comm.send(None, server, GRADIENTS)

    return run
