"""Files that change under a run are named, or a copy of what they were is held; Fortran order is laid anew."""

import gzip
import os
import pickle
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from hvdvae.data import describe_values, open_dataset
from hvdvae.data.array_file import RowSource, array_source
from hvdvae.data.held_file import HeldFile
from hvdvae.data.npy import open_npy, open_npz
from hvdvae.errors import DataError

RNG = np.random.default_rng(6)
GREY = RNG.integers(0, 256, (40, 6, 5), dtype=np.uint8)


@pytest.fixture
def on_disk(monkeypatch):
    """Nothing is read into memory when it is opened."""
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", 0)


def idx(array):
    return struct.pack(">4B3I", 0, 0, 8, 3, *array.shape) + array.tobytes()


def save(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, train=array)
    else:
        path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.idx"])
@pytest.mark.parametrize("change", ["same size", "shorter", "longer", "touched"])
def test_a_file_that_is_written_to_under_a_run_is_named(tmp_path, on_disk, name, change):
    path = tmp_path / name
    save(path, GREY)
    data = open_dataset(str(path))
    data.train.gather(np.array([3, 1]))
    os.utime(path, ns=(1, 1))  # As if it had been written long ago.
    data = open_dataset(str(path))
    if change == "touched":
        path.touch()
    else:
        save(path, {"same size": GREY[::-1], "shorter": GREY[:3], "longer": np.tile(GREY, (3, 1, 1))}[change])
    for wanted in ([3, 1], [0, 1, 2], [30]):
        with pytest.raises(DataError, match=rf"{name}: was written to while this run reads it.*another name"):
            data.train.gather(np.array(wanted))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.idx", "a.idx.gz"])
def test_what_takes_the_place_of_a_file_is_not_read(tmp_path, on_disk, name):
    path = tmp_path / name
    save(path, GREY)
    data = open_dataset(str(path))
    before = data.train.gather(np.arange(len(data.train)))
    save(tmp_path / f"new{name}", GREY[::-1])
    os.replace(tmp_path / f"new{name}", path)
    np.testing.assert_array_equal(data.train.gather(np.arange(len(data.train))), before)
    path.unlink()
    np.testing.assert_array_equal(data.train.gather(np.arange(len(data.train))), before)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.idx", "a.idx.gz"])
def test_small_files_are_held_as_a_copy(tmp_path, name):
    path = tmp_path / name
    save(path, GREY)
    data = open_dataset(str(path))
    assert data.train.in_memory
    before = data.train.gather(np.arange(len(data.train)))
    save(path, GREY[::-1][:7])
    np.testing.assert_array_equal(data.train.gather(np.arange(len(data.train))), before)


def test_a_file_that_is_cut_short_ends_no_process(tmp_path):
    """numpy.save onto a file that another process has mapped ended that by SIGBUS."""
    script = textwrap.dedent("""
        import sys, numpy as np
        import hvdvae.data.array_file as array_file
        from hvdvae.data import Loader, open_dataset
        from hvdvae.errors import DataError
        array_file.IN_MEMORY_BYTES = 0
        np.save("a.npy", np.random.default_rng(0).integers(0, 256, (3000, 4096), dtype=np.uint8))
        data = open_dataset("a.npy")
        try:
            for number, batch in enumerate(Loader(data.train, batch=16).epoch(0)):
                if number == 5:
                    np.save("a.npy", np.zeros((3, 4), np.uint8))
            print("all read")
        except DataError as error:
            print(error)
    """)
    job = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (job.returncode, job.stderr) == (0, "")
    assert "a.npy: was written to while this run reads it" in job.stdout


def test_a_file_that_shrinks_while_it_is_opened_is_named(tmp_path):
    save(tmp_path / "a.npy", GREY)
    held = HeldFile.open(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"short")
    with pytest.raises(DataError, match=r"a\.npy: was written to while this run reads it"):
        array_source(held, 128, GREY.shape, GREY.dtype, "a.npy")


def test_a_held_file_is_not_handed_to_another_process(tmp_path, on_disk):
    save(tmp_path / "a.npy", GREY)
    with pytest.raises(TypeError, match=r"a\.npy is held open by this process"):
        pickle.dumps(open_npy(tmp_path / "a.npy"))


def test_rows_outside_are_refused(tmp_path, on_disk):
    save(tmp_path / "a.npy", GREY)
    source = open_npy(tmp_path / "a.npy")
    for wanted in ([40], [3, -1]):
        with pytest.raises(IndexError, match="40 examples"):
            source.gather(np.array(wanted))
    assert source.gather(np.array([], np.int64)).shape == (0, 1, 6, 5)


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("shape", [(37, 7), (37, 4, 5), (37, 3, 4, 5), (37, 4, 5, 3)])
@pytest.mark.parametrize("dtype", ["u1", "?", ">f8", "<i2"])
def test_fortran_order_is_laid_anew_and_said(tmp_path, monkeypatch, limit, block, shape, dtype):
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", limit)
    monkeypatch.setattr("hvdvae.data.array_file.BLOCK_BYTES", block)
    array = RNG.integers(0, 256, shape).astype(dtype)
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    np.savez(tmp_path / "f.npz", train=np.asfortranarray(array))
    np.save(tmp_path / "c.npy", array)
    plain = open_npy(tmp_path / "c.npy")
    wanted = np.array([36, 0, 5, 5])
    for source in (open_npy(tmp_path / "f.npy"), open_npz(tmp_path / "f.npz")["train"]):
        assert isinstance(source, RowSource) == (limit == 0)
        assert source.dtype == plain.dtype
        np.testing.assert_array_equal(source.gather(wanted), plain.gather(wanted))
        np.testing.assert_array_equal(source.gather(np.arange(37)), plain.gather(np.arange(37)))
        said = describe_values(source, likelihood="gaussian", binarization="none")
        assert "; stored in Fortran order, laid anew in " + ("memory" if limit else "a temporary file of ") in said
    assert plain.notes == ()


def test_no_room_to_lay_it_anew_is_said(tmp_path, on_disk, monkeypatch):
    np.save(tmp_path / "f.npy", np.asfortranarray(GREY))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"f\.npy: stored in Fortran order, and no room .*TMPDIR.*ascontiguousarray"):
        open_npy(tmp_path / "f.npy")


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy: found no plain file"):
        open_dataset(str(tmp_path / "a.npy"))


def test_a_memory_map_in_fortran_order_is_warned_of(tmp_path):
    from hvdvae.data import ArraySource

    np.save(tmp_path / "f.npy", np.asfortranarray(GREY))
    with pytest.warns(UserWarning, match=r"f\.npy: examples of this memory map lie scattered.*open_dataset"):
        ArraySource(np.load(tmp_path / "f.npy", mmap_mode="r"), "f.npy")
