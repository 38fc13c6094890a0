"""`--strategy local`: one process, nothing to exchange. The plain version that the others are held against."""

from torch import Tensor

from hvdvae.strategies.strategy import Strategy


class Local(Strategy):
    """Steps on this process's gradient."""

    name = "local"

    def exchange(self, gradient: Tensor) -> None:
        """The mean over one rank."""
