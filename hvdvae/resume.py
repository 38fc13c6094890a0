"""A run as a checkpoint, and back: weights, optimizer, buffers of every rank, moving average, position.

Randomness needs no state (seeding.py), data order neither (data/sampler.py): both follow from the seed and the
position. At the same world size a resumed run continues bit for bit; at another, the same epoch goes on at the same
example.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hvdvae.checkpoint import Checkpoint
from hvdvae.errors import CheckpointError
from hvdvae.parallel.whole_checkpoint import cut, merge

if TYPE_CHECKING:
    from hvdvae.trainer import Trainer


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


def snapshot(trainer: "Trainer", rows: Tensor, config: Mapping[str, Any]) -> Checkpoint:
    """All that a run needs to continue, in views that are good as long as the strategy's `fetched` lasts.

    Local; where ranks hold a model together, all of them must call it, and the first gets the whole.

    `rows`: float buffers of all ranks, (size, F); the model has their mean, which is what is evaluated and selected.
    """
    world, optimizer = trainer.world, trainer.optimizer
    state = optimizer.state_dict()
    tensors = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    tensors["buffers"] = rows
    tensors |= {f"strategy/{name}": tensor for name, tensor in optimizer.memory().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{number}/{key}"] = value
            else:
                scalars.setdefault(str(number), {})[key] = value
    if trainer.ema is not None:
        averages = optimizer.flat.views(trainer.ema.average)
        tensors |= {f"ema/{name}": average for name, average in averages.items()}
    record = {
        "position": asdict(trainer.position),
        "step": trainer.position.step,
        "world_size": world.size,
        "best": trainer.best,
        "names": optimizer.flat.names,
        "optimizer": optimizer.wrapped_class,
        "examples": trainer.batches.examples,
        "optimizer_groups": state["param_groups"],
        "optimizer_scalars": scalars,
        "skipped_steps": optimizer.skipped_steps,
        "overflows": trainer.stepper.overflows,
        "scaler": trainer.stepper.scaler.state_dict() if trainer.stepper.scaler is not None else None,
        "config": dict(config),
    }
    if optimizer.parts is not None:
        tensors, record = merge(optimizer.parts, tensors, record, optimizer.numbered, trainer.model)
    return Checkpoint(tensors, record)


def restore(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Put a snapshot into a trainer that was built alike, at any world size. Local; every rank does it.

    Raises CheckpointError where names or shapes do not fit.
    """
    checkpoint = part_of(trainer, checkpoint)
    tensors, record, file = checkpoint
    optimizer, world = trainer.optimizer, trainer.optimizer.world
    if record["names"] != optimizer.flat.names:
        raise CheckpointError(
            f"{file} trains {len(record['names'])} parameters, this model {len(optimizer.flat.names)} "
            f"({_difference(record['names'], optimizer.flat.names)}): resume with the --model, --hidden, --latent it "
            "was saved with"
        )
    _check_same_run(trainer, checkpoint)
    load_weights(trainer.model, checkpoint)
    rows = tensors["buffers"]
    if rows.shape[1] == optimizer.flat.buffers.numel():
        same = rows.shape[0] == world.size
        optimizer.flat.buffers.copy_(rows[world.rank] if same else rows.mean(0))
    for name, memory in optimizer.memory().items():
        saved = tensors.get(f"strategy/{name}")
        # Another strategy, or codec, begins with nothing to remember.
        if saved is not None and saved.shape == memory.shape:
            memory.copy_(saved)
    state: dict[int, dict[str, Any]] = {
        int(number): dict(entries) for number, entries in record["optimizer_scalars"].items()
    }
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/", 2)
            state.setdefault(int(number), {})[key] = tensor
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": record["optimizer_groups"]})
    if trainer.ema is not None:
        for name, average in optimizer.flat.views(trainer.ema.average).items():
            average.copy_(tensors.get(f"ema/{name}", tensors[f"model/{name}"]))
    if trainer.stepper.scaler is not None and record["scaler"] is not None:
        trainer.stepper.scaler.load_state_dict(record["scaler"])
    for group, mine in zip(optimizer.param_groups, options, strict=True):
        # The options of this run rule: whoever resumes with another rate or decay wants it.
        group.update(mine)
    optimizer.skipped_steps, trainer.stepper.overflows = record["skipped_steps"], record["overflows"]
    trainer.position = Position(**record["position"])
    trainer.best = record["best"]


def part_of(trainer: "Trainer", checkpoint: Checkpoint) -> Checkpoint:
    """What this rank's part of the model has of a checkpoint, views; all of it where ranks hold whole models. Local."""
    optimizer = trainer.optimizer
    if optimizer.parts is None:
        return checkpoint
    tensors, record = cut(optimizer.parts, checkpoint.tensors, checkpoint.record, optimizer.numbered, trainer.model)
    return Checkpoint(tensors, record, checkpoint.name)


FIXED = ("seed", "binarization", "likelihood")
"""Keys of the configuration that a resume may not change: data order and what the loss measures follow from them."""


def _check_same_run(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    record, file = checkpoint.record, checkpoint.name
    mine = {"optimizer": trainer.optimizer.wrapped_class, "examples": trainer.batches.examples}
    mine |= {key: trainer.configuration[key] for key in FIXED if key in trainer.configuration}
    saved = {**record["config"], **{key: record[key] for key in ("optimizer", "examples") if key in record}}
    for key, value in mine.items():
        if key in saved and saved[key] != value:
            what = "an epoch of" if key == "examples" else f"--{key}"
            hint = "the same --data and --validation" if key == "examples" else f"--{key} {saved[key]}"
            raise CheckpointError(
                f"{file} was trained with {what} {saved[key]}{' examples' if key == 'examples' else ''}, this run has "
                f"{value}: resume with {hint}, or start anew in another --out"
            )


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, ema: bool = False) -> None:
    """Copy weights and buffers into a model, in place. With `ema`, the moving average instead, where there is one.

    Raises CheckpointError naming the first tensor that does not fit.
    """
    saved = {name.removeprefix("model/"): t for name, t in checkpoint.tensors.items() if name.startswith("model/")}
    mine = model.state_dict()
    if saved.keys() != mine.keys():
        raise CheckpointError(
            f"{checkpoint.name} holds another model ({_difference(list(saved), list(mine))}): build it with the "
            "--model, --hidden, --latent it was saved with"
        )
    for name, tensor in saved.items():
        if tensor.shape != mine[name].shape:
            raise CheckpointError(
                f"{checkpoint.name} holds another model ({name} is {tuple(tensor.shape)} there, "
                f"{tuple(mine[name].shape)} here): build it with the --model, --hidden, --latent it was saved with"
            )
    with torch.no_grad():
        for name, tensor in saved.items():
            mine[name].copy_(tensor)
        if ema:
            for name, tensor in checkpoint.tensors.items():
                if name.startswith("ema/"):
                    mine[name.removeprefix("ema/")].copy_(tensor)


def _difference(saved: list[str], mine: list[str]) -> str:
    only_saved, only_mine = sorted(set(saved) - set(mine)), sorted(set(mine) - set(saved))
    return f"only there: {', '.join(only_saved[:3]) or 'none'}; only here: {', '.join(only_mine[:3]) or 'none'}"
