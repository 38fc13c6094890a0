"""A run as a checkpoint, and back: weights, optimizer, buffers of every rank, moving average, position.

Randomness needs no state (seeding.py), data order neither (data/sampler.py): both follow from the seed and the
position. At the same world size a resumed run continues bit for bit; at another, the same epoch goes on at the same
example.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hvdvae.checkpoint import Draft, Folder, Piece, Source, spread
from hvdvae.config_kinds import FUNCTION
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.parallel.whole_checkpoint import PartOfCheckpoint, merge
from hvdvae.run_record import check_run, fitting
from hvdvae.strategies.checkpointed import pieces_of_all
from hvdvae.strategies.group_options import as_text, from_text, set_anew, without_tensors
from hvdvae.strategies.optimizer_state import pack

if TYPE_CHECKING:
    from hvdvae.trainer import Trainer
    from hvdvae.world import World


@dataclass
class Position:
    """Where a run stands."""

    epoch: int = 0
    """Epochs that are finished."""
    examples: int = 0
    """Examples of all ranks in the unfinished epoch."""
    step: int = 0
    """Steps in all."""

    @classmethod
    def at(cls, epochs: float, examples: int, steps: int) -> Self:
        """After so many epochs of so many examples of all ranks and steps of each."""
        whole = int(epochs)
        return cls(whole, int((epochs - whole) * examples), int(epochs * steps))

    def advance(self, examples: int) -> None:
        """One step further."""
        self.examples += examples
        self.step += 1

    def next_epoch(self) -> None:
        """The epoch is finished; its remainder is left out."""
        self.epoch += 1
        self.examples = 0


def snapshot(trainer: "Trainer", rows: Tensor, config: Mapping[str, Any]) -> Draft:
    """All that a run needs to continue, good as long as the strategy's `saving` lasts.

    Every rank that steps with others must call it (it blocks where they hold a model together), and ask for the pieces
    or write them. Of a model in parts the first copy's draft is of the whole.

    `rows`: float buffers of all ranks, (size, F); the model has their mean, which is what is evaluated and selected.
    """
    world, optimizer = trainer.world, trainer.optimizer
    pieces, scalars = pieces_of_all(optimizer, trainer.model, rows)
    if trainer.ema is not None:
        averages = optimizer.flat.views(trainer.ema.average)
        if trainer.averaged_statistics is not None:
            averages |= trainer.averaged_statistics.values
        pieces |= {f"ema/{name}": Piece.of(average) for name, average in averages.items()}
    record = {
        "position": asdict(trainer.position),
        "step": trainer.position.step,
        "world_size": world.size,
        "best": trainer.best,
        "owed": _with_null(trainer.owed),
        "names": optimizer.flat.names,
        "optimizer": optimizer.wrapped_class,
        "examples": trainer.batches.examples,
        "optimizer_groups": without_tensors(pack(optimizer.param_groups)),
        "optimizer_counts": sorted(optimizer.counted.names),
        "optimizer_scalars": {
            number: {key: as_text(value, f"state {key!r}") for key, value in found.items()}
            for number, found in scalars.items()
        },
        "skipped_steps": optimizer.skipped_steps,
        "moved": optimizer.moved.counts(),
        "overflows": trainer.stepper.overflows,
        "scaler": trainer.stepper.scaler.state_dict() if trainer.stepper.scaler is not None else None,
        "config": dict(config),
    }
    draft = Draft(pieces, record)
    return draft if optimizer.parts is None else merge(optimizer.parts, draft, optimizer.numbered, trainer.model)


def newest_of(folder: Folder | None, world: "World") -> Source | None:
    """The newest good checkpoint of a run's folder, which rank 0 alone needs to see; None where there is none yet.

    Blocks; every rank must call it. Raises ConfigError without a folder, and CheckpointError where none is whole.
    """
    if folder is None:
        raise ConfigError("resume() has no folder to look in: give the trainer folder=..., or resume a checkpoint")
    found = folder.newest_good() if world.is_first else None
    if world.is_first and found is None and folder.steps():
        raise CheckpointError(f"no checkpoint in {folder.folder} is whole: delete them to begin anew")
    return spread(found, world)


def restore(trainer: "Trainer", checkpoint: Source) -> None:
    """Put a snapshot into a trainer that was built alike, at any world size. Every rank does it; may block (Source).

    Raises CheckpointError where names or shapes do not fit.
    """
    check_run(checkpoint)
    source = part_of(trainer, checkpoint)
    record, file = source.record, source.name
    optimizer, world = trainer.optimizer, trainer.optimizer.world
    if record["names"] != optimizer.flat.names:
        raise CheckpointError(
            f"{file} trains {len(record['names'])} parameters, this model {len(optimizer.flat.names)} "
            f"({_difference(record['names'], optimizer.flat.names)}): resume with the --model, --hidden, --latent it "
            "was saved with"
        )
    _check_same_run(trainer, source)
    load_weights(trainer.model, source)
    optimizer.flat.take_back()
    optimizer.load_master_weights(source.each("model"))
    for _, rows in source.each("buffers"):
        if rows.shape[1] == optimizer.flat.buffers.numel():
            same = rows.shape[0] == world.size
            optimizer.flat.buffers.copy_(rows[world.rank] if same else rows.mean(0))
    memory = optimizer.memory()
    for name, saved in source.each("strategy"):
        # Another strategy, or codec, begins with nothing to remember.
        if name in memory and saved.shape == memory[name].shape:
            memory[name].copy_(saved)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with fitting(file, "state of the optimizer"):
        optimizer.load_entries(record["optimizer_groups"], _entries(source))
    counted = {*record.get("optimizer_counts", ()), *optimizer.counted.names}
    optimizer.counted.names = counted
    for group, mine, saved in zip(optimizer.param_groups, options, record["optimizer_groups"], strict=True):
        # The options of this run rule: whoever resumes with another rate or decay wants it.
        group.update(set_anew(optimizer.wrapped, mine, saved, counted))
    if trainer.ema is not None:
        averages = optimizer.flat.views(trainer.ema.average)
        trainer.ema.average.copy_(optimizer.flat.parameters)  # Where the run kept none.
        for name, average in source.each("ema"):
            with fitting(file, "moving average"):
                if trainer.averaged_statistics is None or not trainer.averaged_statistics.load(name, average):
                    averages[name].copy_(average)
    if trainer.stepper.scaler is not None and record["scaler"] is not None:
        with fitting(file, "state of the loss scaling"):
            trainer.stepper.scaler.load_state_dict(record["scaler"])
    optimizer.skipped_steps, trainer.stepper.overflows = record["skipped_steps"], record["overflows"]
    optimizer.moved.count_on(record.get("moved", {}))
    trainer.position = Position(**record["position"])
    owed = record.get("owed")
    trainer.owed = {name: math.nan if value is None else value for name, value in owed.items()} if owed else None
    # Of another objective it is another number, which those to come cannot be compared with.
    same = judged_by(record["config"]) == judged_by(trainer.configuration)
    trainer.best = record["best"] if same else None


def _with_null(metrics: Mapping[str, float] | None) -> dict[str, float | None] | None:
    """JSON has no NaN."""
    if metrics is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def judged_by(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """What makes the loss of a validation the number that it is: the objective, and the samples of its bound. Pure."""
    objective = config.get("objective")
    return objective, config.get("samples") if objective == "iwae" else None


def _entries(source: Source) -> Iterator[tuple[int, str, Any]]:
    for number, entries in source.record["optimizer_scalars"].items():
        for key, value in entries.items():
            yield int(number), key, from_text(value)
    for name, tensor in source.each("optimizer"):
        number, _, key = name.partition("/")
        yield int(number), key, tensor


def part_of(trainer: "Trainer", checkpoint: Source) -> Source:
    """What this rank's part of the model has of a checkpoint; all of it where ranks hold whole models. Local."""
    optimizer = trainer.optimizer
    if optimizer.parts is None:
        return checkpoint
    return PartOfCheckpoint(optimizer.parts, checkpoint, optimizer.numbered, trainer.model)


