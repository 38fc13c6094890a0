"""One process needs no MPI, whatever launcher started it."""

import os
import sys

import pytest
import torch

from hvdvae.errors import WorldError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.unit.test_launcher import OPEN_MPI, SRUN

ONE = {
    "srun": SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    "mpirun": OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
}


@pytest.fixture(autouse=True)
def _without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_COMM_", "PMI", "SLURM_", "HOROVOD_", "HVDVAE_")):
            monkeypatch.delenv(name)
    for module in [name for name in sys.modules if name.startswith("hvdvae.world.mpi")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mpi4py", None)


@pytest.mark.parametrize("launcher", ONE)
def test_one_process_trains_without_mpi4py(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    for name, text in ONE[launcher].items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HVDVAE_RANK", "")  # The test's own environment gets it back.
    world = World.create(device="cpu")
    assert (world.rank, world.size, world.launcher, world.is_first) == (0, 1, "none", True)
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, world=world)
    model(torch.ones(3, 2)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    world.close()


def test_several_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in OPEN_MPI.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(WorldError, match="mpirun with 8 ranks, but mpi4py cannot be imported"):
        World.create(device="cpu")
