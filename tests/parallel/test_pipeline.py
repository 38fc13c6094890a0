"""Law 4: a model in stages is the whole one: loss, gradients, noise, checkpoints; and what stages say of themselves."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.batch import Batch
from hvdvae.checkpoint import Folder, load
from hvdvae.cli.assessment import assess
from hvdvae.data import ArraySource
from hvdvae.errors import ConfigError
from hvdvae.parallel.mesh import Groups, Mesh, groups_of
from hvdvae.parallel.micro_batches import SCHEDULES, bubble
from hvdvae.parallel.parts import Parts, Whole
from hvdvae.parallel.sequential import SequentialChain
from hvdvae.parallel.stages import choose_cuts, costs_of, keep_stage
from hvdvae.parallel.tensor import split_layers
from hvdvae.resume import load_weights
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.trainer import Trainer
from hvdvae.vae import VAE, Elbo, FreeBits, Iwae, build_model
from hvdvae.vae.chain import VaeChain
from hvdvae.vae.objectives import Objective
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, examples, share
from tests.parallel.test_tensor import MODELS, adam, whole
from tests.parallel.test_trainer_laws import IMAGES, SHAPE, Epochs, loader

if TYPE_CHECKING:
    from hvdvae.parallel.pipeline import Pipeline

MESHES = [Mesh(dp, pp, tp) for dp, pp, tp in itertools.product((1, 2, 3, 4), repeat=3) if dp * pp * tp <= 4]


@pytest.fixture(params=MESHES, ids=str)
def groups(request: pytest.FixtureRequest, world: World) -> Groups:
    """Every mesh of this many ranks."""
    if request.param.size != world.size:
        pytest.skip(f"{world.size} ranks")
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    return groups_of(request.param, world)


def vae(name: str, **options: Any) -> VAE:
    torch.manual_seed(8)
    return build_model(name, SHAPE, **MODELS[name] | options)


def staged(
    groups: Groups,
    model: VAE,
    objective: Objective,
    samples: int = 1,
    *,
    micros: int = 2,
    cuts: str = "auto",
    strategy: str = "allreduce",
    clip_norm: float | None = None,
    **options: Any,
) -> tuple[Strategy, "Pipeline | None"]:
    """The model in its parts, and what trains them."""
    remembered, stages = Whole.of(model), groups.mesh.pp
    chain = VaeChain(model, objective, samples)
    places = choose_cuts(cuts, model, chain, stages, torch.rand(2, *SHAPE), groups.whole)
    split = split_layers(model, model.chains, groups.layers) if groups.mesh.tp > 1 else {}
    parts = Parts(groups, remembered, split)
    pipeline = None
    if stages > 1:
        from hvdvae.parallel.pipeline import Pipeline

        pipeline = Pipeline(chain, keep_stage(model, chain, places, groups), groups, micros=micros, **options)
    kind: dict[str, Any] = {"strategy": strategy, "engine": "mpi", "clip_norm": clip_norm}
    optimizer = DistributedOptimizer(adam(model.parameters()), model, world=groups.replicas, parts=parts, **kind)
    return optimizer, pipeline


def trainer(
    world: World,
    model: VAE,
    optimizer: Strategy,
    objective: Objective,
    pipeline: "Pipeline | None" = None,
    **options: Any,
) -> Trainer:
    return Trainer(model, optimizer, objective, loader(world), seed=3, pipeline=pipeline, **options)


def unsplit(groups: Groups, model: VAE, objective: Objective, clip_norm: float | None = None) -> list[dict[str, float]]:
    """The same run with whole models on the ranks that hold the same part; its epochs."""
    told = Epochs()
    kind: dict[str, Any] = {"strategy": "local"} if groups.replicas.size == 1 else {"engine": "mpi"}
    kind["clip_norm"] = clip_norm
    optimizer = DistributedOptimizer(adam(model.parameters()), model, world=groups.replicas, **kind)
    trainer(groups.replicas, model, optimizer, objective, monitors=[told]).fit(2)
    return told.metrics


def assert_same(groups: Groups, model: VAE, optimizer: Strategy, expected: VAE) -> None:
    found = whole(model, optimizer)
    for key, parameter in expected.named_parameters():
        torch.testing.assert_close(found[f"model/{key}"], parameter.detach(), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_learn_what_the_whole_model_does(groups: Groups, name: str, schedule: str) -> None:
    told, model, expected = Epochs(), vae(name), vae(name)
    optimizer, pipeline = staged(groups, model, Elbo(), schedule=schedule)
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline, monitors=[told]).fit(2)
    metrics = unsplit(groups, expected, Elbo())
    assert_same(groups, model, optimizer, expected)
    if groups.whole.is_first:
        for mine, other in zip(told.metrics, metrics, strict=True):
            for key in ("loss", "rate", "distortion", "gradient_norm"):
                assert mine[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
def test_the_norm_that_is_clipped_is_that_of_all_stages(groups: Groups, strategy: str) -> None:
    told, model, expected = Epochs(), vae("mlp"), vae("mlp")
    optimizer, pipeline = staged(groups, model, Elbo(), strategy=strategy, clip_norm=0.5)
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline, monitors=[told]).fit(2)
    metrics = unsplit(groups, expected, Elbo(), clip_norm=0.5)
    assert_same(groups, model, optimizer, expected)
    if groups.whole.is_first:
        assert all(epoch["gradient_norm"] > 0.5 for epoch in metrics), "nothing was clipped"
        for mine, other in zip(told.metrics, metrics, strict=True):
            assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "samples"), [(Iwae(samples=3), 3), (Elbo(beta=0.5, warmup_epochs=1, samples=2), 2)], ids=str
)
def test_what_the_loss_needs_crosses_the_cut(groups: Groups, objective: Objective, samples: int) -> None:
    for name in ("mlp", "mlp2"):
        model, expected = vae(name), vae(name)
        optimizer, pipeline = staged(groups, model, objective, samples, micros=3)
        trainer(groups.replicas, model, optimizer, objective, pipeline).fit(2)
        unsplit(groups, expected, objective)
        assert_same(groups, model, optimizer, expected)


def test_layers_in_bfloat16_are_as_near_as_those_of_the_whole_model(groups: Groups) -> None:
    told, expected = Epochs(), Epochs()
    model, other = vae("mlp"), vae("mlp")
    optimizer, pipeline = staged(groups, model, Elbo())
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline, monitors=[told], precision="bf16").fit(1)
    kind = {"strategy": "local"} if groups.replicas.size == 1 else {"engine": "mpi"}
    plain = DistributedOptimizer(adam(other.parameters()), other, world=groups.replicas, **kind)
    trainer(groups.replicas, other, plain, Elbo(), monitors=[expected], precision="bf16").fit(1)
    if groups.whole.is_first:
        assert told.metrics[0]["loss"] == pytest.approx(expected.metrics[0]["loss"], rel=0.01)


def test_free_bits_with_one_micro_batch(groups: Groups) -> None:
    model, expected, objective = vae("mlp"), vae("mlp"), FreeBits(nats=0.2)
    optimizer, pipeline = staged(groups, model, objective, micros=1)
    trainer(groups.replicas, model, optimizer, objective, pipeline).fit(2)
    unsplit(groups, expected, objective)
    assert_same(groups, model, optimizer, expected)


@pytest.mark.parametrize("cuts", ["measured", "1", "2", "4"])
def test_wherever_it_is_cut_and_with_what_is_computed_again(groups: Groups, cuts: str) -> None:
    if groups.mesh.pp > 2 and cuts != "measured":
        more = {3: {"1": "1,2", "2": "1,3", "4": "2,4"}, 4: {"1": "1,2,3", "2": "1,3,4", "4": "2,3,5"}}
        cuts = more[groups.mesh.pp][cuts]
    if groups.mesh.pp == 1 and cuts != "measured":
        pytest.skip("nothing is cut")
    model, expected = vae("mlp"), vae("mlp")
    optimizer, pipeline = staged(groups, model, Elbo(), cuts=cuts, recompute=True, strategy="sharded")
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline).fit(2)
    unsplit(groups, expected, Elbo())
    assert_same(groups, model, optimizer, expected)


def test_accumulated_batches_are_the_big_batch(groups: Groups) -> None:
    for name, objective, samples in (("mlp", Elbo(), 1), ("mlp2", Iwae(samples=3), 3)):
        model, expected = vae(name), vae(name)
        optimizer, pipeline = staged(groups, model, objective, samples)
        optimizer.backward_passes_per_step = 2
        trainer(groups.replicas, model, optimizer, objective, pipeline).fit(2)
        unsplit(groups, expected, objective)
        assert_same(groups, model, optimizer, expected)


@pytest.mark.parametrize("name", ["mlp2", "conv"])
def test_evaluation_on_stages_is_that_of_the_checkpoint_on_one_rank(
    groups: Groups, shared_path: Path, name: str
) -> None:
    options = {"batch_norm": name == "conv" and groups.mesh.tp == 1}
    if groups.mesh.pp == 1:
        pytest.skip("no stages")
    model = vae(name, **options)
    optimizer, pipeline = staged(groups, model, Elbo())
    kept = Folder(shared_path, 5)
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline, checkpoints=kept, ema_decay=0.5).fit(1)
    source = ArraySource(IMAGES, "images")
    with optimizer.fetched():
        together = assess(model, source, groups.replicas, binarization="dynamic", samples=3)
    groups.whole.barrier()
    saved = load(kept.steps()[0])
    single = vae(name, **options)
    load_weights(single, saved)
    alone = assess(single, source, World.alone(device="cpu"), binarization="dynamic", samples=3)
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)
    assert together.elbo == pytest.approx(alone.elbo, rel=1e-5)
    # Everything is in it, as one process would have saved it.
    whole_one = vae(name, **options)
    local = DistributedOptimizer(adam(whole_one.parameters()), whole_one, world=World.alone(), strategy="local")
    resumed = trainer(World.alone(), whole_one, local, Elbo(), ema_decay=0.5)
    resumed.resume(saved)
    assert set(local.state_dict()["state"]) == set(range(len(list(whole_one.parameters()))))


def test_checkpoints_go_on_at_any_other_mesh(world: World, shared_path: Path) -> None:
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    every = [mesh for mesh in MESHES if mesh.size == world.size]
    final: dict[int, dict[str, Tensor]] = {}
    for mesh in every:
        groups, model = groups_of(mesh, world), vae("mlp")
        optimizer, pipeline = staged(groups, model, Elbo())
        kept = Folder(shared_path / str(mesh), 5)
        trainer(groups.replicas, model, optimizer, Elbo(), pipeline, checkpoints=kept, ema_decay=0.9).fit(2)
        final[mesh.dp] = whole(model, optimizer)
    world.barrier()
    for saved, mesh in itertools.product(every, every):
        groups, model = groups_of(mesh, world), vae("mlp")
        optimizer, pipeline = staged(groups, model, Elbo(), strategy="sharded")
        resumed = trainer(groups.replicas, model, optimizer, Elbo(), pipeline, ema_decay=0.9)
        checkpoint = load(Folder(shared_path / str(saved), 5).steps()[-1])
        resumed.resume(checkpoint)
        assert resumed.position.epoch == 1
        for key, tensor in whole(model, optimizer).items():
            assert torch.equal(tensor, checkpoint.tensors[key]), key
        if mesh.dp != saved.dp:
            continue  # Another number of copies would draw other noise.
        resumed.fit(2)
        for key, tensor in whole(model, optimizer).items():
            torch.testing.assert_close(tensor, final[mesh.dp][key], atol=2e-4, rtol=2e-3)


def test_any_sequential_trains_in_stages(groups: Groups) -> None:
    if groups.mesh.tp > 1:
        pytest.skip("layers are split")
    pytest.importorskip("mpi4py")
    from hvdvae.parallel.pipeline import Pipeline

    def network() -> nn.Sequential:
        torch.manual_seed(2)
        block = Scaled(5)
        return nn.Sequential(
            nn.Flatten(),
            nn.ELU(inplace=True),
            nn.Linear(6, 5),
            nn.Tanh(),
            block,
            nn.ReLU(),
            nn.Linear(5, 4),
            nn.Linear(4, 3),
        )

    def loss(output: Tensor, batch: Batch, epoch: float) -> Tensor:
        return (output - batch[1]).square().mean()  # type: ignore[index]

    x, y = examples()
    single = network()
    alone = OPTIMIZERS["adam"](single.parameters())
    model = network()
    chain = SequentialChain(model, loss)
    remembered = Whole.of(model)
    cuts = choose_cuts("measured", model, chain, groups.mesh.pp, [x[:4], y[:4]], groups.whole)
    parts = Parts(groups, remembered, {})
    pipeline = Pipeline(chain, keep_stage(model, chain, cuts, groups), groups, micros=2)
    optimizer = DistributedOptimizer(
        OPTIMIZERS["adam"](model.parameters()), model, world=groups.replicas, parts=parts, engine="mpi"
    )
    mine = share(groups.replicas)
    for _ in range(4):
        alone.zero_grad()
        loss(single(x.clone()), [x, y], 0.0).backward()
        alone.step()
        optimizer.zero_grad()
        pipeline.run([x[mine], y[mine]], 0.0, 1, torch.autocast("cpu", enabled=False))
        optimizer.step()
    found = whole(model, optimizer)
    for key, parameter in single.named_parameters():
        torch.testing.assert_close(found[f"model/{key}"], parameter.detach(), atol=2e-5, rtol=2e-4)
    single.eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), single(x.clone()), atol=2e-5, rtol=2e-4)


class Masks(nn.Dropout):
    """Dropout that remembers what it let through."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(torch.ones_like(x))
        self.seen.append(y.flatten().tolist())
        return x * y


