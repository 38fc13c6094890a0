"""What a run does not load, since every rank would pay for it at its start; and that nothing is lost by that."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hvdvae.data.named import digits
from hvdvae.quick_start import bare
from hvdvae.strategies.flat_optimizer import ELEMENTWISE

RUN = """
import sys
from hvdvae.cli import main
options = "--data digits --hidden 8 --latent 2 --epochs 1 --batch-size 500 --nll-samples 2 --threads 1 --out run"
status = main(["train", *options.split()])
print("loaded:" + " ".join(sorted({"torch._dynamo", "sklearn", "mpi4py", "horovod"} & sys.modules.keys())))
sys.exit(status)
"""


def test_a_run_loads_neither_the_compiler_nor_scikit_learn(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded:"


SLURM = """
import gc, sys
from hvdvae.cli import run
sys.argv = ["hvdvae", "slurm", *"--nodes 1 -- --data digits --out run".split()]
status = run()
sys.exit(status or not (gc.isenabled() and gc.get_freeze_count() > 10_000))
"""


def test_a_command_looks_for_garbage_in_what_it_makes_alone(tmp_path: Path) -> None:
    """Not in what was imported."""
    ended = subprocess.run(
        [sys.executable, "-c", SLURM], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_digits_are_those_of_scikit_learn() -> None:
    found = digits().gather(np.arange(1797)).reshape(-1, 8, 8)
    assert np.array_equal(found, np.rint(load_digits().images * (255 / 16)).astype(np.uint8))


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_a_bare_step_is_the_step(kind: type[torch.optim.Optimizer]) -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, stripped = (kind(model.parameters(), lr=0.1) for model in models)  # type: ignore[call-arg]
    stripped = bare(stripped)
    for step in range(4):
        for model, optimizer in zip(models, (plain, stripped), strict=True):
            optimizer.zero_grad()
            model(torch.full((5, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
