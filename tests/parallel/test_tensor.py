"""Law 4: layers that are split over ranks are the whole ones: loss, gradients, noise, checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.checkpoint import Checkpoint, Folder, load
from hvdvae.cli.assessment import assess
from hvdvae.data import ArraySource
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.parallel.mesh import Groups, Mesh, groups_of
from hvdvae.parallel.parts import Parts, Whole
from hvdvae.parallel.tensor import split_layers
from hvdvae.parallel.whole_checkpoint import merge
from hvdvae.resume import load_weights
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.trainer import Trainer
from hvdvae.vae import VAE, Elbo, build_model
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, loss_of, network, share
from tests.parallel.test_allreduce import STEPS, plain
from tests.parallel.test_trainer_laws import IMAGES, SHAPE, Epochs, loader

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [7, 5], "latent": [3]},
    "mlp2": {"hidden": [6, 5, 5, 4], "latent": [4, 3]},
    "conv": {"channels": [5, 6], "latent": [3]},
}


NORMED: dict[str, dict[str, Any]] = {"conv with BatchNorm": {"channels": [5, 6], "latent": [3], "batch_norm": True}}
"""Whole where layers are, since a channel is normalized by itself."""


def meshes(world: World) -> Iterator[Mesh]:
    """All of this many ranks."""
    for tp in (1, 2, 3, 4):
        if world.size % tp == 0:
            yield Mesh(world.size // tp, tp=tp)


@pytest.fixture(params=["tp=1", "tp=2", "tp=3", "tp=4"])
def groups(request: pytest.FixtureRequest, world: World) -> Groups:
    """Every mesh of this many ranks."""
    tp = int(request.param[3:])
    if world.size % tp:
        pytest.skip(f"{world.size} ranks")
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    return groups_of(Mesh(world.size // tp, tp=tp), world)


def wrapped(groups: Groups, model: nn.Module, optimizer: Callable[..., Optimizer], **options: Any) -> Strategy:
    """The model split, and its optimizer."""
    chains = model.chains if isinstance(model, VAE) else [""]
    parts = Parts(groups, Whole.of(model), split_layers(model, chains, groups.layers))
    chosen = {"strategy": "allreduce", "engine": "mpi", **options}
    return DistributedOptimizer(optimizer(model.parameters()), model, world=groups.replicas, parts=parts, **chosen)


def whole(model: nn.Module, optimizer: Strategy) -> dict[str, Tensor]:
    """All parameters of all parts, by name, on all ranks."""
    assert optimizer.parts is not None
    parts, found = optimizer.parts, {}
    world = parts.groups.whole
    record = {"names": optimizer.flat.names, "optimizer_groups": [{}], "optimizer_scalars": {}}
    tensors = {f"model/{name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    mine = Checkpoint({**tensors, "buffers": optimizer.flat.buffers[None].clone()}, record).draft()
    merged = merge(parts, mine, optimizer.numbered, model)
    shapes = {name: merged.pieces[name].shape for name in sorted(merged.pieces)}
    values = {name: merged.pieces[name].get() for name in shapes}
    for name, shape in world.gather_objects(shapes)[0].items():
        found[name] = world.broadcast_(values[name].clone() if world.is_first else torch.empty(shape))
    return {f"model/{name}": found[f"model/{name}"] for name in parts.whole.parameters}


WAYS: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "sharded": {"strategy": "sharded"},
    "gradients, too": {"strategy": "sharded", "zero_stage": 2},
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trains_as_one_process_with_the_whole_model(groups: Groups, way: str, kind: str, passes: int) -> None:
    model = network(seed=100)
    optimizer = wrapped(groups, model, OPTIMIZERS[kind], backward_passes_per_step=passes, **WAYS[way])
    x, y = (tensor[share(groups.replicas)] for tensor in examples())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in zip(x.chunk(passes), y.chunk(passes), strict=True):
            loss_of(model, *part).backward()
        optimizer.step()
    found = torch.cat([tensor.flatten() for tensor in whole(model, optimizer).values()])
    torch.testing.assert_close(found, plain(OPTIMIZERS[kind]), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_is_of_the_whole_gradient(groups: Groups, way: str) -> None:
    def clip(number: int, optimizer: Optimizer, model: nn.Module) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))

    norms: list[float] = []
    expected = plain(OPTIMIZERS["momentum"], clip)
    model = network(seed=100)
    optimizer = wrapped(groups, model, OPTIMIZERS["momentum"], clip_norm=0.05, **WAYS[way])
    x, y = (tensor[share(groups.replicas)] for tensor in examples())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        assert optimizer.gradient_norm == pytest.approx(norms[step], rel=1e-4)
    found = torch.cat([tensor.flatten() for tensor in whole(model, optimizer).values()])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-4)


def test_float32_weights_of_split_layers_are_split_over_their_copies(groups: Groups) -> None:
    found: list[dict[str, Tensor]] = []
    for way in ({}, {"strategy": "sharded", "zero_stage": 2, "weights": "bf16"}):
        model = network(seed=100)
        optimizer = wrapped(groups, model, OPTIMIZERS["adamw"], **way)
        x, y = (tensor[share(groups.replicas)] for tensor in examples())
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
        found.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert {tensor.dtype for tensor in found[1].values()} == {torch.bfloat16}
    masters = {name: piece.get() for name, piece in sorted(optimizer.master_weights().items())}
    for name, expected in found[0].items():
        torch.testing.assert_close(masters[name], expected, atol=2e-5, rtol=2e-4)


def trainer(world: World, model: VAE, optimizer: Strategy, **options: Any) -> Trainer:
    return Trainer(model, optimizer, Elbo(), loader(world), seed=3, **options)


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, 0.02)


def vae(name: str) -> VAE:
    torch.manual_seed(8)
    return build_model(name.split()[0], SHAPE, **(MODELS | NORMED)[name])


@pytest.mark.parametrize("name", [*MODELS, *NORMED])
def test_a_split_vae_learns_what_the_whole_one_does(groups: Groups, name: str) -> None:
    if name in NORMED and groups.replicas.size > 2:
        pytest.skip("BatchNorm of two examples magnifies the rounding of sums")
    told, expected = Epochs(), Epochs()
    split, unsplit = vae(name), vae(name)
    optimizer = wrapped(groups, split, adam)
    trainer(groups.replicas, split, optimizer, monitors=[told]).fit(2)
    kind = {"strategy": "local"} if groups.replicas.size == 1 else {"engine": "mpi"}
    plain_optimizer = DistributedOptimizer(adam(unsplit.parameters()), unsplit, world=groups.replicas, **kind)
    trainer(groups.replicas, unsplit, plain_optimizer, monitors=[expected]).fit(2)
    found = whole(split, optimizer)
    for key, parameter in unsplit.named_parameters():
        torch.testing.assert_close(found[f"model/{key}"], parameter.detach(), atol=2e-4, rtol=2e-3)
    if groups.whole.is_first:
        for mine, other in zip(told.metrics, expected.metrics, strict=True):
            for key in ("loss", "rate", "distortion", "gradient_norm"):
                assert mine[key] == pytest.approx(other[key], rel=1e-4)


def test_what_is_split_is_smaller_and_what_is_not_is_the_same_on_all(groups: Groups) -> None:
    split, unsplit = vae("mlp"), vae("mlp")
    optimizer = wrapped(groups, split, adam)
    trainer(groups.replicas, split, optimizer).fit(2)
    size = groups.model.size
    cut = [name for name, parameter in split.named_parameters() if parameter.shape != unsplit.get_parameter(name).shape]
    assert bool(cut) == (size > 1)
    for name, parameter in split.named_parameters():
        bits = groups.whole.gather_bytes(parameter.detach().numpy().tobytes())
        if name not in cut:
            assert len(set(bits)) == 1, f"{name} drifts apart"
        else:
            mine = range(groups.whole.rank % size, groups.whole.size, size)
            assert len({bits[rank] for rank in mine}) == 1, f"replicas of {name} drift apart"


def test_a_pair_of_layers_meets_once_forward_and_once_backward(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = World.sum_

    def counted(self: World, tensor: Tensor, what: str = "sum") -> Tensor:
        calls.append(what)
        return original(self, tensor, what)

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    split_layers(model, [""], groups.model)
    monkeypatch.setattr(World, "sum_", counted)
    out = model(torch.randn(3, 6, requires_grad=True))
    assert calls == ["forward of a split layer"] * 2
    out.sum().backward()
    assert calls[2:] == ["backward of a split layer"] * 2


@pytest.mark.parametrize("name", ["mlp", *NORMED])
def test_a_checkpoint_of_any_mesh_goes_on_at_any_other(world: World, shared_path: Path, name: str) -> None:
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    final: dict[str, dict[str, Tensor]] = {}
    for mesh in meshes(world):
        groups = groups_of(mesh, world)
        model = vae(name)
        optimizer = wrapped(groups, model, adam)
        kept = Folder(shared_path / str(mesh), 5)
        trainer(groups.replicas, model, optimizer, checkpoints=kept, ema_decay=0.9).fit(2)
        final[str(mesh)] = whole(model, optimizer)
    world.barrier()
    for saved in meshes(world):
        first = Folder(shared_path / str(saved), 5).steps()[-1]
        for mesh in meshes(world):
            # Another number of copies would draw other noise; the batch of all is the same.
            if mesh.dp != saved.dp:
                continue
            groups = groups_of(mesh, world)
            model = vae(name)
            optimizer = wrapped(groups, model, adam, strategy="sharded")
            resumed = trainer(groups.replicas, model, optimizer, ema_decay=0.9)
            resumed.resume(load(first))
            assert resumed.position.epoch == 1
            resumed.fit(2)
            for key, tensor in whole(model, optimizer).items():
                torch.testing.assert_close(tensor, final[str(saved)][key], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", ["conv", *NORMED])
def test_a_checkpoint_is_the_whole_models_and_loads_where_nothing_is_split(
    groups: Groups, shared_path: Path, name: str
) -> None:
    model = vae(name)
    optimizer = wrapped(groups, model, adam)
    kept = Folder(shared_path, 5)
    trainer(groups.replicas, model, optimizer, checkpoints=kept).fit(1)
    source = ArraySource(IMAGES, "images")
    with optimizer.fetched():
        together = assess(model, source, groups.replicas, binarization="dynamic", samples=3)
    groups.whole.barrier()
    single = vae(name)
    load_weights(single, load(kept.steps()[0]))
    alone = assess(single, source, World.alone(device="cpu"), binarization="dynamic", samples=3)
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)
    assert together.elbo == pytest.approx(alone.elbo, rel=1e-5)


def test_another_models_checkpoint_is_refused(groups: Groups, shared_path: Path) -> None:
    if groups.model.size == 1:
        pytest.skip("nothing is split")
    model = vae("mlp")
    optimizer = wrapped(groups, model, adam)
    kept = Folder(shared_path, 5)
    trainer(groups.replicas, model, optimizer, checkpoints=kept).fit(1)
    groups.whole.barrier()
    other = build_model("mlp", SHAPE, hidden=[9, 5], latent=[3])
    resumed = trainer(groups.replicas, other, wrapped(groups, other, adam))
    with pytest.raises(CheckpointError, match=r"build the model with the --model, --hidden"):
        resumed.resume(load(kept.steps()[0]))


def test_a_rank_that_is_not_finite_keeps_all_parts_from_stepping(groups: Groups) -> None:
    model = network(seed=100)
    optimizer = wrapped(groups, model, OPTIMIZERS["adam"])
    before = whole(model, optimizer)
    loss_of(model, *(tensor[share(groups.replicas)] for tensor in examples())).backward()
    if groups.whole.rank == groups.whole.size - 1:
        next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for key, tensor in whole(model, optimizer).items():
        assert torch.equal(tensor, before[key])


def test_strategies_and_optimizers_that_cannot_are_refused(groups: Groups) -> None:
    with pytest.raises(ConfigError, match=r"train with --strategy allreduce or sharded"):
        wrapped(groups, network(seed=1), OPTIMIZERS["adam"], strategy="local-sgd", engine=None)
    with pytest.raises(ConfigError, match=r"split over ranks, and Adafactor is not elementwise"):
        wrapped(groups, network(seed=1), lambda p: torch.optim.Adafactor(p, 0.05))


def test_a_model_without_a_pair_is_refused(groups: Groups) -> None:
    with pytest.raises(ConfigError, match=r"found no two layers of one kind in a row"):
        split_layers(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), [""], groups.model)


def test_layers_that_share_their_weights_stay_whole(groups: Groups) -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Linear(8, 1))
        model[4].weight = model[0].weight
        return model.append(nn.Tanh()).append(nn.Linear(1, 8)).append(nn.Linear(8, 2))

    split, unsplit = tied(), tied()
    cuts = split_layers(split, [""], groups.layers)
    assert {name.partition(".")[0] for name in cuts} == {"7", "8"}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(split(x), unsplit(x))


def test_an_example_without_a_batch_has_the_shape_that_it_has_unsplit(groups: Groups) -> None:
    for layers, shape in (
        ((nn.Linear(6, 8), nn.Linear(8, 3)), (6,)),
        ((nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)), (2, 5, 5)),
    ):
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        x = torch.ones(shape)
        expected = model(x).shape
        split_layers(model, [""], groups.layers)
        assert model(x).shape == expected
