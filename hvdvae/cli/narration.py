"""What a run says on the terminal: at its start, and at its end."""

import sys
from pathlib import Path

import torch

from hvdvae.config import TrainConfig
from hvdvae.data import Dataset
from hvdvae.trainer import Trainer


def opening(config: TrainConfig, trainer: Trainer, dataset: Dataset, folder: Path) -> str:
    """What is trained, how, and where results go. Local."""
    world, optimizer = trainer.world, trainer.optimizer
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    parts = optimizer.parts
    count = f"{optimizer.flat.parameters.numel():,} parameters"
    if parts is not None:
        ranks, count = f"{ranks} (mesh {parts.groups.mesh})", f"{count} on rank 0"
    resumed = f", resumed at step {trainer.position.step}" if trainer.position.step else ""
    return (
        f"hvdvae: {dataset.name} {dataset.shape}, {len(dataset.train)} train, {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test\n"
        f"hvdvae: {config.model}, {count}, {config.strategy} with engine "
        f"{optimizer.engine} ({optimizer.engine_reason}), {ranks} x {torch.get_num_threads()} threads on "
        f"{world.device.type} by {'one process' if world.launcher == 'none' else world.launcher}\n"
        f"hvdvae: results go to {folder}{resumed}"
    )


def closing(summary: dict[str, object], folder: Path, pictures: list[Path]) -> str:
    """How it came out, and where everything is. Pure."""
    lines = []
    if "test_nll" in summary:
        lines.append(
            f"test NLL {summary['test_nll']:.2f} nats (importance-weighted, k={summary['nll_samples']}), "
            f"ELBO {summary['elbo']:.2f} = -(rate {summary['rate']:.2f} + distortion {summary['distortion']:.2f})"
        )
    lines += [f"  {path.stem + ':':<16} {path}" for path in pictures]
    if not pictures:
        lines.append(f"  {'pictures:':<16} none: the data is no image of 1 or 3 channels, and no square vector")
    lines += [
        f"  {'checkpoints:':<16} {folder / 'checkpoints'}",
        f"  {'curves:':<16} tensorboard --logdir {folder / 'tensorboard'}",
        f"  {'numbers:':<16} {folder / 'summary.json'}, {folder / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
