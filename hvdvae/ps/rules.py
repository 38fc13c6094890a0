"""How a push changes the weights: plain, staleness-aware learning rate, delay compensation, elastic averaging. Pure.

Shapes: P elements of this server's shard. Every rule changes `weights` (P,) in place, through a torch optimizer whose
parameters are views of it, and leaves `push` (P,) free to be overwritten.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.ps.edits import apply
from hvdvae.quick_start import bare


class Rule(Protocol):
    """The contract of a rule."""

    def apply(self, push: Tensor, worker: int, staleness: int) -> None:
        """Update the weights by one push (P,) of `worker`, with `staleness` updates since that worker's pull."""

    def answered(self, worker: int, weights: Tensor) -> None:
        """This worker computes with these weights (P,) from now on."""

    def edited(self, worker: int, edit: Tensor) -> None:
        """This worker has changed weights by hand (edits.py) since it was answered, and computed with them."""

    def reply(self, worker: int) -> Tensor:
        """What the answer carries (P,): the weights, or what the worker has to do to its own."""


class ShardOptimizer:
    """A torch optimizer over the pieces of a shard, one a parameter group, and the options that workers send."""

    def __init__(self, weights: Tensor, kind: type[Optimizer], groups: list[dict[str, Any]]) -> None:
        """`groups`: options, and `start` and `stop` of the group's slice in `weights`; a slice may be empty."""
        self.weights = weights
        pieces = []
        for group in groups:
            options = {key: value for key, value in group.items() if key not in ("start", "stop")}
            pieces.append({**options, "params": [torch.nn.Parameter(weights[group["start"] : group["stop"]])]})
        self.slices = [slice(group["start"], group["stop"]) for group in groups]
        self.optimizer = bare(kind(pieces))  # type: ignore[call-arg] # the base class asks for defaults

    def set_options(self, groups: list[dict[str, Any]]) -> None:
        """Take the options that a worker has changed."""
        for mine, theirs in zip(self.optimizer.param_groups, groups, strict=True):
            mine.update(theirs)

    def step(self, gradient: Tensor, factor: float = 1.0) -> None:
        """Step on a gradient (P,), at `factor` times the learning rate."""
        groups = self.optimizer.param_groups
        for group, part in zip(groups, self.slices, strict=True):
            group["params"][0].grad = gradient[part]
        rates = [group["lr"] for group in groups]
        if factor != 1.0:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


class Plain:
    """The optimizer's own step on the push, however stale."""

    def __init__(self, optimizer: ShardOptimizer) -> None:
        self._optimizer = optimizer

    def apply(self, push: Tensor, worker: int, staleness: int) -> None:
        """One step."""
        self._optimizer.step(push)

    def answered(self, worker: int, weights: Tensor) -> None:
        """Nothing to remember."""

    def edited(self, worker: int, edit: Tensor) -> None:
        """Nothing to remember."""

    def reply(self, worker: int) -> Tensor:
        """The weights."""
        return self._optimizer.weights


class StalenessLearningRate(Plain):
    """The learning rate divided by the staleness, where that is above one (Zhang, Gupta et al. 2016, eq. 6)."""

    def apply(self, push: Tensor, worker: int, staleness: int) -> None:
        """One step at lr / max(1, staleness)."""
        self._optimizer.step(push, 1.0 / max(1, staleness))


class DelayCompensated(Plain):
    """DC-ASGD (Zheng et al. 2017): g + strength g * g * (weights now - weights of the worker's pull).

    `adaptive` is the paper's DC-ASGD-a: strength / sqrt(moving average of g * g + 1e-7), by element (eqs. 10, 11).
    """

    EPSILON = 1e-7

    def __init__(
        self, optimizer: ShardOptimizer, workers: int, strength: float, *, adaptive: bool, decay: float = 0.95
    ) -> None:
        """Keeps the weights that each worker has, (workers, P)."""
        super().__init__(optimizer)
        self._strength, self._decay = strength, decay
        self._pulled = {worker: optimizer.weights.clone() for worker in range(workers)}
        self._mean_square = torch.zeros_like(optimizer.weights) if adaptive else None
        self._scratch = torch.empty_like(optimizer.weights)
        self._root = torch.empty_like(optimizer.weights) if adaptive else None

    def apply(self, push: Tensor, worker: int, staleness: int) -> None:
        """Compensate, then one step. With no update since the pull the push is taken as it is."""
        if self._mean_square is not None:
            self._mean_square.mul_(self._decay).addcmul_(push, push, value=1 - self._decay)
        change = torch.sub(self._optimizer.weights, self._pulled[worker], out=self._scratch)
        change.mul_(push).mul_(push)
        if self._mean_square is not None:
            change.div_(torch.add(self._mean_square, self.EPSILON, out=self._root).sqrt_())
        self._optimizer.step(push.add_(change, alpha=self._strength))

    def answered(self, worker: int, weights: Tensor) -> None:
        """Remember what it has."""
        if worker not in self._pulled:
            self._pulled[worker] = torch.empty_like(weights)
        self._pulled[worker].copy_(weights)

    def edited(self, worker: int, edit: Tensor) -> None:
        """Remember what it has made of them."""
        apply(edit, self._pulled[worker])


class Elastic:
    """EASGD (Zhang, Choromanska, LeCun 2015): workers push their own weights x; an elastic force ties both together.

    e = rate (x - center); center <- center + e here, and the worker does x <- x - e, with the e that the answer has.
    """

    def __init__(self, center: Tensor, rate: float) -> None:
        """`rate` in (0, 1): the paper's alpha."""
        self._center, self._rate = center, rate
        self._force: dict[int, Tensor] = {}

    def apply(self, push: Tensor, worker: int, staleness: int) -> None:
        """Move the center towards the worker."""
        if worker not in self._force:
            self._force[worker] = torch.empty_like(push)
        force = self._force[worker]
        torch.sub(push, self._center, out=force).mul_(self._rate)
        self._center.add_(force)

    def answered(self, worker: int, weights: Tensor) -> None:
        """Nothing to remember."""

    def edited(self, worker: int, edit: Tensor) -> None:
        """Nothing to remember: weights that workers train by themselves are pushed whole."""

    def reply(self, worker: int) -> Tensor:
        """The force e."""
        return self._force[worker]


RULES = ("plain", "staleness-lr", "dcasgd", "dcasgd-a", "easgd")


def rule(name: str, optimizer: ShardOptimizer, *, workers: int, strength: float, elasticity: float) -> Rule:
    """The rule of `--rule`. `strength`: DC-ASGD's lambda; `elasticity`: EASGD's alpha."""
    if name == "staleness-lr":
        return StalenessLearningRate(optimizer)
    if name in ("dcasgd", "dcasgd-a"):
        return DelayCompensated(optimizer, workers, strength, adaptive=name == "dcasgd-a")
    if name == "easgd":
        return Elastic(optimizer.weights, elasticity)
    return Plain(optimizer)
