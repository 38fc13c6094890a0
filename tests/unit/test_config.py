"""Flags, YAML keys, help: what is refused, by which name, and who wins."""

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from hvdvae import config as training
from hvdvae.cli import main
from hvdvae.cli.config_file import read_config, write_config
from hvdvae.cli.options import SUBCOMMANDS
from hvdvae.cli.parser import parse
from hvdvae.config import TrainConfig, flag
from hvdvae.config_check import ABOVE_ZERO, AT_LEAST
from hvdvae.errors import ConfigError


def resolved(*argv: str) -> TrainConfig:
    command, asked = parse(["train", *argv])
    assert command.__name__ == "train"
    return TrainConfig(**asked.values)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("key", AT_LEAST)
def test_too_small_names_the_flag_and_the_least(key: str) -> None:
    least = AT_LEAST[key]
    with pytest.raises(ConfigError, match=rf"^{flag(key)} is {least - 1}, expected at least {least:g}$"):
        TrainConfig(**{key: least - 1})
    with pytest.raises(ConfigError, match=f"^{flag(key)} is nan"):
        TrainConfig(**{key: math.nan})


@pytest.mark.parametrize("key", ABOVE_ZERO)
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_rates_and_times_are_finite_and_above_zero(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{flag(key)} is {value}, expected a finite number above 0$"):
        TrainConfig(**{key: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 2**63}, ["--seed"]),
        ({"ema": 1.0}, ["--ema"]),
        ({"ema": -0.1}, ["--ema"]),
        ({"hidden": []}, ["--hidden"]),
        ({"hidden": [10, 0]}, ["--hidden", "[10, 0]"]),
        ({"latent": [-3]}, ["--latent", "[-3]"]),
        ({"latent": [10**13]}, ["--latent", "below 2**31"]),
        ({"threads": 40_000}, ["--threads", "40000", "1024"]),
        ({"objective": "iwae", "free_bits": 0.1}, ["--free-bits", "--objective"]),
        ({"objective": "iwae", "beta": 2.0}, ["--beta", "--objective"]),
        ({"objective": "iwae", "beta_warmup": 2.0}, ["--beta-warmup", "--objective"]),
        ({"free_bits": 0.1, "beta": 4.0}, ["--free-bits", "--beta"]),
        ({"free_bits": 0.1, "beta_warmup": 4.0}, ["--free-bits", "--beta-warmup"]),
        ({"batch_norm": True}, ["--batch-norm", "--model mlp"]),
        ({"model": "conv", "sync_batch_norm": True}, ["--sync-batch-norm", "--batch-norm"]),
        ({"momentum": 0.9}, ["--momentum", "--optimizer sgd", "no --optimizer"]),
        ({"strategy": "local", "compression": "fp16"}, ["--compression", "--strategy local"]),
        ({"compression_share": 0.1}, ["--compression-share", "topk or randomk", "--compression none"]),
        ({"compression_share": 1.5, "compression": "topk"}, ["--compression-share", "1.5"]),
        ({"compression_rank": 2, "compression": "int8"}, ["--compression-rank", "powersgd"]),
        ({"compression_momentum": 0.9, "compression": "topk"}, ["--compression-momentum", "--optimizer sgd"]),
        ({"compression_momentum": 1.0, "compression": "topk"}, ["--compression-momentum", "below 1"]),
        (
            {"compression_momentum": 0.9, "compression": "topk", "optimizer": "sgd", "strategy": "diloco"},
            ["--compression-momentum", "allreduce or ps", "--strategy diloco"],
        ),
        ({"compression": "topk", "precision": "fp16"}, ["--compression topk", "--precision fp16", "bf16"]),
        ({"weights": "bf16", "precision": "bf16"}, ["--weights", "sharded", "--strategy allreduce"]),
        ({"weights": "bf16", "strategy": "sharded", "zero_stage": 2}, ["--weights", "bf16", "--precision fp32"]),
        ({"weights": "bf16", "strategy": "sharded", "precision": "bf16"}, ["--weights bf16", "--zero-stage 2"]),
        (
            {"weights": "bf16", "strategy": "sharded", "precision": "bf16", "zero_stage": 2, "ema": 0.9},
            ["--ema", "--weights bf16"],
        ),
        ({"sync_every": 4}, ["--sync-every", "local-sgd or diloco", "--strategy allreduce"]),
        ({"sync_every": 0, "strategy": "local-sgd"}, ["--sync-every", "at least 1"]),
        ({"outer_lr": 0.5, "strategy": "local-sgd"}, ["--outer-lr", "diloco"]),
        ({"outer_momentum": 1.0, "strategy": "diloco"}, ["--outer-momentum", "below 1"]),
        ({"group_size": 2}, ["--group-size", "local-sgd or diloco"]),
        ({"strategy": "local-sgd", "ema": 0.9}, ["--ema", "local-sgd"]),
        ({"strategy": "diloco", "reduce_op": "adasum"}, ["--reduce-op", "--strategy allreduce"]),
        ({"strategy": "local", "reduce_op": "adasum"}, ["--reduce-op", "--strategy local"]),
        (
            {"strategy": "local", "model": "conv", "batch_norm": True, "sync_batch_norm": True},
            ["--sync-batch-norm", "--strategy local"],
        ),
        ({"resume": True, "overwrite": True}, ["--resume", "--overwrite"]),
    ],
    ids=str,
)
def test_what_does_not_go_together_names_the_flags(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        TrainConfig(**options)
    for word in words:
        assert word in str(refused.value)


def test_the_defaults_and_the_least_values_are_accepted() -> None:
    TrainConfig()
    least = {key: int(value) for key, value in AT_LEAST.items()}
    for_averages = {key: least.pop(key) for key in ("sync_every", "compression_rank", "group_size")}
    TrainConfig(strategy="ps", rule="dcasgd", dc_strength=least.pop("dc_strength"))
    TrainConfig(**{**least, "strategy": "ps", "consistency": "ssp"})
    TrainConfig(strategy="local-sgd", compression="powersgd", **for_averages)
    TrainConfig(model="conv", batch_norm=True, sync_batch_norm=True, optimizer="sgd", momentum=0.9, ema=0.999)


def test_yaml_keys_are_spelled_as_flags_or_as_fields(tmp_path: Path) -> None:
    text = "batch-size: 7\nlr_scaling: sqrt\nlr: 1e-2\nhidden: [5, 6]\nsync-batch-norm: false\nout: null\n"
    found = resolved("--config", written(tmp_path / "a.yaml", text))
    assert (found.batch_size, found.lr_scaling, found.lr, found.hidden) == (7, "sqrt", 0.01, [5, 6])


@pytest.mark.parametrize("order", ["flags first", "file first", "with ="])
def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path, order: str) -> None:
    file = written(tmp_path / "a.yaml", "lr: 0.25\nbatch_size: 7\n")
    given = {
        "flags first": ["--lr", "0.5", "--config", file],
        "file first": ["--config", file, "--lr", "0.5"],
        "with =": ["--lr=0.5", f"--config={file}"],
    }
    found = resolved(*given[order])
    assert (found.lr, found.batch_size) == (0.5, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3\n", ["unknown key 'batchsize'", "did you mean batch_size?"]),
        ("lr: 1\nskip-limits: 3\n", ["unknown key 'skip_limits'", "did you mean skip_limit?"]),
        ("zzz: 3\n", ["unknown key 'zzz'", "--help"]),
        ("- 3\n", ["line 1", "found a list", "key: value"]),
        ("", ["is empty", "key: value"]),
        ("# lr: 3\n", ["comments alone", "key: value"]),
        ("lr: [\n", ["a.yaml"]),
    ],
)
def test_a_bad_file_is_named_with_its_key_and_the_nearest(tmp_path: Path, text: str, words: list[str]) -> None:
    file = written(tmp_path / "a.yaml", text)
    for argv in (["--config", file], [f"--config={file}"]):
        with pytest.raises(ConfigError) as refused:
            resolved(*argv)
        for word in (f"--config {file}", *words):
            assert word in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        resolved("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "3"], ["--batchsize"]),
        (["--lr", "fast"], ["lr", "fast"]),
        (["--model", "mpl"], ["model", "mpl", "mlp2"]),
        (["--epochs", "3.5"], ["epochs", "3.5"]),
        (["--epochs", "0"], ["--epochs is 0"]),
    ],
)
def test_a_bad_flag_is_one_line_on_stderr_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    assert main(["train", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hvdvae: error: ")
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_a_malformed_variable_of_a_launcher_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "a")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for argv, words in ((["train"], "OMPI_COMM_WORLD_RANK is 'a'"), (["train", "--lr", "0"], "--lr")):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("hvdvae: error: ")
        assert words in said or "OMPI_COMM_WORLD_RANK is 'a'" in said
        assert len(said.splitlines()) == 1


def test_a_bad_value_in_a_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)batch_size.*many"):
        resolved("--config", written(tmp_path / "a.yaml", "batch_size: many\n"))


