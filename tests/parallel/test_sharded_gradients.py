"""ZeRO stage 2: gradients are nowhere whole; the laws it shares with stage 1 are in test_sharded.py."""

import pytest
import torch
from torch import nn

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.sharded_gradients import ShardedGradients
from hvdvae.world import World
from tests.parallel.regression import EXAMPLES, INPUTS, OPTIMIZERS, OUTPUTS, examples, loss_of, network, share, weights


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    monkeypatch.setattr("hvdvae.strategies.sharded_gradients.BUCKET_BYTES", 80)


def wrapped(world: World, model: nn.Module, kind: str = "adam", **options: int) -> ShardedGradients:
    optimizer = DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()),
        model,
        world=world,
        engine="mpi",
        strategy="sharded",
        zero_stage=2,
        **options,  # type: ignore[arg-type]
    )
    assert isinstance(optimizer, ShardedGradients)
    return optimizer


def test_a_rank_keeps_its_share_of_the_gradients_and_no_more(world: World) -> None:
    model = network(seed=100)
    optimizer = wrapped(world, model)
    loss_of(model, *(tensor[share(world)] for tensor in examples())).backward()
    held = [parameter.grad.untyped_storage().nbytes() for parameter in model.parameters() if parameter.grad is not None]
    assert sum(held) <= 4 * 4, "what says that they were sent, and no gradients"
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    length = optimizer.flat.layout.length  # With what aligns parameters.
    kept = optimizer.results()["gradient_bytes"]
    assert sum(world.gather_objects(kept)) == 4 * length
    assert optimizer.flat.gradient.untyped_storage().nbytes() == kept


class Forked(nn.Module):
    """A layer that not every pass, nor every rank, uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.side = nn.Linear(INPUTS, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, OUTPUTS)

    def forward(self, x: torch.Tensor, *, uses_side: bool) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        out: torch.Tensor = self.last(torch.tanh(self.side(h)) if uses_side else h)
        return out


def test_layers_that_some_ranks_or_passes_do_not_use(world: World) -> None:
    """Buckets travel in one order: a rank that has nothing for one holds nobody up."""
    passes, steps = 2, 3
    model, single = Forked(), Forked()
    # Plain SGD: a gradient of zero is as good as none.
    optimizer = wrapped(world, model, "sgd", backward_passes_per_step=passes)
    alone = OPTIMIZERS["sgd"](single.parameters())
    x, y = examples()
    part = EXAMPLES // world.size
    pieces = [slice(start, start + part // passes) for start in range(0, EXAMPLES, part // passes)]

    def loss(which: nn.Module, number: int, step: int) -> torch.Tensor:
        out = which(x[pieces[number]], uses_side=(number + step) % 3 == 0)
        return (out - y[pieces[number]]).square().mean()  # type: ignore[no-any-return]

    for step in range(steps):
        optimizer.zero_grad()
        alone.zero_grad()
        for one in range(passes):
            loss(model, world.rank * passes + one, step).backward()
        (torch.stack([loss(single, number, step) for number in range(len(pieces))]).mean()).backward()
        optimizer.step()
        alone.step()
    torch.testing.assert_close(weights(model), weights(single), atol=2e-5, rtol=2e-4)


def test_whole_gradients_cannot_be_had(world: World) -> None:
    optimizer = wrapped(world, network(seed=100))
    with pytest.raises(ConfigError, match="which --zero-stage 2 does not keep"):
        optimizer.synchronize()
