"""A server's slice of the weights, and what changes it.

Shapes: P elements of this server's slice, F of the workers' float buffers (on the last server), N workers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdvae.ps.edits import apply
from hvdvae.ps.plan import Plan
from hvdvae.ps.rules import Rule, ShardOptimizer, rule
from hvdvae.ps.state import Manifest, packed, unpacked


class Weights:
    """The slice, its optimizer, and the update rule. Knows nothing of when, nor of messages."""

    def __init__(
        self,
        plan: Plan,
        *,
        workers: int,
        buffers: int,
        pieces: Sequence[slice],
        length: int,
        dtype: torch.dtype,
        optimizer: str,
        clip_norm: float | None,
        sum_over_servers: Callable[[Tensor], Tensor],
    ) -> None:
        """All zero until `start`. `pieces`: of the parameter groups; `optimizer`: a class of torch.optim.

        `clip_norm`: global norm at which gradients are clipped; `sum_over_servers` adds up a number (1,) of each.
        """
        self.vector = torch.zeros(length, dtype=dtype)
        """(P,)"""
        self.buffers = torch.zeros(workers, buffers, dtype=dtype)
        """(N, F): each worker's."""
        self.pieces, self.length = pieces, length
        self._plan, self._workers, self._kind = plan, workers, optimizer
        self._clip_norm, self._sum_over_servers = clip_norm, sum_over_servers
        self._mean = torch.empty(length, dtype=dtype) if plan.consistency == "bsp" and workers > 1 else None
        self._optimizer: ShardOptimizer
        self._options: list[dict[str, Any]] | None = None
        """Those that were set last."""
        self._rule: Rule

    def start(self, options: list[dict[str, Any]], manifest: Manifest, state: list[Tensor]) -> None:
        """Take options and state of the optimizer, a piece (piece,) each; `vector` holds the weights by now."""
        groups = [
            {**group, "start": piece.start, "stop": piece.stop}
            for group, piece in zip(options, self.pieces, strict=True)
        ]
        self._optimizer = ShardOptimizer(self.vector, getattr(torch.optim, self._kind), groups)
        unpacked(self._optimizer.optimizer, manifest, state)
        self._rule = rule(
            self._plan.rule,
            self._optimizer,
            workers=self._workers,
            strength=self._plan.strength_of(),
            elasticity=self._plan.elasticity_of(self._workers),
        )

    def set_options(self, options: list[dict[str, Any]] | None) -> None:
        """Make the next update with these options of all groups, learning rates aside; None: as it is."""
        if options is not None and options is not self._options:
            self._optimizer.set_options(options)
            self._options = options

    def update(self, pushes: Sequence[Tensor], rates: Sequence[float], worker: int, staleness: int) -> None:
        """Make one update of the mean of these pushes (P,), which may be overwritten. `worker`: whose is the first."""
        push = pushes[0]
        if len(pushes) > 1:
            assert self._mean is not None
            push = self._mean.copy_(push)
            for other in pushes[1:]:
                push.add_(other)
            push.mul_(1 / len(pushes))
        if self._clip_norm is not None:
            self._clip(push, self._clip_norm)
        for group, rate in zip(self._optimizer.optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate)
        self._rule.apply(push, worker, staleness)

    def edit(self, edit: Tensor, worker: int) -> None:
        """Take what this worker has changed by hand (P,), as edits.py has it; it has computed with it since."""
        apply(edit, self.vector)
        self._rule.edited(worker, edit)

    def answer(self, worker: int) -> Tensor:
        """What a worker is to get now (P,); changes with the next update."""
        return self._rule.reply(worker)

    def answered(self, worker: int, held: Tensor | None = None) -> None:
        """The present weights went to this worker; `held` (P,): what it has of them, where a codec made that less."""
        self._rule.answered(worker, self.vector if held is None else held)

    def state(self) -> tuple[Manifest, list[Tensor]]:
        """The optimizer's, in views."""
        return packed(self._optimizer.optimizer)

    def _clip(self, gradient: Tensor, limit: float) -> None:
        square = self._sum_over_servers(torch.dot(gradient, gradient).double().view(1))
        norm = float(square) ** 0.5
        if norm > limit:
            gradient.mul_(limit / norm)
