"""A run opened again by ranks of which the first alone sees its folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdvae import checkpoint as checkpoints
from hvdvae.checkpoint import Checkpoint
from hvdvae.cli import assemble
from hvdvae.cli.config_file import write_config
from hvdvae.cli.saved_run import open_model, open_run
from hvdvae.config import TrainConfig
from hvdvae.errors import CheckpointError, ConfigError, DataError
from hvdvae.world import World

RECORD = {"step": 7, "config": {"shape": [1, 8, 8]}}


class Second:
    """Rank 1 of two: gathers put its record behind what rank 0 sent."""

    rank, size, is_first, device = 1, 2, False, torch.device("cpu")

    def __init__(self, sent: list[Any]) -> None:
        self.sent = iter(sent)

    def gather_objects(self, record: Any, what: str = "") -> list[Any]:
        return [next(self.sent), record]

    def barrier(self, what: str = "", *, patient: bool = False) -> None: ...


class First(World):
    """Rank 0, alone, that keeps what it sends."""

    sent: list[Any]

    def gather_objects(self, record: Any, what: str = "gather") -> list[Any]:
        self.__dict__.setdefault("sent", []).extend(found := super().gather_objects(record, what))
        return found


def test_a_rank_without_the_folder_gets_the_run_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(hidden=[5], latent=[3], seed=4)
    write_config(config, tmp_path / "config.yaml")
    model = assemble.model(config, (1, 8, 8), torch.device("cpu"))
    saved = Checkpoint({f"model/{name}": tensor + 1 for name, tensor in model.state_dict().items()}, RECORD)
    checkpoints.Folder(tmp_path / "checkpoints", 3).save(saved, is_best=True)
    best = tmp_path / "checkpoints" / "best.safetensors"
    monkeypatch.setattr(checkpoints, "spread", lambda path, world: checkpoints.load(best))
    first = First.alone(device="cpu")
    found = open_run(str(tmp_path), "best", first)
    other = open_run(str(tmp_path / "not here"), "best", Second(first.sent))  # type: ignore[arg-type]
    assert other.config == found.config == config
    assert other.checkpoint == found.checkpoint
    ours, theirs = found.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ConfigError, match="not here is no folder"):
        open_run(str(tmp_path / "not here"), "best", first)


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        (
            np.zeros((40, 9), np.float32),
            r"--data .*other.npy.*shape \(9,\), expected \(1, 8, 8\), as .* was trained on",
        ),
        # What is held out for test may be good.
        (np.linspace(0, 2, 40 * 64, dtype=np.float32).reshape(40, 8, 8), r"other.npy.*2"),
    ],
    ids=["shape", "support"],
)
def test_other_data_is_judged_as_data(tmp_path: Path, examples: Any, words: str) -> None:
    config = TrainConfig(hidden=[5], latent=[3])
    write_config(config, tmp_path / "config.yaml")
    model = assemble.model(config, (1, 8, 8), torch.device("cpu"))
    saved = Checkpoint({f"model/{name}": tensor for name, tensor in model.state_dict().items()}, RECORD)
    checkpoints.Folder(tmp_path / "checkpoints", 3).save(saved, is_best=True)
    np.save(tmp_path / "other.npy", examples)
    with pytest.raises(DataError, match=words):
        open_run(str(tmp_path), "best", World.alone(device="cpu"), data=str(tmp_path / "other.npy"))


def test_a_checkpoint_that_no_run_wrote(tmp_path: Path) -> None:
    write_config(TrainConfig(), tmp_path / "config.yaml")
    checkpoints.Folder(tmp_path / "checkpoints", 3).save(Checkpoint({}, {"step": 7}), is_best=True)
    with pytest.raises(CheckpointError, match=r"best\.safetensors does not say the shape of an example"):
        open_model(str(tmp_path), "best", World.alone(device="cpu"))
