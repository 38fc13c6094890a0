"""What only Horovod carries: fp16 on the wire, Adasum, process sets."""

import pytest
import torch

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.parallel.regression import EXAMPLES, examples, loss_of, network, share, weights

pytest.importorskip("horovod.torch")


@pytest.fixture(autouse=True)
def _needs_a_launcher(world: World) -> None:
    if world.launcher == "none":
        pytest.skip("Horovod is not started without a launcher")


def gradient_of(model: torch.nn.Module, part: slice) -> torch.Tensor:
    model.zero_grad()
    loss_of(model, *(tensor[part] for tensor in examples())).backward()
    return torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])  # type: ignore[union-attr]


def test_fp16_changes_the_wire_and_little_else(world: World) -> None:
    model = network(seed=100)
    expected = weights(model) - gradient_of(model, slice(None))
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 1.0), model, world=world, engine="horovod", compression="fp16"
    )
    gradient_of(model, share(world))
    optimizer.step()
    torch.testing.assert_close(weights(model), expected, atol=1e-3, rtol=1e-2)
    if world.size > 1:
        assert not torch.allclose(weights(model), expected, atol=1e-9, rtol=1e-7), "fp16 must have rounded something"


def test_adasum_of_two_ranks_is_its_formula(world: World) -> None:
    """Maleki et al. 2021, eq. 4: a (1 - a.b / 2|a|^2) + b (1 - a.b / 2|b|^2), layer by layer, of the two updates."""
    if world.size != 2 or world.launcher == "horovodrun-gloo":
        pytest.skip("the formula is of two ranks; Gloo has no Adasum")
    model = network(seed=100)
    halves = []
    for rank in range(2):
        part = slice(rank * EXAMPLES // 2, (rank + 1) * EXAMPLES // 2)
        model.zero_grad()
        loss_of(model, *(tensor[part] for tensor in examples())).backward()
        halves.append([-0.1 * parameter.grad for parameter in model.parameters()])  # type: ignore[operator]
    expected = []
    for parameter, a, b in zip(model.parameters(), *halves, strict=True):
        dot = (a * b).sum()
        update = a * (1 - dot / (2 * a.square().sum())) + b * (1 - dot / (2 * b.square().sum()))
        expected.append((parameter.detach() + update).flatten())
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine="horovod", reduce_op="adasum"
    )
    optimizer.zero_grad()
    loss_of(model, *(tensor[share(world)] for tensor in examples())).backward()
    optimizer.step()
    torch.testing.assert_close(weights(model), torch.cat(expected), atol=1e-6, rtol=1e-5)


def test_process_sets_train_replicas_side_by_side(world: World) -> None:
    if world.size != 2:
        pytest.skip("two sets of one rank each")
    hvd = world.horovod()
    sets = [hvd.add_process_set([rank]) for rank in range(world.size)]
    model = network(seed=world.rank)
    expected = weights(model) - 0.1 * gradient_of(model, share(world))
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        world=world,
        engine="horovod",
        process_set=sets[world.rank],
    )
    gradient_of(model, share(world))
    optimizer.step()
    torch.testing.assert_close(weights(model), expected)
    for group in sets:
        hvd.remove_process_set(group)


@pytest.mark.parametrize("options", [{"engine": "mpi"}, {"engine": "horovod", "reduce_op": "adasum"}])
def test_a_process_set_is_not_dropped_silently(world: World, options: dict[str, str]) -> None:
    if world.size not in (1, 2, 4):
        pytest.skip("Adasum needs a power of two")
    model = network(seed=100)
    process_set = world.horovod().global_process_set
    with pytest.raises(ConfigError, match="process_set"):
        DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 1.0), model, world=world, process_set=process_set, **options
        )


def test_process_sets_may_hold_other_models(world: World) -> None:
    if world.size != 2:
        pytest.skip("two sets of one rank each")
    hvd = world.horovod()
    sets = [hvd.add_process_set([rank]) for rank in range(world.size)]
    model = torch.nn.Linear(3, 1 + world.rank)
    model.register_buffer("mean", torch.full((2 + world.rank,), float(world.rank)))
    rate = 0.1 * (1 + world.rank)
    mine, other = sets[world.rank], sets[1 - world.rank]
    with pytest.raises(ConfigError, match=f"process_set holds ranks .*this is rank {world.rank}"):
        DistributedOptimizer(
            torch.optim.SGD(model.parameters(), rate), model, world=world, engine="horovod", process_set=other
        )
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), rate), model, world=world, engine="horovod", process_set=mine
    )
    expected = model.bias.detach() - rate
    optimizer.zero_grad()
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), expected)
    with optimizer.fetched():
        assert (model.mean == world.rank).all()  # type: ignore[operator, union-attr]


def test_adasum_takes_channels_last(world: World) -> None:
    if world.size != 2 or world.launcher == "horovodrun-gloo":
        pytest.skip("Adasum of two ranks; Gloo has none")
    found = []
    for channels_last in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Conv2d(2, 3, 3)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine="horovod", reduce_op="adasum"
        )
        model(torch.full((1, 2, 4, 4), 1.0 + world.rank)).square().mean().backward()
        optimizer.step()
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1])
