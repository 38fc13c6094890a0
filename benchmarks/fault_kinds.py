"""What can break while a job runs, and what has to be prepared for it."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.fault_run import Job
from benchmarks.fault_ways import Way
from benchmarks.study.namespaces import PREFIX, Network, NoNetwork, network

STOPPED_SECONDS = 10.0
NAN_STEP = 150
CLOCKS = Path("/usr/lib")
"""Where libfaketime is looked for."""


class Skipped(Exception):
    """A fault that cannot be had here."""


def kill_trainer(job: Job, way: Way) -> None:
    """SIGKILL of a rank that trains."""
    _kill(job, 1)


def kill_rank_0(job: Job, way: Way) -> None:
    """SIGKILL of the rank that keeps the log."""
    job.may_end = bool(way.extra)  # A worker 0 has no successor.
    _kill(job, 0)


def kill_server(job: Job, way: Way) -> None:
    """SIGKILL of the first server."""
    job.may_end = way.extra == 1
    _kill(job, way.trainers)


def _kill(job: Job, rank: int) -> None:
    victim = job.rank(rank)
    job.now()
    victim.kill()


def stop_trainer(job: Job, way: Way) -> None:
    """SIGSTOP for ten seconds; the fault is over when they are."""
    victim = job.rank(1)
    victim.suspend()
    time.sleep(STOPPED_SECONDS)
    job.now()
    victim.resume()


def fill_disk(job: Job, way: Way) -> None:
    """The file system of the results has no byte left when a checkpoint is written, not the first one."""
    job.may_end = True
    while not list((job.out / "checkpoints").glob("step-*.safetensors")) and job.process.poll() is None:
        time.sleep(0.05)
    job.now()
    with (job.out / "ballast").open("wb") as ballast:
        try:
            while True:
                ballast.write(b"\0" * 65536)
                ballast.flush()
        except OSError:
            pass


def spoil_gradient(job: Job, way: Way) -> None:
    """One loss of one rank is not a number; the job was told to make it so, and says when it has."""
    give_up = time.monotonic() + 60
    while not (spoiled := [at for at, line in job.said() if "is not a number now" in line]):
        if time.monotonic() > give_up or job.process.poll() is not None:
            raise RuntimeError(f"no loss of step {NAN_STEP} was spoiled")
        time.sleep(0.01)
    job.spent = 1
    job.fault_at = spoiled[0]


def jump_clock(job: Job, way: Way) -> None:
    """The clock goes an hour back, and a second later two ahead."""
    set_clock(job.folder, "-3600")
    time.sleep(1.0)
    job.now()
    set_clock(job.folder, "+3600")


FAULTS: dict[str, Callable[[Job, Way], None]] = {
    "a trainer is killed": kill_trainer,
    "rank 0 is killed": kill_rank_0,
    "the server is killed": kill_server,
    "a trainer is stopped for 10 s": stop_trainer,
    "the disk is full": fill_disk,
    "a gradient is not finite": spoil_gradient,
    "the clock jumps": jump_clock,
}


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Inside, the results go to a file system of 64 MB."""
    run = folder / "run"
    run.mkdir()
    if os.geteuid() != 0:
        raise Skipped("a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=False)


def fake_clock(folder: Path) -> dict[str, str]:
    """The environment in which clocks follow a file."""
    libraries = [*CLOCKS.glob("*/faketime/libfaketimeMT.so.1")]
    if not libraries:
        raise Skipped("libfaketime is not installed")
    set_clock(folder, "+0")
    return {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def set_clock(folder: Path, shift: str) -> None:
    """Seconds from the true time."""
    # At once: a file that is read while it is empty has a clock fall back to some other time.
    part = folder / "clock.part"
    part.write_text(f"{shift}\n")
    part.replace(folder / "clock")


@contextmanager
def two_hosts() -> Iterator[Network]:
    """Inside, there are two hosts; after it nothing runs on them."""
    try:
        with network(2, 1000.0) as hosts:
            try:
                yield hosts
            finally:
                for number in (1, 2):
                    _end_all_on(f"{PREFIX}{number}")
    except NoNetwork as error:
        raise Skipped(str(error)) from None


def cut_link(job: Job) -> None:
    """Between two hosts, for ten seconds; the fault is over when they are."""
    link = ["ip", "link", "set", f"{PREFIX}-v2"]
    subprocess.run([*link, "down"], check=True)
    time.sleep(STOPPED_SECONDS)
    job.now()
    subprocess.run([*link, "up"], check=True)


def _end_all_on(host: str) -> None:
    told = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=False)
    for number in told.stdout.split():
        try:
            psutil.Process(int(number)).kill()
        except psutil.NoSuchProcess:
            continue
