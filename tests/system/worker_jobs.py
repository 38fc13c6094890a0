"""Jobs over parameter servers, on the embedded digits, whose ranks a test kills or stops."""

import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.system.conftest import Finished, Launch, clean_environment

WORKERS, EXAMPLES, BATCH = 3, 1457, 10
MPIRUN_ULFM = "mpirun --with-ft ulfm"


@cache
def has_ulfm() -> bool:
    """Whether the mpirun on the path can let others go on."""
    try:
        found = subprocess.run(
            ["mpirun", "--with-ft", "ulfm", "-n", "1", "true"],
            env=clean_environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0


def start(
    folder: Path, plan: str, *, epochs: int, mpirun: str = "mpirun", threads: str = "--threads 1", samples: int = 2
) -> Launch:
    """A job of three workers, and of servers and backups as the plan says."""
    servers = (2 if "--servers 2" in plan else 1) * (2 if "--replicas 1" in plan else 1)
    run = f"--batch-size {BATCH} --epochs {epochs} --nll-samples {samples} --pictures-every 0 {threads} --out run"
    command = f"{mpirun} --bind-to none --map-by :OVERSUBSCRIBE -n {WORKERS + servers} {sys.executable} -m hvdvae train"
    return Launch(f"{command} --data digits --strategy ps {plan} {run}".split(), clean_environment(), folder)


def worker(job: Launch, rank: int) -> psutil.Process:
    """The process of a rank. Waits until it is there."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and job.process.poll() is None:
        for child in psutil.Process(job.process.pid).children(recursive=True):
            try:
                if child.environ().get("OMPI_COMM_WORLD_RANK") == str(rank) and "hvdvae" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    job.kill()
    raise AssertionError(f"rank {rank} did not start; all that the job said:\n{job.finish().output}")


def strike(job: Launch, folder: Path, rank: int, number: signal.Signals, seconds: float = 60) -> Finished:
    """Send a rank a signal once an epoch has ended; returns how the job ended."""
    try:
        process = worker(job, rank)
        await_first_epoch(folder)
        process.send_signal(number)
        return job.finish(seconds)
    finally:
        job.kill()


def await_first_epoch(folder: Path) -> None:
    """Return once an epoch has ended."""
    metrics = folder / "run" / "metrics.jsonl"
    give_up = time.monotonic() + 60
    while not (metrics.exists() and "epoch" in metrics.read_text()):
        assert time.monotonic() < give_up, "no epoch ended"
        time.sleep(0.02)


def await_validated(folder: Path) -> None:
    """Return once a checkpoint has been found to be the best: after a validation."""
    give_up = time.monotonic() + 60
    while not (folder / "run" / "checkpoints" / "best.safetensors").exists():
        assert time.monotonic() < give_up, "no validation ended"
        time.sleep(0.02)
