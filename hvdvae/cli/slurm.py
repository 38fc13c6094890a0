"""`hvdvae slurm`: a batch script for Slurm that saves before its time is up, and goes on by itself in the next stretch.

The scripts in launch/slurm/ are its output with "$@" for the options of train.
"""

import math
import os
import re
import shlex
import sys
from pathlib import PurePath

from hvdvae.cli import assemble
from hvdvae.cli.options import SlurmOptions
from hvdvae.config import TrainConfig
from hvdvae.errors import ConfigError
from hvdvae.launcher import survives_deaths

WARNING_SECONDS = 120
"""Before the time limit; what saving and leaving may take."""

_OWN = ["--resume"]
"""Options of train that the script adds: each stretch goes on where the last one was."""
_START = {
    # Since Slurm 22.05 srun does not take the cores of a rank from sbatch.
    "srun": 'srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK"',
    # Bound to a core each, ranks would have one thread.
    "mpirun": 'mpirun --bind-to none -np "$SLURM_NTASKS"',
}


def slurm(options: SlurmOptions) -> int:
    """Print the script. Returns the exit status; raises ConfigError."""
    _check_site(options)
    own = own_command(options)
    config = None if own else _trained(options)
    if _seconds(options.time) <= 2 * WARNING_SECONDS:
        raise ConfigError(
            f"--time is {options.time}, expected more than {2 * WARNING_SECONDS // 60} minutes: a job is warned "
            f"{WARNING_SECONDS // 60} before its end, and has to come further before that"
        )
    if config is not None:
        _check_ranks(options, config)
    sys.stdout.write(script(options, shlex.join(own or _of_train(options)), own=bool(own)))
    return 0


def own_command(options: SlurmOptions) -> list[str]:
    """The words of a command that is no `hvdvae train`; none where they are its options. Pure. Raises ConfigError."""
    words = _of_train(options)
    if not words or words[0].startswith("-"):
        return []
    first = PurePath(words[0]).name
    if first in _LAUNCHERS:
        raise ConfigError(
            f"slurm: found {first} behind `--`, and the script starts the ranks itself (--launcher): name what each "
            "rank runs, as python train.py, and their number by --nodes and --ntasks-per-node"
        )
    if first == "hvdvae":
        raise ConfigError(f"slurm: found hvdvae {' '.join(words[1:2])} behind `--`, expected options of hvdvae train")
    if PurePath(first).suffix == ".py":
        raise ConfigError(f"slurm: found {words[0]} behind `--`, expected what runs it: python {words[0]}")
    if options.servers:
        raise ConfigError(
            f"--servers {options.servers} is for options of hvdvae train behind `--`, found {words[0]}: drop it, and "
            "raise --ntasks-per-node; a script of your own says strategy='ps' itself"
        )
    return words


def _of_train(options: SlurmOptions) -> list[str]:
    return options.train[2:] if options.train[:2] == ["hvdvae", "train"] else options.train


def _check_site(options: SlurmOptions) -> None:
    """Refuse what would be no line of sbatch. Raises ConfigError naming the flag."""
    for key in (*_SITE_OPTIONS, "modules"):
        value = getattr(options, key)
        if value is not None and not re.fullmatch(r"[\w./,:@%+&|*()\[\]=-]+" if key != "modules" else _MODULES, value):
            raise ConfigError(f"--{key} is {value!r}, expected a value as sbatch takes it, without blanks or quotes")
    if options.memory is not None and not re.fullmatch(r"\d+[KMGT]?", options.memory):
        raise ConfigError(f"--memory is {options.memory!r}, expected megabytes, or a number with K, M, G or T, as 64G")


def _trained(options: SlurmOptions) -> TrainConfig:
    """What the script's command would train, read as train reads it. Raises ConfigError as train would."""
    from hvdvae.cli.parser import parse

    _, asked = parse(["train", *_roles(options), *_OWN, *_of_train(options)])
    if asked.values["out"] is None:
        raise ConfigError("slurm: found no --out among the options of train, expected one: each stretch goes on there")
    if asked.values["overwrite"]:
        raise ConfigError(
            "slurm: found --overwrite among the options of train, and the script resumes: drop it, and choose another "
            "--out or delete what is there before the first stretch"
        )
    config: TrainConfig = asked.config()
    if options.servers and config.strategy != "ps":
        raise ConfigError(
            f"--servers {options.servers} is for --strategy ps, found --strategy {config.strategy} behind `--`: drop "
            "one of them"
        )
    if options.servers and config.servers != options.servers:
        raise ConfigError(
            f"--servers {options.servers} before `--` and --servers {config.servers} behind it say different things: "
            "drop one"
        )
    return config


