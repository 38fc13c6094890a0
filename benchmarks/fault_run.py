"""A job that something happens to: started, watched by the clock of another process, and ended.

What ranks tell bears their own time, which may be what broke. So each line that they write is given the time at which
it is seen here, a hundredth of a second later at most.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.fault_ways import ROOT
from hvdvae.cli import mpirun

POLL_SECONDS = 0.01
SECONDS = 90.0
"""Without a word in its log, its metrics or its folder of checkpoints, after which a job is taken to hang."""


class Tail:
    """Lines that are written to a file from now on, each with the time at which it was seen."""

    def __init__(self, path: Path) -> None:
        """Names only; the file may come later."""
        self.lines: list[tuple[float, str]] = []
        """Seconds of time.monotonic, and the line."""
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._lock = threading.Lock()

    def look(self) -> None:
        """Take what is new. Any thread may call it."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._at)
                    found = file.read()
            except FileNotFoundError:
                return
            now = time.monotonic()
            self._at += len(found)
            *whole, self._rest = (self._rest + found).split(b"\n")
            self.lines += [(now, line.decode(errors="replace")) for line in whole]


class Job:
    """A running job in a folder of its own."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        """Watch it from now on, until `unwatch`."""
        self.folder, self.process = folder, process
        self.out = folder / "run"
        self.fault_at = 0.0
        """Seconds of time.monotonic."""
        self.may_end = False
        """Whether this way cannot survive this fault; it shall then end, and be able to resume."""
        self.step_before = 0
        """Of the last beat of an earlier job of this run."""
        self.spent = 0
        """Steps that the fault itself was to cost."""
        self._log, self._metrics = Tail(folder / "log"), Tail(self.out / "metrics.jsonl")
        self._unwatched = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._unwatched.wait(POLL_SECONDS):
            self._log.look()
            self._metrics.look()

    def unwatch(self) -> None:
        """Take what is left, and watch no more."""
        self._unwatched.set()
        self._watcher.join()
        self._log.look()
        self._metrics.look()

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
        """When a line of metrics was seen, and its step, of each so far."""
        lines = [(at, json.loads(line)) for at, line in list(self._metrics.lines)]
        return [(at, line["step"]) for at, line in lines if line["kind"] == "step"]

    def said(self) -> list[tuple[float, str]]:
        """Its log so far, and when each line was seen."""
        return list(self._log.lines)

    def await_beats(self, count: int) -> None:
        """Return once training is under way."""
        give_up = time.monotonic() + 60
        while len(self.beats()) < count:
            if time.monotonic() > give_up or self.process.poll() is not None:
                raise RuntimeError(f"did not start to train: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def end(self) -> int | None:
        """Its status, as a shell has it, once it has ended; None where it says nothing any more. Blocks."""
        said, since = -1, time.monotonic()
        while self.process.poll() is None and time.monotonic() - since < SECONDS:
            files = (self.folder / "log", self.out / "metrics.jsonl", self.out / "checkpoints")
            stamp = sum(file.stat().st_mtime_ns for file in files if file.exists())
            if stamp != said:
                said, since = stamp, time.monotonic()
            time.sleep(0.05)
        status = self.process.poll()
        self.unwatch()
        return 128 - status if status is not None and status < 0 else status

    def now(self) -> None:
        """The fault happens now."""
        self.fault_at = time.monotonic()


@contextmanager
def started(words: Sequence[str], folder: Path) -> Iterator[Job]:
    """A job; after it nothing of it runs."""
    env = {**mpirun.environment(os.environ), "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
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
        job.unwatch()
