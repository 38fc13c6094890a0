"""Checkpoints: whole or refused by name, never unpickled; a write that fails leaves the earlier ones."""

import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hvdvae.checkpoint import Checkpoint, Draft, Folder, Piece, load, save, spread
from hvdvae.checkpoint import file as checkpoint_file
from hvdvae.checkpoint.file import FORMAT
from hvdvae.errors import CheckpointError
from hvdvae.world import World


def example(step: int = 5) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    vector = torch.randn(12, generator=generator)
    tensors = {
        "whole": vector,
        "part": vector[2:6].view(2, 2),  # Shares storage, as views of flat vectors do.
        "transposed": vector.view(3, 4).t(),
        "double": torch.randn(3, dtype=torch.float64, generator=generator),
        "half": vector.bfloat16(),
        "count": torch.tensor(step),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(2, 0),
    }
    return Checkpoint(tensors, {"step": step, "best": 1.5, "none": None, "text": 'é"\n', "nested": {"lr": 1e-3}})


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.record == other.record
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name


def small(path: Path, step: int = 1) -> bytes:
    save(path, Checkpoint({"weight": torch.arange(3.0)}, {"step": step}))
    return path.read_bytes()


def load_bytes(data: bytes, path: Path) -> Checkpoint:
    path.write_bytes(data)
    return load(path)


def steps_in(folder: Folder) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in folder.steps()]


def test_all_dtypes_and_shapes_come_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "too" / "a.safetensors"
    save(path, example())
    assert_equal(load(path), example())
    assert os.listdir(path.parent) == [path.name], "no temporary file may be left"


def test_saving_does_not_change_or_keep_the_tensors(tmp_path: Path) -> None:
    mine = example()
    save(tmp_path / "a", mine)
    assert_equal(mine, example())
    mine.tensors["whole"].zero_()
    assert_equal(load(tmp_path / "a"), example())


def test_every_truncation_is_refused_by_name(tmp_path: Path) -> None:
    data = small(tmp_path / "a")
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match=r"/torn\.safetensors is "):
            load_bytes(data[:length], tmp_path / "torn.safetensors")


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_refused_by_name(tmp_path: Path, flip: int) -> None:
    data = small(tmp_path / "a")
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= flip
        with pytest.raises(CheckpointError, match=r"/bad\.safetensors is "):
            load_bytes(bytes(damaged), tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("found", "read_as"), [("F32", "I32"), ("[2,3]", "[3,2]"), ('"one"', '"two"')])
def test_other_types_shapes_and_names_of_the_same_bytes_are_refused(tmp_path: Path, found: str, read_as: str) -> None:
    save(tmp_path / "a", Checkpoint({"one": torch.ones(2, 3)}, {"step": 1}))
    data = (tmp_path / "a").read_bytes()
    assert data.count(found.encode()) == 1
    with pytest.raises(CheckpointError, match=r"/bad is damaged"):
        load_bytes(data.replace(found.encode(), read_as.encode()), tmp_path / "bad")


def test_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    data = small(tmp_path / "a")
    assert load_bytes(data, tmp_path / "good").record == {"step": 1}
    with pytest.raises(CheckpointError, match=r"/long is torn"):
        load_bytes(data + b"\0", tmp_path / "long")


def foreign_files(weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"a: 1\n" * 30,
        "safetensors of another program": safetensors.torch.save(weights),
        "with other metadata": safetensors.torch.save(weights, {"format": "pt"}),
        "of a later version": safetensors.torch.save(weights, {"format": "hvdvae-checkpoint-999"}),
        "without record": safetensors.torch.save(weights, {"format": FORMAT, "digest": "0"}),
        "without digest": safetensors.torch.save(weights, {"format": FORMAT, "record": "{}"}),
        "with another digest": safetensors.torch.save(weights, {"format": FORMAT, "record": "{}", "digest": "0"}),
    }


@pytest.mark.parametrize("kind", foreign_files({}))
def test_foreign_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step-000000003.safetensors"
    path.write_bytes(foreign_files({"weight": torch.ones(3)})[kind])
    with pytest.raises(CheckpointError, match=r"step-000000003\.safetensors"):
        load(path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["pickle", "torch.save", "old torch.save"])
