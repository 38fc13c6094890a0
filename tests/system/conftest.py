"""Real launches: mpirun and horovodrun as a user types them, in a process group of their own, with a time limit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hvdvae.cli import main

ROOT = Path(__file__).parents[2]
LAUNCHER_PREFIXES = ("OMPI_COMM_", "OMPI_UNIVERSE", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HOROVOD_")
DURATION = 120.0


@dataclass(frozen=True)
class Finished:
    """How a launch ended."""

    status: int
    output: str
    """Standard output and error of all ranks."""
    seconds: float


class Launch:
    """A running job."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.start, self.folder = time.monotonic(), folder
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def finish(self, seconds: float = DURATION) -> Finished:
        """Wait for the end; past the time limit the job is killed and the test fails with its output."""
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self.process.communicate()
            pytest.fail(f"still running after {seconds} s; output so far:\n{output}")
        return Finished(self.process.returncode, output, time.monotonic() - self.start)

    def kill(self) -> None:
        """End the launcher, gently first so that it ends its ranks, then by force."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


Start = Callable[..., Launch]
Command = Callable[..., Finished]


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, ready to oversubscribe and to run as root."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")])),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), kept.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **changes,
    }


def launcher_command(launcher: str, ranks: int) -> list[str]:
    """The launcher's part of a command line; skips the test where it is not installed."""
    program = "mpirun" if launcher == "mpirun" else "horovodrun"
    if launcher != "none" and shutil.which(program, path=clean_environment()["PATH"]) is None:
        pytest.skip(f"{program} is not on PATH")
    return {
        "none": [],
        "mpirun": ["mpirun", "-n", str(ranks), "--bind-to", "none"],
        "horovodrun-mpi": ["horovodrun", "--mpi", "--binding-args=--bind-to none", "-np", str(ranks)],
        "horovodrun-gloo": ["horovodrun", "--gloo", "-np", str(ranks)],
    }[launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(ranks, *arguments, launcher="mpirun", **environment) -> a running Launch of `python ARGUMENTS`."""
    running: list[Launch] = []

    def run(ranks: int, *arguments: str, launcher: str = "mpirun", **environment: str) -> Launch:
        command = [*launcher_command(launcher, ranks), sys.executable, *arguments]
        running.append(Launch(command, clean_environment(**environment), tmp_path))
        return running[-1]

    yield run
    for launch in running:
        launch.kill()


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command(*arguments) -> how `hvdvae ARGUMENTS` ended, run in this process, in the test's own folder.

    An exception that escapes the command fails the test: a user would see its traceback.
    """
    for name in os.environ:
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Finished:
        capfd.readouterr()
        began = time.monotonic()
        status = main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return Finished(status, said.out + said.err, time.monotonic() - began)

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that trains in no time: 8 x 8 bytes, two kinds of noisy stripes; 480, 40 and 41 examples."""
    noise = np.random.default_rng(0)
    stripes = np.zeros((561, 8, 8), np.uint8)
    stripes[::2, :, ::2] = 255
    stripes[1::2, ::2, :] = 255
    flipped = noise.random(stripes.shape) < 0.1
    stripes[flipped] = 255 - stripes[flipped]
    file = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(file, train=stripes[:480], validation=stripes[480:520], test=stripes[520:])
    return file
