"""`hvdvae doctor`: can this machine train, and if not, what would mend it. One line a point."""

import os
import shutil
import subprocess
from collections.abc import Iterator

from hvdvae.cli import checks, leftovers, mpirun, probes
from hvdvae.cli.finding import Finding, verdict
from hvdvae.cli.probes import Answer
from hvdvae.launcher import detect


def doctor(options: object = None) -> int:
    """Check and print. Returns 0 if training works, alone and in parallel, else 1. Blocks for up to a minute.

    Under a launcher the first rank does it. `options` is ignored: there are none.
    """
    if detect(os.environ).rank > 0:
        return 0
    findings = []
    for finding in examine():
        findings.append(finding)
        print(finding, flush=True)
    text, status = verdict(findings)
    print(text)
    return status


def examine() -> Iterator[Finding]:
    """All points in order, each as soon as it is known."""
    yield checks.python()
    torch = probes.ask(probes.TORCH)
    yield checks.torch(torch)

    mpi = probes.ask(probes.MPI)
    yield checks.mpi(mpi)
    path, maker = mpirun.of_library(mpirun.parse_name(mpi.facts.get("library", "")))
    yield checks.launcher_program(path, shutil.which("mpirun"), maker, mpi)
    if not mpi.error:
        yield checks.threads(mpi)
        yield checks.ulfm(_launch(path, maker, probes.ULFM, fault_tolerant=True))

    horovod = probes.ask(probes.HOROVOD)
    yield checks.horovod(horovod)
    if not horovod.error:
        yield checks.built_for(horovod, torch, mpi)
    yield checks.gpu(torch, _driver_answers(), horovod)

    yield checks.launcher(os.environ)
    yield checks.shared_memory(leftovers.clear())
    if not torch.error:
        from hvdvae.cores import available_cores, granted_cores

        ranks = max(2, detect(os.environ).local_size)
        yield checks.cores(len(available_cores()), granted_cores(os.environ), ranks)
    for engine, code, needed in (("mpi", probes.PAIR_MPI, mpi), ("horovod", probes.PAIR_HOROVOD, horovod)):
        if path is not None and not needed.error:
            yield checks.pair(engine, _launch(path, maker, code))


def _launch(path: str | None, maker: str, code: str, *, fault_tolerant: bool = False) -> Answer:
    if path is None:
        return Answer(error="no mpirun")
    return probes.ask(code, launch=mpirun.command(path, maker, 2, fault_tolerant=fault_tolerant))


def _driver_answers() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
