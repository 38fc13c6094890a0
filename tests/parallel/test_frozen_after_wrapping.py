"""What is frozen after wrapping stays where it is, with its state, as with torch: no momentum or decay moves it."""

from typing import Any

import pytest
import torch
from torch import nn

from hvdvae.errors import ConfigError
from hvdvae.ps.plan import Plan
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share, weights
from tests.parallel.test_parameter_server import Smooth, data, served

WAYS: dict[str, dict[str, Any]] = {
    "allreduce, horovod": {"engine": "horovod"},
    "allreduce, mpi": {"engine": "mpi"},
    "allreduce, mpi, several hosts": {"engine": "mpi"},
    "adasum, horovod": {"engine": "horovod", "reduce_op": "adasum"},
    "bf16": {"engine": "mpi", "compression": "bf16"},
    "topk": {"engine": "mpi", "compression": "topk", "compression_share": 0.5},
    "sharded": {"engine": "mpi", "strategy": "sharded"},
    "sharded, horovod": {"engine": "horovod", "strategy": "sharded"},
    "sharded, gradients too": {"engine": "mpi", "strategy": "sharded", "zero_stage": 2},
    "sharded, weights too": {"engine": "mpi", "strategy": "sharded", "zero_stage": 2, "weights": "bf16"},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 2},
    "diloco": {"strategy": "diloco", "sync_every": 2},
}
EXACT = (
    "allreduce, horovod",
    "allreduce, mpi",
    "allreduce, mpi, several hosts",
    "sharded",
    "sharded, horovod",
    "sharded, gradients too",
)


def step(world: World, model: nn.Module, optimizer: Any) -> None:
    x, y = (tensor[share(world)] for tensor in examples())
    optimizer.zero_grad()
    with optimizer.arithmetic():
        loss = loss_of(model, x, y)
    loss.backward()
    optimizer.step()


def wrapped(world: World, name: str, model: nn.Module, plain: torch.optim.Optimizer) -> Any:
    if world.launcher == "horovodrun-gloo" and "horovod" not in name:
        pytest.skip("horovodrun --gloo has no MPI")
    if world.launcher != "none" and "horovod" in name:
        pytest.importorskip("horovod.torch")
    return DistributedOptimizer(plain, model, world=world, **WAYS[name])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", WAYS)
def test_it_stays_and_moves_again(world: World, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "allreduce, mpi, several hosts":
        monkeypatch.setattr(World, "shares_memory", lambda world, nbytes: False)
        monkeypatch.setattr(World, "shared_vectors", lambda world, like: None)
    monkeypatch.setattr("hvdvae.strategies.sharded_gradients.BUCKET_BYTES", 80)
    model = network(seed=100)
    optimizer = wrapped(world, name, model, OPTIMIZERS[kind](model.parameters()))
    for _ in range(2):
        step(world, model, optimizer)
    frozen = [model[0].bias, model[2].weight]  # type: ignore[index]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in frozen]
    moving = model[0].weight.detach().clone()  # type: ignore[index]
    for _ in range(4):
        step(world, model, optimizer)
    assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
    assert not torch.equal(model[0].weight, moving)  # type: ignore[index]
    for parameter in frozen:
        parameter.requires_grad_(True)
    step(world, model, optimizer)
    assert not any(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
    with optimizer.fetched():
        assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("since", [0, 2], ids=["from the start", "after two steps"])
def test_all_the_rest_is_as_with_torch(world: World, name: str, kind: str, since: int) -> None:
    """Frozen before any step or later, then trained again: what torch does to the bit of its bias correction."""
    found = []
    for is_plain in (True, False):
        model = network(seed=100)
        plain = OPTIMIZERS[kind](model.parameters())
        optimizer = plain if is_plain else wrapped(world, name, model, plain)
        x, y = (tensor if is_plain else tensor[share(world)] for tensor in examples())
        for number in range(8):
            for parameter in (model[0].bias, model[2].weight):  # type: ignore[index]
                parameter.requires_grad_(not since <= number < 5)
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            if number == 4:
                found.append(weights(model))
        found.append(weights(model))
    torch.testing.assert_close(found[2], found[0], atol=2e-6, rtol=2e-5)
    if kind not in ("adam", "adamw"):  # One count of steps a group: it goes on while some of it is frozen.
        torch.testing.assert_close(found[3], found[1], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", ["allreduce, mpi", "sharded, gradients too", "local-sgd"])
def test_ranks_that_freeze_differently_are_told(world: World, name: str) -> None:
    if world.size == 1:
        pytest.skip("one rank differs from nobody")
    model = network(seed=100)
    optimizer = wrapped(world, name, model, OPTIMIZERS["adam"](model.parameters()))
    model[0].bias.requires_grad_(world.rank == 0)  # type: ignore[index]

    def train() -> None:
        for _ in range(3):
            step(world, model, optimizer)

    with pytest.raises(ConfigError, match=r"what is frozen \(requires_grad\) is not the same on ranks 0 and 1"):
        train()


def test_parameter_servers_refuse_it(world: World) -> None:
    with served(world, 1, Plan(), Smooth, OPTIMIZERS["adam"]) as connected:
        if connected is None:
            return
        optimizer, model, _ = connected
        x, y = data()
        for parameter in [*model.parameters()][:1]:
            parameter.requires_grad_(False)
        loss_of(model, x, y).backward()
        with pytest.raises(ConfigError, match=r"was frozen .* after the optimizer was wrapped"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.finish()
