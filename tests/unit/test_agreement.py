"""All ranks take rank 0's configuration and have the same data, or say who differs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from hvdvae.cli.agreement import agreed_config, check_same_data, digest
from hvdvae.cli.asked import Asked
from hvdvae.cli.config_file import write_config
from hvdvae.cli.parser import parse
from hvdvae.config import TrainConfig
from hvdvae.data import ArraySource, Dataset
from hvdvae.errors import ConfigError, DataError, HvdvaeError
from hvdvae.launcher import Launch


class Together:
    """A World's gather over threads."""

    def __init__(self, size: int, devices: Sequence[str] = ()) -> None:
        self.size, self.devices = size, devices or ["cpu"] * size
        self.records: list[Any] = [None] * size
        self.barrier = Barrier(size, timeout=10)

    def rank(self, rank: int) -> Any:
        class Member:
            device = torch.device(self.devices[rank])
            is_first = rank == 0

            @staticmethod
            def gather_objects(record: Any, what: str = "") -> list[Any]:
                self.records[rank] = record
                self.barrier.wait()
                everyone = list(self.records)
                self.barrier.wait()
                return everyone

        return Member()


def on_all(function: Callable[[int], Any], size: int) -> list[Any]:
    """Results or errors of all ranks."""

    def one(rank: int) -> Any:
        try:
            return function(rank)
        except HvdvaeError as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def agreed(*command_lines: Sequence[str], devices: Sequence[str] = ()) -> list[Any]:
    asked = [parse(["train", *words])[1] for words in command_lines]
    world = Together(len(asked), devices)
    return on_all(lambda rank: agreed_config(asked[rank], world.rank(rank)), len(asked))


def test_ranks_that_do_not_see_the_saved_configuration_take_that_of_rank_0(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"disk{rank}").mkdir()
    saved = TrainConfig(lr=0.125, hidden=[9], optimizer="sgd", momentum=0.5, threads=3, deadline=7.0)
    write_config(saved, tmp_path / "disk0" / "config.yaml")
    # An earlier run of another configuration, left on a local disk, has no say either.
    write_config(TrainConfig(lr=0.5), tmp_path / "disk2" / "config.yaml")
    lines = [["--resume", "--out", str(tmp_path / f"disk{rank}"), "--momentum", "0.25"] for rank in range(3)]
    asked = []
    for rank, words in enumerate(lines):
        found = parse(["train", *words])[1]
        found.check(Launch(launcher="mpirun", rank=rank, size=3))
        # The path is the same on all hosts, what lies behind it is not.
        asked.append(Asked(*({**values, "out": "run"} for values in found[:2])))
    world = Together(3)
    first, *others = on_all(lambda rank: agreed_config(asked[rank], world.rank(rank)), 3)
    assert (first.lr, first.hidden, first.momentum, first.deadline) == (0.125, [9], 0.25, 7.0)
    for other in others:
        assert {**vars(other), "threads": None} == {**vars(first), "threads": None}


def test_a_rank_that_was_told_something_else_is_named_on_all() -> None:
    found = agreed(["--lr", "0.5"], ["--lr", "0.5"], ["--lr", "0.25"])
    for error in found:
        assert isinstance(error, ConfigError)
        assert str(error).startswith("--lr is 0.25 on rank 2 and 0.5 on rank 0")


def test_threads_and_device_are_each_ranks_own() -> None:
    one, two = agreed(["--threads", "1"], ["--threads", "2", "--device", "cpu"])
    assert (one.threads, two.threads, one.device, two.device) == (1, 2, "auto", "cpu")
    for error in agreed(["--device", "cpu"], [], devices=["cpu", "meta"]):
        assert isinstance(error, ConfigError)
        assert "--device is auto (meta) on rank 1 and cpu (cpu) on rank 0" in str(error)


def test_what_cannot_work_is_refused_before_the_ranks_meet() -> None:
    asked = parse(["train", "--momentum", "0.5"])[1]
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="--momentum"):
            asked.check(Launch(launcher="mpirun", rank=rank, size=2))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (np.zeros((9, 2), np.uint8), "9 examples"),
        (np.zeros((10, 3), np.uint8), r"\(3,\)"),
        (np.full((10, 2), 7, np.uint8), "up to 255"),
        (np.zeros((10, 2), np.float32), "float32"),
    ],
)
def test_ranks_that_find_other_data_are_named_with_the_numbers(other: np.ndarray, words: str) -> None:
    def dataset(test: np.ndarray) -> Dataset:
        common = ArraySource(np.zeros((20, 2), np.uint8), "common")
        return Dataset(name="a", train=common, validation=common, test=ArraySource(test, "mine.npy"))

    found = [dataset(np.zeros((10, 2), np.uint8)), dataset(other)]
    world = Together(2)
    for error in on_all(lambda rank: check_same_data(found[rank], world.rank(rank)), 2):
        assert isinstance(error, DataError)
        assert "mine.npy: the test split on rank 1 has " in str(error)
        with pytest.raises(DataError, match=words):
            raise error
    check_same_data(found[0], Together(1).rank(0))


def test_one_example_in_memory_that_differs_is_found() -> None:
    mine, theirs = (np.arange(4000, dtype=np.uint8).reshape(1000, 4) for _ in range(2))
    theirs[501, 2] += 1
    assert digest(ArraySource(mine, "mine")) != digest(ArraySource(theirs, "theirs"))
    assert digest(ArraySource(mine, "mine")) == digest(ArraySource(mine.copy(), "copy"))


def test_of_a_file_that_is_streamed_a_sample_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4000, dtype=np.float32).reshape(1000, 4))
    source = ArraySource(np.load(tmp_path / "a.npy", mmap_mode="r"), "a.npy")
    asked: list[int] = []
    gather = source.gather
    source.gather = lambda indices: asked.extend(indices) or gather(indices)  # type: ignore[method-assign, func-returns-value]
    assert len(digest(source)) == 12
    assert len(asked) == 64
    assert (asked[0], asked[-1]) == (0, 999)
