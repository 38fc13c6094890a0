"""Batches of a rank: the same examples and the same binarization at every world size, and after a resume."""

import gc
import itertools
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdvae.data import ArraySource, Loader, Source, Subset, open_dataset
from hvdvae.errors import ConfigError, DataError

GREY = np.random.default_rng(1).integers(0, 256, (53, 1, 4, 4), dtype=np.uint8)


def loader(source=None, **options):
    source = source or ArraySource(GREY, "a")
    return Loader(source, **({"batch": 4, "seed": 3} | options))


def whole_epoch(size, batch, epoch=0, start=0, **options):
    """All examples of an epoch in the order in which `size` ranks see them step by step."""
    ranks = [loader(rank=r, size=size, batch=batch, **options).epoch(epoch, start) for r in range(size)]
    return torch.cat([torch.cat(step) for step in zip(*ranks, strict=True)])


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdvae-prefetch"]


@pytest.mark.parametrize("binarization", ["dynamic", "static", "none"])
def test_ranks_together_see_what_one_process_sees_bit_for_bit(binarization):
    one = whole_epoch(1, 12, epoch=2, binarization=binarization)
    assert (one.shape, one.dtype) == ((48, 1, 4, 4), torch.float32)
    for size, batch in ((2, 6), (3, 4), (4, 3), (12, 1)):
        assert torch.equal(whole_epoch(size, batch, epoch=2, binarization=binarization), one)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_epoch_goes_on_where_it_stopped_at_any_size(size):
    whole = whole_epoch(2, 6)
    for start in (0, 12, 24, 48):
        rest = loader(size=size, batch=2, rank=0).steps(start)
        if rest:
            resumed = whole_epoch(size, 2, start=start)
            assert torch.equal(resumed[: 48 - start], whole[start:][: len(resumed)])
    assert loader(size=1, batch=4).steps(52) == 0
    assert list(loader(size=1, batch=4).epoch(0, 52)) == []


def test_all_ranks_take_the_same_number_of_steps_and_small_data_shrinks_the_batch():
    ranks = [loader(rank=rank, size=5, batch=100) for rank in range(5)]
    assert {r.batch for r in ranks} == {10}
    assert {(r.steps(), r.global_batch, len(list(r.epoch(0)))) for r in ranks} == {(1, 50, 1)}


