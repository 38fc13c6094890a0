"""What a run asks of a strategy besides steps: to begin and to end, to go on without the dead, and what it counted."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from hvdvae.strategies.common_model import CommonModel
from hvdvae.strategies.equal_options import EqualOptions
from hvdvae.world import World

if TYPE_CHECKING:
    from hvdvae.parallel.parts import Parts


class RunMember(CommonModel):
    """A strategy as the Trainer knows it. Here is what most of them answer."""

    name = ""
    """As in `--strategy`."""
    engine = "none"
    """What carries the collectives: none, horovod or mpi."""
    engine_reason = "one process exchanges nothing"
    """Why that one, for the log."""
    synchronous = True
    """Whether all ranks take the same step at the same time, and hold the same weights after it."""
    joined_at: float | None = None
    """Epochs that had been done when this rank took the place of one that died; None: it was there from the start."""
    precision: str | None = None
    """The only one that it computes in, as in --precision."""
    is_told_the_step = False
    """Whether somebody else, as the Trainer, tells the watchdog which step this is."""
    is_told_the_passes = False
    """Whether somebody else, as the Trainer, weighs losses so that a step is of `backward_passes_per_step` passes."""
    parts: "Parts | None" = None
    """Where several ranks hold a model together: this rank's part."""
    is_finished = False
    """Whether `finish` has returned, and ranks need nothing of each other any more but what they do after training."""
    saves_average = False
    """Whether a save averages, for good, what each rank has of its own: the run then goes on from the mean."""
    recovers = False
    """Whether those that are left can go on when a rank has died (ULFM)."""
    own: list[slice]
    """Of the vectors, what this rank answers for in the global norm."""
    equal_options: EqualOptions
    """Compares those of ranks that step together."""

    def hold(self, parts: "Parts") -> None:
        """Train this part of a model that several ranks hold: norm and checkpoints are the whole model's. Local."""
        parts.check(self.param_groups)
        self.parts, self.own = parts, parts.own(self.flat)
        parts.groups.whole.watchdog.part_of = lambda rank: parts.groups.mesh.part(rank)
        # Who dies takes a part of the model along: others must hold it, too.
        self.recovers = self.recovers and parts.groups.whole.survives_deaths
        if self.recovers:
            # Imported here: it needs MPI.
            from hvdvae.parallel.survival import Survival

            parts.survival = Survival(parts.groups)

    @property
    def whole(self) -> World:
        """All ranks that train, also those that hold other parts of the model; `world` has those that hold this one."""
        return self.world if self.parts is None else self.parts.groups.whole

    def start(self) -> None:
        """Called by every rank before its first step of a run."""

    def tell_progress(self, epochs: float) -> None:
        """Let others know, where somebody asks, how many epochs this rank has done. Local."""

    def signal_to_leave(self, own: int) -> int:
        """Number of the signal for which this rank ends its run now, 0: none. Local. `own`: that it got itself."""
        return own

    def signal_of_all(self, known: int, own: int) -> int:
        """Number of the signal that has ended the run, 0: none; the same on all ranks. Every rank must call it then.

        May block. `known`: that this rank has left for; `own`: that it got itself.
        """
        return known

    def finish(self) -> None:
        """Return once every rank has taken its last step of a run. Every rank must call it."""

    def editing(self) -> AbstractContextManager[None]:
        """Inside, weights may be changed by hand after a step (clamped, masked, loaded), alike on all ranks.

        What trains on the ranks needs no such word; parameter servers hold the weights, and hear of it by this.
        """
        return nullcontext()

    def recover(self) -> None:
        """Take up the exchange with those that are left, after World.recover; weights and state stay as they are.

        Blocks; every living rank must call it. Only where `recovers`. Raises PartLost, and
        SystemExit on a rank that the others have no work for.
        """
        if self.parts is not None and self.parts.survival is not None:
            self.parts.survival.regroup()
        self.equal_options.begin()
        self.zero_grad()

    def lose(self, ranks: Sequence[int]) -> None:
        """These ranks of `world` have died once all had finished. Local."""

    def catch_up(self) -> None:
        """Others have taken a step that this rank had its part in, and did not come to take. Local."""

    @property
    def share(self) -> tuple[int, int]:
        """This rank's place among those that train, and their number: changes where one dies and the others go on."""
        return self.world.rank, self.world.size

    def traffic(self) -> dict[str, float]:
        """Bytes that this rank has sent and received, in all and a step. Local."""
        return {}

    def results(self) -> dict[str, Any]:
        """What the summary of a run has to say of this strategy, JSON-able. Local, after `finish`."""
        return {**self.traffic()}

    def arithmetic(self) -> AbstractContextManager[Any]:
        """What a model with these weights is to be evaluated in. Local."""
        return nullcontext()
