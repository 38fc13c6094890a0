"""What happens to a run when something breaks: every fault, every way of training, one job each.

    python benchmarks/faults.py [--only WORDS] [--soak KILLS]

For each: whether training went on, how long after the fault, how many steps were lost, and the exit status. A job that
hangs, ends badly with status 0, or leaves no checkpoint that can be read is counted as broken; then the exit status is
1. Digits, three ranks that train, or four that hold two copies of a model. Needs Open MPI 5; link cuts and full disks
need root, clock jumps libfaketime.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

if __name__ == "__main__":  # A script's own folder is on the path; the packages are beside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.study.namespaces import PREFIX, NoNetwork, network
from hvdvae.checkpoint import Folder
from hvdvae.cli import mpirun

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = 3
SECONDS = 90.0
"""Without a word in its log, its metrics or its folder of checkpoints, after which a job is taken to hang."""
SOAK_EPOCHS = 20
STOPPED_SECONDS = 10.0
RUN = "--data digits --epochs 60 --batch-size 10 --nll-samples 2 --pictures-every 0 --threads 1 --validate-every 10"
RUN += " --deadline 40 --checkpoint-every 1"


@dataclass(frozen=True)
class Way:
    """A way of training."""

    options: str
    extra: int = 0
    """Ranks that serve."""
    trainers: int = TRAINERS
    survives: bool = True
    """Started with ULFM; else under a supervisor."""


WAYS = {
    "allreduce, mpi": Way("--strategy allreduce --engine mpi"),
    "allreduce, horovod": Way("--strategy allreduce --engine horovod"),
    "allreduce, supervised": Way("--strategy allreduce --engine mpi", survives=False),
    "stages of two copies": Way("--strategy allreduce --engine mpi --mesh dp=2,pp=2", trainers=4),
    "local-sgd, supervised": Way("--strategy local-sgd", survives=False),
    "diloco, supervised": Way("--strategy diloco --optimizer adamw", survives=False),
    "sharded, supervised": Way("--strategy sharded --engine mpi", survives=False),
    "ps": Way("--strategy ps", extra=1),
    "ps, a backup": Way("--strategy ps --replicas 1", extra=2),
}


class Skipped(Exception):
    """A fault that cannot be had here."""


@dataclass
class Job:
    """A running job in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    fault_at: float = 0.0
    may_end: bool = False
    """Whether this way cannot survive this fault; it shall then end, and be able to resume."""
    more: list[Callable[[], None]] = field(default_factory=list)
    """To be undone when the job has ended."""

    @property
    def out(self) -> Path:
        """Of the run."""
        return self.folder / "run"

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank of mpirun's."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.environ().get("OMPI_COMM_WORLD_RANK") == str(rank) and "train" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        raise RuntimeError(f"rank {rank} is not there")

    def beats(self) -> list[tuple[float, int]]:
        """Time and step of every line of metrics so far."""
        file = self.out / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line["time"], line["step"]) for line in map(_parsed, lines) if line.get("kind") == "step"]

    def await_beats(self, count: int) -> None:
        """Return once training is under way."""
        give_up = time.monotonic() + 60
        while len(self.beats()) < count:
            if time.monotonic() > give_up or self.process.poll() is not None:
                raise RuntimeError(f"did not start to train: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def end(self) -> int | None:
        """Its status once it has ended; None where it says nothing any more. Blocks."""
        said, since = -1, time.monotonic()
        while self.process.poll() is None and time.monotonic() - since < SECONDS:
            files = (self.folder / "log", self.out / "metrics.jsonl", self.out / "checkpoints")
            stamp = sum(file.stat().st_mtime_ns for file in files if file.exists())
            if stamp != said:
                said, since = stamp, time.monotonic()
            time.sleep(0.05)
        return self.process.poll()

    def now(self) -> None:
        """The fault happens now."""
        self.fault_at = time.time()


def kill_trainer(job: Job, way: Way) -> None:
    """SIGKILL of a rank that trains."""
    job.rank(1).kill()
    job.now()


def kill_rank_0(job: Job, way: Way) -> None:
    """SIGKILL of the rank that keeps the log."""
    job.may_end = bool(way.extra)  # A worker 0 has no successor.
    job.rank(0).kill()
    job.now()


def kill_server(job: Job, way: Way) -> None:
    """SIGKILL of the first server."""
    if not way.extra:
        raise Skipped("has no server")
    job.may_end = way.extra == 1
    job.rank(way.trainers).kill()
    job.now()


def stop_trainer(job: Job, way: Way) -> None:
    """SIGSTOP for ten seconds."""
    victim = job.rank(1)
    victim.suspend()
    time.sleep(STOPPED_SECONDS)
    victim.resume()
    job.now()


def fill_disk(job: Job, way: Way) -> None:
    """The file system of the results has no byte left when a checkpoint is written, not the first one."""
    job.may_end = True
    while not list((job.out / "checkpoints").glob("step-*.safetensors")) and job.process.poll() is None:
        time.sleep(0.05)
    with (job.out / "ballast").open("wb") as ballast:
        try:
            while True:
                ballast.write(b"\0" * 65536)
                ballast.flush()
        except OSError:
            pass
    job.now()


def spoil_gradient(job: Job, way: Way) -> None:
    """One loss of one rank is not a number; the job was told to make it so."""
    time.sleep(2.0)
    job.now()


def jump_clock(job: Job, way: Way) -> None:
    """The clock goes an hour back, then two ahead."""
    for shift in ("-3600", "+3600"):
        (job.folder / "clock").write_text(f"{shift}\n")
        time.sleep(1.0)
    job.now()


FAULTS: dict[str, Callable[[Job, Way], None]] = {
    "a trainer is killed": kill_trainer,
    "rank 0 is killed": kill_rank_0,
    "the server is killed": kill_server,
    "a trainer is stopped for 10 s": stop_trainer,
    "the disk is full": fill_disk,
    "a gradient is not finite": spoil_gradient,
    "the clock jumps": jump_clock,
}
# A checkpoint that was torn while its run was dead, and a link that is cut, are not done to one running job here.
TORN, CUT = "the newest checkpoint is torn", "a link is cut for 10 s"


@dataclass(frozen=True)
class Outcome:
    """Of one fault in one way."""

    fault: str
    way: str
    words: str
    seconds: float | None = None
    lost: int | None = None
    status: int | None = None
    broken: bool = False


def command(
    way: Way, folder: Path, *, nan_step: int = 0, resume: bool = False, ranks_have: Mapping[str, str] | None = None
) -> list[str]:
    """The launch of one job. `ranks_have`: environment variables of its ranks alone."""
    program = mpirun.find()
    if program is None:
        raise SystemExit("no mpirun: `hvdvae doctor` says more")
    job = ["env", *(f"{key}={value}" for key, value in (ranks_have or {}).items())]
    job += [sys.executable, str(ROOT / "benchmarks" / "fault_job.py"), str(nan_step), "1", "train"]
    job += [*shlex.split(f"{RUN} {way.options}"), "--out", str(folder / "run"), *(["--resume"] if resume else [])]
    words = mpirun.command(program, mpirun.name(program), way.trainers + way.extra, fault_tolerant=way.survives)
    supervisor = [sys.executable, "-m", "hvdvae", "supervise", "--backoff", "0.5", "--restarts", "1", "--"]
    return [*([] if way.survives else supervisor), *words, *job]


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[Job]:
    """A job; after it nothing of it runs."""
    log = (folder / "log").open("ab")
    env = {**mpirun.environment(os.environ), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
    job = Job(folder, process)
    try:
        yield job
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for left in [*family, process]:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()
        for undo in job.more:
            undo()


def outcome(fault: str, name: str, job: Job) -> Outcome:
    """Wait for the end, and say what became of the run."""
    status = job.end()
    if status is None:
        return Outcome(fault, name, "hangs", broken=True)
    status = status if status >= 0 else 128 - status
    before = [step for at, step in job.beats() if at <= job.fault_at]
    # A beat may have been agreed on before a rank was killed, and told after it.
    went_on = re.search(r"go on from step (\d+)", (job.folder / "log").read_text())
    least = int(went_on[1]) if went_on else -1
    after = [(at, step) for at, step in job.beats() if at > job.fault_at and step > least]
    finished = (job.out / "summary.json").exists()
    good = Folder(job.out / "checkpoints", 3).newest_good() is not None
    if finished:
        seconds = after[0][0] - job.fault_at if after else None
        goes_on_from = least if went_on else min((step for _, step in after), default=0)
        lost = max(0, before[-1] - goes_on_from) if before and after else None
        words = "started again" if "restart 1 of" in (job.folder / "log").read_text() else "goes on"
        return Outcome(fault, name, words, seconds, lost, status, broken=status != 0 or not good)
    broken = status == 0 or not good or not job.may_end
    return Outcome(fault, name, "ends, can be resumed" if good else "ends", None, None, status, broken)


def measure(fault: str, name: str, folder: Path, more: str = "") -> Outcome:
    """One fault in one way of training. `more`: options of the run."""
    way = replace(WAYS[name], options=f"{WAYS[name].options}{more}")
    inject = FAULTS[fault]
    environment: dict[str, str] = {}
    if inject is jump_clock:
        environment = fake_clock(folder)
    with small_disk(folder) if inject is fill_disk else nothing():
        words = command(way, folder, nan_step=150 if inject is spoil_gradient else 0, ranks_have=environment)
        with started(words, folder) as job:
            job.await_beats(5)
            time.sleep(random.uniform(0.0, 0.5))
            inject(job, way)
            found = outcome(fault, name, job)
            # Beats are told by the clock that jumped.
            return replace(found, seconds=None) if inject is jump_clock else found


def measure_torn(name: str, folder: Path) -> Outcome:
    """A run is killed as a whole, its newest checkpoint cut short, and the run resumed."""
    way = WAYS[name]
    with started(command(way, folder), folder) as job:
        job.await_beats(5)
        while len(list((job.out / "checkpoints").glob("step-*"))) < 2 and job.process.poll() is None:
            time.sleep(0.05)
        last = job.beats()[-1][1] if job.beats() else 0
    newest = sorted((folder / "run" / "checkpoints").glob("step-*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    with started(command(way, folder, resume=True), folder) as job:
        job.now()
        found = outcome(TORN, name, job)
    refused = "refused" in (folder / "log").read_text()
    again = [step for at, step in job.beats() if at > job.fault_at]
    lost = max(0, last - min(again)) if again else None
    words = "goes on from the one before" if refused and not found.broken else found.words
    return Outcome(TORN, name, words, None, lost, found.status, found.broken or not refused)


def measure_cut(name: str, folder: Path) -> Outcome:
    """Two hosts, and no link between them for ten seconds."""
    way, program = WAYS[name], mpirun.find()
    assert program is not None
    each = 2 if way.extra or way.trainers == 4 else 1
    if way.extra > 1 or not way.survives:
        raise Skipped("is measured by the plain way")
    try:
        with network(2, 1000.0) as hosts:
            job_words = [sys.executable, str(ROOT / "benchmarks" / "fault_job.py"), "0", "0", "train"]
            job_words += [*shlex.split(f"{RUN} {way.options}"), "--out", str(folder / "run")]
            passed = [word for key in ("PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", key)]
            words = hosts.mpirun(program, [*passed, *job_words], each=each)
            with started(words, folder) as job:
                job.await_beats(5)
                link = ["ip", "link", "set", f"{PREFIX}-v2"]
                subprocess.run([*link, "down"], check=True)
                time.sleep(STOPPED_SECONDS)
                subprocess.run([*link, "up"], check=True)
                job.now()
                return outcome(CUT, name, job)
    except NoNetwork as error:
        raise Skipped(str(error)) from None


@contextmanager
def nothing() -> Iterator[None]:
    """No preparation."""
    yield


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Inside, the results go to a file system of 24 MB."""
    run = folder / "run"
    run.mkdir()
    if os.geteuid() != 0:
        raise Skipped("a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(run)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=False)


def fake_clock(folder: Path) -> dict[str, str]:
    """The environment in which clocks follow a file."""
    libraries = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    if not libraries:
        raise Skipped("libfaketime is not installed")
    (folder / "clock").write_text("+0\n")
    return {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def soak(kills: int, place: Path) -> list[Outcome]:
    """Kill so many ranks at random moments of random ways that survive it."""
    choose = random.Random(kills)
    found = []
    for number in range(kills):
        fault = choose.choice([name for name, fault in FAULTS.items() if fault in (kill_trainer, kill_rank_0)])
        name = choose.choice([name for name, way in WAYS.items() if way.survives])
        found.append(measure(fault, name, _folder(place, f"soak-{number}"), f" --epochs {SOAK_EPOCHS}"))
        print(f"{number + 1}/{kills}: {_row(found[-1])}", flush=True)
    return found


def table(found: list[Outcome]) -> str:
    """As Markdown."""
    head = "| fault | way of training | outcome | seconds to go on | steps lost | exit status |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(_row, found)])


def _row(one: Outcome) -> str:
    seconds = "" if one.seconds is None else f"{one.seconds:.2f}"
    lost, status = ("" if value is None else str(value) for value in (one.lost, one.status))
    words = f"**broken**: {one.words}" if one.broken else one.words
    return f"| {one.fault} | {one.way} | {words} | {seconds} | {lost} | {status} |"


def _parsed(line: str) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads(line)
    except json.JSONDecodeError:  # The last line is being written.
        return {}
    return found


def _folder(place: Path, name: str) -> Path:
    folder = place / "".join(letter if letter.isalnum() else "-" for letter in name)
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    """Break all, and print the table. The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults and ways whose name has these words, as 'killed / ps'")
    parser.add_argument("--soak", type=int, default=0, help="random kills instead")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="hvdvae-faults-"))
    fault_words, _, way_words = (part.strip() for part in asked.only.partition("/"))
    found = soak(asked.soak, place) if asked.soak else []
    for fault in [] if asked.soak else [*FAULTS, TORN, CUT]:
        for name in WAYS:
            if fault_words not in fault or way_words not in name:
                continue
            folder = _folder(place, f"{fault} {name}")
            try:
                kinds = {TORN: measure_torn, CUT: measure_cut}
                one = kinds[fault](name, folder) if fault in kinds else measure(fault, name, folder)
            except Skipped as reason:
                print(f"{fault}, {name}: {reason}", file=sys.stderr)
                continue
            except RuntimeError as error:
                print(f"{fault}, {name}: {error}", file=sys.stderr)
                one = Outcome(fault, name, "did not start", broken=True)
            found.append(one)
            print(_row(one), flush=True)
    broken = [one for one in found if one.broken]
    print(f"\n{table(found)}\n\n{len(broken)} of {len(found)} broken; logs: {place}")
    if not broken:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
