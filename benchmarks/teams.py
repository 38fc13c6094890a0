"""Which sides are measured by which processes.

A team is processes of their own, so that what one side sets (Horovod's environment, how MPI waits, what the allocator
keeps, threads) does not reach another. Sides of one team take turns within a block.
"""

from dataclasses import dataclass

import benchmarks.side_pythae as pythae
import benchmarks.sides_peers as peers
import benchmarks.sides_trainer as trainer
from benchmarks.side import Side


@dataclass(frozen=True)
class Team:
    """Some processes and what they measure."""

    name: str
    sides: tuple[Side, ...]
    ranks: int = 1
    """More than one: they run under mpirun, and measure one side."""
    joins_as_trainer: bool = False
    """Whether MPI starts as the Trainer starts it, or as Python's `from mpi4py import MPI` does."""

    def sides_of(self, model: str) -> tuple[Side, ...]:
        """Those that are measured with this model."""
        return tuple(side for side in self.sides if model in side.models)


ALL: tuple[Team, ...] = (
    Team("alone", trainer.ONE_PROCESS),
    Team("mpi", (trainer.MPI,), ranks=2, joins_as_trainer=True),
    Team("horovod", (trainer.HOROVOD,), ranks=2, joins_as_trainer=True),
    Team("apart", (trainer.APART,), ranks=2, joins_as_trainer=True),
    Team("raw_horovod", (peers.RAW_HOROVOD,), ranks=2),
    Team("ddp", (peers.DDP,), ranks=2),
    Team("pythae", (pythae.PYTHAE,)),
)


def installed() -> list[Team]:
    """The teams that can start here."""
    return [team for team in ALL if team.name != "pythae" or pythae.is_installed()]
