"""Every flag of train changes what a run does, or is refused by its name: with every strategy, optimizer, model, ..."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hvdvae import strategies
from hvdvae.cli import assemble, main, train
from hvdvae.cli.asked import Asked
from hvdvae.cli.config_file import write_config
from hvdvae.cli.options import SUBCOMMANDS
from hvdvae.cli.parser import parse
from hvdvae.config import TrainConfig, flag
from hvdvae.data import ArraySource, Dataset
from hvdvae.errors import HvdvaeError

DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}
CONTEXTS: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "allreduce": {"strategy": "allreduce"},
    "engine mpi": {"engine": "mpi"},
    "engine horovod": {"engine": "horovod", "compression": "fp16"},
    "int8": {"compression": "int8"},
    "topk": {"compression": "topk", "optimizer": "sgd"},
    "powersgd": {"compression": "powersgd"},
    "sharded": {"strategy": "sharded"},
    "zero stage 2": {"strategy": "sharded", "zero_stage": 2},
    "zero stage 2 in bf16": {"strategy": "sharded", "zero_stage": 2, "precision": "bf16"},
    "bf16 weights": {"strategy": "sharded", "zero_stage": 2, "precision": "bf16", "weights": "bf16"},
    "local-sgd": {"strategy": "local-sgd"},
    "every step": {"strategy": "local-sgd", "sync_every": 1},
    "diloco": {"strategy": "diloco"},
    "asp": {"strategy": "ps"},
    "ssp": {"strategy": "ps", "consistency": "ssp", "staleness": 2},
    "bsp": {"strategy": "ps", "consistency": "bsp"},
    "easgd": {"strategy": "ps", "rule": "easgd"},
    "dcasgd": {"strategy": "ps", "rule": "dcasgd"},
    "ps with topk": {"strategy": "ps", "compression": "topk"},
    "conv": {"model": "conv", "hidden": [4, 8]},
    "conv with BatchNorm": {"model": "conv", "hidden": [4, 8], "batch_norm": True},
    "mlp2": {"model": "mlp2", "hidden": [9, 8, 7, 6], "latent": [3, 2]},
    "gaussian": {"likelihood": "gaussian"},
    "sgd": {"optimizer": "sgd"},
    "rmsprop": {"optimizer": "rmsprop"},
    "adagrad": {"optimizer": "adagrad"},
    "steps of the rate": {"schedule": "step"},
    "cosine": {"schedule": "cosine"},
    "iwae": {"objective": "iwae", "samples": 5},
    "free bits": {"free_bits": 0.5},
    "beta 0": {"beta": 0.0},
    "stages": {"pipeline": 2},
    "a mesh": {"mesh": "dp=2,pp=2"},
    "split layers": {"tensor": 2},
}
OTHER: dict[str, Any] = {
    "binarization": "static",
    "hidden": [5, 7],
    "latent": [4],
    "activation": "relu",
    "batch_norm": True,
    "model": "conv",
    "likelihood": "gaussian",
    "sigma": 0.1,
    "objective": "iwae",
    "samples": 3,
    "beta": 2.0,
    "beta_warmup": 2.0,
    "free_bits": 0.25,
    "batch_size": 5,
    "accumulate": 2,
    "optimizer": "sgd",
    "lr": 0.5,
    "lr_scaling": "sqrt",
    "warmup": 2.0,
    "schedule": "cosine",
    "step_epochs": 3.0,
    "gamma": 0.5,
    "momentum": 0.5,
    "eps": 1e-4,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "ema": 0.5,
    "skip_limit": 3,
    "strategy": "sharded",
    "engine": "mpi",
    "compression": "bf16",
    "compression_share": 0.5,
    "compression_rank": 3,
    "compression_momentum": 0.5,
    "sync_every": 7,
    "adaptive_sync": True,
    "group_size": 2,
    "outer_lr": 0.5,
    "outer_momentum": 0.5,
    "zero_stage": 2,
    "weights": "bf16",
    "tensor": 2,
    "pipeline": 2,
    "micro_batches": 3,
    "pipeline_schedule": "gpipe",
    "recompute": True,
    "cuts": "2",
    "mesh": "dp=2,tp=2",
    "reduce_op": "adasum",
    "sync_batch_norm": True,
    "servers": 2,
    "consistency": "bsp",
    "staleness": 3,
    "backup_workers": 1,
    "replicas": 1,
    "rule": "staleness-lr",
    "dc_strength": 0.5,
    "elasticity": 0.25,
    "push_every": 2,
    "fetch_every": 2,
    "prefetch": True,
    "precision": "bf16",
    "channels_last": True,
    "seed": 3,
    "validate_every": 2,
    "checkpoint_every": 2,
    "keep": 1,
    "deadline": 7.0,
    "replace_workers": True,
}
"""A value other than the default."""
OF_CONV = {"activation": "tanh"}
"""The same where the default is the model's."""
OF_THE_LAUNCH = ["data", "validation", "epochs", "device", "threads", "compile", "out", "resume", "overwrite"]
OF_THE_LAUNCH += ["nll_samples", "pictures_every", "external_storage"]
"""Which mean something in every run, whatever the others say: how they act is seen in tests/system."""
RANKS = 4
SMALL = {"hidden": [8], "latent": [2]}


