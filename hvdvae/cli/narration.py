"""What a run says on the terminal: at its start, and at its end."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hvdvae.config import TrainConfig
from hvdvae.data import Dataset, describe_values
from hvdvae.parallel.mesh import Mesh
from hvdvae.trainer import Trainer

Processor = Mapping[str, Any]
MOST_NAMED = 8
"""Ranks in a line."""


def opening(
    config: TrainConfig, trainer: Trainer, dataset: Dataset, folder: Path, named: Collection[str], processor: Processor
) -> str:
    """What is trained on what, how, and where results go. Local.

    `named`: keys that somebody gave a value; the others are marked as defaults where a run begins. `processor`:
    torch.cpu.get_capabilities(), where this torch has it.
    """
    world, optimizer = trainer.world, trainer.optimizer
    resumed = f", resumed at step {trainer.position.step}" if trainer.position.step else ""

    def mark(key: str) -> str:
        return "" if key in named or resumed else " (default)"

    rate = float(optimizer.param_groups[0]["lr"])
    parts = optimizer.parts
    mesh = Mesh(world.size) if parts is None else parts.groups.mesh
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks (mesh {mesh})"
    servers = f" and {_plural(world.servers, 'server')} ({config.consistency})" if config.strategy == "ps" else ""
    threads, launcher = torch.get_num_threads(), "one process" if world.launcher == "none" else world.launcher
    values = describe_values(dataset.train, likelihood=config.likelihood, binarization=str(config.binarization))
    drawn = mark("binarization") if config.binarization != "none" else ""
    sizes = f"hidden {_joined(config.hidden)}, latent {_joined(config.latent)}, {config.activation}"
    count = f"{optimizer.flat.layout.runs.count:,} parameters{' on rank 0' if parts is not None else ''}"
    width = "" if config.sigma is None else f", sigma {config.sigma:g}"
    held = "; ".join(f"{part}: {several(ranks)}" for part, ranks in mesh.holders().items())
    lines = [
        f"{dataset.name}{mark('data')}: {len(dataset.train)} train, {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test examples of shape {dataset.shape}",
        f"values: {values}{drawn}",
        f"{config.model}{mark('model')}, {sizes}: {count}; likelihood {config.likelihood}{mark('likelihood')}{width}",
        f"{config.strategy}{mark('strategy')} with engine {optimizer.engine} ({optimizer.engine_reason}), {ranks}"
        f"{servers} x {_plural(threads, 'thread')} on {world.device} by {launcher}",
        f"{optimizer.wrapped_class}{mark('optimizer')}, lr {rate:g}{mark('lr')}, {_batch(config, trainer)}",
        *([f"ranks of {held}"] if parts is not None else []),
        f"results go to {folder}{resumed}",
        *_cut_short(config, trainer),
        *in_software(config.precision, world.device.type, processor),
    ]
    return "\n".join(f"hvdvae: {line}" for line in lines)


def _batch(config: TrainConfig, trainer: Trainer) -> str:
    copies, mine = trainer.optimizer.world.size, batch_of(trainer)
    passes = f" in {config.accumulate} passes" if config.accumulate > 1 else ""
    together = config.strategy in ("allreduce", "sharded") and copies > 1
    step = f", {mine * copies} a step" if together else ""
    return f"{_plural(mine, 'example')} a rank{passes}{step}"


def batch_of(trainer: Trainer) -> int:
    """Examples that a rank takes in a step: less than asked for where the data has no more."""
    return int(getattr(trainer.batches, "batch", 0))


def _cut_short(config: TrainConfig, trainer: Trainer) -> list[str]:
    wanted, mine = config.batch_size * config.accumulate, batch_of(trainer)
    if mine >= wanted:
        return []
    passes = f" x --accumulate {config.accumulate}" if config.accumulate > 1 else ""
    return [
        f"warning: --batch-size {config.batch_size}{passes} is more than the {trainer.batches.examples} training "
        f"examples over {_plural(trainer.optimizer.world.size, 'rank')}: a rank takes {mine} a step"
    ]


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _joined(sizes: Sequence[int] | None) -> str:
    return " ".join(map(str, sizes or ()))


def in_software(precision: str, device: str, processor: Processor) -> list[str]:
    """A warning, as a line, where a processor knows the arithmetic of --precision from software alone. Pure.

    `processor`: torch.cpu.get_capabilities(), where this torch has it. Measured with AVX2 alone: bf16 takes 8 (MLP) and
    19 times (convolutions) as long as fp32.
    """
    needed = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}.get(precision)
    if device != "cpu" or needed is None or processor.get("architecture") != "x86_64":
        return []
    if any(processor.get(name) for name in needed):
        return []
    return [
        f"warning: --precision {precision}: this processor has no instructions for it "
        f"({' or '.join(needed)}), and is slower than with fp32, maybe many times"
    ]


def closing(summary: dict[str, Any], folder: Path, pictures: list[Path], *, finished: bool, legend: str = "") -> str:
    """How it came out, and where everything is; where nothing was learned an error says so after it. Pure."""
    lines = []
    if "test_nll" in summary:
        lines.append(
            f"test NLL {summary['test_nll']:.2f} nats (importance-weighted, k={summary['nll_samples']}), "
            f"ELBO {summary['elbo']:.2f} = -(rate {summary['rate']:.2f} + distortion {summary['distortion']:.2f})"
        )
    if "pipeline" in summary:
        lines.append(stages(summary["pipeline"]))
    lines += [f"  {path.stem + ':':<16} {path}" for path in pictures]
    if pictures and legend:
        lines.append(f"  {'shades:':<16} {legend}")
    if not pictures:
        lines.append(f"  {'pictures:':<16} none: the data is no image of 1 or 3 channels, and no square vector")
    lines += [
        f"  {'checkpoints:':<16} {folder / 'checkpoints'}",
        f"  {'curves:':<16} tensorboard --logdir {folder / 'tensorboard'}",
        f"  {'numbers:':<16} {folder / 'summary.json'}, {folder / 'metrics.jsonl'}",
    ]
    if finished:
        # A supervisor waits for these words (supervisor.py).
        lines.append(f"hvdvae: finished, results in {folder}")
    return "\n".join(lines)


def several(ranks: list[int]) -> str:
    """0, 4, 8, or the first ones and the last of so many that nobody would read them. Pure."""
    if len(ranks) <= MOST_NAMED:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))}, ... {ranks[-1]} ({len(ranks)} ranks)"


def stages(found: dict[str, Any]) -> str:
    """How long each stage worked and waited, against the theory (S - 1) / (M + S - 1). Pure."""
    seconds = ", ".join(f"{one:.2f}" for one in found["stage_seconds"])
    return (
        f"stages worked {seconds} s (the busiest {found['imbalance']:.2f} times the mean), idle {found['idle']:.2f} of "
        f"the time; {found['schedule']} with {found['micro_batches']} micro-batches: bubble {found['bubble']:.2f}"
    )


def say(text: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
