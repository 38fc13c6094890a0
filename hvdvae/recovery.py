"""Training in step goes on when a rank dies, or when hosts are added: without a checkpoint, and without a lost step.

1. RankLost is raised on all ranks that live, whatever they waited in (World.waiting), or HostsChanged
2. they meet anew, numbered anew (World.recover), and the strategy takes up its exchange among them
3. some have done what they were in, others not, as the last answer came or did not: the latter take the state of
   the former, and do the same next; so do those that are new
4. what is left of the epoch is shared anew, the learning rate follows the number of ranks

Ranks that hold a model together take a step all or none of them (parallel/survival.py): in 3 they need no state.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hvdvae import checkpoint as checkpoints
from hvdvae.errors import HostsChanged, MisfitError, PartLost, RankLost
from hvdvae.resume import Position, restore, snapshot
from hvdvae.version import __version__
from hvdvae.world import deaths

if TYPE_CHECKING:
    from hvdvae.trainer import Trainer

T = TypeVar("T")


def surviving(trainer: "Trainer", action: Callable[[], T]) -> T:
    """Do, after training, what all ranks do together, and once more, without the dead, where a rank dies in it.

    Blocks; every rank must call it. Raises RankLost where the strategy cannot go on.
    """
    while True:
        try:
            return action()
        except RankLost as lost:
            recover(trainer, lost)


def enter(trainer: "Trainer") -> None:
    """Take up a place among ranks that train already. Blocks."""
    try:
        trainer.world.enter()
        _catch_up(trainer, new=True)
    except RankLost as lost:
        recover(trainer, lost, new=True)


def recover(trainer: "Trainer", lost: RankLost, *, new: bool = False) -> None:
    """Go on without the dead. Blocks; every rank that lives must come. `new`: this one has no state yet.

    Mutates the trainer where others were further. Raises `lost` where the strategy cannot go on, or nobody is missing.
    """
    if trainer.optimizer.is_finished and (missing := deaths.missing(trainer.world)):
        trainer.optimizer.lose(sorted(missing))
        trainer.died += trainer.world.recover().died
        if trainer.world.is_first:
            sys.stderr.write(f"hvdvae: {', '.join(missing.values())} has died after training; the others go on\n")
        return
    if not (trainer.optimizer.recovers and trainer.world.survives_deaths):
        if missing := deaths.missing(trainer.world):
            parts = trainer.optimizer.parts
            held = {rank: f" ({parts.groups.mesh.part(rank)})" if parts is not None else "" for rank in missing}
            names = ", ".join(f"{name}{held[rank]}" for rank, name in missing.items())
            raise RankLost(f"{names} has died: {lost}") from lost
        raise lost
    world, began, before = trainer.world, time.perf_counter(), trainer.optimizer.world.size
    parts = trainer.optimizer.parts
    died, added = list[str](), list[str]()
    is_done = False
    while not is_done:
        try:
            if parts is not None and parts.survival is not None:
                parts.survival.withdraw()
            change = world.recover(trains=not new)
            died, added = died + change.died, added + change.added
            if died or added or isinstance(lost, HostsChanged):
                trainer.optimizer.recover()
                _catch_up(trainer, new=new)
            is_done = True
        except PartLost as part:
            raise PartLost(f"{', '.join(died)} has died: {part}") from lost
        except RankLost:
            continue  # One more died meanwhile.
    if not (died or added or isinstance(lost, HostsChanged)):
        raise lost  # It was something else, and would come again.
    trainer.died += died
    trainer.take_place(before)
    mesh = f" (mesh {parts.groups.mesh})" if parts is not None else ""
    if world.is_first:
        news = [f"{name} has died" for name in died] + [f"{name} has come" for name in added]
        sys.stderr.write(
            f"hvdvae: {', '.join(news) or 'nobody has gone'}; {world.size} ranks{mesh} go on from step "
            f"{trainer.position.step}, {time.perf_counter() - began:.2f} s later\n"
        )


def _catch_up(trainer: "Trainer", *, new: bool = False) -> None:
    """Ranks that are behind, or `new`, take the state and the stage of one that is furthest. Blocks; all must call it.

    The others differ by one step, or one stage, at most, and hold the same where they do not.
    """
    world, optimizer = trainer.world, trainer.optimizer
    mine = [trainer.stage.number, trainer.position.step]
    told = [mine, new, asdict(trainer.stage), asdict(trainer.position), trainer.best, trainer.owed]
    found = world.gather_objects(told, "stages of those that are left")
    furthest = max(place for place, is_new, *_ in found if not is_new)
    if any(is_new for _, is_new, *_ in found):
        everyone = world.gather_objects(_identity(trainer), "comparison of new ranks")
        if new:
            _check_fits(everyone[world.rank], everyone[[is_new for _, is_new, *_ in found].index(False)])
    behind = [is_new or place < furthest for place, is_new, *_ in found]
    if not any(behind):
        return
    leader = behind.index(False)
    if optimizer.parts is None:
        _take_state(trainer, leader, is_behind=behind[world.rank], new=new)
    if behind[world.rank]:
        _, _, stage, position, trainer.best, trainer.owed = found[leader]
        trainer.stage, trainer.position = type(trainer.stage)(**stage), Position(**position)


def _identity(trainer: "Trainer") -> dict[str, Any]:
    """What ranks that train together have alike, JSON-able."""
    own = {key: value for key, value in trainer.configuration.items() if key not in _OF_A_RANK}
    return {**own, "version of hvdvae": __version__, "version of torch": torch.__version__}


_OF_A_RANK = ("device", "threads", "out", "resume", "overwrite")


def _check_fits(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises MisfitError where a new rank is not as those that train. Pure."""
    for key, value in theirs.items():
        if mine.get(key) != value:
            raise MisfitError(
                f"this new rank has {key} {mine.get(key)}, and those that train have {value}: start it with the same "
                "flags, data and libraries"
            )


def _take_state(trainer: "Trainer", leader: int, *, is_behind: bool, new: bool) -> None:
    world, optimizer = trainer.world, trainer.optimizer
    rows = optimizer.flat.buffers.clone()[None]
    state = snapshot(trainer, rows, trainer.configuration).taken() if world.rank == leader else None
    told = checkpoints.shared(state, leader, world)
    has_skipped = told.record["skipped_steps"] > optimizer.skipped_steps
    if is_behind and not new and told.record["step"] > trainer.position.step and not has_skipped:
        optimizer.catch_up()
    # Float buffers, and what messages of this rank have left out, are each rank's own.
    own = [] if new else [optimizer.flat.buffers, *(optimizer.memory()[name] for name in optimizer.own_memory)]
    kept = [tensor.clone() for tensor in own]
    if is_behind:
        restore(trainer, told)
        for tensor, before in zip(own, kept, strict=True):
            tensor.copy_(before)
        if new:
            for name in optimizer.own_memory:
                optimizer.memory()[name].zero_()
