"""The options of a parameter server, and the check that they go together."""

from dataclasses import dataclass

from hvdvae.compression.feedback import check_momentum
from hvdvae.errors import ConfigError
from hvdvae.ps.rules import RULES

CONSISTENCIES = ("asp", "ssp", "bsp")
COMPRESSIONS = ("fp16", "bf16", "int8", "sign", "topk")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of a parameter server. `check` refuses those that do not go together."""

    consistency: str = "asp"
    staleness: int | None = None
    """SSP's bound, in clocks."""
    backup_workers: int = 0
    replicas: int = 0
    """Backups of each server, which go on where it dies (ULFM)."""
    replace_workers: bool = False
    """Start a worker in the place of one that died (ULFM)."""
    rule: str = "plain"
    strength: float | None = None
    """DC-ASGD's lambda; default 0.04, and 2 for the variance-normalized form (Zheng et al. 2017, section 6)."""
    elasticity: float | None = None
    """EASGD's alpha; default 0.9 / number of workers (Zhang et al. 2015, section 5)."""
    push_every: int = 1
    """Steps of a worker between two pushes."""
    fetch_every: int | None = None
    """Steps of a worker between two pulls: a multiple of `push_every`, by default the same."""
    prefetch: bool = False
    """Compute the next step while the push and pull of the last are under way."""

    compression: str = "none"
    """Codec of pushes and pulls: none, or one of COMPRESSIONS."""
    compression_share: float | None = None
    compression_momentum: float = 0.0

    def check(self, *, workers: int, servers: int) -> None:
        """Raises ConfigError naming the flag to change. `servers`: ranks that serve, backups too."""
        if self.replicas not in (0, 1):
            raise ConfigError(f"--replicas is {self.replicas}, expected 0 or 1: a server has a backup, or none")
        if servers % (1 + self.replicas):
            raise ConfigError(
                f"{servers} ranks serve, and --replicas {self.replicas} makes pairs of them: start an even number"
            )
        if self.replace_workers and servers > 1:
            raise ConfigError(
                f"--replace-workers with {servers} ranks that serve: the server that starts a worker must be the only "
                "one; use --servers 1, without --replicas"
            )
        if self.consistency not in CONSISTENCIES:
            raise ConfigError(f"--consistency is {self.consistency!r}, expected one of {', '.join(CONSISTENCIES)}")
        if self.rule not in RULES:
            raise ConfigError(f"--rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        if self.consistency == "ssp" and (self.staleness is None or self.staleness < 0):
            raise ConfigError(
                f"--consistency ssp needs a bound: --staleness {self.staleness} found, expected 0 or more clocks"
            )
        if self.consistency != "ssp" and self.staleness is not None:
            raise ConfigError(f"--staleness bounds --consistency ssp, found with --consistency {self.consistency}")
        if self.backup_workers and self.consistency != "bsp":
            raise ConfigError(f"--backup-workers goes with --consistency bsp, found with {self.consistency}")
        if not 0 <= self.backup_workers < workers:
            raise ConfigError(
                f"--backup-workers is {self.backup_workers} of {workers} workers, expected 0 to {workers - 1}: a step "
                "needs somebody's gradient"
            )
        if self.backup_workers and self.shards(servers) > 1:
            raise ConfigError(
                f"--backup-workers with --servers {self.shards(servers)}: servers could disagree on which push was "
                "late; use one"
            )
        self._check_rule()
        self._check_periods()
        self._check_compression()

    def _check_compression(self) -> None:
        check_momentum(self.compression, self.compression_momentum)
        if self.compression == "none":
            return
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                f"--compression {self.compression} needs ranks that average, and parameter servers take pushes one by "
                f"one: use one of {', '.join(COMPRESSIONS)}, or --strategy allreduce"
            )
        if self.rule == "easgd":
            raise ConfigError(
                f"--compression {self.compression} is for gradients, and --rule easgd pushes weights: use --strategy "
                "local-sgd, which compresses differences"
            )
        if self.compression == "fp16" and self.push_every > 1:
            raise ConfigError(
                f"--compression fp16 ends at 65504, and the sum of --push-every {self.push_every} gradients may be "
                "beyond: use --compression bf16"
            )
        if self.replicas:
            raise ConfigError(
                f"--compression {self.compression} does not go with --replicas {self.replicas}: a backup does not know "
                "what a worker holds; drop one of them"
            )

    def _check_rule(self) -> None:
        if self.strength is not None and not self.rule.startswith("dcasgd"):
            raise ConfigError(f"--dc-strength goes with --rule dcasgd or dcasgd-a, found with {self.rule}")
        if self.elasticity is not None and (self.rule != "easgd" or not 0 < self.elasticity < 1):
            raise ConfigError(
                f"--elasticity is {self.elasticity} with --rule {self.rule}, expected above 0 and below 1, with easgd"
            )
        if self.consistency == "bsp" and self.rule != "plain":
            raise ConfigError(
                f"--rule {self.rule} is for pushes that come one by one: use --consistency asp or ssp, or --rule plain"
            )
        if self.prefetch and self.rule in ("dcasgd", "dcasgd-a", "easgd"):
            raise ConfigError(
                f"--prefetch computes with weights that are one pull older than those --rule {self.rule} takes it to "
                "have: use one of the two"
            )

    def _check_periods(self) -> None:
        for flag, found in (("--push-every", self.push_every), ("--fetch-every", self.pull_every)):
            if found < 1:
                raise ConfigError(f"{flag} is {found}, expected at least 1 step")
        if self.pull_every % self.push_every:
            raise ConfigError(
                f"--fetch-every {self.fetch_every} is no multiple of --push-every {self.push_every}: weights come with "
                "the answer to a push"
            )
        periodic = self.pull_every > 1
        if periodic and self.consistency == "bsp":
            raise ConfigError("--push-every and --fetch-every go with --consistency asp or ssp: bsp is every step")
        if periodic and self.prefetch:
            raise ConfigError("--prefetch goes with a push and a pull at every step: leave --push-every, --fetch-every")
        if periodic and self.rule.startswith("dcasgd"):
            raise ConfigError(
                f"--rule {self.rule} compensates gradients of the weights that were pulled, and with --push-every and "
                "--fetch-every they are of the worker's own: use one of the two"
            )
        if self.rule == "easgd" and self.pull_every != self.push_every:
            raise ConfigError("--rule easgd pulls when it pushes: leave --fetch-every, set --push-every (its period)")

    @property
    def pull_every(self) -> int:
        """Steps of a worker between two pulls."""
        return self.fetch_every if self.fetch_every is not None else self.push_every

    def shards(self, servers: int) -> int:
        """Into how many pieces so many ranks that serve cut the weights: each has 1 + `replicas` holders."""
        return servers // (1 + self.replicas)

    def elasticity_of(self, workers: int) -> float:
        """EASGD's alpha for so many workers."""
        return self.elasticity if self.elasticity is not None else 0.9 / max(workers, 1)

    def strength_of(self) -> float:
        """DC-ASGD's lambda."""
        default = 2.0 if self.rule == "dcasgd-a" else 0.04
        return self.strength if self.strength is not None else default