def test_resume_takes_the_saved_configuration_and_flags_still_win(tmp_path: Path) -> None:
    saved = TrainConfig(lr=0.125, hidden=[9], batch_size=3, epochs=2, out=str(tmp_path), overwrite=True)
    write_config(saved, tmp_path / "config.yaml")
    for out in (["--out", str(tmp_path)], [f"--out={tmp_path}"]):
        found = resolved("--resume", *out, "--epochs", "5")
        assert (found.lr, found.hidden, found.batch_size, found.epochs) == (0.125, [9], 3, 5)
        assert found.resume
        assert not found.overwrite, "how an earlier launch treated the folder is no property of the run"
    assert resolved("--out", str(tmp_path)).lr == TrainConfig().lr, "without --resume nothing is read"
    assert resolved("--resume", "--out", str(tmp_path / "new")).lr == TrainConfig().lr


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        (
            {"strategy": "sharded", "zero_stage": 2, "mesh": "dp=3"},
            ("--strategy", "local"),
            {"zero_stage": 1, "mesh": None},
        ),
        (
            {"strategy": "ps", "consistency": "ssp", "staleness": 2},
            ("--consistency", "bsp"),
            {"strategy": "ps", "consistency": "bsp", "staleness": None},
        ),
        ({"strategy": "ps", "rule": "easgd", "elasticity": 0.3}, ("--rule", "plain"), {"elasticity": None}),
        (
            {"strategy": "ps", "consistency": "bsp", "backup_workers": 1},
            ("--consistency", "asp"),
            {"backup_workers": 0},
        ),
        ({"strategy": "allreduce", "pipeline": 2, "micro_batches": 8}, ("--tensor", "2"), {"pipeline": 1, "tensor": 2}),
        (
            {"strategy": "allreduce", "pipeline": 2, "micro_batches": 8},
            ("--mesh", "pp=4"),
            {"pipeline": 1, "mesh": "pp=4", "micro_batches": 8},
        ),
        (
            {"strategy": "allreduce", "compression": "topk", "compression_share": 0.2},
            ("--strategy", "sharded"),
            {"compression": "none", "compression_share": None},
        ),
        (
            {"strategy": "ps", "servers": 2, "rule": "easgd"},
            ("--strategy", "allreduce"),
            {"servers": 1, "rule": "plain"},
        ),
    ],
)
def test_what_was_saved_and_does_not_go_with_what_is_asked_now_is_forgotten(
    tmp_path: Path, saved: dict[str, Any], given: tuple[str, ...], expected: dict[str, Any]
) -> None:
    written(tmp_path / "config.yaml", yaml.safe_dump(saved))
    found = resolved("--resume", "--out", str(tmp_path), *given)
    assert {key: getattr(found, key) for key in expected} == expected