def test_layers_draw_their_own_noise_wherever_the_model_is_cut(groups: Groups) -> None:
    if groups.mesh.pp == 1 or groups.mesh.tp > 1:
        pytest.skip("stages alone")
    from hvdvae.parallel.pipeline import Pipeline

    def drawn(cuts: str) -> dict[int, list[list[float]]]:
        """Masks of each layer, of all ranks' micro-batches."""
        layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), Masks())]
        model = nn.Sequential(*layers)
        chain = SequentialChain(model, lambda output, batch, epoch: output.square().mean())
        torch.manual_seed(groups.replicas.rank)
        choose_cuts("measured", model, chain, groups.mesh.pp, torch.ones(4, 6), groups.whole)
        places = choose_cuts(cuts, model, chain, groups.mesh.pp, torch.ones(4, 6), groups.whole)
        pipeline = Pipeline(chain, keep_stage(model, chain, places, groups), groups, micros=2, recompute=True)
        for layer in layers[1::2]:
            layer.seen.clear()  # Of measuring.
        for _ in range(2):
            pipeline.run(torch.ones(8, 6), 0.0, 1, torch.autocast("cpu", enabled=False))
        mine = {number: layer.seen for number, layer in enumerate(layers[1::2]) if layer.seen}
        everyone = groups.model.gather_objects([[number, masks] for number, masks in mine.items()])
        # In which order a stage computes them depends on where it stands.
        return {number: sorted(masks) for found in everyone for number, masks in found}

    first, second = ({2: "1", 3: "1,2", 4: "1,2,3"}, {2: "3", 3: "2,4", 4: "1,2,4"})
    found = drawn(first[groups.mesh.pp])
    assert found == drawn(second[groups.mesh.pp])
    assert len(found) == 5
    # Two batches of two micro-batches, each computed twice: forward and backward see the same.
    masks = [tuple(mask) for seen in found.values() for mask in seen]
    assert len(masks) == 5 * 2 * 2 * 2
    assert len(set(masks)) == 5 * 2 * 2
    copies = groups.replicas.gather_objects(found.get(0, []))
    assert len({str(copy) for copy in copies}) == groups.replicas.size


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("tied", r"4\.weight and 0\.weight are one tensor|0\.weight and 4\.weight are one tensor"),
        ("twice", r"are one tensor, and stages 0 and \d would hold it"),
        ("tuple", r"layer 2 of the model returns a tuple"),
    ],
)
def test_a_model_that_stages_cannot_hold_is_refused(groups: Groups, broken: str, message: str) -> None:
    if groups.mesh.pp == 1 or groups.mesh.tp > 1:
        pytest.skip("stages alone")

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    layers: list[nn.Module] = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
    if broken == "tied":
        layers[4].weight = layers[0].weight
    elif broken == "twice":
        layers[4] = layers[0]
    else:
        layers[2] = Pair(6, 6)
    model = nn.Sequential(*layers)
    chain = SequentialChain(model, lambda output, batch, epoch: output.sum())
    # All ranks measure: the layer that returns a tuple is found then, and tied ones when they are kept.
    with pytest.raises(ConfigError, match=message):  # noqa: PT012
        costs_of(model, chain, torch.ones(2, 6))
        keep_stage(model, chain, [*range(groups.mesh.pp)], groups)


