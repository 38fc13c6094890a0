"""Training in step goes on when a rank dies, or when hosts are added: without a checkpoint, and without a lost step.

    1. RankLost is raised on all ranks that live, whatever they waited in (World.waiting), or HostsChanged
    2. they meet anew, numbered anew (World.recover), and the strategy takes up its exchange among them
    3. who had not taken the last step takes the state of those who had; so does who is new
    4. what is left of the epoch is shared anew, the learning rate follows the number of ranks, and what was
       interrupted is done again
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from hvdvae import checkpoint as checkpoints
from hvdvae.errors import HostsChanged, RankLost, WorldError
from hvdvae.resume import restore, snapshot

if TYPE_CHECKING:
    from hvdvae.trainer import Trainer

T = TypeVar("T")


def surviving(trainer: "Trainer", action: Callable[[], T]) -> T:
    """Do what all ranks do together, and once more, without the dead, where a rank dies in it.

    Blocks; every rank must call it. Raises RankLost where the strategy cannot go on.
    """
    while True:
        try:
            return action()
        except RankLost as lost:
            if not trainer.optimizer.recovers:
                raise
            _recover(trainer, lost)


def enter(trainer: "Trainer") -> None:
    """Take up a place among ranks that train already (an elastic horovodrun). Blocks."""
    trainer.world.enter()
    _catch_up(trainer, new=True)


def _recover(trainer: "Trainer", lost: RankLost) -> None:
    """Every rank that lives comes here."""
    world, began, before = trainer.world, time.perf_counter(), trainer.world.size
    died, added = list[str](), list[str]()
    while True:
        with suppress(RankLost):  # One more died meanwhile.
            change = world.recover()
            if not any(change) and not isinstance(lost, HostsChanged):  # Then it would come again.
                raise WorldError(str(lost)) from lost
            died, added = died + change.died, added + change.added
            trainer.optimizer.recover()
            _catch_up(trainer)
            break
    trainer.died += died
    trainer.take_place(before)
    if world.is_first:
        news = [f"{name} has died" for name in died] + [f"{name} has come" for name in added]
        sys.stderr.write(
            f"hvdvae: {', '.join(news) or 'nobody has gone'}; {world.size} ranks go on from step "
            f"{trainer.position.step}, {time.perf_counter() - began:.2f} s later\n"
        )


def _catch_up(trainer: "Trainer", *, new: bool = False) -> None:
    """After a death: ranks that had not yet taken the step that others had take those others' state instead.

    So do those that are `new`. The others differ by one step at most, and hold the same where they do not. Blocks;
    every rank must call it.
    """
    world, optimizer = trainer.world, trainer.optimizer
    found = world.gather_objects([trainer.position.step, new], "steps of those that are left")
    last = max(step for step, is_new in found if not is_new)
    behind = [is_new or step < last for step, is_new in found]
    if not any(behind):
        return
    leader = behind.index(False)
    own = optimizer.flat.buffers.clone()
    mine = snapshot(trainer, own[None], trainer.configuration) if world.rank == leader else None
    state = checkpoints.shared(mine, leader, world)
    if behind[world.rank]:
        restore(trainer, state)
        optimizer.flat.buffers.copy_(own)
