"""BatchNorm over the batches of all ranks is torch's BatchNorm on the whole batch: outputs, gradients, statistics."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm
from hvdvae.world import World

CHANNELS = 3
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(CHANNELS), ()),
    "1d over positions": (lambda: nn.BatchNorm1d(CHANNELS), (5,)),
    "2d": (lambda: nn.BatchNorm2d(CHANNELS), (4, 2)),
    "3d": (lambda: nn.BatchNorm3d(CHANNELS), (2, 1, 2)),
    "not affine": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (4, 2)),
    "cumulative": (lambda: nn.BatchNorm1d(CHANNELS, momentum=None), ()),
    "without running statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (2, 2)),
    "other constants": (lambda: nn.BatchNorm1d(CHANNELS, eps=0.1, momentum=0.7), ()),
}


def lengths(world: World) -> list[int]:
    """Examples of each rank: not the same number."""
    return [4 + 3 * rank for rank in range(world.size)]


def part(world: World, whole: Tensor) -> Tensor:
    return whole.split(lengths(world))[world.rank]


def pair(build: Callable[[], nn.Module], world: World) -> tuple[nn.Module, nn.Module]:
    """torch's layer, and ours with its values."""
    plain = build()
    if plain.affine:  # type: ignore[truthy-bool]
        with torch.no_grad():
            plain.weight.copy_(torch.tensor([0.5, -2.0, 1.5]))  # type: ignore[operator, union-attr]
            plain.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))  # type: ignore[operator, union-attr]
    ours = convert_sync_batch_norm(copy.deepcopy(plain), world)
    assert isinstance(ours, SyncBatchNorm)
    return plain, ours


def batch(world: World, spatial: tuple[int, ...], step: int, offset: float = 2.0) -> tuple[Tensor, Tensor]:
    """Inputs of all ranks, the ranks' means far apart, and weights of a loss."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(lengths(world)), CHANNELS, *spatial)
    x = torch.randn(shape, generator=generator) * 1.5 + offset
    for rank, piece in enumerate(x.split(lengths(world))):
        piece.add_(3.0 * rank)
    return x, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_torch_on_the_whole_batch(world: World, name: str) -> None:
    build, spatial = LAYERS[name]
    plain, ours = pair(build, world)
    for step in range(3):
        x, weight = batch(world, spatial, step)
        whole = x.clone().requires_grad_()
        mine = part(world, x).clone().requires_grad_()
        expected, found = plain(whole), ours(mine)
        (expected * weight).sum().backward()
        (found * part(world, weight)).sum().backward()
        torch.testing.assert_close(found, part(world, expected), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mine.grad, part(world, whole.grad), atol=2e-5, rtol=1e-4)  # type: ignore[arg-type]
    for (key, a), b in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    for theirs, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
        total = world.sum_(parameter.grad.clone())  # type: ignore[union-attr]
        torch.testing.assert_close(total, theirs.grad, atol=1e-4, rtol=1e-4)
    plain.eval()
    ours.eval()
    x, _ = batch(world, spatial, 9)
    if plain.track_running_stats:
        torch.testing.assert_close(ours(part(world, x)), part(world, plain(x)), atol=1e-5, rtol=1e-4)


def test_it_differs_from_the_statistics_of_one_rank(world: World) -> None:
    """What the test above would not see if the inputs were alike on all ranks."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    plain, ours = pair(LAYERS["1d"][0], world)
    x, _ = batch(world, (), 0)
    assert not torch.allclose(ours(part(world, x)), plain(part(world, x)), atol=0.1)


def test_a_large_mean_does_not_cost_the_variance(world: World) -> None:
    """Mean of squares minus square of the mean loses all digits in float32."""
    plain, ours = pair(LAYERS["1d"][0], world)
    x, _ = batch(world, (), 0, offset=3000.0)
    expected = plain.double()(x.double()).float()
    torch.testing.assert_close(ours(part(world, x)), part(world, expected), atol=2e-3, rtol=2e-3)


