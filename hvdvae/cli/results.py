"""The folder of a run: who may write there, and its summary."""

import json
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hvdvae.cli.config_file import CONFIG_FILE, LARGEST_FILE, read_mapping, read_text
from hvdvae.cli.folder_lock import LOCK_FILE, hold
from hvdvae.cli.links import refuse_links
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from hvdvae.monitor.jsonl import finite
from hvdvae.regular_file import open_to_read, why
from hvdvae.whole_file import write_whole
from hvdvae.world import World

RESULTS = (
    "checkpoints",
    "tensorboard",
    "metrics.jsonl",
    "summary.json",
    "samples.png",
    "reconstructions.png",
)
"""What a run leaves; --overwrite deletes these and nothing else."""


def prepare_folder(config: TrainConfig, world: World) -> Path:
    """The folder of this run, made by rank 0; the same path on all ranks. Blocks; every rank must call it.

    Raises ConfigError where it holds an earlier run and neither --resume nor --overwrite says what to do with that, or
    what is no run's.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    data = Path(config.data).name if "/" in config.data else config.data
    default = f"runs/{data}-{config.model}-{config.strategy}-{stamp}"
    folder = Path(world.gather_objects(config.out or default, "agreement on --out")[0])
    if world.is_first:
        _claim(folder, config)
        # Before anything is deleted: another run may be writing it.
        hold(folder, replaces=config.overwrite)
        _delete(folder, _claim(folder, config))
    world.barrier("rank 0 makes the folder of results", patient=True)
    return folder


def _claim(folder: Path, config: TrainConfig) -> list[str]:
    """Make the folder; returns what may be deleted in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made a folder ({why(error, folder)})") from error
    refuse_links(folder, [LOCK_FILE, CONFIG_FILE, *(() if config.overwrite else RESULTS)])
    earlier = [name for name in RESULTS if os.path.lexists(folder / name)]
    if (folder / CONFIG_FILE).exists() and not config.overwrite and not _is_a_run(folder):
        raise ConfigError(
            f"--out {folder} holds a {CONFIG_FILE} that no run wrote, and this run would replace it: move it away, "
            "replace it with --overwrite, or choose another folder"
        )
    if not earlier or config.resume:
        return []
    if not config.overwrite:
        raise ConfigError(
            f"--out {folder} holds an earlier run ({', '.join(earlier)}): continue it with --resume, delete it with "
            "--overwrite, or choose another folder"
        )
    if not _is_a_run(folder):
        raise ConfigError(
            f"--overwrite: {folder} holds {', '.join(earlier)}, but no config.yaml, summary.json or metrics.jsonl of a "
            "training run: delete them yourself if they may go, or choose another folder with --out"
        )
    return earlier


def _delete(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        # Of a link, the link alone.
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_a_run(folder: Path) -> bool:
    """Whether a training run wrote here: names such as checkpoints/ are anybody's."""
    try:
        keys = set(read_mapping(read_text(folder / CONFIG_FILE, CONFIG_FILE), CONFIG_FILE))
    except ConfigError:
        keys = set()
    if {"likelihood", "strategy", "pictures_every"} <= keys:
        return True
    if {"strategy", "world_size", "skipped_steps"} <= _json(folder / "summary.json").keys():
        return True
    return {"time", "kind", "step"} <= _json(folder / "metrics.jsonl", first_line=True).keys()


def _json(path: Path, *, first_line: bool = False) -> dict[str, Any]:
    """What a file of JSON holds, or its first line; empty where it is none."""
    try:
        with open_to_read(path) as file:
            text = file.readline(LARGEST_FILE) if first_line else file.read()
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_speed(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """The summary of a run that was finished before: that of the run that trained, with this one's test. Local."""
    if summary["training_seconds"]:
        return summary
    return summary | _json(path) | {key: summary[key] for key in _OF_TEST if key in summary}


_OF_TEST = ("elbo", "rate", "distortion", "test_nll", "nll_samples", "active_units")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write whole or not at all. Local. Raises ConfigError naming the file."""
    # JSON has no NaN and no infinity.
    write_whole(path, json.dumps(finite(record), indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("hvdvae", "torch", "numpy", "horovod", "mpi4py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