class Recorder:
    """In the place of a class: what it was made with, but for objects."""

    def __init__(self, name: str, seen: dict[str, Any]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        plain = {key: shown for key, value in options.items() if (shown := _plain(value)) is not None}
        self.seen[self.name] = [[shown for one in arguments if (shown := _plain(one)) is not None], plain]
        return Made(arguments[0] if arguments else None)


class Made:
    """What a run asks of the strategy, the trainer, ... that it has made."""

    position = SimpleNamespace(step=0)

    def __init__(self, wrapped: object) -> None:
        self.wrapped = wrapped
        self.world = self.whole = SimpleNamespace(rank=0, size=2, device=torch.device("cpu"), is_first=True)

    def hold(self, parts: object) -> None:
        pass


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | list | dict):
        return value
    return asdict(value) if type(value).__name__ == "Plan" else None


CLASSES = {
    "local_sgd": "LocalSgd DiLoCo",
    "ps": "ParameterServer",
    "sharded": "Sharded",
    "allreduce_mpi": "MpiAllreduce",
    "sharded_gradients": "ShardedGradients",
    "master_weights": "MasterWeights",
    "allreduce_compressed": "CompressedAllreduce",
    "allreduce_shared": "SharedAllreduce",
    "allreduce_horovod": "HorovodAllreduce HorovodAdasum",
}


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    """What strategies, the trainer, the loader and the pipeline were made with last."""
    pytest.importorskip("mpi4py")
    pytest.importorskip("horovod")
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        modules = {module: importlib.import_module(f"hvdvae.strategies.{module}") for module in CLASSES}
        for module, names in CLASSES.items():
            for name in names.split():
                patch.setattr(modules[module], name, Recorder(name, found))
        patch.setattr(modules["allreduce_shared"], "can_share", lambda *_: False)
        patch.setattr(strategies, "Local", Recorder("Local", found))
        pipeline = importlib.import_module("hvdvae.parallel.pipeline")
        patch.setattr(pipeline, "Pipeline", Recorder("Pipeline", found))
        for name in ("choose_cuts", "keep_stage"):
            patch.setattr(assemble, name, Recorder(name, found))
        patch.setattr(assemble, "split_layers", lambda *_: {})
        patch.setattr(train, "convert_sync_batch_norm", Recorder("SyncBatchNorm", found))
        for name in ("Trainer", "Loader"):
            patch.setattr(train, name, Recorder(name, found))
        patch.setattr(train, "Pictures", lambda *_, **__: None)
        patch.setattr(train.checkpoints, "Folder", Recorder("Folder", found))
        yield found


@cache
def digits() -> Dataset:
    values = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    return Dataset(**{name: ArraySource(values, "digits") for name in ("train", "validation", "test")}, name="digits")


def does(values: dict[str, Any], named: list[str], seen: dict[str, Any]) -> dict[str, Any]:
    """What a run with these values does, as far as its objects say. Raises HvdvaeError where it is refused."""
    seen.clear()
    config = assemble.resolved(Asked({}, values, frozenset(named)).config())
    servers = config.servers * (1 + config.replicas) if config.strategy == "ps" else 0
    ranks = 1 if config.strategy == "local" else RANKS
    world = SimpleNamespace(rank=0, size=ranks, servers=servers, role="trainer", launcher="mpirun")
    world.device, world.is_first, world.sum_ = torch.device("cpu"), True, lambda total, what="": total
    world.everyone = SimpleNamespace(size=ranks + servers)
    mesh = assemble.mesh_of(config, ranks)
    found: dict[str, Any] = {"mesh": str(mesh)}
    if config.strategy == "ps":
        assemble.plan(config).check(workers=ranks, servers=servers)
    binarization = assemble.binarization(config, digits().train)
    train.check_dataset(digits(), likelihood=config.likelihood, binarization=binarization, batch=8, size=2)
    model = assemble.model(config, (1, 8, 8), torch.device("cpu"))
    numbers = [(name, one.shape, one.stride(), one.flatten()[0].item()) for name, one in model.named_parameters()]
    found |= {"model": repr(model), "parameters": numbers, "likelihood": vars(model.likelihood).get("sigma")}
    found["objective"] = repr(vars(assemble.objective(config)))
    schedule = assemble.schedule(config)
    found["schedule"] = [schedule(epoch) for epoch in (0.5, 1.0, 3.5, 10.5, 19.0)]
    inner = assemble.optimizer(config, model, world)  # type: ignore[arg-type]
    found["optimizer"] = type(inner).__name__, {k: v for k, v in inner.param_groups[0].items() if k != "params"}
    stages = SimpleNamespace(mesh=mesh, whole=world, layers=None, stages=world)
    if mesh.pp * mesh.tp > 1:
        assemble.split(config, model, stages)  # type: ignore[arg-type]
    if config.sync_batch_norm:
        train.convert_sync_batch_norm(model, world)  # type: ignore[arg-type]
    optimizer = assemble.distributed(config, model, world)  # type: ignore[arg-type]
    train._trainer(config, model, model, optimizer, None, digits(), Path("run"), None)
    # The launch reads these before there are objects.
    launch = {"deadline": config.deadline, "replace": config.replace_workers} if config.strategy != "local" else {}
    return {**found, **seen, **launch, "servers": servers}


