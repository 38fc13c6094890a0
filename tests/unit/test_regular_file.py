"""What a run reads and writes is a file: no link is followed, and no pipe, device or socket is waited for."""

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.record import Record
from benchmarks.study.run import _write
from hvdvae.checkpoint import Checkpoint, Folder, load, save
from hvdvae.cli.config_file import read_config, read_values, write_config
from hvdvae.cli.folder_lock import hold, release
from hvdvae.cli.results import prepare_folder, write_json
from hvdvae.cli.supervise import _of_file
from hvdvae.config import TrainConfig
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.monitor.jsonl import JsonLines
from hvdvae.monitor.tensorboard import TensorBoard
from hvdvae.regular_file import open_in_place, open_new, open_to_append, open_to_read, temporary, why
from hvdvae.vae import save_picture
from hvdvae.whole_file import write_whole
from hvdvae.world import World

SMALL = Checkpoint({"w": torch.ones(2)}, {"step": 7})


def make(kind: str, path: Path) -> None:
    """What is no file, under a name."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.mkdir()


KINDS = {"pipe": "a named pipe", "socket": "a socket", "folder": "a folder"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_by_what_it_is(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # The address of a socket is short.
    path = Path("x")
    make(kind, path)
    for opening in (open_to_read, open_to_append, open_in_place):
        with pytest.raises(OSError, match=f"it is {KINDS[kind]}, expected a file"):
            opening(path)
    with pytest.raises(FileExistsError):
        open_new(path)


def test_devices_are_refused() -> None:
    for opening in (open_to_read, open_to_append):
        with pytest.raises(OSError, match="it is a device, expected a file"):
            opening(Path("/dev/zero"))


def test_no_file_is_made_or_opened_for_writing_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name, target in (("x", victim), ("y", tmp_path / "new")):
        (tmp_path / name).symlink_to(target)
        for opening in (open_to_append, open_in_place):
            with pytest.raises(OSError, match="it is a symbolic link, expected a file"):
                opening(tmp_path / name)
        with pytest.raises(FileExistsError):
            open_new(tmp_path / name)
    with open_to_read(tmp_path / "x") as file:  # Its owner may have a link to read.
        assert file.read() == b"precious"
    assert not (tmp_path / "new").exists()


def test_nobody_knows_a_temporary_name_before() -> None:
    names = {temporary(Path("a/step-7.safetensors")) for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"step-7\.[0-9a-f]{12}\.tmp", name.name) for name in names)


Writer = Callable[[Path], object]
WRITERS: dict[str, tuple[str, Writer]] = {
    "checkpoint": ("step-000000007.safetensors", lambda folder: Folder(folder, 2).save(SMALL, is_best=True)),
    "best": ("best.safetensors", lambda folder: Folder(folder, 2).save(SMALL, is_best=True)),
    "configuration": ("config.yaml", lambda folder: write_config(TrainConfig(), folder / "config.yaml")),
    "summary": ("summary.json", lambda folder: write_json(folder / "summary.json", {"a": 1})),
    "picture": ("a.png", lambda folder: save_picture(folder / "a.png", np.zeros((2, 2, 1), np.uint8))),
    "cell": ("a.json", lambda folder: _write(folder / "a.json", {"a": 1})),
    "record": ("r.json", lambda folder: Record({}, {"models": [], "rounds": 1}).write(folder / "r.json")),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=list(WRITERS))
def test_links_under_the_names_that_are_written_lead_nowhere(
    tmp_path: Path, name: str, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the final name, and under the one before: even who knows that has no file of another replaced."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    before = folder / "known.tmp"
    for module in ("checkpoint.file", "checkpoint.folder", "whole_file"):
        monkeypatch.setattr(f"hvdvae.{module}.temporary", lambda path: before)
    before.symlink_to(victim)
    with pytest.raises((CheckpointError, ConfigError), match="File exists"):
        write(folder)
    monkeypatch.undo()
    (folder / name).symlink_to(victim)
    # As the names were once: of this process.
    for old in (f"{Path(name).stem}.{os.getpid()}.tmp", f"{name}.{os.getpid()}.tmp"):
        (folder / old).symlink_to(victim)
    for old in (f"{Path(name).stem}.draft", f"{Path(name).stem}.part"):
        (folder / old).symlink_to(victim)
    write(folder)
    assert victim.read_text() == "precious"
    assert not (folder / name).is_symlink()
    assert (folder / name).stat().st_size > 0


def test_lines_and_locks_are_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    for name in ("metrics.jsonl", "lock"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(ConfigError, match=r"cannot write .*metrics\.jsonl: it is a symbolic link"):
        JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="lock: it is a symbolic link"):
        hold(tmp_path)
    assert victim.read_text() == ""


def test_event_files_have_names_that_nobody_knows_before_and_that_follow_in_time(tmp_path: Path) -> None:
    for _ in range(3):
        TensorBoard(tmp_path).close()
    by_name = sorted(path.name for path in tmp_path.iterdir())
    assert len({name.rpartition(".")[2] for name in by_name}) == 3
    assert by_name == [path.name for path in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)]


@pytest.mark.timeout(20)
def test_pipes_in_the_place_of_a_runs_files_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "lock", "step-000000009.safetensors", "summary.json"):
        os.mkfifo(tmp_path / name)
    pipe = "it is a named pipe, expected a file"
    for reading in (
        lambda: read_config(tmp_path / "config.yaml"),
        lambda: read_values(tmp_path / "config.yaml", "--config config.yaml"),
    ):
        with pytest.raises(ConfigError, match=rf"config\.yaml: {pipe}"):
            reading()
    assert _of_file(["--config", str(tmp_path / "config.yaml")]) is None
    with pytest.raises(CheckpointError, match=rf"step-000000009\.safetensors: {pipe}"):
        load(tmp_path / "step-000000009.safetensors")
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl: {pipe}"):
        JsonLines(tmp_path / "metrics.jsonl", first_step=3)
    with pytest.raises(ConfigError, match=f"lock: {pipe}"):
        hold(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml that no run wrote"):
        prepare_folder(TrainConfig(out=str(tmp_path)), World.alone(device="cpu"))
    folder = Folder(tmp_path, 3)
    assert folder.newest_good() is None
    folder.save(SMALL, is_best=False)
    assert folder.newest_good() == tmp_path / "step-000000007.safetensors"
    write_json(tmp_path / "summary.json", {"a": 1})
    assert (tmp_path / "summary.json").read_text().startswith("{")


def test_a_folder_called_as_a_temporary_file_stays(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp" / "mine").write_text("precious")
    Folder(tmp_path, 1).save(SMALL, is_best=True)
    assert (tmp_path / "x.tmp" / "mine").read_text() == "precious"
    (tmp_path / "best.safetensors").unlink()
    (tmp_path / "best.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"best\.safetensors: Is a directory"):
        Folder(tmp_path, 1).save(SMALL, is_best=True)
    with pytest.raises(CheckpointError, match=r"x\.tmp"):
        save(tmp_path / "x.tmp", SMALL)


FULL = """
import os, sys
from pathlib import Path
from hvdvae.checkpoint import Checkpoint, save
from hvdvae.cli.folder_lock import hold
from hvdvae.errors import HvdvaeError
from hvdvae.monitor.jsonl import JsonLines
from hvdvae.monitor.tensorboard import TensorBoard
from hvdvae.whole_file import write_whole
disk = Path(sys.argv[1])
(disk / "lock").touch()
(disk / "metrics.jsonl").touch()
try:
    with open(disk / "fill", "wb") as fill:
        while True:
            fill.write(bytes(1024))
            fill.flush()
