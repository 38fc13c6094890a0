"""`hvdvae supervise`: a job that is started again where it failed, and requeued where its time is up."""

import os
import signal
import subprocess
import sys

from hvdvae.cli.options import SuperviseOptions
from hvdvae.errors import ConfigError
from hvdvae.supervisor import Policy
from hvdvae.supervisor import supervise as run

OPEN_ENDED = ("--out", "--config")


def supervise(options: SuperviseOptions) -> int:
    """Run the command. Blocks; returns its exit status, or 0 where the job was requeued. Raises ConfigError."""
    command = options.command
    if not command:
        raise ConfigError("supervise has no command: hvdvae supervise -- mpirun -np 2 hvdvae train --out DIR")
    if not any(word.split("=")[0] in OPEN_ENDED for word in command):
        raise ConfigError(
            f"supervise: found no --out in {' '.join(command)!r}: name it, or each restart begins anew in a folder of "
            "its own"
        )
    job = os.environ.get("SLURM_JOB_ID")
    if options.requeue and job is None:
        raise ConfigError("--requeue: found no SLURM_JOB_ID, expected a Slurm job: use sbatch, or drop --requeue")
    policy = Policy(restarts=options.restarts, backoff=options.backoff, silence=options.silence, grace=options.grace)
    end = run(command, policy)
    # Not after SIGTERM: that is how scancel ends a job for good, and Slurm requeues by itself what it preempts.
    if end.signal == signal.SIGUSR1 and options.requeue and job is not None:
        return _requeue(job)
    return end.status


def _requeue(job: str) -> int:
    sys.stderr.write(f"hvdvae supervise: requeueing Slurm job {job}\n")
    sys.stderr.flush()
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if asked.returncode:
        raise ConfigError(
            f"scontrol requeue {job} failed ({asked.stderr.strip() or asked.returncode}): submit with --requeue"
        )
    return 0
