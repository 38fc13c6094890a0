"""From names and paths to splits, and what is refused on the way."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvdvae.data import ArraySource, check_dataset, check_support, open_dataset
from hvdvae.data.named import REMOTES, Remote, fetch
from hvdvae.data.split import complete_splits
from hvdvae.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GREY = np.random.default_rng(1).integers(0, 256, (60, 5, 4), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("HVDVAE_DATA", raising=False)


def all_of(source):
    return source.gather(np.arange(len(source)))


def write_idx(file, array):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def rows_as_set(*sources):
    rows = [row.tobytes() for source in sources for row in all_of(source)]
    assert len(set(rows)) == len(rows)
    return set(rows)


def test_digits_are_embedded_and_scaled():
    data = open_dataset("digits")
    assert data.shape == (1, 8, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (1457, 161, 179)
    values = all_of(data.train)
    assert (values.dtype, values.min(), values.max(), data.train.peak) == (np.uint8, 0, 255, 255)
    assert len(np.unique(values)) == 17


@pytest.mark.parametrize("missing", ["validation", "test", "both", "neither"])
def test_missing_splits_are_cut_from_train_the_same_each_time(missing):
    def cut():
        splits = {"train": ArraySource(GREY[:40], "a")}
        if missing not in ("validation", "both"):
            splits["validation"] = ArraySource(GREY[40:50], "a")
        if missing not in ("test", "both"):
            splits["test"] = ArraySource(GREY[50:], "a")
        return complete_splits(splits)

    train, validation, test = cut()
    sizes = {"validation": (36, 4, 10), "test": (36, 10, 4), "both": (33, 3, 4), "neither": (40, 10, 10)}
    assert (len(train), len(validation), len(test)) == sizes[missing]
    rows_as_set(train, validation, test)
    for source, again in zip((train, validation, test), cut(), strict=True):
        np.testing.assert_array_equal(all_of(source), all_of(again))


def test_the_cut_is_pinned_so_that_a_run_of_years_ago_held_out_the_same():
    _, validation, test = complete_splits({"train": ArraySource(np.arange(30, dtype=np.uint8)[:, None], "a")})
    assert (all_of(test).ravel().tolist(), all_of(validation).ravel().tolist()) == ([5, 11, 29], [10, 12])


def test_validation_size_is_capped_can_be_asked_for_and_must_leave_examples():
    many = {
        "train": ArraySource(np.zeros((60_000, 1), np.uint8), "a"),
        "test": ArraySource(GREY[:, 0, :1], "a"),
    }
    assert len(complete_splits(many)[1]) == 5000
    assert len(complete_splits(many, 10_000)[1]) == 10_000
    for wanted in (0, 60_000):
        with pytest.raises(DataError, match=f"60000 examples.*not {wanted}"):
            complete_splits(many, wanted)
    with pytest.raises(DataError, match="validation split of 60"):
        complete_splits(many | {"validation": many["test"]}, 100)
    with pytest.raises(DataError, match="found 2 examples"):
        complete_splits({"train": ArraySource(GREY[:2], "a")})


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("prefix", ["", "binarized_mnist_"])
def test_folder_of_idx_files(tmp_path, suffix, prefix):
    write_idx(tmp_path / f"{prefix}train-images-idx3-ubyte{suffix}", GREY[:40])
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", GREY[:40, 0, 0])
    write_idx(tmp_path / f"{prefix}valid-images-idx3-ubyte{suffix}", GREY[40:50])
    write_idx(tmp_path / f"{'test' if prefix else 't10k'}-images-idx3-ubyte{suffix}", GREY[50:])
    data = open_dataset(str(tmp_path))
    for source, rows in ((data.train, GREY[:40]), (data.validation, GREY[40:50]), (data.test, GREY[50:])):
        np.testing.assert_array_equal(all_of(source)[:, 0], rows)


def test_a_plain_idx_file_is_preferred_to_its_gz_and_two_others_are_unclear(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"torn")
    assert len(open_dataset(str(tmp_path)).train) == 49
    write_idx(tmp_path / "emnist-train-images-idx3-ubyte", GREY)
    with pytest.raises(DataError, match=r"found both emnist-train.* for train"):
        open_dataset(str(tmp_path))


def test_labels_beside_the_examples_are_left_alone(tmp_path):
    labels = np.arange(len(GREY))
    np.savez(tmp_path / "both.npz", images=GREY, labels=labels)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(GREY):
        Image.fromarray(image).save(tmp_path / f"images/{number:02}.png")
    np.save(tmp_path / "images/labels.npy", labels)
    for name in ("both.npz", "images"):
        data = open_dataset(str(tmp_path / name))
        assert len(data.train) + len(data.validation) + len(data.test) == len(GREY)
        assert data.shape == (1, *GREY.shape[1:])
    np.savez(tmp_path / "unclear.npz", images=GREY, masks=GREY)
    with pytest.raises(DataError, match="found the keys images, masks"):
        open_dataset(str(tmp_path / "unclear.npz"))


def test_single_files_and_folders_of_arrays_or_images(tmp_path):
    write_idx(tmp_path / "one.idx.gz", GREY)
    np.save(tmp_path / "one.npy", GREY)
    np.savez(tmp_path / "one.npz", GREY)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays/train.npy", GREY[:50])
    np.save(tmp_path / "arrays/test.npy", GREY[50:])
    for split, rows in (("train", GREY[:40]), ("val", GREY[40:50]), ("test", GREY[50:])):
        for number, image in enumerate(rows):
            (tmp_path / f"images/{split}/class").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / f"images/{split}/class/{number:02}.png")
    sizes = {
        "one.idx.gz": (49, 5, 6),
        "arrays": (45, 5, 10),
        "images": (40, 10, 10),
        "images/train": (33, 3, 4),
    }
    sizes |= {"one.npy": (49, 5, 6), "one.npz": (49, 5, 6)}
    everything = {image.tobytes() for image in GREY}
    for name, expected in sizes.items():
        data = open_dataset(str(tmp_path / name))
        assert (len(data.train), len(data.validation), len(data.test)) == expected
        assert data.shape == (1, 5, 4)
        rows = rows_as_set(data.train, data.validation, data.test)
        assert rows <= everything if name == "images/train" else rows == everything


def write_images(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(GREY[number]).save(folder / f"{number}.png")


def test_a_class_called_like_a_split_is_unclear(tmp_path):
    for name in ("boat", "plane", "train"):
        write_images(tmp_path / "vehicles" / name)
    with pytest.raises(DataError, match="vehicles: found 'train' for train beside images in boat, plane; expected"):
        open_dataset(str(tmp_path / "vehicles"))


def test_folders_without_images_beside_the_splits_do_not_matter(tmp_path):
    write_images(tmp_path / "set/train", 20)
    (tmp_path / "set/labels").mkdir()
    (tmp_path / "set/labels/names.txt").write_text("boat")
    assert len(open_dataset(str(tmp_path / "set")).train) == 17


def test_two_folders_for_one_split_are_unclear(tmp_path):
    for name in ("train", "val", "validation"):
        write_images(tmp_path / "set" / name)
    with pytest.raises(DataError, match="set: found both 'val' and 'validation' for validation"):
        open_dataset(str(tmp_path / "set"))


def test_values_decide_the_scale_of_all_splits_together(tmp_path):
    np.savez(tmp_path / "a.npz", train=GREY, test=np.zeros_like(GREY))
    data = open_dataset(str(tmp_path / "a.npz"))
    assert (data.train.peak, data.validation.peak, data.test.peak) == (255, 255, 255)
    np.savez(tmp_path / "b.npz", train=GREY > 100, test=GREY > 200)
    data = open_dataset(str(tmp_path / "b.npz"))
    assert (data.train.peak, data.validation.peak, data.test.peak) == (1, 1, 1)


def test_paths_are_also_looked_for_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HVDVAE_DATA", str(tmp_path))
    np.save(tmp_path / "mine.npy", GREY)
    assert open_dataset("mine.npy").name == "mine.npy"
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist/train-images-idx3-ubyte", GREY)
    write_idx(tmp_path / "mnist/t10k-images-idx3-ubyte", GREY[:7])
    data = open_dataset("mnist")
    assert (data.name, len(data.train), len(data.test)) == ("mnist", 54, 7)


BAD = {
    "nothing": (None, "no such file or folder.*digits, mnist.*--data.*HVDVAE_DATA"),
    "bad.txt": (b"hello", r"bad\.txt: found a file of unknown kind"),
    "bad.npy": (b"", r"bad\.npy: found an empty file"),
    "nan.npy": (
        np.where(np.arange(40).reshape(20, 2) == 14, np.nan, 0.5),
        r"nan\.npy: found a NaN.*example 7",
    ),
    "big.npy": (np.full((20, 2), 1e300), r"big\.npy: found.*beyond float32 in example 0"),
    "rank.npy": (np.zeros(20), r"rank\.npy: found an array of rank 1"),
    "split.npz": ({"train": GREY, "test": GREY[:, :4]}, r"split\.npz\[test\]: .*\(1, 4, 4\).*\(1, 5, 4\)"),
    "dtype.npz": ({"train": GREY, "test": GREY / 255}, r"dtype\.npz\[test\]: .*float32.*uint8"),
    "notrain.npz": ({"test": GREY}, r"notrain\.npz: found the keys test; expected train"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_when_it_is_opened(tmp_path, name):
    content, message = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / name))


def test_folders_without_data_say_what_they_have(tmp_path):
    with pytest.raises(DataError, match="found nothing; expected IDX"):
        open_dataset(str(tmp_path))
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"found notes\.md; expected IDX"):
        open_dataset(str(tmp_path))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", GREY)
    with pytest.raises(DataError, match="found t10k-images-idx3-ubyte; expected a train-images"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "likelihood", "binarization", "refused"),
    [
        ((0, 1), "bernoulli", "dynamic", False),
        ((0, 1.01), "bernoulli", "dynamic", True),
        ((-0.01, 1), "bernoulli", "none", True),
        ((0, 255), "bernoulli", "static", True),
        ((-0.5, 1), "discretized-logistic", "none", True),
        ((0, 1), "discretized-logistic", "none", False),
        ((-40, 1e6), "gaussian", "none", False),
    ],
)
def test_values_outside_the_support_are_refused(values, likelihood, binarization, refused):
    source = ArraySource(np.array([values], np.float32), "measured.npy")
    if not refused:
        check_support(source, likelihood, binarization)
        return
    with pytest.raises(DataError, match=rf"measured\.npy: .*{values[0]:g} to {values[1]:g}.*{likelihood}"):
        check_support(source, likelihood, binarization)


def test_uint8_is_in_every_support_and_flags_that_disagree_are_refused():
    source = ArraySource(GREY, "a")
    for likelihood in ("bernoulli", "gaussian", "discretized-logistic"):
        check_support(source, likelihood, "none")
    for likelihood, binarization, flag in (
        ("poisson", "none", "--likelihood"),
        ("bernoulli", "sometimes", "--binarization"),
        ("gaussian", "dynamic", "--binarization"),
    ):
        with pytest.raises(ConfigError, match=flag):
            check_support(source, likelihood, binarization)


def test_fewer_examples_than_ranks_and_empty_batches_are_refused(tmp_path):
    np.save(tmp_path / "few.npy", GREY[:10])
    data = open_dataset(str(tmp_path / "few.npy"))
    check_dataset(data, likelihood="bernoulli", binarization="dynamic", batch=100, size=8)
    with pytest.raises(DataError, match=r"few\.npy: found 8 training examples.*9 ranks"):
        check_dataset(data, likelihood="bernoulli", binarization="dynamic", batch=1, size=9)
    with pytest.raises(ConfigError, match="--batch-size"):
        check_dataset(data, likelihood="bernoulli", binarization="dynamic", batch=0, size=1)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A data set `mnist` of our own on a server of our own; the list holds the paths that were asked for."""
    (tmp_path / "served").mkdir()
    digests = {}
    for name, rows in (("train-images-idx3-ubyte.gz", GREY), ("t10k-images-idx3-ubyte.gz", GREY[:5])):
        write_idx(tmp_path / "served" / name, rows)
        digests[name] = hashlib.md5((tmp_path / "served" / name).read_bytes()).hexdigest()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setitem(REMOTES, "mnist", Remote((url + "gone/", url), digests))
    monkeypatch.setenv("HVDVAE_DATA", str(tmp_path / "cache"))
    yield tmp_path / "served", asked
    server.shutdown()
    server.server_close()


