"""What a value of a YAML file means: the text that stands there, read as the flag of its key."""

import pwd
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study.located import StudyError
from benchmarks.study.study_file import parse as parse_study
from hvdvae.checkpoint import Checkpoint, Folder
from hvdvae.cli import assemble
from hvdvae.cli.config_file import LARGEST_FILE, read_config, read_values, write_config
from hvdvae.cli.parser import parse
from hvdvae.cli.supervise import _folder, _of_file
from hvdvae.config import TrainConfig, flag
from hvdvae.errors import ConfigError
from tests.unit.test_study_file import GOOD

SMALL = TrainConfig(hidden=[5], latent=[3])


def of_file(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "a.yaml"
    path.write_text(text)
    return read_values(path, "a.yaml")


def of_flags(*argv: str) -> dict[str, Any]:
    return dict(parse(["train", *argv])[1].values)


NAMES = (
    "2026_11_30",
    "010",
    "1e3",
    "12:30",
    "2026-11-30",
    "2001-99-99",
    "0x1f",
    "yes",
    "no",
    "off",
    "True",
    "1.50",
    "=",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_paths_are_the_text_that_stands_there(tmp_path: Path, name: str) -> None:
    for key in ("out", "data", "device", "cuts"):
        assert of_file(tmp_path, f"{key}: {name}\n")[key] == name
        assert of_flags(f"--{key}", name)[key] == name
    write_config(TrainConfig(out=name, data=name), tmp_path / "config.yaml")
    assert (found := read_config(tmp_path / "config.yaml")).out == found.data == name
    (tmp_path / "b.yaml").write_text(f"out: {name}\n")
    assert _of_file(["--config", str(tmp_path / "b.yaml")]) == {"out": name}
    assert _folder(["--config", str(tmp_path / "b.yaml")]) == Path(name)
    study = parse_study(GOOD.replace("data: digits", f"data: {name}").replace("Who wins", name), "s.yaml")
    assert (study.data, study.title) == (name, name)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "010", 10),
        ("epochs", "1_000", 1000),
        ("seed", "0x1F", 31),
        ("seed", "0o17", 15),
        ("lr", "1e-3", 0.001),
        ("lr", "1.e-3", 0.001),
        ("lr", ".5", 0.5),
        ("lr", "1_0.5", 10.5),
        ("clip_norm", "null", None),
        ("clip_norm", "2", 2.0),
        ("binarization", "none", "none"),
        ("zero_stage", "2", 2),
    ],
)
def test_a_flag_and_a_key_are_read_alike(tmp_path: Path, key: str, text: str, value: object) -> None:
    for found in (of_file(tmp_path, f"{key}: {text}\n")[key], of_flags(f"--{key.replace('_', '-')}", text)[key]):
        assert found == value
        assert type(found) is type(value)


def test_switches_are_read_as_people_write_them(tmp_path: Path) -> None:
    for text, value in (("true", True), ("Yes", True), ("on", True), ("False", False), ("no", False), ("off", False)):
        assert of_file(tmp_path, f"batch_norm: {text}\n")["batch_norm"] is value
    with pytest.raises(ConfigError, match="batch_norm is 'y', expected true or false"):
        of_file(tmp_path, "batch_norm: y\n")


@pytest.mark.parametrize("text", ["12:30", "12:30.5", "!!int x", "1e3", "9" * 400, "9" * 5000, "٣", "1.0", "0x", ""])
def test_what_is_no_whole_number_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml, line 2: (epochs|found)") as refused:
        of_file(tmp_path, f"lr: 1\nepochs: {text}\n")
    assert len(str(refused.value)) < 200
    with pytest.raises(ConfigError, match="--epochs") as refused:
        of_flags("--epochs", text)
    assert len(str(refused.value)) < 200


def test_numbers_of_400_digits_are_refused_by_their_flag() -> None:
    for key in ("--lr", "--seed", "--threads", "--hidden", "--deadline", "--beta", "--ema"):
        with pytest.raises(ConfigError, match=key) as refused:
            TrainConfig(**of_flags(key, "9" * 400))
        assert len(str(refused.value)) < 200
    for key in ("--samples", "--seed", "--deadline"):
        with pytest.raises(ConfigError, match=key):
            parse(["evaluate", "run", key, "9" * 400])


