"""Whatever stands in a YAML file, it is read, or refused in one line that names the file."""

import contextlib
import json
import string
from argparse import ArgumentTypeError
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.study.located import StudyError
from benchmarks.study.study_file import parse as parse_study
from hvdvae.cli.config_file import read_config, read_values, write_config
from hvdvae.cli.parser import Typed
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from tests.unit.test_study_file import GOOD

KEYS = [field.name for field in fields(TrainConfig)]
bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

characters = st.sampled_from(
    string.ascii_letters + string.digits + "\n\n  :-[]{},&*!|>'\"%@`#?~.=_+\t\0\r\u2028é٣\ufeff"
)
jumble = st.text(characters, max_size=60)
scalars = st.one_of(
    jumble,
    st.integers().map(str),
    st.floats().map(str),
    st.integers(300, 5000).map(lambda digits: "9" * digits),
    st.dates().map(str),
    st.sampled_from(["yes", "null", "~", "1_0", "0x1f", "12:30", ".inf", "-.nan", "!!int x", "*a", "&a b", "<<"]),
)
lines = st.tuples(st.one_of(st.sampled_from(KEYS), jumble), scalars).map(lambda pair: f"{pair[0]}: {pair[1]}\n")
texts = st.one_of(jumble, st.lists(lines, max_size=6).map("".join))


def refused_in_one_line(error: Exception, name: str) -> None:
    assert name in str(error)
    assert len(str(error).splitlines()) == 1, str(error)
    assert len(str(error)) < 1000


def read(data: bytes) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_bytes(data)
        return read_values(path, "a.yaml")


@bounded
@given(texts)
@example("a: 1\n\x85b: 2")
def test_a_configuration_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        values = read(text.encode())
    except ConfigError as error:
        refused_in_one_line(error, "a.yaml")
        return
    with contextlib.suppress(ConfigError):
        TrainConfig(**values)


@bounded
@given(st.binary(max_size=40))
def test_bytes_are_read_or_refused_in_one_line(data: bytes) -> None:
    try:
        read(data)
    except ConfigError as error:
        refused_in_one_line(error, "a.yaml")


@bounded
@given(st.sampled_from(KEYS), scalars)
def test_a_flag_and_a_quoted_key_are_one(key: str, text: str) -> None:
    if TrainConfig.__dataclass_fields__[key].default is False or key in ("hidden", "latent"):
        return  # Switches take no value, and lists several.
    found: list[str] = []
    for reading in (
        lambda: read(f"{key}: {json.dumps(text)}\n".encode())[key],
        lambda: Typed(key, get_type_hints(TrainConfig)[key])(text),
    ):
        try:
            found.append(repr(reading()))
        except (ConfigError, ArgumentTypeError):
            found.append("refused")
    assert found[0] == found[1]


@settings(bounded, max_examples=60)
@given(st.text(max_size=20).filter(bool), st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=3))
def test_what_is_written_reads_back(text: str, sizes: list[int]) -> None:
    if text.startswith("~") or any("\ud800" <= letter <= "\udfff" for letter in text):
        return  # A home; and what no file of UTF-8 holds.
    config = TrainConfig(out=text, hidden=sizes, latent=sizes)
    with TemporaryDirectory() as folder:
        write_config(config, Path(folder, "config.yaml"))
        assert asdict(read_config(Path(folder, "config.yaml"))) == asdict(config)


@settings(bounded, max_examples=60)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 12), scalars)
def test_a_study_is_read_or_refused_in_one_line(place: int, length: int, text: str) -> None:
    try:
        parse_study(GOOD[:place] + text + GOOD[place + length :], "s.yaml")
    except StudyError as error:
        refused_in_one_line(error, "s.yaml")
