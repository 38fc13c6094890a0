"""The folder of a run: what --overwrite may delete, and summaries that every reader takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from hvdvae.cli.config_file import read_config, write_config
from hvdvae.cli.results import RESULTS, keep_speed, prepare_folder, write_json
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from hvdvae.world import World


def prepared(folder: Path, **options: Any) -> Path:
    return prepare_folder(TrainConfig(out=str(folder), **options), World.alone(device="cpu"))


def foreign(folder: Path) -> Path:
    """Somebody else's work under names that a run has, too."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "precious.pt").write_text("weights")
    (folder / "config.yaml").write_text("strategy: mine\n")
    (folder / "metrics.jsonl").write_text('{"loss": 1}\n')
    (folder / "summary.json").write_text("[]")
    return folder


def test_overwrite_deletes_nothing_where_no_run_was(tmp_path: Path) -> None:
    before = sorted(foreign(tmp_path).rglob("*"))
    with pytest.raises(ConfigError) as refused:
        prepared(tmp_path, overwrite=True)
    for word in ("--overwrite", str(tmp_path), "checkpoints", "--out"):
        assert word in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


MARKS = {
    "summary.json": '{\n  "strategy": "allreduce",\n  "world_size": 2,\n  "skipped_steps": 0\n}\n',
    "metrics.jsonl": '{"time": 1.5, "kind": "step", "step": 3}\n{"torn',
}


@pytest.mark.parametrize("mark", ["config.yaml", *MARKS])
def test_overwrite_deletes_the_results_of_a_run(tmp_path: Path, mark: str) -> None:
    foreign(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    if mark == "config.yaml":
        write_config(TrainConfig(), tmp_path / mark)
    else:
        (tmp_path / mark).write_text(MARKS[mark])
    assert prepared(tmp_path, overwrite=True) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "lock", "notes.txt"]


@pytest.mark.parametrize("name", ["lock", "config.yaml", *RESULTS])
@pytest.mark.parametrize("resume", [True, False])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, resume: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_config(TrainConfig(), run / "config.yaml")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("../victim")  # Through a link that dangles a file is made.
    with pytest.raises(ConfigError, match=rf"run/{name} is a symbolic link to \.\./victim"):
        prepared(run, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_overwrite_deletes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.mkdir()
    write_config(TrainConfig(), run / "config.yaml")
    (run / "checkpoints").symlink_to(victim)
    (run / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
    prepared(run, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "lock"]
    assert victim.is_dir()


@pytest.mark.parametrize("resume", [True, False])
def test_a_configuration_that_no_run_wrote_is_not_replaced(tmp_path: Path, resume: bool) -> None:
    mine = "epochs: 3\n"
    (tmp_path / "config.yaml").write_text(mine)
    with pytest.raises(ConfigError, match=r"a config.yaml that no run wrote.*--overwrite"):
        prepared(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == mine
    prepared(tmp_path, overwrite=True)


def test_a_configuration_is_written_whole_and_not_through_a_link(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "config.yaml"
    victim.write_text("precious")
    path.symlink_to(victim)
    write_config(TrainConfig(epochs=7), path)
    assert victim.read_text() == "precious"
    assert read_config(path).epochs == 7
    with pytest.raises(ConfigError, match=r"cannot write .*none/config.yaml"):
        write_config(TrainConfig(), tmp_path / "none" / "config.yaml")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["config.yaml", "victim"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    record = {"loss": float("nan"), "layers": [{"kl": [1.5, float("inf")]}], "name": "a", "count": 3, "none": None}
    write_json(tmp_path / "a.json", record)

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"loss": None, "layers": [{"kl": [1.5, None]}], "name": "a", "count": 3, "none": None}


def test_a_resume_of_a_finished_run_keeps_the_speed_of_the_run_that_trained(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    trained = {"examples_per_second": 1000.0, "training_seconds": 3.5, "world_size": 2, "test_nll": 90.0}
    trained |= {"bytes_sent": 12, "compression_error": 0.1}
    again = {"examples_per_second": None, "training_seconds": 0.0, "world_size": 1, "test_nll": 91.0, "bytes_sent": 0}
    assert keep_speed(again, path) == again, "there is none to keep"
    path.write_text(json.dumps(trained))
    assert keep_speed(again, path) == {**trained, "test_nll": 91.0}
    more = {**again, "examples_per_second": 500.0, "training_seconds": 1.0}
    assert keep_speed(more, path) == more