def test_what_is_asked_now_and_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "config.yaml", "strategy: sharded\n")
    with pytest.raises(ConfigError, match="--zero-stage is for --strategy sharded"):
        resolved("--resume", "--out", str(tmp_path), "--strategy", "local", "--zero-stage", "2")


@pytest.mark.parametrize("where", ["out in the file", "resume in the file", "both in the file", "a pattern"])
def test_resume_takes_the_saved_configuration_wherever_it_is_asked_for(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "a[1]*" if where == "a pattern" else tmp_path / "run"
    folder.mkdir()
    write_config(TrainConfig(lr=0.125, epochs=2, out=str(folder)), folder / "config.yaml")
    out, resume = f"out: {folder}\n", "resume: true\n"
    argv = {
        "out in the file": ["--resume", "--config", written(tmp_path / "a.yaml", out)],
        "resume in the file": ["--out", str(folder), "--config", written(tmp_path / "b.yaml", resume)],
        "both in the file": ["--config", written(tmp_path / "c.yaml", out + resume)],
        "a pattern": ["--resume", "--out", str(folder)],
    }
    found = resolved(*argv[where], "--epochs", "5")
    assert (found.resume, found.out, found.lr, found.epochs) == (True, str(folder), 0.125, 5)


def test_a_saved_configuration_that_is_broken_is_named(tmp_path: Path) -> None:
    written(tmp_path / "config.yaml", "lr: fast\n")
    with pytest.raises(ConfigError, match=r"config\.yaml, line 1: lr is 'fast', expected a number"):
        resolved("--resume", "--config", written(tmp_path / "a.yaml", f"out: {tmp_path}\n"))


def test_numbers_in_a_file_are_names_where_names_are_expected(tmp_path: Path) -> None:
    found = resolved("--config", written(tmp_path / "a.yaml", "out: 2026\ndata: 7\n"))
    assert (found.out, found.data) == ("2026", "7")
    for text in ("out: [1]\n", "data: null\n"):
        with pytest.raises(ConfigError, match="expected text"):
            resolved("--config", written(tmp_path / "b.yaml", text))


def test_one_key_in_two_spellings_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "batch-size: 7\nlr: 1\nbatch_size: 8\n")
    with pytest.raises(ConfigError, match=r"a\.yaml, line 3: batch_size stands twice, also spelled as batch-size"):
        resolved("--config", file)


