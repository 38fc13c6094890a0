"""One cell as a job of its own: started in its own process group, ended whatever happens, its words kept."""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.study.namespaces import NoNetwork, network
from hvdvae.cli import mpirun
from hvdvae.regular_file import open_to_append

GRACE_SECONDS = 8.0
PR_SET_PDEATHSIG = 1
SETTINGS = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_tcp_flags": "send,inplace",
    "HOROVOD_LOG_LEVEL": "error",
}
"""For all contenders: MPI yields its core while it waits, and sends both ways at once, as our World sets it."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
PASSED = ("PYTHONPATH", "OMP_NUM_THREADS", "HVDVAE_DATA")
ROOT = Path(__file__).resolve().parents[2]


class JobFailed(Exception):
    """A job ended badly; the text says how."""


@dataclass(frozen=True)
class Ranks:
    """How many to start, and where."""

    count: int
    survive_deaths: bool = False
    link_mbit: float | None = None
    """Of each rank, which is a host of its own then; None: as `launcher` says."""
    launcher: str | None = None
    """A command with {ranks} in it, as `srun --mpi=pmix -n {ranks}`; None: this machine's mpirun, on this machine."""


def run_ranks(folder: Path, ranks: Ranks, log: Path, *, seconds: float) -> None:
    """Run job.py on so many ranks. Blocks for at most so many seconds; raises JobFailed."""
    job = [sys.executable, "-m", "benchmarks.study.job", str(folder.absolute())]
    if ranks.launcher is not None and ranks.link_mbit is None:
        launcher = shlex.split(ranks.launcher.format(ranks=ranks.count))
        # Inside an allocation: what says so must stay.
        run([*launcher, *job], log, environment={**os.environ, **SETTINGS, "OMP_NUM_THREADS": "1"}, seconds=seconds)
        return
    program = mpirun.find()
    if program is None:
        raise JobFailed("no mpirun in this Python's environment nor on the PATH: `hvdvae doctor` says more")
    environment = {**mpirun.environment(os.environ), **SETTINGS}
    if ranks.link_mbit is None:
        command = mpirun.command(program, mpirun.name(program), ranks.count, fault_tolerant=ranks.survive_deaths)
        run([*command, *job], log, environment={**environment, GLOO_INTERFACE: _loopback()}, seconds=seconds)
        return
    try:
        with network(ranks.count, ranks.link_mbit) as hosts:
            # mpirun hands on to other hosts what it is told to.
            passed = [part for name in (GLOO_INTERFACE, *SETTINGS, *PASSED) for part in ("-x", name)]
            command = hosts.mpirun(program, [*passed, *job])
            run(command, log, environment={**environment, GLOO_INTERFACE: "eth0"}, seconds=seconds)
    except NoNetwork as error:
        raise JobFailed(f"skipped: {error}") from None


def judge(folder: Path, log: Path, *, seconds: float) -> None:
    """Run judge.py. Blocks for at most so many seconds; raises JobFailed."""
    run(
        [sys.executable, "-m", "benchmarks.study.judge", str(folder)],
        log,
        environment=dict(os.environ),
        seconds=seconds,
    )


def run(command: Sequence[str], log: Path, *, environment: Mapping[str, str], seconds: float) -> None:
    """Run to the end, with all that it says appended to `log`. Blocks; raises JobFailed."""
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    with open_to_append(log) as words:
        job = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_me,
        )
        with _ended(job):
            try:
                status = job.wait(seconds)
            except subprocess.TimeoutExpired:
                raise JobFailed(f"was still running after {seconds:.0f} s, and was ended") from None
    if status != 0:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise JobFailed(f"ended with {how}")


@contextmanager
def _ended(job: subprocess.Popen[bytes]) -> Iterator[None]:
    """After it, neither the job nor anything that it started runs."""
    try:
        yield
    finally:
        family = _family(job)
        if job.poll() is None:
            job.terminate()  # A launcher ends its ranks, wherever they are.
            psutil.wait_procs(family, GRACE_SECONDS)
        for process in family:
            if process.is_running():
                process.kill()
        job.wait()


def _family(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        me = psutil.Process(job.pid)
        return [*me.children(recursive=True), me]
    except psutil.NoSuchProcess:
        return []


def _end_with_me() -> None:
    """In the child: SIGTERM when the harness dies, even by SIGKILL; nobody else would end the job then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])
