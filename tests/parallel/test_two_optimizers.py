"""Two optimizers of one model, as a GAN has them: one's bad step leaves the other's good one alone."""

import pytest
import torch
from torch import nn

from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World


@pytest.mark.parametrize("clears", ["both first", "each before its own", "the model's"])
def test_a_skipped_step_takes_back_its_own_statistics_alone(world: World, engine: str, clears: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for name in ("G", "D")})
    optimizers = {
        name: DistributedOptimizer(torch.optim.SGD(model[name].parameters(), 0.1), model, world=world, engine=engine)
        for name in ("G", "D")
    }
    generator = torch.Generator().manual_seed(world.rank)

    def clear(name: str, when: str) -> None:
        if clears == when:
            optimizers[name].zero_grad()

    for step in range(4):
        is_bad = step == 2
        for name in ("G", "D"):
            clear(name, "both first")
        if clears == "the model's":
            model.zero_grad()
        clear("D", "each before its own")
        model["D"](torch.randn(16, 4, generator=generator) + 3).mean().backward()
        optimizers["D"].step()
        after = [buffer.clone() for buffer in model["D"].buffers()]
        before = [buffer.clone() for buffer in model["G"].buffers()]
        clear("G", "each before its own")
        loss = model["G"](torch.randn(16, 4, generator=generator)).mean()
        (loss * float("nan") if is_bad and world.rank == 0 else loss).backward()
        optimizers["G"].step()
        assert all(torch.equal(*pair) for pair in zip(after, model["D"].buffers(), strict=True))
        assert all(torch.equal(*pair) for pair in zip(before, model["G"].buffers(), strict=True)) == is_bad
        if is_bad and clears == "the model's":
            for name in ("G", "D"):  # As its gradients are not finite any more.
                optimizers[name].zero_grad()
    assert (optimizers["D"].skipped_steps, optimizers["G"].skipped_steps) == (0, 1)
    assert [int(model[name][1].num_batches_tracked) for name in ("D", "G")] == [4, 3]
