"""Every layout that HDF5 has is read as HDF5 reads it, or refused by name where that would be zeros or a crash."""

import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvdvae.data.array_file import RowSource
from hvdvae.data.hdf5 import HDF5Source, open_hdf5
from hvdvae.data.open import open_dataset
from hvdvae.errors import ConfigError, DataError

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (30, 6, 5), dtype=np.uint8)
SOME = np.array([29, 0, 7, 7])


def low_level(file, name, array, set_layout):
    """A data set whose properties h5py has no keyword for."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    set_layout(properties)
    kind, space = h5py.h5t.py_create(array.dtype), h5py.h5s.create_simple(array.shape)
    h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, properties))[...] = array


def virtual(path, source, key, *, shape=GREY.shape, seen=GREY.shape, rows=None):
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(shape, "u1")
        layout[: rows or seen[0]] = h5py.VirtualSource(source, key, seen)
        file.create_virtual_dataset("train", layout, fillvalue=9)


def contiguous(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"] = GREY


def user_block(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["train"] = GREY


def big_endian_floats(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"] = (GREY / 7).astype(">f8")


def booleans(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"] = GREY > 100


def packed_bits(path: Path) -> None:
    """Twelve bits of sixteen, not at the lowest place: bytes that are not numpy's."""
    with h5py.File(path, "w") as file:
        kind = h5py.h5t.STD_U16LE.copy()
        kind.set_precision(12)
        kind.set_offset(3)
        identifier = h5py.h5d.create(file.id, b"train", kind, h5py.h5s.create_simple(GREY.shape))
        identifier.write(h5py.h5s.ALL, h5py.h5s.ALL, GREY.astype("u2"))


