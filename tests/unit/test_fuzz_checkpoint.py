"""A checkpoint of any content, its digest in order, is taken or refused in one line that names it."""

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvdvae.checkpoint import Checkpoint, load, save
from hvdvae.cli import assemble
from hvdvae.cli.config_file import write_config
from hvdvae.cli.same_function import changes, check_resumed
from hvdvae.cli.saved_run import open_model
from hvdvae.config import TrainConfig
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.world import World
from tests.unit.test_trainer import plain_network, saved_run, trainer_of

bounded = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
SHAPE = (1, 8, 8)
CONFIG = TrainConfig(hidden=[5], latent=[3], ema=0.9)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.integers(10**300, 10**400)
)
words = st.text(max_size=4)
values = st.recursive(
    scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(words, part, max_size=3), max_leaves=5
)
tensors = st.sampled_from(
    [
        torch.ones(3),
        torch.ones(2, 2),
        torch.tensor(1.0),
        torch.empty(0, 4),
        torch.tensor([True]),
        torch.ones(5, 4).bfloat16(),
    ]
)
NAMES = ("", "model/x", "optimizer/x/step", "optimizer/9/y", "buffers", "ema/x")


@functools.cache
def of_a_run() -> Checkpoint:
    with TemporaryDirectory() as folder:
        return saved_run(Path(folder), ema_decay=0.9, config={"seed": 1, "objective": "elbo"})


@functools.cache
def of_a_model() -> Checkpoint:
    model = assemble.model(CONFIG, SHAPE, torch.device("cpu"))
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    function = {**assemble.function_of(CONFIG, SHAPE), "binarization": "none"}
    saved = {**asdict(CONFIG), "shape": list(SHAPE), "function": function, "limits": [0.0, 1.0], "data_digest": "a"}
    return Checkpoint(found, {"step": 3, "config": saved})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a record."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any, *, gone: bool) -> Any:
    if not path:
        return value
    found = copy.deepcopy(record)
    inner: Any = functools.reduce(lambda part, key: part[key], path[:-1], found)
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return found


def refused_in_one_line(error: Exception) -> None:
    assert "a.safetensors" in str(error), error
    assert len(str(error).splitlines()) == 1, error


def test_the_checkpoint_that_is_changed_below_is_good() -> None:
    trainer_of(plain_network(), ema_decay=0.9).resume(of_a_run())
    with TemporaryDirectory() as folder:
        opened(of_a_model(), Path(folder))


def resumed(checkpoint: Checkpoint) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save(path, checkpoint)
        try:
            trainer_of(plain_network(), ema_decay=0.9, config={"seed": 1}).resume(load(path))
        except CheckpointError as error:
            refused_in_one_line(error)


def opened(checkpoint: Checkpoint, folder: Path) -> None:
    save(folder / "a.safetensors", checkpoint)
    write_config(CONFIG, folder / "config.yaml")
    open_model(str(folder), str(folder / "a.safetensors"), World.alone(device="cpu"))


@bounded
@given(st.data(), values, st.booleans())
def test_records_of_runs(data: st.DataObject, value: Any, gone: bool) -> None:
    record = of_a_run().record
    path = data.draw(st.sampled_from([*places(record)]))
    resumed(Checkpoint(of_a_run().tensors, changed(record, path, value, gone=gone)))


@bounded
@given(
    st.data(),
    st.one_of(tensors, st.none()),
    st.sampled_from(NAMES),
)
def test_tensors_of_runs(data: st.DataObject, tensor: torch.Tensor | None, name: str) -> None:
    found = dict(of_a_run().tensors)
    place = name or data.draw(st.sampled_from(sorted(found)))
    found.pop(place, None)
    if tensor is not None:
        found[place] = tensor
    resumed(Checkpoint(found, of_a_run().record))


@bounded
@given(st.data(), values, st.booleans())
def test_records_of_models(data: st.DataObject, value: Any, gone: bool) -> None:
    record = of_a_model().record
    path = data.draw(st.sampled_from([*places(record)]))
    with TemporaryDirectory() as folder:
        try:
            opened(Checkpoint(of_a_model().tensors, changed(record, path, value, gone=gone)), Path(folder))
        except CheckpointError as error:
            refused_in_one_line(error)


@bounded
@given(st.data(), values, st.booleans())
def test_what_is_compared_at_a_resume(data: st.DataObject, value: Any, gone: bool) -> None:
    record = of_a_model().record
    path = data.draw(st.sampled_from([place for place in places(record) if len(place) > 1]))
    found = changed(record, path, value, gone=gone)
    try:
        check_resumed(assemble.function_of(CONFIG, SHAPE), found, "a.safetensors")
        changes(CONFIG, found)
    except CheckpointError as error:
        refused_in_one_line(error)


@bounded
@given(st.binary(max_size=30), st.integers(0, 400), st.integers(0, 10))
@example(b'{"__metadata__":' + b"[" * 30, 8, 0)
def test_bytes(data: bytes, place: int, length: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save(path, of_a_model())
        whole = path.read_bytes()
        path.write_bytes(whole[:place] + data + whole[place + length :])
        if path.read_bytes() == whole:
            return
        with pytest.raises(CheckpointError) as refused:
            load(path)
        refused_in_one_line(refused.value)


@pytest.mark.parametrize("record", ["[]", "3", "null", '"x"', "[" * 100_000, "{", "", '{"a": NaN' + "0" * 9])
def test_records_that_are_no_mapping(tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **options: record if value == {} else dumps(value, **options))
    save(tmp_path / "a.safetensors", Checkpoint({"w": torch.ones(2)}, {}))
    monkeypatch.undo()
    with pytest.raises(CheckpointError) as refused:
        load(tmp_path / "a.safetensors")
    refused_in_one_line(refused.value)


def test_a_record_cannot_set_what_is_no_count(tmp_path: Path) -> None:
    checkpoint = of_a_run()
    strange = Checkpoint(checkpoint.tensors, {**checkpoint.record, "moved": {"__class__": 1, "counts": 2}})
    trainer = trainer_of(plain_network(), ema_decay=0.9)
    trainer.resume(strange)
    assert callable(trainer.optimizer.moved.counts)


def test_a_model_that_no_configuration_gives_is_refused(tmp_path: Path) -> None:
    """The file of the folder is judged as such, before the checkpoint."""
    with pytest.raises(ConfigError, match="no folder"):
        open_model(str(tmp_path / "none"), "best", World.alone(device="cpu"))
