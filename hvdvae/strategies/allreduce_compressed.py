"""`--strategy allreduce --compression CODEC`: synchronous SGD whose gradients are short messages on the wire.

How the mean comes about: mean.py; what the codecs do: compression/.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies.mean import CompressedMean
from hvdvae.strategies.strategy import Strategy
from hvdvae.world import World


class CompressedAllreduce(Strategy):
    """Every rank steps on the mean of what all ranks' messages say: the same bits on all."""

    name = "allreduce"
    engine = "mpi"
    recovers = True
    takes_closures = False

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        world: World,
        *,
        compression: str,
        share: float | None = None,
        rank: int | None = None,
        momentum: float = 0.0,
        **options: Any,
    ) -> None:
        """As Strategy; `compression` to `momentum` as CompressedMean has them. Raises ConfigError."""
        super().__init__(optimizer, model, world, **options)
        flat = self.flat
        # Codecs see no gaps: those would count among the elements of which they send a share, or take the mean size.
        self._runs = flat.layout.runs
        self._mean = CompressedMean(
            world, self._runs.dense(flat.gradient), flat.shapes, compression, share=share, rank=rank, momentum=momentum
        )
        self._compression = compression
        self.own_memory = tuple(name for name in ("remembered", "velocity") if name in self._mean.memory())
        self.saves_average = bool(self.own_memory)
        self.moved = self._mean.traffic

    def exchange(self, gradient: Tensor) -> None:
        """The mean over ranks of what they say, in place."""
        dense = self._runs.dense(gradient)
        self._mean.mean_(dense)
        self._runs.spread(dense, gradient)

    def update(self) -> None:
        """Step; what messages left out is remembered from now on. Raises ConfigError under a GradScaler."""
        if self._mean.remembers and getattr(self, "found_inf", None) is not None:
            raise ConfigError(
                f"compression {self._compression!r} (--compression) remembers gradients, and a GradScaler (--precision "
                "fp16) scales each step's differently: use bf16, or one of --compression fp16, bf16, int8"
            )
        self._mean.keep()
        self.moved.steps += 1
        self.moved.errors += self._mean.error
        super().update()

    def skip(self) -> None:
        """As Strategy's: what this step's message told is nobody's."""
        self._mean.forget()

    def recover(self) -> None:
        """As Strategy's: what the dead remembered is lost."""
        super().recover()
        self._mean.recover()

    def catch_up(self) -> None:
        """As Strategy's: what its message told is not told again."""
        self._mean.catch_up()

    @contextmanager
    def fetched(self, *, state: bool = False) -> Iterator[Tensor]:
        """As Strategy's; with `state`, ranks share equally, for good, what they remember: one vector is saved."""
        if state:
            self._mean.settle()
        with super().fetched(state=state) as rows:
            yield rows

    def memory(self) -> dict[str, Tensor]:
        """As Strategy's: what messages left out."""
        return self._mean.memory()

    def traffic(self) -> dict[str, float]:
        """As Strategy's, and the mean size of what messages left out, as a part of the gradient's."""
        return {**self.moved.metrics(), "compression_error": self.moved.errors / max(self.moved.steps, 1)}

    def results(self) -> dict[str, Any]:
        """As Strategy's."""
        return {"compression": self._compression, **self.traffic()}