@given(
    batch=st.integers(1, 80),
    changes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_ranks_that_stayed_cut_what_is_left_as_those_that_come_do(batch, changes):
    """However many there were in between: together they take every example that is left once, but for the remainder."""
    source = ArraySource(np.arange(53, dtype=np.float32)[:, None], "a")
    options = {"batch": batch, "seed": 3, "binarization": "none", "likelihood": "gaussian"}
    stayed, position, seen = loader(source, **options), 0, []
    for size, most_steps in changes:
        stayed.reshare(0, size)
        came = [loader(source, rank=rank, size=size, **options) for rank in range(size)]
        assert {(one.batch, one.global_batch, one.steps(position)) for one in [stayed, *came]} == {
            (stayed.batch, stayed.batch * size, (53 - position) // stayed.global_batch)
        }
        ranks = [stayed, *came[1:]]
        steps = min(most_steps, stayed.steps(position))
        for batches in itertools.islice(zip(*(one.epoch(0, position) for one in ranks), strict=True), steps):
            seen += torch.cat(batches).flatten().tolist()
        position += steps * stayed.global_batch
    assert len(seen) == len(set(seen)) == position


def test_dynamic_changes_with_epoch_and_seed_and_static_with_neither():
    one = Subset(ArraySource(np.full((53, 400), 128, np.uint8), "a"), np.array([7]))

    def image(binarization, epoch, seed):
        return next(iter(Loader(one, batch=1, seed=seed, binarization=binarization).epoch(epoch)))

    first = image("dynamic", 0, 0)
    assert torch.equal(first, image("dynamic", 0, 0))
    for epoch, seed in ((1, 0), (0, 1)):
        assert 0.3 < (image("dynamic", epoch, seed) != first).float().mean() < 0.7
        assert torch.equal(image("static", epoch, seed), image("static", 0, 0))


def test_data_that_cannot_be_trained_on_is_refused():
    with pytest.raises(DataError, match=r"a: found 53 training examples.*54 ranks"):
        loader(size=54)
    with pytest.raises(DataError, match=r"b: found float64 from 0 to 2"):
        loader(ArraySource(np.array([[0.0, 2.0]]), "b"), batch=1)
    with pytest.raises(ConfigError, match="--batch-size"):
        loader(batch=0)
    with pytest.raises(ConfigError, match="--binarization"):
        loader(likelihood="gaussian", binarization="dynamic")


@pytest.mark.parametrize("kind", ["npy", "npz", "contiguous.h5", "chunked.h5"])
def test_data_on_disk_gives_the_same_batches_as_in_memory(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("hvdvae.data.hdf5.open_hdf5.__kwdefaults__", {"in_memory_bytes": 0, "external_storage": False})
    monkeypatch.setattr("hvdvae.data.array_file.IN_MEMORY_BYTES", 0)
    file = tmp_path / f"a.{kind}"
    splits = {"train": GREY, "validation": GREY[:5], "test": GREY[5:10]}
    if kind == "npy":
        np.save(file, GREY)
    elif kind == "npz":
        np.savez(file, **splits)
    else:
        with h5py.File(file, "w") as out:
            for name, array in splits.items():
                out.create_dataset(name, data=array, chunks=(5, 1, 4, 4) if kind == "chunked.h5" else None)
    source = open_dataset(str(file)).train
    assert not source.in_memory
    copy = ArraySource(source.gather(np.arange(len(source))), "copy")
    for epoch in (0, 1):
        streamed = torch.cat(list(loader(source).epoch(epoch)))
        assert torch.equal(streamed, torch.cat(list(loader(copy).epoch(epoch))))
    assert prefetch_threads() == []


def test_in_memory_data_starts_no_thread():
    iterator = loader().epoch(0)
    next(iterator)
    assert prefetch_threads() == []


class Failing(Source):
    """Streams zeros; raises `error` in the given gather and counts the gathers."""

    path, shape, dtype, in_memory = "failing.bin", (3,), np.dtype(np.uint8), False

    def __init__(self, error=None, at=0):
        self.error, self.at, self.gathers = error, at, 0
        self.limits = (0.0, 255.0)

    def __len__(self):
        return 1000

    def gather(self, indices):
        self.gathers += 1
        if self.error is not None and self.gathers == self.at:
            raise self.error
        return np.zeros((len(indices), 3), np.uint8)


@pytest.mark.parametrize("error", [OSError("disk gone"), DataError("failing.bin: torn")])
def test_errors_of_the_thread_surface_in_the_main_thread_with_the_files_name(error):
    batches = loader(Failing(error, at=5)).epoch(0)
    for _ in range(4):
        next(batches)
    with pytest.raises(DataError, match=r"failing\.bin: .*(disk gone|torn)"):
        next(batches)
    assert prefetch_threads() == []


def test_errors_of_a_users_own_source_keep_their_type_and_name_the_file():
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader(Failing(ZeroDivisionError(), at=2)).epoch(0))
    assert any("failing.bin" in note for note in caught.value.__notes__)


def test_the_thread_runs_ahead_by_a_bounded_number_of_batches():
    source = Failing()
    iterator = loader(source).epoch(0)
    next(iterator)
    deadline = time.monotonic() + 5
    while source.gathers < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.gathers == 4
    iterator.close()


@pytest.mark.parametrize("how", ["close", "collect", "break"])
def test_the_thread_ends_with_the_iterator(how):
    iterator = loader(Failing()).epoch(0)
    next(iterator)
    assert len(prefetch_threads()) == 1
    if how == "close":
        iterator.close()
    elif how == "break":
        for _ in iterator:
            break
    del iterator
    gc.collect()
    assert prefetch_threads() == []
