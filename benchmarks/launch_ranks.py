"""Starts ranks of a module of this folder on this machine, and waits for them with a time limit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdvae.cli import mpirun

ROOT = Path(__file__).resolve().parents[1]
TIMED_OUT = 124


def launch_ranks(module: str, argument: Mapping[str, Any], *, ranks: int, seconds: float) -> int:
    """Run `python -m MODULE ARGUMENT` on so many ranks, with one thread each; their output goes to ours.

    `argument` goes over as JSON. Blocks. Returns the exit status, TIMED_OUT if they were ended after
    `seconds`. Raises FileNotFoundError where there is no mpirun.
    """
    program = mpirun.find()
    if program is None:
        raise FileNotFoundError(
            "found no mpirun on PATH or beside this Python: run launch/install.sh, or load your MPI"
        )
    environment = mpirun.environment(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    command = mpirun.command(program, mpirun.name(program), ranks)
    # mpi4py's runner ends all ranks when one raises.
    python = [sys.executable, "-X", "faulthandler", "-m", "mpi4py", "-m", module, json.dumps(argument)]
    process = subprocess.Popen([*command, *python], env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Gently first, so that mpirun ends its ranks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
