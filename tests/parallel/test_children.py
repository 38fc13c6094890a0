"""A process that a rank starts is no rank, though it inherits the launcher's variables."""

import json
import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hvdvae.errors import WorldError
from hvdvae.world import World

PROGRAM = """
import json
from hvdvae.world import World
world = World.create(device="cpu")
world.barrier()
found = [world.rank, world.size, world.is_first]
try:
    from mpi4py import MPI
    found.append(MPI.COMM_WORLD.size)
except ImportError:
    found.append(1)
print(json.dumps(found))
"""


def place(world: World) -> list[Any]:
    """Rank and size, and what becomes of a sum."""
    try:
        world.sum_(torch.ones(1))
    except WorldError as error:
        return [world.rank, world.size, str(error)]
    return [world.rank, world.size, "summed"]


class Places(Dataset[list[Any]]):
    """Each example is what a worker's own World says; `made` in the rank, or anew in the worker."""

    def __init__(self, made: World | None) -> None:
        self._made = made

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[Any]:
        return place(self._made if self._made is not None else World.create(device="cpu"))


def as_in_rank(world: World, found: list[Any]) -> None:
    """A worker that cuts data by rank and size gets its rank's share, and meets nobody."""
    assert found[:2] == [world.rank, world.size]
    assert found[2] == "summed" if world.size == 1 else f"started by rank {world.rank} of {world.size}" in found[2]


def test_a_spawned_worker_that_makes_a_world_has_its_ranks_place(world: World) -> None:
    loader = DataLoader(
        Places(None), num_workers=1, batch_size=None, multiprocessing_context=multiprocessing.get_context("spawn")
    )
    for found in loader:
        as_in_rank(world, found)
    world.barrier()


def test_a_forked_worker_does_not_speak_for_its_rank(world: World) -> None:
    loader = DataLoader(
        Places(world), num_workers=1, batch_size=None, multiprocessing_context=multiprocessing.get_context("fork")
    )
    for found in loader:
        as_in_rank(world, found)
    total = world.sum_(torch.ones(1))
    assert float(total) == world.size, "the rank itself goes on as before"


def test_a_program_that_a_rank_runs_is_alone(world: World) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [0, 1, True, 1]
    world.barrier()


def test_an_exception_in_a_forked_child_does_not_end_the_job(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    child = os.fork()
    if child == 0:
        sys.excepthook(KeyError, KeyError("the child's own"), None)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert "uncaught exception on rank" not in capfd.readouterr().err
    world.barrier()