def test_the_saved_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = TrainConfig(lr=3e-7, eps=1e-4, hidden=[3, 4], seed=2**62, clip_norm=None, out="a b: c")
    path = tmp_path / "config.yaml"
    write_config(config, path)
    assert read_config(path) == config
    parse(["train", "--config", str(path)])[1].config()
    assert resolved("--config", str(path)) == config
    path.write_text(path.read_text() + "of_another_version: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml, line \d+: unknown key 'of_another_version'"):
        read_config(path)
    with pytest.raises(ConfigError, match=r"none/config\.yaml"):
        read_config(tmp_path / "none" / "config.yaml")


@pytest.mark.parametrize("kind", [*training.GROUPS, *(kind for kind, _ in SUBCOMMANDS.values())])
def test_every_option_has_a_help_text(kind: type) -> None:
    texts = {item.arg_name: item.description for item in docstring_parser.parse_from_object(kind).params}
    for field in fields(kind):
        assert len(texts.get(field.name) or "") > 5, f"{kind.__name__}.{field.name} has no docstring"


@pytest.mark.parametrize("name", ["evaluate", "sample", "reconstruct"])
def test_who_waits_for_other_ranks_can_be_told_how_long(name: str) -> None:
    assert parse([name, "DIR"])[1].deadline == TrainConfig().deadline
    assert parse([name, "DIR", "--deadline", "7"])[1].deadline == 7
    with pytest.raises(ConfigError, match=r"--deadline is 0\.0, expected a finite number above 0"):
        parse([name, "DIR", "--deadline", "0"])


@pytest.mark.parametrize("name", training.LIKELIHOODS)
def test_models_and_data_know_the_likelihoods_of_the_command_line(name: str) -> None:
    from hvdvae.data import check_choice
    from hvdvae.vae import build_likelihood

    assert resolved("--likelihood", name).likelihood == name
    check_choice(name, "none")
    build_likelihood(name)


def test_help_shows_every_flag_and_loads_nothing_heavy() -> None:
    code = f"""
import sys
from hvdvae.cli import main
for words in ([], ["train"], *([name] for name in {list(SUBCOMMANDS)})):
    try:
        main([*words, "--help"])
        sys.exit("--help returned")
    except SystemExit as end:
        assert not end.code, end.code
heavy = [name for name in ("torch", "numpy", "mpi4py", "horovod", "sklearn") if name in sys.modules]
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for kind in (TrainConfig, *(kind for kind, _ in SUBCOMMANDS.values())):
        for field in fields(kind):
            shown = {"folder": "DIR", "command": "WORD", "train": "WORD"}.get(field.name, flag(field.name))
            assert shown in run.stdout
    for name in ("train", *SUBCOMMANDS):
        assert f"\n    {name} " in run.stdout or f"usage: hvdvae {name}" in run.stdout


def test_the_saved_yaml_is_plain(tmp_path: Path) -> None:
    write_config(TrainConfig(hidden=[3]), tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {"lr", "hidden", "strategy", "compression", "batch_size"} <= set(loaded)
    assert None not in loaded.values()
    assert not {"resume", "overwrite", "channels_last", "momentum", "gamma", "servers", "cuts"} & set(loaded)
