"""Questions that doctor asks in processes of their own, so that a crash or hang in MPI stays theirs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdvae.cli import mpirun

_MARK = "hvdvae-probe "


@dataclass(frozen=True)
class Answer:
    """What a probe found out, or why it could not. `error` is empty if and only if it answered."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


_TELL = f"""
import json, os, re
def tell(**facts):
    print({_MARK!r} + json.dumps(facts), flush=True)
def libmpi():
    maps = open("/proc/self/maps").readlines() if os.path.exists("/proc/self/maps") else []
    found = {{line.split()[-1] for line in maps if re.search(r"/libmpi(ch)?\\.so[.0-9]*$", line)}}
    return sorted(map(os.path.realpath, found))
"""

TORCH = """
import torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
tell(version=torch.__version__, cuda=torch.version.cuda, gpus=gpus)
"""

MPI = """
import mpi4py
from mpi4py import MPI
levels = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED",
          MPI.THREAD_SERIALIZED: "SERIALIZED", MPI.THREAD_MULTIPLE: "MULTIPLE"}
tell(version=mpi4py.__version__, library=MPI.Get_library_version().strip("\\0 \\n"), libmpi=libmpi(),
     standard=".".join(map(str, MPI.Get_version())), threads=levels[MPI.Query_thread()])
"""

HOROVOD = """
import horovod, horovod.torch as hvd
record = os.path.join(os.path.dirname(horovod.__file__), "metadata.json")
built_for = json.load(open(record)).get("pytorch") if os.path.exists(record) else None
tell(version=horovod.__version__, mpi=bool(hvd.mpi_built()), gloo=bool(hvd.gloo_built()),
     nccl=bool(hvd.nccl_built()), torch=built_for, libmpi=libmpi())
"""

PAIR_MPI = """
from mpi4py import MPI
world = MPI.COMM_WORLD
total = world.allreduce(world.rank + 1)
if world.rank == 0:
    tell(size=world.size, total=total)
"""

PAIR_HOROVOD = """
import torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), name="doctor", op=hvd.Sum).item()
if hvd.rank() == 0:
    tell(size=hvd.size(), total=total)
hvd.shutdown()
"""

ULFM = """
from mpi4py import MPI
world = MPI.COMM_WORLD.Dup()
world.Set_errhandler(MPI.ERRORS_RETURN)
agreed = world.Agree(1)
if MPI.COMM_WORLD.rank == 0:
    tell(size=world.size, agreed=agreed)
"""


def ask(code: str, *, launch: Sequence[str] = (), seconds: float = 90.0) -> Answer:
    """Run `code` in a new Python, under the `launch` command if one is given. Blocks for at most `seconds`.

    The code says its facts with `tell`; under a launch one rank does.
    """
    child = subprocess.Popen(
        [*launch, sys.executable, "-P", "-c", _TELL + code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=mpirun.environment(os.environ),
        start_new_session=True,
    )
    try:
        said, complaints = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(child)
        return Answer(error=f"no answer within {seconds:.0f} s")
    told = [line.partition(_MARK)[2] for line in said.splitlines() if _MARK in line]
    if child.returncode == 0 and told:
        return Answer(facts=json.loads(told[-1]))
    return Answer(error=_gist(complaints) or f"exit status {child.returncode}")


def _end(child: subprocess.Popen[str]) -> None:
    """End a launch with all that it started: first so that mpirun can end its ranks, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.communicate(timeout=8)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _gist(complaints: str) -> str:
    """The line of an exception if there is one, else the last line that says something."""
    lines = [line.strip() for line in complaints.splitlines() if any(map(str.isalpha, line))]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "error"))]
    return (errors or lines or [""])[-1][:300]
