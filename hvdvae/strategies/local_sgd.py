"""`--strategy local-sgd` and `--strategy diloco`: ranks step alone, and every H steps average how far they came.

    every step:     this rank's own optimizer steps on its own gradient
    every H steps:  difference = weights at the last average - weights now, its mean over ranks, as it is or compressed
                    velocity = outer momentum * velocity + mean
                    weights = weights at the last average - outer lr * (mean + outer momentum * velocity)

local-sgd has outer lr 1 and no outer momentum: the mean of the weights (Stich 2019). diloco has Nesterov's momentum
(Douillard et al. 2023: inner AdamW, outer lr 0.7, momentum 0.9). Adaptive H: H sqrt(loss now / first loss), so ranks
average more often as they come closer (AdaComm, Wang and Joshi 2019). The inner optimizer's state is each rank's own.
Hierarchical: ranks of a group average their gradients at every step, as allreduce does, and only groups have weights of
their own in between.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError, NonFiniteError, WorldError
from hvdvae.strategies.mean import mean_over_ranks
from hvdvae.strategies.shared_state import share_state
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World


class LocalSgd(Strategy):
    """Between two averages each rank has weights of its own."""

    name = "local-sgd"
    engine = "mpi"
    engine_reason = "averages are the World's own"
    averages_gradients = False
    saves_average = True

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        world: World,
        *,
        sync_every: int,
        adaptive: bool = False,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        group_size: int = 1,
        compression: str = "none",
        share: float | None = None,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        """As Strategy. `sync_every`: H, and the largest one if `adaptive`; `compression` to `rank` as in mean.py.

        `group_size`: ranks that average gradients at every step, 0 for those of a host; one of each then averages with
        the others' (Lin et al. 2020, hierarchical local SGD). Raises ConfigError, WorldError for unequal groups.
        """
        if not isinstance(sync_every, int) or sync_every < 1:
            raise ConfigError(
                f"sync_every (--sync-every) is {sync_every}, expected a whole number of steps, at least 1"
            )
        if not 0 < outer_lr < math.inf:
            raise ConfigError(f"outer_lr (--outer-lr) is {outer_lr}, expected a finite number above 0")
        if not 0 <= outer_momentum < 1:
            raise ConfigError(f"outer_momentum (--outer-momentum) is {outer_momentum}, expected 0 to below 1")
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        self._group, leaders = _groups(world, group_size)
        """Ranks that step alike."""
        # Without momentum correction: what is remembered are differences, and the outer optimizer has a momentum.
        self._mean = mean_over_ranks(
            leaders, self._weights(), flat.shapes, compression, share=share, rank=rank, momentum=0.0
        )
        self._compression = compression
        self._sync_every, self._adaptive = sync_every, adaptive
        self._outer_lr, self._outer_momentum = outer_lr, outer_momentum
        self._anchor = self._weights().clone()
        """Weights at the last average, as they are sent and saved: without the gaps of the vector, (D,)."""
        self._difference = torch.zeros_like(self._anchor)
        self._velocity = torch.zeros_like(self._anchor) if outer_momentum else torch.zeros(0)
        self._shrinkage = torch.tensor([1.0, 0.0], dtype=torch.float64)
        """H of now as a part of the largest, and the first mean loss; 0: not known yet."""
        self._since = torch.zeros(1, dtype=torch.int64)
        """Steps since the last average."""
        self._is_mean = True
        """Whether this rank's weights are the mean of all ranks'."""
        self._losses = torch.zeros(2, dtype=torch.float64)
        """Sum and count since the last average."""
        self.moved = self._mean.traffic

    def watch(self, loss: Tensor) -> None:
        """As Strategy's; an adaptive H follows the loss."""
        super().watch(loss)
        if self._adaptive:
            value = loss.item()
            self._losses += torch.tensor([value, 1.0] if math.isfinite(value) else [0.0, 0.0])

    def exchange(self, gradient: Tensor) -> None:
        """Gradients stay each group's own."""
        if self._group.size > 1:
            self._group.sum_(gradient, "average of gradients in a group").div_(self._group.size)
            self.moved.ring(gradient.nbytes, self._group.size)

    def update(self) -> None:
        """This rank's own step; blocks where H are done, and there every rank must come."""
        self._begin()
        super().update()
        self._is_mean = False
        self._count()

    def skip(self) -> None:
        """A step that this rank could not take counts as one: the others come to the average."""
        self._begin()
        self._is_mean = False  # The others may have stepped.
        self._count()

    def average(self) -> None:
        """Meet. Blocks; every rank must call it after as many steps.

        Raises on all ranks NonFiniteError, or ConfigError where options or numbers of steps differ.
        """
        self._compare("average")
        difference = torch.sub(self._anchor, self._weights(), out=self._difference)
        if self._group.rank == 0:
            self._mean.mean_(difference)
        if self._group.size > 1:
            self._group.broadcast_(difference, what="mean of all groups")
            self.moved.told(difference.nbytes, self._group.size, is_root=self._group.rank == 0)
        self._check_finite(difference)
        self._mean.keep()
        step = difference
        if self._outer_momentum:
            frozen = [place for number, place in enumerate(self.flat.layout.dense_places) if number in self.flat.frozen]
            plain = [(place, difference[place] / self._outer_lr, self._velocity[place].clone()) for place in frozen]
            self._velocity.mul_(self._outer_momentum).add_(difference)
            step = difference.add_(self._velocity, alpha=self._outer_momentum)
            for place, mean, velocity in plain:  # What is frozen takes the mean, and is carried no further.
                step[place], self._velocity[place] = mean, velocity
        self.flat.layout.runs.spread(self._anchor.sub_(step, alpha=self._outer_lr), self.flat.parameters)
        self.flat.publish()
        self._since.zero_()
        self._is_mean = True
        self.moved.averages += 1
        self.moved.errors += self._mean.error
        if self._adaptive:
            self._set_period()

    def finish(self) -> None:
        """The run ends with the same weights on all ranks: their mean. Blocks; every rank must call it."""
        self._settle_on_mean()

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """Inside, the model has the mean of all ranks' weights; after, this rank's own.

        With `state` the mean is for good, and of what optimizers and messages remember too: what is saved is what all
        ranks go on with. The period goes on: the outer step comes when H are done. Blocks; every rank must enter it.
        """
        self.flat.take_back()
        if state:
            self._settle_on_mean()
            self.world.sum_(self._losses, "mean of losses").div_(self.world.size)
            self.moved.ring(share_state(self.world, self.inner), self.world.size)
            if self._group.rank == 0:
                self._mean.settle()
        own = None if self._is_mean else self.flat.parameters.clone()
        if own is not None:
            self._average_plainly(self.flat.parameters, "average of weights")
            self.flat.publish()
        try:
            with super().fetched(state=state) as rows:
                yield rows
        finally:
            if own is not None:
                self.flat.parameters.copy_(own)
                self.flat.publish()

    def restored(self) -> None:
        """As Strategy's: all ranks have the same weights."""
        self._is_mean = True

    def remembered(self) -> None:
        """As Strategy's: within a period each rank has had weights of its own."""
        self._is_mean = not int(self._since)

    def memory(self) -> dict[str, Tensor]:
        """As Strategy's."""
        # Named apart from what strategies remember of gradients.
        remembered = {f"difference_{name}": vector for name, vector in self._mean.memory().items()}
        period = {"anchor": self._anchor, "since": self._since, "losses": self._losses}
        return {"outer_velocity": self._velocity, "shrinkage": self._shrinkage, **period, **remembered}

    def traffic(self) -> dict[str, float]:
        """As Strategy's, and the mean size of what messages left out, as a part of the difference's."""
        return {**self.moved.metrics(), "compression_error": self.moved.errors / max(self.moved.averages, 1)}

    def results(self) -> dict[str, Any]:
        """As Strategy's."""
        steps = self.moved.steps / max(self.moved.averages, 1)
        return {
            "compression": self._compression,
            "averages": self.moved.averages,
            "steps_per_average": steps,
            **self.traffic(),
        }

    def _weights(self) -> Tensor:
        """Without the gaps of the vector, (D,)."""
        return self.flat.layout.runs.dense(self.flat.parameters)

    def _begin(self) -> None:
        if not self._since:
            # Here, since weights may have been loaded meanwhile.
            self._anchor.copy_(self._weights())

    def _count(self) -> None:
        self.moved.steps += 1
        self._since += 1
        if self._since >= self._period:
            self.average()

    @property
    def _period(self) -> int:
        """H of now."""
        return max(1, math.ceil(self._sync_every * float(self._shrinkage[0]))) if self._adaptive else self._sync_every

    def _settle_on_mean(self) -> None:
        """All ranks go on with the mean of their weights, uncompressed. Blocks; every rank must call it.

        Raises NonFiniteError on all ranks.
        """
        self.flat.take_back()
        if not self._is_mean:
            self._compare("average of weights")
            self._average_plainly(self.flat.parameters, "average of weights")
            self._check_finite(self._weights())
            self.flat.publish()
            self._is_mean = True

    def compare_options(self) -> None:
        """As Strategy's, at averages alone: in between ranks do not wait for each other."""

    def _compare(self, what: str) -> None:
        # Checkpoints have the options of one rank, and an average of unequal numbers of steps is nobody's.
        sum_ = partial(self.world.sum_, what=what)
        mine: dict[str, Any] = {"steps": self.moved.steps, "frozen": self.flat.frozen}
        self.equal_options.compare(self.param_groups, self.world, sum_, ranks=self.peers, **mine)

    def _check_finite(self, vector: Tensor) -> None:
        if not bool(torch.isfinite(torch.dot(vector, vector))):
            raise NonFiniteError(
                f"weights of some rank were not finite at the average after step {self.moved.steps}: lower --lr, set "
                "--clip-norm, or average more often (--sync-every)"
            )

    def _average_plainly(self, vector: Tensor, what: str) -> None:
        self.world.sum_(vector, what).div_(self.world.size)
        self.moved.ring(vector.nbytes, self.world.size)

    def _set_period(self) -> None:
        """All ranks come to the same H, since they have the same mean loss."""
        total, count = self.world.sum_(self._losses.clone(), "mean loss").tolist()
        self._losses.zero_()
        if count:
            loss = total / count
            if self._shrinkage[1] == 0:
                self._shrinkage[1] = loss
            if min(loss, float(self._shrinkage[1])) > 0:  # A loss may be negative: then nothing is known, and H stays.
                self._shrinkage[0] = min(1.0, math.sqrt(loss / float(self._shrinkage[1])))


def _groups(world: World, group_size: int) -> tuple[World, World]:
    """This rank's group, and, of the first rank of each, all such: they average for the others.

    Blocks; every rank must call it.
    """
    if group_size == 1:
        return World.alone(device=str(world.device)), world
    group = world.part(_number_of_group(world, group_size))
    return group, world.part(group.rank)


def _number_of_group(world: World, group_size: int) -> int:
    """This rank's. Blocks; every rank must call it."""
    if group_size == 0:
        hosts = world.gather_objects(world.host)
        counts = {hosts.count(host) for host in hosts}
        if len(counts) > 1:
            raise WorldError(
                f"--group-size 0 needs as many ranks on every host, found {sorted(counts)}: start equally many, or set "
                "--group-size to a number that divides the ranks"
            )
        return hosts.index(world.host)
    if group_size < 0 or world.size % group_size:
        raise ConfigError(f"--group-size is {group_size}, expected 0 or a number that divides the {world.size} ranks")
    return world.rank // group_size


class DiLoCo(LocalSgd):
    """The same with an outer optimizer."""

    name = "diloco"
