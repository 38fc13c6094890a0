"""A configuration is held against the checkpoint: what changes the trained function is refused by name."""

from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdvae import checkpoint as checkpoints
from hvdvae.checkpoint import Checkpoint
from hvdvae.cli import assemble
from hvdvae.cli.config_file import write_config
from hvdvae.cli.same_function import changes, check_resumed
from hvdvae.cli.saved_run import open_model
from hvdvae.config import TrainConfig
from hvdvae.config_kinds import BY_DATA, CHANGEABLE, FIXED, FUNCTION, OF_A_LAUNCH
from hvdvae.errors import CheckpointError
from hvdvae.vae import sample_images
from hvdvae.world import World

SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {"hidden": [5], "latent": [3]}
DRAWN = {**SMALL, "binarization": "dynamic"}
"""As `hvdvae train` saves it, which has seen the data."""
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({**SMALL, "activation": "relu"}, "activation"),
    "likelihood": ({**SMALL, "likelihood": "discretized-logistic"}, "likelihood"),
    "sigma": ({**SMALL, "likelihood": "gaussian", "sigma": 0.25}, "sigma"),
    "binarization": ({**SMALL, "binarization": "none"}, "binarization"),
    "hidden": ({"hidden": [6], "latent": [3]}, "hidden"),
    "model": ({"model": "conv", "hidden": [5], "latent": [3]}, "model"),
    "batch norm": ({"model": "conv", "batch_norm": True}, "batch_norm"),
}


def record_of(config: TrainConfig, *, says_function: bool = True) -> dict[str, Any]:
    saved = {**asdict(config), "shape": list(SHAPE)}
    if says_function:
        saved["function"] = assemble.function_of(config, SHAPE)
    return {"step": 7, "config": saved}


def saved_in(folder: Path, config: TrainConfig, *, says_function: bool = True) -> Path:
    model = assemble.model(config, SHAPE, torch.device("cpu"))
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    found = Checkpoint(tensors, record_of(config, says_function=says_function))
    checkpoints.Folder(folder / "checkpoints", 3).save(found, is_best=True)
    write_config(config, folder / "config.yaml")
    return folder


def test_every_key_is_of_one_kind() -> None:
    found = Counter([*FUNCTION, *FIXED, *BY_DATA, *CHANGEABLE, *OF_A_LAUNCH])
    assert set(found) == {field.name for field in fields(TrainConfig)}, "say in config_kinds.py what a resume may do"
    assert set(found.values()) == {1}


@pytest.mark.parametrize("says_function", [True, False], ids=["saved resolved", "saved before that"])
@pytest.mark.parametrize(("options", "key"), OTHERS.values(), ids=list(OTHERS))
def test_swapped_configurations_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], key: str, says_function: bool
) -> None:
    one = saved_in(tmp_path / "one", TrainConfig(**DRAWN), says_function=says_function)
    other = saved_in(tmp_path / "other", TrainConfig(**options), says_function=says_function)
    world = World.alone(device="cpu")
    for folder in (one, other):
        open_model(str(folder), "best", world)
    mine, theirs = ((folder / "config.yaml").read_text() for folder in (one, other))
    (one / "config.yaml").write_text(theirs)
    (other / "config.yaml").write_text(mine)
    for folder in (one, other):
        with pytest.raises(
            CheckpointError, match=rf"best\.safetensors holds another model: it was trained with .*{key} .*config\.yaml"
        ):
            open_model(str(folder), "best", world)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    one = saved_in(tmp_path / "one", TrainConfig(**SMALL))
    other = saved_in(tmp_path / "other", TrainConfig(**SMALL, activation="relu"))
    with pytest.raises(CheckpointError, match=r"other/.*it was trained with activation relu \(not tanh\)"):
        open_model(str(one), str(other / "checkpoints" / "best.safetensors"), World.alone(device="cpu"))


def test_a_default_that_is_spelled_out_is_the_same_function(tmp_path: Path) -> None:
    folder = saved_in(tmp_path, TrainConfig(**SMALL))
    spelled = TrainConfig(**SMALL, activation="tanh", binarization="dynamic")
    write_config(spelled, folder / "config.yaml")
    open_model(str(folder), "best", World.alone(device="cpu"))
    check_resumed(assemble.function_of(spelled, SHAPE), record_of(TrainConfig(**SMALL)), "a")
    for name in ("mlp", "mlp2", "conv"):
        function = assemble.function_of(TrainConfig(model=name), SHAPE)
        rebuilt = TrainConfig(**{key: function[key] for key in FUNCTION if key in function})
        plain, again = (assemble.model(c, SHAPE, torch.device("cpu")) for c in (TrainConfig(model=name), rebuilt))
        with torch.no_grad():
            drawn = []
            for model in (plain, again):
                drawn.append(sample_images(model, 4, torch.Generator().manual_seed(1)))
        assert torch.equal(*drawn), f"what {name} resolves to is not what it is built as"


@pytest.mark.parametrize(("options", "key"), OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("says_function", [True, False])
def test_a_resume_as_another_function_is_refused_by_its_flag(
    options: dict[str, Any], key: str, says_function: bool
) -> None:
    record = record_of(TrainConfig(**DRAWN), says_function=says_function)
    with pytest.raises(CheckpointError, match=rf"was trained with .*{key}.*resume with .*--{key.replace('_', '-')}"):
        check_resumed(assemble.function_of(TrainConfig(**options), SHAPE), record, "step-7")
    check_resumed(assemble.function_of(TrainConfig(**SMALL, lr=1.0), SHAPE), record, "step-7")
    with pytest.raises(CheckpointError, match="shape"):
        check_resumed(assemble.function_of(TrainConfig(**SMALL), (64,)), record, "step-7")


def test_what_a_resume_changes_is_said() -> None:
    record = record_of(TrainConfig(**SMALL))
    assert changes(TrainConfig(**SMALL), record) == []
    later = TrainConfig(**SMALL, lr=0.01, clip_norm=2.0, out="elsewhere", threads=3)
    assert changes(later, record) == ["lr 0.01 (was 0.001)", "clip_norm 2.0 (was none)"]
    assert changes(later, {"config": {}}) == []