def chunked(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", data=GREY, chunks=(4, 6, 5), maxshape=(None, 6, 5))


def compressed(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", data=GREY, chunks=(4, 3, 5), compression="gzip", shuffle=True, fletcher32=True)


def compact(path: Path) -> None:
    with h5py.File(path, "w") as file:
        low_level(file, "train", GREY, lambda properties: properties.set_layout(h5py.h5d.COMPACT))


def soft_link(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["below/there"] = GREY
        file["train"] = h5py.SoftLink("/below/there")


def external_link(path: Path) -> None:
    """At another offset, in a file that is longer and has a user block."""
    with h5py.File(path.with_name("other.h5"), "w", userblock_size=512) as file:
        file["before"] = np.zeros(5000)
        file["images"] = GREY
    with h5py.File(path, "w") as file:
        file["train"] = h5py.ExternalLink("other.h5", "/images")


def virtual_of_two(path: Path) -> None:
    for number in (0, 1):
        with h5py.File(path.with_name(f"part{number}.h5"), "w") as file:
            file.create_dataset("x", data=GREY[number::2], chunks=(4, 6, 5))
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(GREY.shape, "u1")
        for number in (0, 1):
            layout[number::2] = h5py.VirtualSource(f"part{number}.h5", "x", (15, 6, 5))
        file.create_virtual_dataset("train", layout)


def virtual_in_one_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["raw/x"] = np.repeat(GREY, 2, axis=2)
        layout = h5py.VirtualLayout(GREY.shape, "u1")
        layout[:] = h5py.VirtualSource(file["raw/x"])[:, :, ::2]
        file.create_virtual_dataset("train", layout)


def virtual_of_virtual(path: Path) -> None:
    contiguous(path.with_name("base.h5"))
    virtual(path.with_name("middle.h5"), "base.h5", "train")
    virtual(path, "middle.h5", "train")


LAYOUTS = (
    *(contiguous, user_block, big_endian_floats, booleans, packed_bits, chunked, compressed, compact),
    *(soft_link, external_link, virtual_of_two, virtual_in_one_file, virtual_of_virtual),
)


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_read_as_hdf5_reads_it(tmp_path, layout, limit):
    path = tmp_path / "a.h5"
    layout(path)
    with h5py.File(path) as file:
        expected = file["train"][()]
    source = open_hdf5(path, in_memory_bytes=limit)["train"]
    assert source.in_memory == (limit > 0)
    read_as = expected.astype(np.uint8 if expected.dtype in (np.uint8, np.bool_) else np.float32)
    for wanted in (SOME, np.arange(30), np.array([4])):
        np.testing.assert_array_equal(source.gather(wanted)[:, 0], read_as[wanted])
    if limit == 0:
        rows = layout in (contiguous, user_block, big_endian_floats, booleans, soft_link, external_link)
        assert isinstance(source, RowSource if rows else HDF5Source), "read row by row only where the bytes are numpy's"


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_an_external_link_leads_to_is_not_looked_for_in_the_linking_file(tmp_path, limit):
    """It was mapped there, at the offset in the other file: no example was true."""
    external_link(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["padding"] = RNG.integers(0, 256, 200_000, dtype=np.uint8).reshape(20, 100, 100)
    source = open_hdf5(tmp_path / "a.h5", in_memory_bytes=limit)["train"]
    np.testing.assert_array_equal(source.gather(np.arange(30))[:, 0], GREY)


def dangling(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"], file["test"] = GREY, h5py.ExternalLink("gone.h5", "/x")


def soft_circle(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"] = h5py.SoftLink("/train")


def never_written(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", GREY.shape, "u1")


def partly_written(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", GREY.shape, "u1", chunks=(3, 6, 5))[:20] = GREY[:20]


def missing_source(path: Path) -> None:
    virtual_of_two(path)
    path.with_name("part1.h5").unlink()


def missing_data_set(path: Path) -> None:
    contiguous(path.with_name("base.h5"))
    virtual(path, "base.h5", "images")


def hole(path: Path) -> None:
    contiguous(path.with_name("base.h5"))
    virtual(path, "base.h5", "train", shape=(31, 6, 5))


def smaller_source(path: Path) -> None:
    contiguous(path.with_name("base.h5"))
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((31, 6, 5), "u1")
        layout[:] = h5py.VirtualSource("base.h5", "train", (40, 6, 5))[:31]
        file.create_virtual_dataset("train", layout)


def unlimited(path: Path) -> None:
    chunked(path.with_name("base.h5"))
    with h5py.File(path, "w") as file:
        layout, endless = h5py.VirtualLayout(GREY.shape, "u1", maxshape=(None, 6, 5)), h5py.h5s.UNLIMITED
        layout[0:endless] = h5py.VirtualSource("base.h5", "train", GREY.shape, maxshape=(None, 6, 5))[0:endless]
        file.create_virtual_dataset("train", layout)


def source_never_written(path: Path) -> None:
    never_written(path.with_name("base.h5"))
    virtual(path, "base.h5", "train")


def external_storage(path: Path) -> None:
    with h5py.File(path, "w") as file:
        where = [(str(path.with_name("raw.bin")), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("train", data=GREY, external=where)


def virtual_of_external_storage(path: Path) -> None:
    external_storage(path.with_name("base.h5"))
    virtual(path, "base.h5", "train")


def no_plug_in(path: Path) -> None:
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((30, 6, 5))
        properties.set_filter(32_767, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(GREY.shape)
        identifier = h5py.h5d.create(file.id, b"train", h5py.h5t.NATIVE_UINT8, space, properties)
        identifier.write_direct_chunk((0, 0, 0), GREY.tobytes())


def huge_chunk(path: Path) -> None:
    """A few kilobytes that become 2 GB at each read."""
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "train", (4, 6, 5), "u1", chunks=(1 << 20, 40, 50), maxshape=(None,) * 3, compression="gzip"
        )
        file["train"].id.write_direct_chunk((0, 0, 0), b"x")


def overfull_chunk(path: Path) -> None:
    """One that says it has 900 bytes, and becomes 50 MB: HDF5 decompresses it all, and has read the first."""
    with h5py.File(path, "w") as file:
        file.create_dataset("train", GREY.shape, "u1", chunks=GREY.shape, compression="gzip")
        file["train"].id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(50_000_000), 1))


def virtual_of_huge_chunk(path: Path) -> None:
    huge_chunk(path.with_name("base.h5"))
    virtual(path, "base.h5", "train", shape=(4, 6, 5), seen=(4, 6, 5))


REFUSED = {
    overfull_chunk: r"a\.h5\[train\]: found a chunk of 2[0-9]{5} bytes in the file; expected at most 900",
    virtual_of_huge_chunk: r"base\.h5\[train\]: found chunks of \(1048576, 40, 50\), 2097 MB each.*h5repack",
    dangling: r"a\.h5\[test\]: found a link to gone\.h5/x, where nothing is",
    soft_circle: r"a\.h5\[train\]: found a link to /train, where nothing is",
    never_written: r"a\.h5\[train\]: found numbers that were never written, and would be read as 0",
    partly_written: r"a\.h5\[train\]: found 7 of 10 chunks, the others were never written.*resize",
    missing_source: r"a\.h5\[train\], of which a part is in part1\.h5\[x\]: found no such file",
    missing_data_set: r"a\.h5\[train\], .* base\.h5\[images\]: found no such data set; .*HDF5 would read 9",
    hole: r"a\.h5\[train\]: found no source, or two, for example 30 ",
    smaller_source: r"base\.h5\[train\]: found the shape \(30, 6, 5\); expected a larger one",
    unlimited: r"base\.h5\[train\]: found a part of an irregular or unlimited shape",
    source_never_written: r"base\.h5\[train\]: found numbers that were never written",
    external_storage: r"a\.h5\[train\]: its numbers lie in \S*raw\.bin, outside .*--external-storage",
    virtual_of_external_storage: r"base\.h5\[train\]: its numbers lie in \S*raw\.bin, outside",
    no_plug_in: r"a\.h5\[train\]: compressed by the filter 32767 .*no plug-in here.*pip install hdf5plugin",
    huge_chunk: r"a\.h5\[train\]: found chunks of \(1048576, 40, 50\), 2097 MB each.*h5repack",
}


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.__name__)
def test_what_hdf5_would_fill_with_zeros_or_not_read_is_refused(tmp_path, layout, limit):
    path = tmp_path / "a.h5"
    layout(path)
    with pytest.raises(DataError, match=REFUSED[layout]) as raised:
        open_hdf5(path, in_memory_bytes=limit)
    assert "truncated or corrupt" not in str(raised.value)


def test_a_virtual_data_set_of_itself_ends_no_process(tmp_path):
    virtual(tmp_path / "dot.h5", ".", "train")
    virtual(tmp_path / "name.h5", "name.h5", "train")
    for one, other in ("ab", "ba"):
        virtual(tmp_path / f"{one}.h5", f"{other}.h5", "train")
    for number in range(12):
        virtual(tmp_path / f"deep{number}.h5", f"deep{number + 1}.h5", "train")
    contiguous(tmp_path / "deep12.h5")
    script = textwrap.dedent("""
        from pathlib import Path
        from hvdvae.data.hdf5 import open_hdf5
        from hvdvae.errors import DataError
        for name in ("dot", "name", "a", "b", "deep0"):
            try:
                open_hdf5(Path(f"{name}.h5"))
            except DataError as error:
                print(error)
    """)
    job = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (job.returncode, job.stderr) == (0, "")
    assert job.stdout.count("found a virtual data set of itself") == 4, job.stdout
    assert job.stdout.count("found a virtual data set of virtual ones, 9 deep") == 1, job.stdout


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_external_storage_is_read_where_it_is_allowed(tmp_path, monkeypatch, limit):
    external_storage(tmp_path / "a.h5")
    source = open_hdf5(tmp_path / "a.h5", in_memory_bytes=limit, external_storage=True)["train"]
    np.testing.assert_array_equal(source.gather(SOME)[:, 0], GREY[SOME])
    raw = tmp_path / "raw.bin"
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"lie in \S*raw\.bin: found 899 bytes; expected 900"):
        open_hdf5(tmp_path / "a.h5", external_storage=True)
    if limit == 0:
        with pytest.raises(DataError, match=r"raw\.bin: was written to while this run reads it"):
            source.gather(SOME)
    raw.unlink()
    with pytest.raises(DataError, match=r"lie in \S*raw\.bin: found no such file"):
        open_hdf5(tmp_path / "a.h5", external_storage=True)
    with pytest.raises(ConfigError, match="--external-storage is for HDF5 files, found --data digits"):
        open_dataset("digits", external_storage=True)


WRITER = """
import sys, h5py
file = h5py.File("a.h5", "w", libver=sys.argv[1])
file.create_dataset("train", data=[[1, 2]] * 30, chunks=(5, 2), maxshape=(None, 2))
if sys.argv[2] == "swmr":
    file.swmr_mode = True
file.flush()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("library", "mode", "held", "killed"),
    [
        ("earliest", "plain", "another process has it open for writing", None),
        ("latest", "plain", "another process has it open for writing", "h5clear -s"),
        ("latest", "swmr", "has it open for writing, or ended without closing it", "h5clear -s"),
    ],
)
def test_a_file_that_a_writer_holds_or_held_is_not_called_corrupt(tmp_path, library, mode, held, killed):
    command = [sys.executable, "-c", WRITER, library, mode]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(DataError, match=rf"a\.h5: .*{held}") as raised:
            open_hdf5(tmp_path / "a.h5")
        assert "corrupt" not in str(raised.value)
        with h5py.File(tmp_path / "link.h5", "w") as file:
            file["train"] = h5py.ExternalLink("a.h5", "/train")
        with pytest.raises(DataError, match=rf"link\.h5\[train\]: a link to \S*a\.h5: .*{held}"):
            open_hdf5(tmp_path / "link.h5")
        writer.kill()
        writer.wait()
    if killed is None:
        assert len(open_hdf5(tmp_path / "a.h5")["train"]) == 30
        return
    with pytest.raises(DataError, match=rf"a\.h5: .*ended without closing it.*{killed} \S*a\.h5"):
        open_hdf5(tmp_path / "a.h5")


def test_a_file_that_is_read_into_memory_is_let_go_of(tmp_path):
    contiguous(tmp_path / "a.h5")
    source = open_hdf5(tmp_path / "a.h5")["train"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train"] = GREY[::-1]
    np.testing.assert_array_equal(source.gather(np.arange(30))[:, 0], GREY)


@pytest.mark.parametrize("layout", [contiguous, chunked, external_link, virtual_of_two], ids=lambda one: one.__name__)
def test_a_file_that_changes_under_a_run_is_named(tmp_path, layout):
    layout(tmp_path / "a.h5")
    source = open_hdf5(tmp_path / "a.h5", in_memory_bytes=0)["train"]
    name = {external_link: "other.h5", virtual_of_two: "part1.h5"}.get(layout, "a.h5")
    os.utime(tmp_path / name, ns=(1, 1))
    with pytest.raises(DataError, match=rf"{name}: was written to while this run reads it"):
        source.gather(SOME)
