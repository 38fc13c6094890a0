"""A run in which a rank kills itself before a given step: python dying_rank.py VICTIM STEP OPTIONS OF TRAIN..."""

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import torch

from hvdvae.checkpoint import Folder
from hvdvae.cli import assemble
from hvdvae.cli.parser import parse
from hvdvae.config import TrainConfig
from hvdvae.data import ArraySource, Loader
from hvdvae.trainer import Trainer
from hvdvae.world import World

SHAPE, EXAMPLES = (1, 4, 4), 240


class Deadly(Loader):
    """Batches, of which one kills."""

    fatal: int | None = None

    def epoch(self, epoch: int, start: int = 0) -> Generator[torch.Tensor]:
        for step, batch in enumerate(super().epoch(epoch, start)):
            if epoch == 1 and step == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def main(victim: int, step: int, words: list[str]) -> None:
    """Train, and leave checkpoints in --out."""
    torch.set_num_threads(1)
    _, asked = parse(["train", *words])
    config = TrainConfig(**asked.values)
    world = World.create(device="cpu", deadline=60)
    groups = assemble.mesh(config, world)
    model = assemble.model(config, SHAPE, world.device)
    parts, pipeline = assemble.split(config, model, groups) if groups is not None else (None, None)
    copies = world if groups is None else groups.replicas
    optimizer = assemble.distributed(config, model, copies, parts)
    images = torch.rand(EXAMPLES, *SHAPE, generator=torch.Generator().manual_seed(1)).numpy()
    batches = Deadly(ArraySource(images, "images"), batch=config.batch_size, rank=copies.rank, size=copies.size)
    batches.fatal = step if world.rank == victim else None
    trainer = Trainer(
        model,
        optimizer,
        assemble.objective(config),
        batches,
        pipeline=pipeline,
        ema_decay=config.ema,
        checkpoints=Folder(Path(config.out or "run") / "checkpoints", keep=1),
        lr_scaling=config.lr_scaling,
    )
    trainer.fit(config.epochs)
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
