"""What a run says on the terminal: at its start, and at its end."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvdvae.config import TrainConfig
from hvdvae.data import Dataset
from hvdvae.parallel.mesh import Mesh
from hvdvae.trainer import Trainer

MOST_NAMED = 8
"""Ranks in a line."""


def opening(config: TrainConfig, trainer: Trainer, dataset: Dataset, folder: Path) -> str:
    """What is trained, how, and where results go. Local."""
    world, optimizer = trainer.world, trainer.optimizer
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    parts = optimizer.parts
    mesh = Mesh(world.size) if parts is None else parts.groups.mesh
    count = f"{optimizer.flat.parameters.numel():,} parameters{' on rank 0' if parts is not None else ''}"
    if world.size > 1:
        ranks += f" (mesh {mesh})"
    held = "; ".join(f"{part}: {several(ranks)}" for part, ranks in mesh.holders().items())
    placed = f"hvdvae: ranks of {held}\n" if parts is not None else ""
    resumed = f", resumed at step {trainer.position.step}" if trainer.position.step else ""
    return (
        f"hvdvae: {dataset.name} {dataset.shape}, {len(dataset.train)} train, {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test\n"
        f"hvdvae: {config.model}, {count}, {config.strategy} with engine "
        f"{optimizer.engine} ({optimizer.engine_reason}), {ranks} x {torch.get_num_threads()} threads on "
        f"{world.device.type} by {'one process' if world.launcher == 'none' else world.launcher}\n"
        f"{placed}hvdvae: results go to {folder}{resumed}"
        f"{in_software(config.precision, world.device.type, getattr(torch.cpu, 'get_capabilities', dict)())}"
    )


def in_software(precision: str, device: str, processor: Mapping[str, Any]) -> str:
    """A warning, on a line of its own, where a processor knows the arithmetic of --precision from software alone. Pure.

    `processor`: torch.cpu.get_capabilities(), where this torch has it. Measured with AVX2 alone: bf16 takes 8 (MLP) and
    19 times (convolutions) as long as fp32.
    """
    needed = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}.get(precision)
    if device != "cpu" or needed is None or processor.get("architecture") != "x86_64":
        return ""
    if any(processor.get(name) for name in needed):
        return ""
    return (
        f"\nhvdvae: warning: --precision {precision}: this processor has no instructions for it "
        f"({' or '.join(needed)}), and is slower than with fp32, maybe many times"
    )


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
