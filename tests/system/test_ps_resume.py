"""A job over parameter servers that a signal has stopped, and that is resumed, ends as one that was never stopped."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvdvae.checkpoint import Folder, load
from tests.system.worker_jobs import WORKERS, start, strike

EPOCHS = 6
PLAN = "--consistency bsp --hidden 12 --latent 3"


def newest(folder: Path) -> Path:
    return Folder(folder / "run" / "checkpoints", 3).steps()[0]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    job = start(folder, PLAN, epochs=EPOCHS).finish(100)
    assert job.status == 0, job.output
    return load_file(newest(folder))


@pytest.mark.parametrize("victim", [1, WORKERS], ids=["a worker", "the server"])
def test_under_bsp_all_leave_after_the_same_step(
    tmp_path: Path, victim: int, never_stopped: dict[str, torch.Tensor]
) -> None:
    """Whoever got the signal: the optimizer has taken as many steps as the position counts."""
    ended = strike(start(tmp_path, PLAN, epochs=EPOCHS), tmp_path, victim, signal.SIGUSR1)
    assert ended.status == 128 + signal.SIGUSR1, ended.output
    step = load(newest(tmp_path)).record["step"]
    counts = {int(tensor) for name, tensor in load_file(newest(tmp_path)).items() if name.endswith("/step")}
    assert counts == {step}
    resumed = start(tmp_path, f"{PLAN} --resume", epochs=EPOCHS).finish(100)
    assert resumed.status == 0, resumed.output
    assert f"resumed at step {step}" in resumed.output
    found = load_file(newest(tmp_path))
    assert found.keys() == never_stopped.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, never_stopped[name])] == []
