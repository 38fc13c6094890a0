"""hvdvae train --weights bf16: saved, resumed, tested and evaluated as any run, of float32 weights."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hvdvae.checkpoint import Checkpoint, load
from tests.system.conftest import Command, Launch, clean_environment

SHARDED = ("--strategy", "sharded", "--zero-stage", "2", "--precision", "bf16", "--weights", "bf16")
RUN = ("--data", "digits", "--hidden", "40", "--latent", "5", "--batch-size", "40", "--threads", "1")


def train(folder: Path, out: str, epochs: int, *words: str) -> Checkpoint:
    """The last checkpoint of a run on two ranks."""
    launch = ["mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", "2", sys.executable, "-m", "hvdvae"]
    run = (*RUN, "--nll-samples", "10", "--epochs", str(epochs), "--out", out)
    job = Launch([*launch, "train", *run, *words], clean_environment(), folder).finish(90)
    assert job.status == 0, job.output
    return load(max((folder / out / "checkpoints").glob("step-*.safetensors")))


def test_a_run_is_saved_resumed_and_evaluated_in_float32(command: Command, tmp_path: Path) -> None:
    whole = train(tmp_path, "whole", 3, *SHARDED, "--engine", "mpi")
    train(tmp_path, "run", 2, *SHARDED, "--engine", "mpi")
    found = train(tmp_path, "run", 3, *SHARDED, "--engine", "mpi", "--resume")
    assert found.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert tensor.dtype != torch.bfloat16, name
        assert torch.equal(found.tensors[name], tensor), f"{name} does not go on bit for bit"
    weight = whole.tensors["model/decoder.output.weight"]
    assert not torch.equal(weight, weight.bfloat16().float()), "it has more digits than the model"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    sizes = [tensor.numel() for name, tensor in whole.tensors.items() if name.startswith("model/")]
    # Each parameter begins at a multiple of 16 of the elements, which 2 and half of 4 bytes are kept of.
    padded = sum(-(-size // 16) * 16 for size in sizes)
    assert summary["weight_bytes"] == pytest.approx(2 * padded + 4 * padded / 2, abs=64)
    assert (tmp_path / "run" / "samples.png").exists()
    evaluated = command("evaluate", tmp_path / "run", "--samples", "10")
    assert evaluated.status == 0, evaluated.output
    exact = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert exact["nll"] == pytest.approx(summary["test_nll"], abs=0.3), "bfloat16 and float32 tell the same"
    by_horovod = train(tmp_path, "run", 4, *SHARDED, "--engine", "horovod", "--resume")
    assert by_horovod.record["position"]["epoch"] == 4
    train(tmp_path, "run", 5, *SHARDED[:2], "--resume", "--zero-stage", "1", "--precision", "fp32", "--weights", "fp32")
    last = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert last["epochs"] == 5
    assert last["test_nll"] < summary["test_nll"]
