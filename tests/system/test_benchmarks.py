"""Benchmarks run to their end and print what they say they measure; what it was, nobody asserts."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.study.namespaces import NoNetwork, network
from hvdvae.compression import CODECS
from hvdvae.parallel.tensor import pairs_of
from hvdvae.vae import build_model
from tests.system.conftest import ROOT, Launch, clean_environment

BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def output_of(folder: Path, *command: str) -> str:
    ended = Launch([sys.executable, *command], clean_environment(), folder).finish(200)
    assert ended.status == 0, ended.output
    return ended.output


def test_parallelism_has_every_side_and_what_theory_allows(tmp_path: Path) -> None:
    words = ["--rounds", "1", "--seconds", "0.2", "--hidden", "40", "40", "--batch", "64"]
    output = output_of(tmp_path, str(BENCHMARKS / "parallelism.py"), *words)
    for side in ("allreduce", "sharded", "sharded, weights too", "pipeline, 1f1b", "pipeline, gpipe", "tensor"):
        assert re.search(rf"^{side} +[\d,]+ \[", output, re.MULTILINE), output
    assert len(re.findall(r"of what is allowed, \d\.\d\d \[.*; idle \d\.\d\d \[.*bubble 0\.11, imbalance", output)) == 2
    assert re.search(r"tensor: .* of what is allowed; its sums, of \d+\.\d MB a step and rank", output)


def test_layers_that_are_split_sum_the_bytes_that_theory_says(tmp_path: Path) -> None:
    """Of each pair its outputs forward and the gradient of its inputs backward; images have none."""
    batch, hidden = 16, [40, 30]
    order = {"hidden": hidden, "batch_size": batch, "tensor": 2, "seconds": 0.1}
    launch = ["mpirun", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", "2", sys.executable]
    job = Launch([*launch, str(BENCHMARKS / "parallelism_rank.py"), json.dumps(order)], clean_environment(), tmp_path)
    ended = job.finish(60)
    assert ended.status == 0, ended.output
    found = json.loads(ended.output.strip("\0\n ").splitlines()[-1])
    model = build_model("mlp", (1, 28, 28), likelihood="bernoulli", hidden=hidden, latent=[20], activation="relu")
    numbers, first = 0, True
    for chain in model.chains:
        for one, _, other in pairs_of(model, chain, 2):
            numbers += model.get_submodule(other).out_features + (0 if first else model.get_submodule(one).in_features)
            first = False
    assert found["sum_bytes"] == batch * numbers * torch.float32.itemsize


def test_codecs_are_timed_against_targets_and_a_copy(tmp_path: Path) -> None:
    words = ["--rounds", "1", "--seconds", "0.01", "--elements", "100000"]
    output = output_of(tmp_path, str(BENCHMARKS / "codecs.py"), *words)
    rates = re.findall(r"^(\w+)(?: encode| decode| both)? +\d+\.\d\d \[", output, re.MULTILINE)
    assert {*rates} == {*CODECS, "copy"}, output
    assert len(re.findall(r"target [\d.]+: (?:reached|missed)$", output, re.MULTILINE)) == 4


def test_slow_link_measures_both_settings(tmp_path: Path) -> None:
    try:
        with network(2, 100):
            pass
    except NoNetwork as why:
        pytest.skip(str(why))
    output = output_of(tmp_path, str(BENCHMARKS / "slow_link.py"), "--rounds", "1", "--megabytes", "0.05")
    assert len(re.findall(r"^all(?:gather|reduce) +times sooner +\d", output, re.MULTILINE)) == 2, output
