"""`hvdvae supervise`: a job that is started again where it failed, and requeued where its time is up."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdvae.cli.options import SuperviseOptions
from hvdvae.errors import ConfigError
from hvdvae.supervisor import Policy
from hvdvae.supervisor import supervise as run

NAMES_A_FOLDER = ("--out", "--config")


def supervise(options: SuperviseOptions) -> int:
    """Run the command. Blocks; returns its exit status, or 0 where the job was requeued. Raises ConfigError."""
    command = options.command
    if not command:
        raise ConfigError("supervise has no command: hvdvae supervise -- mpirun -np 2 hvdvae train --out DIR")
    if options.restarts and not any(word.split("=")[0] in NAMES_A_FOLDER for word in command):
        raise ConfigError(
            f"supervise: found no --out in {' '.join(command)!r}: name it, or each restart begins anew in a folder of "
            "its own"
        )
    job = os.environ.get("SLURM_JOB_ID")
    if options.requeue and job is None:
        raise ConfigError("--requeue: found no SLURM_JOB_ID, expected a Slurm job: use sbatch, or drop --requeue")
    policy = Policy(restarts=options.restarts, backoff=options.backoff, silence=options.silence, grace=options.grace)
    end = run(command, policy, lambda start: _has_results(command, start))
    # Not after SIGTERM: that is how scancel ends a job for good, and Slurm requeues by itself what it preempts.
    if end.signal == signal.SIGUSR1 and options.requeue and job is not None:
        return _requeue(job)
    return end.status


def _has_results(command: Sequence[str], start: float) -> bool:
    """Whether the run wrote its summary since then; for commands that are no `hvdvae train --out DIR`, their status."""
    words = list(itertools.chain.from_iterable(word.split("=", 1) if word[:2] == "--" else [word] for word in command))
    # A launch on other hosts may be one word, for their shell.
    trains = any("train" in word.split() for word in words)
    if not trains or "--out" not in words[:-1]:
        return True
    summary = Path(words[len(words) - words[::-1].index("--out")]) / "summary.json"
    # File systems round times.
    return summary.exists() and summary.stat().st_mtime >= start - 2


def _requeue(job: str) -> int:
    sys.stderr.write(f"hvdvae supervise: requeueing Slurm job {job}\n")
    sys.stderr.flush()
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if asked.returncode:
        raise ConfigError(
            f"scontrol requeue {job} failed ({asked.stderr.strip() or asked.returncode}): submit with --requeue"
        )
    return 0
