"""These tests run at any number of ranks, with the same bodies:

    pytest tests/parallel                        one rank
    mpirun -np 2 pytest tests/parallel           two, and so on (also horovodrun --gloo -np 2)

All ranks run the same tests in the same order. If one fails on any rank, the others may wait for it in a collective for
ever; so the rank that fails prints why and ends the whole job.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdvae.abort import abort_job
from hvdvae.launcher import detect
from hvdvae.world import World

LAUNCH = detect(os.environ)
torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """One rank's progress is enough."""
    if LAUNCH.rank > 0:
        config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process


def pytest_report_header() -> str:
    return f"rank {LAUNCH.rank} of {LAUNCH.size}, launcher {LAUNCH.launcher}"


def pytest_exception_interact(node: pytest.Item, report: Any) -> None:
    if LAUNCH.size > 1:
        sys.__stderr__.write(f"\nFAILED on rank {LAUNCH.rank} of {LAUNCH.size}: {node.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        abort_job(1)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """All ranks that were launched; one without a launcher."""
    joined = World.create(device="cpu", deadline=60)
    yield joined
    joined.close()


@pytest.fixture
def shared_path(world: World, tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(world.gather_objects(str(tmp_path))[0])


@pytest.fixture(params=["mpi", "horovod"])
def engine(request: pytest.FixtureRequest, world: World) -> str:
    """Every engine that this launch has."""
    name: str = request.param
    if name == "mpi" and world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    if name == "horovod" and world.launcher != "none":
        pytest.importorskip("horovod.torch")
    return name