def test_the_table_has_every_flag() -> None:
    assert sorted([*OTHER, *OF_THE_LAUNCH]) == sorted(DEFAULTS)


def test_every_flag_acts_or_is_refused_by_name(seen: dict[str, Any]) -> None:
    silent, nameless = [], []
    acted = {"staleness"}  # Without it there is no ssp.
    for context, base in CONTEXTS.items():
        before = does(DEFAULTS | SMALL | base, [*base], seen)
        for key in (key for key in OTHER if key not in base):
            value = OF_CONV.get(key, OTHER[key]) if base.get("model") == "conv" else OTHER[key]
            try:
                after = does(DEFAULTS | SMALL | base | {key: value}, [*base, key], seen)
            except HvdvaeError as refused:
                if flag(key) not in str(refused) and f"{key} (" not in str(refused):
                    nameless.append((context, flag(key), str(refused)))
                continue
            if after == before:
                silent.append((context, flag(key)))
            acted.add(key)
    assert not silent
    assert not nameless
    assert acted == {*OTHER}, "refused everywhere, or without a context of its own"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_flag_of_the_other_subcommands_is_read(name: str) -> None:
    source = inspect.getsource(importlib.import_module(f"hvdvae.cli.{name}"))
    for field in fields(SUBCOMMANDS[name][0]):
        assert re.search(rf'\boptions\.{field.name}\b|"{field.name}"', source), flag(field.name)


def test_a_pause_before_restarts_that_do_not_come_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "--restarts", "0", "--backoff", "3", "--", "true"]) == 2
    assert "--backoff 3 is for restarts, found --restarts 0" in capsys.readouterr().err


@pytest.mark.parametrize("key", OF_THE_LAUNCH)
def test_what_is_of_the_launch_is_read(key: str) -> None:
    """In the source of the command: an option that nobody reads would be of no use."""
    read = set()
    for module in (train, assemble, __import__("hvdvae.cli.results", fromlist=["x"])):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
                read.add(node.attr)
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    assert key in read


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("--optimizer sgd --eps 1e-8", "--eps is for --optimizer adam or adamw"),
        ("--gamma 0.1", "--gamma is for --schedule step"),
        ("--step-epochs 10", "--step-epochs is for --schedule step"),
        ("--strategy local --engine horovod", "--engine is for --strategy allreduce or sharded"),
        ("--strategy ps --engine mpi", "--engine is for --strategy allreduce or sharded"),
        ("--strategy local --deadline 300", "--deadline is for --strategy"),
        ("--zero-stage 1", "--zero-stage is for --strategy sharded"),
        ("--servers 1", "--servers is for --strategy ps"),
        ("--consistency asp", "--consistency is for --strategy ps"),
        ("--cuts auto", "--cuts is for models in stages"),
        ("--strategy diloco --reduce-op average", "--reduce-op is for --strategy allreduce"),
        # What is off, or so in every run, is what was asked for.
        ("--optimizer adam --momentum 0 --compression none --ema 0", ""),
        ("--strategy ps --tensor 1 --pipeline 1 --weights fp32 --backup-workers 0", ""),
        ("--schedule step --gamma 0.1 --step-epochs 10", ""),
    ],
)
@pytest.mark.parametrize("by", ["flags", "file"])
def test_a_flag_at_its_default_is_refused_where_it_has_no_meaning(
    line: str, refused: str, by: str, tmp_path: Path
) -> None:
    words = line.split()
    if by == "file":
        pairs = zip(words[::2], words[1::2], strict=True)
        (tmp_path / "a.yaml").write_text("".join(f"{key[2:]}: {value}\n" for key, value in pairs))
        words = ["--config", str(tmp_path / "a.yaml")]
    asked = parse(["train", *words])[1]
    if not refused:
        assert asked.config().epochs == DEFAULTS["epochs"]
        return
    with pytest.raises(HvdvaeError, match=refused):
        asked.config()


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_a_run_saves_names_nothing_without_meaning_and_reads_back(context: str, tmp_path: Path) -> None:
    config = assemble.resolved(TrainConfig(**CONTEXTS[context], out="run"))
    write_config(config, tmp_path / "config.yaml")
    assert parse(["train", "--config", str(tmp_path / "config.yaml")])[1].config() == config