except OSError:
    pass
lines = JsonLines(disk / "metrics.jsonl")
writers = {
    "lock": lambda: hold(disk),
    "config.yaml": lambda: write_whole(disk / "config.yaml", "a: 1"),
    "metrics.jsonl": lambda: lines.on_epoch(1, 1, {}),
    "tensorboard": lambda: TensorBoard(disk / "tensorboard"),
    "step-7": lambda: save(disk / "step-7", Checkpoint({}, {"step": 7})),
}
for name, write in writers.items():
    try:
        write()
    except HvdvaeError as error:
        print(name, "|", error)
    else:
        print(name, "fitted")
sys.stdout.flush()
os._exit(0)
"""


def test_whatever_is_written_first_to_a_full_disk_is_one_line_that_names_the_disk(tmp_path: Path) -> None:
    """Of 64 KiB, mounted in a namespace of its own, which ends with the process."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}'"
    try:
        can = subprocess.run([*mount, mounted], capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        can = False
    if not can:
        pytest.skip("this user may not mount")
    script = tmp_path.with_suffix(".py")
    script.write_text(FULL)
    command = [*mount, f"{mounted} && '{sys.executable}' '{script}' '{tmp_path}'"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    found = dict(line.split(" | ") for line in run.stdout.splitlines())
    assert set(found) == {"lock", "config.yaml", "metrics.jsonl", "tensorboard", "step-7"}, run.stdout
    for name, line in found.items():
        assert name in line
        assert f"No space left on device: the disk at {tmp_path} has 0 bytes free" in line


def test_only_a_full_disk_is_named(tmp_path: Path) -> None:
    error = OSError(errno.EACCES, "Permission denied")
    assert why(error, tmp_path) == "Permission denied"
    assert "bytes free" in why(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path / "none" / "none")
    with pytest.raises(ConfigError, match=r"cannot write .*none/a: No such file or directory$"):
        write_whole(tmp_path / "none" / "a", "")
    release()
