"""What a run says of itself at its start."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hvdvae.cli import assemble
from hvdvae.cli.narration import in_software, opening
from hvdvae.config import TrainConfig
from hvdvae.data import ArraySource, Dataset
from hvdvae.data.sampler import local_batch
from hvdvae.flat_layout import Layout

AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("precision", "device", "processor", "warns"),
    [
        ("bf16", "cpu", AVX2, True),
        ("fp16", "cpu", AVX2 | {"avx512_bf16": True}, True),
        ("bf16", "cpu", AVX2 | {"avx512_bf16": True}, False),
        ("bf16", "cpu", AVX2 | {"amx_bf16": True}, False),
        ("fp32", "cpu", AVX2, False),
        ("bf16", "cuda", AVX2, False),
        ("bf16", "cpu", {"architecture": "aarch64"}, False),
    ],
)
def test_a_precision_without_instructions_is_warned_of(
    precision: str, device: str, processor: dict[str, Any], warns: bool
) -> None:
    found = in_software(precision, device, processor)
    assert bool(found) == warns
    if warns:
        assert found[0].startswith(f"warning: --precision {precision}: this processor has no instructions")


DIGITS = ArraySource(np.arange(480 * 64, dtype=np.uint64).astype(np.uint8).reshape(480, 8, 8), "stripes.npy")


def said(*named: str, step: int = 0, **options: Any) -> list[str]:
    """The lines of an opening of two ranks that average."""
    dataset = Dataset(name="stripes.npy", train=DIGITS, validation=DIGITS, test=DIGITS)
    config = assemble.resolved(TrainConfig(**options))
    config = replace(config, binarization=assemble.binarization(config, DIGITS))
    world = SimpleNamespace(size=2, device=torch.device("cpu"), launcher="mpirun", servers=0)
    flat = SimpleNamespace(layout=Layout([[1200, 34]], 4))
    optimizer = SimpleNamespace(world=world, parts=None, flat=flat, engine="mpi", engine_reason="as asked")
    optimizer.wrapped_class, optimizer.param_groups = "Adam", [{"lr": 0.001}]
    batch = local_batch(480, config.batch_size * config.accumulate, 2)
    trainer: Any = SimpleNamespace(world=world, optimizer=optimizer, position=SimpleNamespace(step=step))
    trainer.batches = SimpleNamespace(batch=batch, examples=480)
    return opening(config, trainer, dataset, Path("run"), named, {}).splitlines()


def test_the_opening_names_data_values_likelihood_model_strategy_ranks_and_device() -> None:
    lines = said("data", "lr")
    assert all(line.startswith("hvdvae: ") for line in lines)
    text = "\n".join(lines)
    for words in (
        "stripes.npy: 480 train, 480 validation, 480 test examples of shape (1, 8, 8)",
        "values: uint8, 0 to 255, divided by 255, then drawn as 0 or 1",
        "mlp (default), hidden 200 200, latent 50, tanh: 1,234 parameters",
        "likelihood bernoulli (default)",
        "allreduce (default) with engine mpi (as asked), 2 ranks (mesh dp=2",
        "on cpu by mpirun",
        "Adam (default), lr 0.001, 128 examples a rank, 256 a step",
        "results go to run",
    ):
        assert words in text
    assert "warning" not in text


def test_what_was_asked_is_told_from_what_is_default() -> None:
    asked = "\n".join(said("likelihood", "model", "strategy", "binarization", "optimizer", likelihood="bernoulli"))
    for words in ("likelihood bernoulli\n", "mlp, hidden", "allreduce with engine", "keeps them)\n", "Adam, lr"):
        assert words in asked + "\n"
    assert "keeps them) (default)" in "\n".join(said("data"))
    assert "(default)" not in "\n".join(said(step=7)), "a run that goes on has the values that it was begun with"


def test_a_batch_beyond_the_data_is_said() -> None:
    text = "\n".join(said(batch_size=1000))
    assert "--batch-size 1000 is more than the 480 training examples over 2 ranks: a rank takes 240 a step" in text
    assert "240 examples a rank, 480 a step" in text
    text = "\n".join(said(batch_size=128, accumulate=2))
    assert "--batch-size 128 x --accumulate 2 is more than" in text
    assert "in 2 passes" in text
    assert "warning" not in "\n".join(said(batch_size=240))
