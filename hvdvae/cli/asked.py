"""What the command line of train asks for, before the ranks have met."""

from typing import Any, NamedTuple

from hvdvae.config import TrainConfig, refuse_idle_options
from hvdvae.launcher import Launch


class Asked(NamedTuple):
    """What a command line of train asks for, of this process alone."""

    given: dict[str, Any]
    """Defaults, overlaid with --config and flags."""
    values: dict[str, Any]
    """The same on top of the configuration of the run that --resume continues, where this process sees one."""
    named: frozenset[str] = frozenset()
    """Keys that stand on the command line or in a file of --config, whatever their values."""

    def config(self) -> TrainConfig:
        """What is asked for. Raises ConfigError naming the flag, also for one that was named and changes nothing."""
        config = TrainConfig(**self.values)
        refuse_idle_options(self.values, self.named)
        return config

    def check(self, launch: Launch) -> None:
        """Refuse what cannot work before the ranks meet. Local; raises ConfigError naming the flag."""
        # Only rank 0 must see the folder of the run: what others make of --resume without it may not go together.
        if launch.rank == 0 or not self.values["resume"]:
            self.config()
