"""An elastic horovodrun: ranks come where hosts are added, and training goes on when one is killed."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.system.conftest import Launch, clean_environment

EPOCHS, EXAMPLES, BATCH = 120, 1457, 10


def launch(folder: Path, *, np: int) -> Launch:
    """Training on digits under a horovodrun that asks hosts.txt which hosts there are."""
    program = shutil.which("horovodrun", path=clean_environment()["PATH"])
    if program is None:
        pytest.skip("horovodrun is not on PATH")
    script = folder / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat {folder}/hosts.txt\n")
    script.chmod(0o755)
    elastic = f"--gloo --network-interface lo -np {np} --min-np 1 --max-np 2 --host-discovery-script {script}"
    run = f"--batch-size {BATCH} --epochs {EPOCHS} --nll-samples 2 --pictures-every 0 --threads 1 --deadline 60"
    run += " --validate-every 50 --checkpoint-every 50 --lr-scaling linear --lr 0.0001"
    command = [program, *elastic.split(), sys.executable, "-m", "hvdvae", "train", *run.split(), "--out", "run"]
    return Launch(command, clean_environment(), folder)


def workers(job: Launch) -> list[psutil.Process]:
    """Ranks, oldest first."""
    family = psutil.Process(job.process.pid).children(recursive=True)
    found = [p for p in family if "hvdvae" in p.cmdline() and "train" in p.cmdline() and "python" in p.name()]
    return sorted((p for p in found if "HOROVOD_RANK" in p.environ()), key=lambda p: p.create_time())


def test_a_host_is_added_and_then_lost(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("localhost:1\n")
    job = launch(tmp_path, np=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        await_lines(metrics, 1)
        (tmp_path / "hosts.txt").write_text("localhost:1\n127.0.0.1:1\n")
        await_lines(metrics, 1, ranks=2)
        newest = workers(job)[-1]
        newest.send_signal(signal.SIGKILL)
        await_lines(metrics, 1, ranks=1, after=2)
        ended = job.finish(200)
    finally:
        job.kill()
    assert "has come; 2 ranks go on from step" in ended.output
    assert "has died; 1 ranks go on from step" in ended.output
    assert ended.status == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == EPOCHS
    assert summary["world_size"] == 1
    steps = [int(found) for found in re.findall(r"go on from step (\d+)", ended.output)]
    assert steps == sorted(steps)
    # With two ranks an epoch has half as many steps.
    assert summary["steps"] < EPOCHS * (EXAMPLES // BATCH)


def await_lines(metrics: Path, count: int, *, ranks: int = 1, after: int = 0) -> None:
    """Return once so many lines tell of steps of so many ranks, behind one that tells of `after`."""
    give_up = time.monotonic() + 90
    while True:
        assert time.monotonic() < give_up
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        sizes = [len(json.loads(line)["step_seconds"]) for line in lines if '"step_seconds"' in line]
        if after in sizes:
            sizes = sizes[len(sizes) - sizes[::-1].index(after) :]
        elif after:
            sizes = []
        if sizes.count(ranks) >= count:
            return
        time.sleep(0.1)