def test_named_sets_are_downloaded_from_the_next_mirror_and_cached(mirror):
    _, asked = mirror
    assert len(open_dataset("mnist").train) == 54
    assert {path for path in asked if "gone" not in path} == {
        "/train-images-idx3-ubyte.gz",
        "/t10k-images-idx3-ubyte.gz",
    }
    before = len(asked)
    assert len(open_dataset("mnist").test) == 5
    assert len(asked) == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_only_what_is_missing_of_a_named_set_is_downloaded(mirror, tmp_path, suffix):
    _, asked = mirror
    (tmp_path / "cache/mnist").mkdir(parents=True)
    write_idx(tmp_path / f"cache/mnist/train-images-idx3-ubyte{suffix}", GREY[:40])
    data = open_dataset("mnist")
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 5), "the test is not cut from train"
    assert not [path for path in asked if "train" in path]


def test_a_download_with_a_wrong_checksum_is_refused_and_not_kept(mirror):
    served, _ = mirror
    write_idx(served / "train-images-idx3-ubyte.gz", GREY[:20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: found neither.*expected md5.*HVDVAE_DATA"):
        fetch("mnist")
    with pytest.raises(DataError, match="found neither"):
        open_dataset("mnist")


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="MNIST is not in ../shared/data/mnist")
def test_mnist_itself():
    data = open_dataset(str(SHARED / "mnist"))
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert (data.shape, data.train.dtype, data.train.peak, data.train.in_memory) == (
        (1, 28, 28),
        np.uint8,
        255,
        True,
    )
    first = data.test.gather(np.array([0]))[0, 0]
    assert (int(first.sum()), int(first[7, 6])) == (18_454, 84)


@pytest.mark.skipif(not (SHARED / "mnist_static").is_dir(), reason="no ../shared/data/mnist_static")
def test_mnist_of_larochelle_stays_binary():
    data = open_dataset(str(SHARED / "mnist_static"))
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 10_000, 10_000)
    assert (data.train.peak, data.test.peak) == (1, 1)
