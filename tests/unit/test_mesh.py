"""Which rank stands where, and what a mesh that does not fit is told."""

import re
from typing import Any

import pytest
from torch import nn

from hvdvae.cli.assemble import mesh_of, micro_batches
from hvdvae.cli.narration import several
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from hvdvae.parallel.mesh import Mesh, parse, places_of
from hvdvae.parallel.tensor import pairs_of
from hvdvae.vae import build_model


def test_every_rank_has_a_place_of_its_own_and_models_stand_side_by_side() -> None:
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.size == 8
    places = [mesh.place(rank) for rank in range(8)]
    assert places[:4] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert places[4:] == [(1, stage, piece) for _, stage, piece in places[:4]]


def test_of_many_ranks_the_first_and_the_last_are_named() -> None:
    assert several([0, 4, 8]) == "0, 4, 8"
    assert several([*range(0, 1000, 4)]) == "0, 4, 8, ... 996 (250 ranks)"


def test_parts_are_named_with_their_ranks() -> None:
    assert Mesh(2, pp=2).holders() == {"stage 0": [0, 2], "stage 1": [1, 3]}
    assert Mesh(2, tp=2).holders() == {"slice 0": [0, 2], "slice 1": [1, 3]}
    assert Mesh(3).holders() == {"the model": [0, 1, 2]}
    assert Mesh(2, pp=2, tp=2).holders() == {
        f"stage {stage}, slice {piece}": [2 * stage + piece, 4 + 2 * stage + piece]
        for stage in range(2)
        for piece in range(2)
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dp=2,tp=4", {"dp": 2, "pp": 1, "tp": 4}),
        (" tp = 2", {"dp": 1, "pp": 1, "tp": 2}),
        ("pp=3", {"dp": 1, "pp": 3, "tp": 1}),
    ],
)
def test_what_is_left_out_is_one(text: str, expected: dict[str, int]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "dp", "dp=0", "dp=-1", "xx=2", "dp=2,dp=2", "dp=2;tp=2", "dp=2,", "dp=1.5"])
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--mesh is .*expected dp=\.\.,pp=\.\.,tp=\.\. with counts from 1"):
        parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, "--tensor 3: a model takes 3 ranks then, and 2 are no multiple"),
        ({"mesh": "dp=2,tp=2"}, "--mesh dp=2,tp=2 is of 4 ranks, but 2 train"),
        ({"mesh": "rows=2"}, "--mesh is 'rows=2'"),
        (
            {"tensor": 2, "compile": True},
            "--compile does not go with a model that is split (--tensor, --pipeline, --mesh)",
        ),
        ({"pipeline": 2, "precision": "fp16"}, "--precision fp16 does not go with a model that is split"),
        ({"tensor": 2, "compression": "int8"}, "--compression does not go with a model that is split"),
        (
            {"pipeline": 2, "strategy": "sharded", "zero_stage": 2},
            "--zero-stage 2 does not go with a model in stages (--pipeline, --mesh)",
        ),
        ({"micro_batches": 4}, "--micro-batches is for models in stages"),
        (
            {"pipeline": 2, "recompute": True, "model": "conv", "batch_norm": True},
            "--recompute with --batch-norm would count each batch twice",
        ),
    ],
)
def test_what_does_not_go_with_a_split_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_of(TrainConfig(**options), 2)


def test_sharded_gradients_go_with_split_layers() -> None:
    assert mesh_of(TrainConfig(tensor=2, strategy="sharded", zero_stage=2), 4) == Mesh(2, tp=2)


def test_a_mesh_is_read_back_from_its_text() -> None:
    assert Mesh.of(8, mesh=str(Mesh(2, 2, 2))) == Mesh(2, 2, 2)


