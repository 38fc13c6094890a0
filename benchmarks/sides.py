"""All sides of the comparison, and which of them may be open at the same time."""

import benchmarks.side_pythae as pythae
import benchmarks.sides_peers as peers
import benchmarks.sides_trainer as trainer
from benchmarks.side import Side

Unit = tuple[Side, ...]
"""Sides that are measured together."""


def units(model: str) -> list[Unit]:
    """What is measured one after the other in a round, for this model.

    Two ranks: one side at a time, since Horovod and Gloo bring threads. One process: all, taking turns.
    """
    two = [(side,) for side in (*trainer.TWO_RANKS, *peers.TWO_RANKS) if model in side.models]
    alone = [*trainer.ONE_PROCESS, *peers.ONE_PROCESS, *(pythae.ONE_PROCESS if pythae.is_installed() else ())]
    return [*two, tuple(side for side in alone if model in side.models)]


def names(model: str) -> dict[str, str]:
    """Key of each side -> what it is, pythae included where it is not installed."""
    present = [side for unit in units(model) for side in unit]
    return {side.key: side.what for side in (*present, *pythae.ONE_PROCESS)}
