"""`hvdvae supervise`: a job that is started again where it failed, and requeued where its time is up."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdvae.cli.config_file import expanded, read_values
from hvdvae.cli.options import SuperviseOptions
from hvdvae.errors import ConfigError
from hvdvae.supervisor import MENDED_BY_USERS, Policy
from hvdvae.supervisor import supervise as run


def supervise(options: SuperviseOptions) -> int:
    """Run the command. Blocks; returns its exit status, or 0 where the job was requeued. Raises ConfigError."""
    command = options.command
    if not command:
        raise ConfigError("supervise has no command: hvdvae supervise -- mpirun -np 2 hvdvae train --out DIR")
    if not options.restarts and options.backoff != SuperviseOptions.backoff:
        raise ConfigError(f"--backoff {options.backoff:g} is for restarts, found --restarts 0: drop one of them")
    words = _words(command)
    asked = _of_file(words)
    if options.restarts and not ("--out" in words[:-1] or asked is None or isinstance(asked.get("out"), str)):
        raise ConfigError(
            f"supervise: found no --out in {' '.join(command)!r}: name it, or each restart begins anew in a folder of "
            "its own"
        )
    if "--out" in words and words[words.index("--out") + 1 :][:1] in ([], [""]):
        raise ConfigError("supervise: --out is empty, expected a folder: a variable that is not set?")
    if options.restarts and asked and asked.get("overwrite"):
        raise ConfigError(
            "supervise: the file of --config says overwrite, and a restart resumes: say --overwrite on the command "
            "line instead, which the first start alone has"
        )
    job = os.environ.get("SLURM_JOB_ID")
    if options.requeue and job is None:
        raise ConfigError("--requeue: found no SLURM_JOB_ID, expected a Slurm job: use sbatch, or drop --requeue")
    policy = Policy(restarts=options.restarts, backoff=options.backoff, silence=options.silence, grace=options.grace)
    folder = _folder(words)
    before = _checkpoints(folder)
    end = run(
        command, policy, (lambda: _written(folder and folder / "summary.json")) if leaves_results(command) else None
    )
    # Not after SIGTERM: that is how scancel ends a job for good, and Slurm requeues by itself what it preempts.
    if not options.requeue or job is None or end.signal != signal.SIGUSR1 or end.for_good:
        return end.status
    if end.status in MENDED_BY_USERS:
        return end.status
    # What it has said counts, too: the folder may be one that only its own hosts see.
    if folder is not None and _checkpoints(folder) == before and not end.said_saved:
        sys.stderr.write(
            f"hvdvae supervise: {folder} has no checkpoint of this stretch: the next would not come further, so it is "
            "not requeued; ask for more time\n"
        )
        return end.status
    return _requeue(job)


def _words(command: Sequence[str]) -> list[str]:
    """With --flag=value as two."""
    return list(itertools.chain.from_iterable(word.split("=", 1) if word[:2] == "--" else [word] for word in command))


def leaves_results(command: Sequence[str]) -> bool:
    """Whether a command that does its work has results: it trains, or is a script of any name with an --out. Pure."""
    # A launch on other hosts may be one word, for their shell.
    every = _words([part for word in command for part in word.split()])
    trains = "train" in every
    of_train = every[every.index("train") + 1 :] if trains else every
    return (trains or "--out" in every) and not {"--help", "-h"} & {*of_train}


def _folder(words: Sequence[str]) -> Path | None:
    """Where the run's results will be, as far as its command says."""
    if "--out" in words[:-1]:
        return Path(expanded(words[len(words) - words[::-1].index("--out")], "--out"))
    found = _of_file(words)
    out = found.get("out") if found else None
    return Path(out) if isinstance(out, str) else None


def _of_file(words: Sequence[str]) -> dict[str, object] | None:
    """What the file of --config says; {} where none is named, None where it cannot be read: the run will say it."""
    if "--config" not in words[:-1]:
        return {}
    file = words[words.index("--config") + 1]
    try:
        return read_values(Path(expanded(file, "--config")), file)
    except ConfigError:
        return None


def _written(path: Path | None) -> tuple[int, int] | None:
    """What tells one writing of a file from another, whatever the clocks say; None where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if found is not None else None


def _checkpoints(folder: Path | None) -> set[tuple[int, int] | None]:
    return {_written(path) for path in folder.glob("checkpoints/step-*.safetensors")} if folder is not None else set()


def _requeue(job: str) -> int:
    sys.stderr.write(f"hvdvae supervise: requeueing Slurm job {job}\n")
    sys.stderr.flush()
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if asked.returncode:
        raise ConfigError(
            f"scontrol requeue {job} failed ({asked.stderr.strip() or asked.returncode}): submit with --requeue"
        )
    return 0