class Scaled(nn.Module):
    """A block with a parameter of its own, and a layer in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 0.9))
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def test_what_has_no_parameters_is_no_step_of_its_own() -> None:
    layers = nn.Flatten(), nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Identity()
    chain = SequentialChain(nn.Sequential(*layers), lambda output, batch, epoch: output.sum())
    assert [step.modules for step in chain.steps] == [("0", "1", "2", "3"), ("4", "5")]


def test_stages_take_an_optimizer_of_all_parameters_in_their_order(groups: Groups) -> None:
    if groups.mesh.pp == 1:
        pytest.skip("no stages")
    model = vae("mlp")
    chain, remembered = VaeChain(model, Elbo(), 1), Whole.of(model)
    places = choose_cuts("auto", model, chain, groups.mesh.pp, torch.rand(2, *SHAPE), groups.whole)
    keep_stage(model, chain, places, groups)
    first, *rest = model.parameters()
    first.requires_grad = False
    for chosen in ([*rest], [*rest, first]):
        with pytest.raises(ConfigError, match=r"give it model\.parameters\(\), frozen ones too, in their order"):
            DistributedOptimizer(
                adam(chosen), model, world=groups.replicas, parts=Parts(groups, remembered, {}), engine="mpi"
            )


def test_the_trainer_of_a_sequential_needs_no_loss_besides_its_chains(groups: Groups) -> None:
    if groups.mesh.pp == 1 or groups.mesh.tp > 1:
        pytest.skip("stages alone")
    from hvdvae.parallel.pipeline import Pipeline

    torch.manual_seed(2)
    model = nn.Sequential(*(layer for width in (5, 5, 5) for layer in (nn.LazyLinear(width), nn.Tanh())))
    model = nn.Sequential(nn.Flatten(), *model, nn.Linear(5, 16))
    model(torch.zeros(1, *SHAPE))
    whole_model = Whole.of(model)
    chain = SequentialChain(model, lambda output, batch, epoch: (output - batch.flatten(1)).square().mean())  # type: ignore[union-attr]
    cuts = choose_cuts("measured", model, chain, groups.mesh.pp, torch.rand(2, *SHAPE), groups.whole)
    pipeline = Pipeline(chain, keep_stage(model, chain, cuts, groups), groups, micros=2)
    parts = Parts(groups, whole_model, {})
    optimizer = DistributedOptimizer(adam(model.parameters()), model, world=groups.replicas, parts=parts, engine="mpi")
    told = Epochs()
    Trainer(model, optimizer, None, loader(groups.replicas), monitors=[told], pipeline=pipeline).fit(6)
    if groups.whole.is_first:
        assert told.metrics[-1]["loss"] < 0.8 * told.metrics[0]["loss"]


def test_stages_tell_how_long_they_worked_and_idled(groups: Groups) -> None:
    model = vae("mlp")
    optimizer, pipeline = staged(groups, model, Elbo(), micros=2)
    if pipeline is None:
        pytest.skip("no stages")
    trainer(groups.replicas, model, optimizer, Elbo(), pipeline).fit(1)
    found = pipeline.results()
    assert len(found["stage_seconds"]) == groups.mesh.pp
    assert min(found["stage_seconds"]) > 0
    assert found["bubble"] == bubble(groups.mesh.pp, 2)
    assert 0 < found["idle"] < 1
    assert 1 <= found["imbalance"] <= groups.mesh.pp


def test_a_micro_batch_that_is_not_finite_keeps_all_stages_from_stepping(groups: Groups) -> None:
    model = vae("mlp")
    optimizer, pipeline = staged(groups, model, Elbo())
    if pipeline is None:
        pytest.skip("no stages")
    before = whole(model, optimizer)
    batch = torch.zeros(4, *SHAPE)
    batch[3] = torch.nan
    for values, _ in pipeline.run(batch, 0.0, 1, torch.autocast("cpu", enabled=False)):
        optimizer.watch(values["loss"])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for key, tensor in whole(model, optimizer).items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize(
    ("cuts", "stages", "message"),
    [
        ("1,2,3,4,5,6,7", 8, r"--pipeline 8: this model has 6 steps to cut between; use at most 6 stages"),
        ("x", 2, r"--cuts is 'x', expected auto, measured, or 1 rising numbers from 1 to 5"),
        ("3,3", 3, r"--cuts is '3,3'"),
        ("6", 2, r"--cuts is '6'"),
        ("1,2", 2, r"--cuts is '1,2'"),
    ],
)
def test_cuts_that_cannot_be_are_refused(world: World, cuts: str, stages: int, message: str) -> None:
    model = vae("mlp")
    with pytest.raises(ConfigError, match=message):
        choose_cuts(cuts, model, VaeChain(model, Elbo(), 1), stages, torch.rand(2, *SHAPE), world)