def _check_ranks(options: SlurmOptions, config: TrainConfig) -> None:
    """Refuse what so many ranks cannot do. Raises ConfigError naming the flag."""
    ranks = options.nodes * options.ntasks_per_node
    servers = config.servers * (1 + config.replicas) if config.strategy == "ps" else 0
    if servers >= ranks:
        raise ConfigError(
            f"{servers} parameter servers (--servers, --replicas) of {ranks} ranks leave none to train: raise "
            "--ntasks-per-node"
        )
    if options.gpus_per_node and options.ntasks_per_node - servers // options.nodes > options.gpus_per_node:
        raise ConfigError(
            f"--ntasks-per-node {options.ntasks_per_node} with --gpus-per-node {options.gpus_per_node}: ranks would "
            "share a GPU; start one rank a GPU, and servers on top"
        )
    if config.strategy == "local" and ranks > 1:
        raise ConfigError(
            f"--strategy local trains in one process, and the job has {ranks} ranks: use --nodes 1 --ntasks-per-node "
            "1, or another strategy"
        )
    if config.replace_workers and not survives_deaths(os.environ):
        raise ConfigError(
            "--replace-workers: a death ends the script's job; drop it, or start `mpirun --with-ft ulfm` (Open MPI 5) "
            "in a script of your own"
        )
    assemble.mesh_of(config, ranks - servers)
    if servers:
        assemble.plan(config).check(workers=ranks - servers, servers=servers)


def _roles(options: SlurmOptions) -> list[str]:
    return ["--strategy", "ps", "--servers", str(options.servers)] if options.servers else []


def _seconds(time: str) -> float:
    """Of a limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; 0 is none. Raises ConfigError. Pure."""
    if time.upper() in ("0", "UNLIMITED", "INFINITE"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, re.ASCII)
    if found is None:
        raise ConfigError(f"--time is {time!r}, expected minutes, H:MM:SS or D-H:MM:SS, as sbatch takes it")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def script(options: SlurmOptions, train: str, *, own: bool = False) -> str:
    """The batch script. `train`: options of hvdvae train, or one's `own` command, in the shell's language. Pure."""
    asked = {
        "job-name": "hvdvae",
        "nodes": options.nodes,
        "ntasks-per-node": options.ntasks_per_node,
        "cpus-per-task": options.cpus_per_task,
        **({"gpus-per-node": options.gpus_per_node} if options.gpus_per_node else {}),
        "time": options.time,
        **{name: value for key, name in _SITE_OPTIONS.items() if (value := getattr(options, key)) is not None},
        "signal": f"B:USR1@{WARNING_SECONDS}",
        "open-mode": "append",
        **({"array": f"1-{options.array}%1"} if options.array > 1 else {}),
    }
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{name}={value}" for name, value in asked.items())]
    if options.array == 1:
        lines.append("#SBATCH --requeue")
    if options.modules:
        lines.append(_LOAD.format(options.modules))
    words = train if own else f"hvdvae train {shlex.join([*_roles(options), *_OWN])} {train}"
    lines += [_SITE, *([_OF_ONES_OWN] if own else [])]
    # Started again, a command without an --out would begin anew.
    restarts = " --restarts 0" if own and not _has_out(train) else ""
    lines.append((_ONCE if options.array == 1 else _ARRAY).format(restarts, f"{_START[options.launcher]} {words}"))
    return "\n".join(lines) + "\n"


def _has_out(command: str) -> bool:
    return any(word.partition("=")[0] == "--out" for word in shlex.split(command))


_SITE_OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "memory": "mem",
}
"""Flags of ours, and of sbatch."""
_MODULES = r"[\w./+-]+( [\w./+-]+)*"
_LAUNCHERS = ("srun", "mpirun", "mpiexec", "horovodrun", "sbatch", "torchrun")

_LOAD = """\
type module >/dev/null 2>&1 || . /etc/profile  # A batch shell is no login shell.
module load {} || exit 2"""

_OF_ONES_OWN = """\
# Two minutes before its time is up each rank gets SIGUSR1: save then, and leave (Trainer.fit does); go on from there
# when the job comes again."""

_SITE = """\
# Submit where `hvdvae` is on the PATH; what else your site wants are flags of sbatch.
set -euo pipefail
here=$(command -v hvdvae) || { echo "hvdvae is not on the PATH: activate its environment, then submit" >&2; exit 2; }
home=${here%/bin/hvdvae}
# srun does not tell an MPI of the environment where it is.
if [ -x "$home/bin/mpirun" ] && [ -e "$home/pyvenv.cfg" ]; then
    export OPAL_PREFIX="$home" PMIX_PREFIX="$home" PRTE_PREFIX="$home" PMIX_MCA_psec=native
fi"""

_ONCE = "exec hvdvae supervise --requeue{} -- {}"

_ARRAY = """\
hvdvae supervise{} -- {} &
job=$!
trap 'kill -USR1 "$job"' USR1
status=138
while [ "$status" -eq 138 ] && kill -0 "$job" 2>/dev/null; do  # A signal ends `wait`, not the job.
    status=0
    wait "$job" || status=$?
done
if [ "$status" -eq 0 ]; then  # All epochs are done: what is left of the array is not needed.
    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
fi
exit "$status\""""