@pytest.mark.parametrize("value", ["~/a b/x", "~", "~root/x"])
def test_a_tilde_is_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    homes = {"~/a b/x": "/home/me/a b/x", "~": "/home/me", "~root/x": f"{pwd.getpwnam('root').pw_dir}/x"}
    expected = homes[value]
    for key in ("out", "data"):
        assert of_file(tmp_path, f"{key}: {value}\n")[key] == expected
        assert of_flags(f"--{key}={value}")[key] == expected
    _, options = parse(["evaluate", value, f"--data={value}", f"--checkpoint={value}"])
    assert (options.folder, options.data, options.checkpoint) == (expected,) * 3
    assert parse(["sample", "run", f"--output={value}"])[1].output == expected
    assert _folder(["--out", value]) == Path(expected)
    assert parse_study(GOOD.replace("data: digits", f"data: {value}"), "s.yaml").data == expected
    # Only where a path is meant.
    assert of_file(tmp_path, f"device: {value}\n")["device"] == value


def test_a_home_that_nobody_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml, line 1: out is '~nobody-here/x', and nobody here has that home"):
        of_file(tmp_path, "out: ~nobody-here/x\n")
    with pytest.raises(ConfigError, match=r"--data is '~nobody-here'"):
        of_flags("--data", "~nobody-here")
    assert of_flags("--out", "./~nobody-here/x")["out"] == "./~nobody-here/x"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{one}: &{one} [{','.join(['*' + before] * 9)}]\n" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 1: found the anchor &a"),
        ("lr: *x\n", "line 1: found the alias"),
        ("lr: 1\nepochs: !!int x\n", "line 2: found the tag !!int"),
        ("lr: !!python/object/apply:os.system [exit]\n", "line 1: found the tag !!python/object/apply"),
        ("lr: ! 1\n", "line 1: found the tag !"),
        ("lr: 1\n--- \nlr: 2\n", "line 2: a second document"),
        ("lr: " + "[" * 100_000, "line 1: found more than 20 levels"),
        ("- " * 50_000, "line 1: found more than 20 levels"),
        ("? " * 50_000, "line 1: found more than 20 levels"),
        ("[a]: 1\n", "line 1: found a key that is no word"),
        ("{a: 1}: 1\n", "line 1: found a key that is no word"),
        ("lr: 1\nlr: 2\n", "line 2: the key 'lr' stands twice"),
        ("<<: {lr: 1}\n", "unknown key '<<'"),
        ("lr: 2001-99-99\n", "line 1: lr is '2001-99-99', expected a number"),
        ("#" * (LARGEST_FILE + 1), "found more than 200,000 bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_nobody_writes_by_hand_is_refused_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        of_file(tmp_path, text)
    assert words in str(refused.value)
    assert str(refused.value).startswith("a.yaml")
    if "unknown key" not in words and "bytes" not in words and "expected a number" not in words:
        with pytest.raises(StudyError) as error:
            parse_study(text, "a.yaml")
        assert words in str(error.value)


def test_equal_lists_are_written_so_that_they_can_be_read(tmp_path: Path) -> None:
    sizes = [3, 4]
    config = TrainConfig(hidden=sizes, latent=sizes, out="é", data="null")
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


FLOATS = [name for name, field in TrainConfig.__dataclass_fields__.items() if "float" in str(field.type)]


@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_beyond_what_float32_holds(key: str) -> None:
    """torch raises "value cannot be converted" in the middle of a step."""
    with pytest.raises(ConfigError) as refused:
        TrainConfig(**of_flags(flag(key), "1e300"))
    assert flag(key) in str(refused.value)


@pytest.mark.parametrize("count", ["1000000000000", str(2**62)])
def test_more_samples_than_memory_are_refused_by_their_flag(tmp_path: Path, count: str) -> None:
    write_config(SMALL, tmp_path / "config.yaml")
    model = assemble.model(SMALL, (1, 8, 8), torch.device("cpu"))
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    found = Checkpoint(tensors, {"step": 1, "config": {"shape": [1, 8, 8]}})
    Folder(tmp_path / "checkpoints", 1).save(found, is_best=True)
    command, options = parse(["sample", str(tmp_path), "--count", count])
    with pytest.raises(ConfigError, match=f"--count {count} does not fit into memory"):
        command(options)
