"""Our strategies, in a loop of one's own, as README shows it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.strategies import Strategy
from hvdvae.world import World


class Ours:
    """Any of them. On a rank that serves, building it serves until the workers have ended, and ends the process."""

    def __init__(self, config: TrainConfig, model: nn.Module, world: World) -> None:
        """Blocks; every rank must build it."""
        self.model, self.rank, self.size = model, world.rank, world.size
        self.optimizer: Strategy = assemble.distributed(config, model, world)
        self.steps_together = self.optimizer.synchronous
        self._world = world
        self._mine = 0
        self._seen = [0] * world.size
        """Steps of each worker; of one that has died, those that it had done."""

    def prepare(self) -> None:
        """As Contender's."""
        self.optimizer.start()
        self._world.barrier("start")

    def zero_grad(self) -> None:
        """As Contender's."""
        self.optimizer.zero_grad()

    def exchange(self) -> None:
        """Push and pull are all of a worker's step; otherwise the allreduce."""
        if self.steps_together:
            self.optimizer.synchronize()
        else:
            self.optimizer.step()

    def update(self) -> None:
        """As Contender's."""
        self._mine += 1
        if self.steps_together:
            self.optimizer.step()

    def steps_done(self) -> int:
        """By what the servers told with their last answer."""
        if self.steps_together:
            return self._mine * self.size
        clocks, period = self.optimizer.client.clocks, self.optimizer.plan.push_every  # type: ignore[attr-defined]
        self._seen = [max(seen, clock * period) for seen, clock in zip(self._seen, clocks, strict=True)]
        self._seen[self.rank] = self._mine
        return sum(self._seen)

    def any(self, flag: bool) -> bool:
        """As Contender's."""
        return any(self._world.gather_objects(flag, "whether to stop")) if self.steps_together else flag

    def look(self) -> AbstractContextManager[object]:
        """As Contender's: what the strategy has evaluated; the first rank's affair where ranks do not step together."""
        return self.optimizer.fetched() if self.steps_together or self.rank == 0 else nullcontext()

    def end(self) -> dict[str, Any]:
        """As Contender's."""
        self.optimizer.finish()
        counted = self.optimizer.results()
        self._world.close()
        return counted