def test_pickles_are_refused_and_never_unpickled(tmp_path: Path, writer: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "step-000000009.safetensors"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
        pickle.loads(path.read_bytes())
    else:
        pickled = tmp_path / "model.pt"
        torch.save(Trap(sprung), pickled, _use_new_zipfile_serialization=writer == "torch.save")
        torch.load(pickled, weights_only=False)
        pickled.rename(path)
    assert sprung.exists(), "the trap must work for those who unpickle"
    sprung.unlink()
    with pytest.raises(CheckpointError, match=r"step-000000009\.safetensors"):
        load(path)
    assert Folder(tmp_path, 3).newest_good() is None
    assert not sprung.exists()


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.safetensors: No such file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_write_that_fails_anywhere_leaves_the_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = Folder(tmp_path, 3)
    folder.save(example(1), is_best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", fail)
        elif call == "replace":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr(checkpoint_file, "open_new", fail)
        for step in (2, 1):  # A new file, and one that is there already.
            with pytest.raises(CheckpointError, match=rf"step-00000000{step}\.safetensors: No space left .*--resume"):
                folder.save(Checkpoint(example(3).tensors, {"step": step}), is_best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert folder.newest_good() == tmp_path / "step-000000001.safetensors"
    folder.save(example(2), is_best=False)
    assert steps_in(folder) == [2, 1]


SAVES_TOO_MUCH = """
import sys, torch
from pathlib import Path
from hvdvae.checkpoint import Checkpoint, Folder
from hvdvae.errors import CheckpointError
{limit}
folder = Folder(Path(sys.argv[1]), 3)
folder.save(Checkpoint({{"w": torch.ones(10)}}, {{"step": 1}}), is_best=True)
try:
    folder.save(Checkpoint({{"w": torch.ones(1 << 20)}}, {{"step": 2}}), is_best=True)
    sys.exit("it fitted")
except CheckpointError as error:
    print(error)
print(folder.newest_good().name, sorted(path.name for path in folder.folder.iterdir()))
"""
LEFT = "step-000000001.safetensors ['best.safetensors', 'step-000000001.safetensors']"


def test_a_file_size_limit_leaves_the_earlier(tmp_path: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    command = [sys.executable, "-c", SAVES_TOO_MUCH.format(limit=limit), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "step-000000002.safetensors: File too large" in run.stdout
    assert LEFT in run.stdout


def test_a_full_disk_leaves_the_earlier(tmp_path: Path) -> None:
    """A file system of one MiB, mounted in a namespace of its own, which ends with the process."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}'"
    try:
        can = subprocess.run([*mount, mounted], capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        can = False
    if not can:
        pytest.skip("this user may not mount")
    script = tmp_path.with_suffix(".py")
    script.write_text(SAVES_TOO_MUCH.format(limit=""))
    command = [*mount, f"{mounted} && '{sys.executable}' '{script}' '{tmp_path}'"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "step-000000002.safetensors: No space left on device" in run.stdout
    assert LEFT in run.stdout


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 2)
    for step in (1, 2, 3, 10, 11):
        folder.save(example(step), is_best=step in (1, 2))
        assert load(folder.best).record["step"] == min(step, 2)
    assert steps_in(folder) == [11, 10]
    assert_equal(load(folder.best), example(2))
    assert sorted(os.listdir(tmp_path)) == [
        "best.safetensors",
        "step-000000010.safetensors",
        "step-000000011.safetensors",
    ]


def test_the_best_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    folder = Folder(tmp_path, 1)
    folder.save(example(1), is_best=True)
    folder.save(example(2), is_best=False)
    assert_equal(load(folder.best), example(1))
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "step-000000002.safetensors"]


def test_the_newest_good_passes_over_torn_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path, 9)
    assert folder.newest_good() is None
    for step in (9, 10, 100):
        folder.save(example(step), is_best=False)
    newest = tmp_path / "step-000000100.safetensors"
    assert folder.newest_good() == newest
    newest.write_bytes(newest.read_bytes()[:-7])
    assert folder.newest_good() == tmp_path / "step-000000010.safetensors"
    assert "refused: " in (said := capsys.readouterr().err)
    assert str(newest) in said
    (tmp_path / "step-000000010.safetensors").write_bytes(b"")
    (tmp_path / "step-000000009.safetensors").write_bytes(b"x" * 100)
    assert folder.newest_good() is None


def test_a_torn_newer_one_does_not_cost_the_one_just_written(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 1)
    (tmp_path / "step-000000100.safetensors").write_bytes(b"torn")
    path = folder.save(example(95), is_best=False)
    assert folder.newest_good() == path


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    (tmp_path / "step-000000007.4711.tmp").write_bytes(b"half")
    folder = Folder(tmp_path, 2)
    assert folder.steps() == []
    folder.save(example(8), is_best=False)
    assert os.listdir(tmp_path) == ["step-000000008.safetensors"]


def test_spread_in_one_process(tmp_path: Path) -> None:
    world = World.alone(device="cpu")
    assert spread(None, world) is None
    save(tmp_path / "a", example())
    found = spread(tmp_path / "a", world)
    assert found is not None
    assert found.record == example().record
    for name, tensor in example().tensors.items():
        ((rest, read),) = found.each(name)
        assert rest == ""
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_file_that_is_another_one_by_now_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", example(1))
    found = spread(tmp_path / "a", World.alone(device="cpu"))
    assert found is not None
    save(tmp_path / "a", example(2))
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        list(found.each("whole"))


@pytest.mark.parametrize("room", [1, 2, 3])
def test_whoever_cannot_write_still_asks_for_every_piece(tmp_path: Path, room: int) -> None:
    """Other ranks wait in those that they hold together."""
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) == room:
            raise OSError(28, "No space left on device")
        return torch.ones(2)

    pieces = {name: Piece((2,), torch.float32, lambda name=name: get(name)) for name in "cabd"}
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path / "a", Draft(pieces, {"step": 1}))
    assert asked == ["a", "b", "c", "d"]
    assert not list(tmp_path.iterdir())


def test_tensors_are_written_and_read_one_by_one(tmp_path: Path) -> None:
    """So that a rank which holds a part of a model never holds the whole."""
    there = 0

    def get() -> torch.Tensor:
        nonlocal there
        there += 1
        tensor = torch.ones(3)
        weakref.finalize(tensor, lambda: gone.append(1))
        assert there - len(gone) <= 2
        return tensor

    gone: list[int] = []
    save(tmp_path / "a", Draft({str(n): Piece((3,), torch.float32, get) for n in range(9)}, {"step": 1}))
    assert there == 9
    assert all(torch.equal(tensor, torch.ones(3)) for tensor in load(tmp_path / "a").tensors.values())


def test_the_header_is_readable_without_the_package(tmp_path: Path) -> None:
    """Any safetensors reader opens the file; the record is JSON."""
    save(tmp_path / "a", example())
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(example().tensors)
    assert json.loads(metadata["record"]) == example().record