def test_tensor_alone_leaves_the_rest_to_copies() -> None:
    assert Mesh.of(8, tensor=2) == Mesh(dp=4, tp=2)
    assert Mesh.of(3) == Mesh(dp=3, tp=1)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (6, {"tensor": 4}, "--tensor 4: a model takes 4 ranks then, and 6 are no multiple of it; use 1 or 2 or 3 or 6"),
        (2, {"tensor": 4}, "use 1 or 2 ranks a model, or start 4"),
        (4, {"tensor": 2, "pipeline": 3}, "--pipeline 3 --tensor 2: a model takes 6 ranks then, and 4 are no multiple"),
        (6, {"mesh": "dp=2,tp=2"}, "--mesh dp=2,tp=2 is of 4 ranks, but 6 train: use dp=3,pp=1,tp=2 or "),
        (4, {"mesh": "dp=2,tp=2", "tensor": 4}, "--tensor 4 and --mesh dp=2,tp=2 say different things"),
        (4, {"mesh": "dp=2,tp=2", "pipeline": 2}, "--pipeline 2 and --mesh dp=2,tp=2 say different things"),
    ],
)
def test_a_wrong_product_names_what_fits(size: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Mesh.of(size, **options)  # type: ignore[arg-type]


def pairs(model: nn.Module, chain: str = "", count: int = 2) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in pairs_of(model, chain, count)]


def test_pairs_hold_as_many_weights_as_can_be() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 90))
    assert pairs(model) == [("2", "4")], "not the first two, which hold less"
    four = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    assert pairs(four) == [("0", "1"), ("2", "3")]


def test_only_layers_of_one_kind_with_nothing_but_elementwise_between_are_paired() -> None:
    assert pairs(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 4))) == []
    assert pairs(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))) == []
    assert pairs(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 1, 3))) == [("0", "2")]
    assert pairs(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))) == []
    assert pairs(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), count=4) == [], "fewer neurons than ranks"


def test_batch_norm_of_each_channel_may_stand_between() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1)
    assert [*pairs_of(nn.Sequential(*layers), "", 2)] == [("0", ["1"], "3")]
    assert pairs(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.BatchNorm1d(3), nn.Linear(2, 4))) == []


def test_layers_that_share_a_weight_are_not_split() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Linear(8, 2))
    assert pairs(model) == [("0", "2"), ("4", "5")]
    model[4].weight = model[0].weight
    assert pairs(model) == []
    again = nn.Linear(4, 4)
    assert pairs(nn.Sequential(again, nn.Tanh(), again, nn.Tanh(), nn.Linear(4, 4))) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4),
        ({"free_bits": 0.1}, 1),
        ({"model": "conv", "batch_norm": True}, 1),
        ({"free_bits": 0.1, "micro_batches": 2}, 2),
    ],
)
def test_what_looks_at_a_whole_batch_flows_through_stages_as_one(options: dict[str, Any], expected: int) -> None:
    assert micro_batches(TrainConfig(**options)) == expected


def test_the_models_of_the_package_have_pairs() -> None:
    mlp = build_model("mlp", (1, 4, 4), hidden=[8, 8], latent=[3])
    assert pairs(mlp, "encoder") == [("encoder.network.0", "encoder.network.2")]
    assert pairs(mlp, "decoder") == [("decoder.network.2", "decoder.output")]
    conv = build_model("conv", (1, 8, 8), channels=[8, 8], latent=[3])
    assert pairs(conv, "encoder") == [("encoder.network.0", "encoder.network.2")]
    assert pairs(conv, "decoder") == [("decoder.network.1", "decoder.output")]
    assert [pairs(mlp, chain) for chain in mlp.chains] == [pairs(mlp, "encoder"), pairs(mlp, "decoder")]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # Two stages in two copies, of which one rank each is gone: (part, copy) of the others.
        ([(0, 0), (0, 1), (1, 1)], [2, 0, 1]),
        ([(1, 0), (0, 1), (1, 1)], [3, 0, 1]),
        ([(0, 0), (1, 0), (1, 1)], [0, 1, 3]),
        ([(0, 0), (1, 1)], [0, 1]),
        # Three copies: two whole ones keep their ranks together; two broken ones make one.
        ([(0, 0), (0, 1), (1, 1), (0, 2), (1, 2)], [4, 0, 1, 2, 3]),
        ([(0, 0), (1, 1), (0, 2), (1, 2)], [2, 3, 0, 1]),
    ],
)
def test_whole_copies_stay_together_and_come_first(found: list[tuple[int, int]], expected: list[int]) -> None:
    assert places_of(found, 2) == expected
