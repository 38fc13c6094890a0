"""What delay alone does: one process trains with gradients of weights that are some updates old.

    python benchmarks/staleness.py --data mnist              # about a minute a delay and epoch
    python benchmarks/staleness.py --delays 0,1,3 --epochs 2 --lr 5e-4

No ranks, no servers, no clock: what is left of the price of asynchrony when everything else is taken away. Prints the
validation ELBO after each epoch.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.study.job import initial_model
from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.data import Dataset, Loader, evaluation_batch, open_dataset
from hvdvae.seeding import seed_everything
from hvdvae.vae.evaluate import evaluate

CPU = torch.device("cpu")


def main() -> None:
    """Print a line a delay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as of hvdvae train [digits]")
    parser.add_argument("--delays", default="0,1,3", help="updates between a gradient's weights and its use [0,1,3]")
    parser.add_argument("--epochs", type=int, default=3, help="[3]")
    parser.add_argument("--batch-size", type=int, default=100, help="[100]")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam [1e-3]")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(asked.data)
    config = TrainConfig(data=asked.data, batch_size=asked.batch_size, lr=asked.lr)
    print(f"{asked.data}, Adam, lr {asked.lr:g}, batch {asked.batch_size}: validation ELBO after each epoch")
    for delay in map(int, asked.delays.split(",")):
        elbos = ", ".join(f"{elbo:.2f}" for elbo in train(config, dataset, delay, asked.epochs))
        print(f"delay {delay}: {elbos}", flush=True)


def train(config: TrainConfig, dataset: Dataset, delay: int, epochs: int) -> Iterator[float]:
    """Yields the validation ELBO after each epoch, nats per example."""
    model = initial_model(config, dataset.train, CPU)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    objective = assemble.objective(config)
    loader = Loader(dataset.train, batch=config.batch_size, seed=config.seed)
    parameters = list(model.parameters())
    waiting: deque[tuple[Tensor, ...]] = deque()
    step = 0
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            seed_everything(CPU, config.seed, 0, step)
            step += 1
            waiting.append(torch.autograd.grad(objective(model, batch, 0.0)["loss"], parameters))
            if len(waiting) > delay:
                for parameter, gradient in zip(parameters, waiting.popleft(), strict=True):
                    parameter.grad = gradient
                optimizer.step()

        def gather(start: int, stop: int) -> Tensor:
            return evaluation_batch(
                dataset.validation, start, stop, binarization=assemble.binarization(config, dataset.validation)
            )

        with torch.no_grad():
            yield evaluate(model, gather, len(dataset.validation), samples=1).elbo


if __name__ == "__main__":
    main()