def test_a_whole_model_is_converted_and_trains_as_one_process(world: World, engine: str) -> None:
    def network() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Conv2d(2, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        return nn.Sequential(inner, nn.Flatten(), nn.Linear(CHANNELS * 4, 4, bias=False), nn.BatchNorm1d(4))

    plain, ours = network(), network()
    names = list(ours.state_dict())
    ours = convert_sync_batch_norm(ours, world)
    assert sum(isinstance(module, SyncBatchNorm) for module in ours.modules()) == 2
    assert list(ours.state_dict()) == names
    count = 4 * world.size
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    wrapped = DistributedOptimizer(torch.optim.SGD(ours.parameters(), 0.1), ours, world=world, engine=engine)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(count, 2, 4, 4, generator=generator), torch.randn(count, 4, generator=generator)
        mine = slice(4 * world.rank, 4 * world.rank + 4)
        for model, stepper, piece in ((plain, optimizer, slice(None)), (ours, wrapped, mine)):
            stepper.zero_grad()
            (model(x[piece]) - target[piece]).square().mean().backward()
            stepper.step()
    for (name, a), b in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_conversion_keeps_the_mode_and_the_tensors_of_an_optimizer(world: World) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    parameters = list(model.parameters())
    converted = convert_sync_batch_norm(model, world)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert not any(module.training for module in converted.modules())


def test_low_precision_goes_in_and_out(world: World) -> None:
    _, ours = pair(LAYERS["2d"][0], world)
    x, _ = batch(world, (4, 2), 0)
    out = ours(part(world, x).bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(part(world, x)), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("forward_first", [False, True])
def test_a_skipped_step_leaves_no_mark_on_statistics(world: World, synchronized: bool, forward_first: bool) -> None:
    """Whether a loop clears gradients before the forward pass or after it; counters, too."""
    torch.manual_seed(3)
    model: nn.Module = nn.Sequential(nn.Linear(4, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 1))
    if synchronized:
        model = convert_sync_batch_norm(model, world)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine="auto")

    def step(x: Tensor) -> None:
        if not forward_first:
            optimizer.zero_grad()
        loss = model(x).square().mean()
        if forward_first:
            optimizer.zero_grad()
        loss.backward()
        optimizer.watch(loss)
        optimizer.step()

    def good() -> Tensor:
        return torch.randn(6, 4)

    torch.manual_seed(10 + world.rank)
    step(good())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bad = good()
    if world.rank == world.size - 1:
        bad[2, 1] = torch.inf
    step(bad)
    assert optimizer.skipped_steps == 1
    if not forward_first:
        # Otherwise the good ranks' forward pass was over when buffers were kept.
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())
    step(good())
    assert optimizer.skipped_steps == 1
    model.eval()
    assert bool(model(good()).isfinite().all())


def test_one_that_stands_in_two_places_is_one_still(world: World) -> None:
    """Its hooks stay, too."""
    norm, seen = nn.BatchNorm1d(3), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    model = convert_sync_batch_norm(nn.Sequential(norm, nn.Linear(3, 3), norm), world)
    assert isinstance(model[0], SyncBatchNorm)  # type: ignore[index]
    assert model[0] is model[2]  # type: ignore[index]
    model(torch.randn(4, 3))
    assert len(seen) == 2


def test_a_rank_may_have_no_examples(world: World) -> None:
    if world.size == 1:
        pytest.skip("somebody needs some")
    plain, ours = pair(lambda: nn.BatchNorm1d(CHANNELS), world)
    x, _ = batch(world, (), 0)
    mine = x[:0] if world.rank == 0 else x.tensor_split(world.size - 1)[world.rank - 1]
    expected = plain(x)
    found = ours(mine)
    if world.rank:
        torch.testing.assert_close(found, expected.tensor_split(world.size - 1)[world.rank - 1])
    torch.testing.assert_close(ours.running_var, plain.running_var)


def test_a_converted_model_can_be_copied_and_saved_whole(world: World) -> None:
    model = convert_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), world)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(part(world, batch(world, (), 0)[0])), model(part(world, batch(world, (), 0)[0])))
    loaded = pickle.loads(pickle.dumps(model))  # As torch.save(model) does.
    with pytest.raises(ConfigError, match="convert_sync_batch_norm"):
        loaded(torch.ones(2, 3))
    convert_sync_batch_norm(loaded, world)
    assert torch.equal(loaded(part(world, batch(world, (), 1)[0])), model(part(world, batch(world, (), 1)[0])))
