"""A model that is split before it has numbers gets those of the whole one."""

from typing import Any

import pytest
import torch
from torch import nn

from hvdvae.cli import assemble
from hvdvae.cli.footprint import Imagined
from hvdvae.config import TrainConfig
from hvdvae.parallel.fill import fill
from hvdvae.parallel.mesh import Groups, Mesh
from hvdvae.parallel.parts import Cut
from hvdvae.parallel.stages import costs_of, keep_stage
from hvdvae.parallel.tensor import split_layers
from hvdvae.vae import VAE, set_output_bias
from hvdvae.vae.chain import VaeChain

SHAPE = (1, 8, 8)
CPU, META = torch.device("cpu"), torch.device("meta")
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [12, 8], "latent": [3]},
    "mlp2": {"model": "mlp2", "hidden": [12, 8], "latent": [6, 4]},
    "conv": {"model": "conv", "hidden": [4, 8], "latent": [3]},
    "conv with batch norm": {"model": "conv", "hidden": [4, 8], "latent": [3], "batch_norm": True},
    "channels last": {"model": "conv", "hidden": [4, 8], "latent": [3], "channels_last": True},
    "gaussian": {"hidden": [12, 8], "latent": [3], "likelihood": "gaussian"},
}


def groups(mesh: Mesh, rank: int) -> Groups:
    _, stage, piece = mesh.place(rank)
    worlds: list[Any] = [Imagined(rank, mesh.size), Imagined(0, 1), Imagined(rank, mesh.size)]
    worlds += [Imagined(stage, mesh.pp), Imagined(piece, mesh.tp)]
    return Groups(mesh, *worlds)


MESHES = ("pp=2", "tp=2", "pp=2,tp=2")


@pytest.mark.parametrize(
    ("name", "text"),
    # Statistics stand between the layers of such a pair.
    [(name, text) for name in MODELS for text in MESHES if name != "conv with batch norm" or "tp" not in text],
)
def test_parts_hold_what_the_whole_holds(name: str, text: str) -> None:
    config = TrainConfig(seed=3, **MODELS[name])
    mean = torch.rand(SHAPE) if config.likelihood == "bernoulli" else None
    whole = assemble.model(config, SHAPE, CPU)
    if mean is not None:
        set_output_bias(whole, mean)
    expected, seen = whole.state_dict(), set()
    axes = {key: int(value) for key, value in (part.split("=") for part in text.split(","))}
    mesh = Mesh(1, **axes)
    for rank in range(mesh.size):
        part, cuts = split_without_numbers(config, mesh, rank)
        torch.manual_seed(rank)  # Whatever was drawn before.
        assemble.fill_part(config, part, cuts, mean, CPU)
        for key, tensor in part.state_dict().items():
            mine = cuts[key].of_whole(expected[key]) if key in cuts else expected[key]
            assert torch.equal(tensor, mine), key
            assert tensor.stride() == torch.empty_like(mine).stride()
            seen.add(key)
    assert seen == expected.keys()


def split_without_numbers(config: TrainConfig, mesh: Mesh, rank: int) -> tuple[VAE, dict[str, Cut]]:
    part = assemble.model(config, SHAPE, META)
    chain = VaeChain(part, assemble.objective(config), 1)
    mine = groups(mesh, rank)
    cuts = split_layers(part, part.chains, mine.layers) if mesh.tp > 1 else {}
    if mesh.pp > 1:
        keep_stage(part, chain, chain.default_cuts, mine)
    return part, cuts


def test_no_more_than_a_layer_has_numbers_at_a_time() -> None:
    config = TrainConfig(**MODELS["conv"])
    part, whole = assemble.model(config, SHAPE, META), assemble.model(config, SHAPE, META)
    names = []

    def drawn(name: str) -> None:
        real = [key for key, tensor in whole.state_dict().items() if not tensor.is_meta]
        assert {key.rpartition(".")[0] for key in real} <= {name}
        names.extend(real)

    fill(part, whole, {}, CPU, drawn)
    assert set(names) == whole.state_dict().keys()
    assert not any(tensor.is_meta for tensor in part.state_dict().values())
    assert all(tensor.is_meta for tensor in whole.state_dict().values())


def test_costs_of_a_model_without_numbers_are_those_of_its_steps() -> None:
    config = TrainConfig(**MODELS["conv with batch norm"])
    model = assemble.model(config, SHAPE, META)
    chain = VaeChain(model, assemble.objective(config), 1)
    costs = costs_of(model, chain, torch.rand(4, *SHAPE))
    assert len(costs) == len(chain.steps)
    assert all(0 < cost < float("inf") for cost in costs)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert isinstance(model, nn.Module)
    assert model.training