DIGEST = "data_digest"


def _check_same_run(trainer: "Trainer", checkpoint: Source) -> None:
    record, file = checkpoint.record, checkpoint.name
    mine = {"optimizer": trainer.optimizer.wrapped_class, "examples": trainer.batches.examples}
    mine |= {key: trainer.configuration[key] for key in ("seed", DIGEST) if key in trainer.configuration}
    # What weights compute is compared with nothing left to defaults (cli/same_function.py).
    if not ("function" in trainer.configuration and "function" in record["config"]):
        for key in FUNCTION:
            if (value := trainer.configuration.get(key)) is not None and record["config"].get(key) is not None:
                mine[key] = value
    saved = {**record["config"], **{key: record[key] for key in ("optimizer", "examples") if key in record}}
    for found in (mine, saved):
        found |= {key: str(found[key]).lower() for key in ("optimizer",) if key in found}  # As the flag names it.
    for key, value in mine.items():
        if key in saved and saved[key] != value:
            what = "an epoch of" if key == "examples" else f"--{key}"
            what = "data of digest" if key == DIGEST else what
            hint = "the same --data and --validation" if key in ("examples", DIGEST) else f"--{key} {saved[key]}"
            raise CheckpointError(
                f"{file} was trained with {what} {saved[key]}{' examples' if key == 'examples' else ''}, this run has "
                f"{value}: resume with {hint}, or start anew in another --out"
            )


def load_weights(model: nn.Module, checkpoint: Source, *, ema: bool = False) -> None:
    """Copy weights and buffers into a model, in place. With `ema`, the moving average instead, where there is one.

    Blocks where the checkpoint is spread. Raises CheckpointError naming the first tensor that does not fit.
    """
    shapes = {name.removeprefix("model/"): s for name, s in checkpoint.shapes.items() if name.startswith("model/")}
    mine = model.state_dict()
    if shapes.keys() != mine.keys():
        raise CheckpointError(
            f"{checkpoint.name} holds another model ({_difference(list(shapes), list(mine))}): build it with the "
            "--model, --hidden, --latent it was saved with"
        )
    for name, shape in shapes.items():
        if shape != tuple(mine[name].shape):
            raise CheckpointError(
                f"{checkpoint.name} holds another model ({name} is {shape} there, "
                f"{tuple(mine[name].shape)} here): build it with the --model, --hidden, --latent it was saved with"
            )
    with torch.no_grad():
        for kind in ("model", "ema") if ema else ("model",):
            for name, tensor in checkpoint.each(kind):
                mine[name].copy_(tensor)


def _difference(saved: list[str], mine: list[str]) -> str:
    only_saved, only_mine = sorted(set(saved) - set(mine)), sorted(set(mine) - set(saved))
    return f"only there: {', '.join(only_saved[:3]) or 'none'}; only here: {', '.join(only_mine[:3]) or 'none'}"
