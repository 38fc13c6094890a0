"""What of the wrapped optimizer must stay as it was: which parameters it has, and which of them are trained."""

from torch import nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError


class Wrapped:
    """A torch optimizer as it was when it was wrapped."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Remember. Local."""
        self._optimizer = optimizer
        groups: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
        everything = [parameter for group in groups for parameter in group]
        self._lengths = [len(group) for group in groups]
        self._frozen = [parameter for parameter in everything if not parameter.requires_grad]
        self.numbers = [number for number, parameter in enumerate(everything) if parameter.requires_grad]
        """Of trained parameters, as the optimizer numbers all. Frozen ones are nobody's to change."""
        self.trained = [[parameter for parameter in group if parameter.requires_grad] for group in groups]
        """Of each group."""

    def check(self) -> None:
        """Raises ConfigError where what is laid out in vectors is no more what the user wants trained. Local."""
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ConfigError(
                "a parameter that was frozen when the optimizer was wrapped has requires_grad now, and would not be "
                "trained: wrap with all that is to be trained, or wrap anew"
            )
        if [len(group["params"]) for group in self._optimizer.param_groups] != self._lengths:
            raise ConfigError(
                "parameters were taken out of a param_group, or put in, since the optimizer was wrapped: wrap with "
                "those that are to be trained, or wrap anew"
            )
