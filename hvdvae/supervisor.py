"""Runs a job, hands signals on to it, ends it where it hangs, and starts it again where it failed.

One process beside the launcher, for what no rank can do: all ranks may be dead, and the launcher may not have noticed.

    the command ends with 0 and has its results, whatever signal came,
    or with an error that only its user can mend                        the same status
    it ends with 0 and without results: a launcher that has lost a
    host has been seen to do so                                         taken to have failed
    it fails, or is ended below                                        once more with --resume, after a pause
    it says that it ends (DYING), and for DYING_SECONDS nothing more   it is ended
    it says nothing for `silence` seconds                              it is ended
    SIGINT, SIGTERM, SIGHUP or SIGUSR1 comes                           it gets SIGUSR1: save, leave, and stay away
    the supervisor is killed                                           the same (deputy.py)
    it ends badly                                                      what it said of the cause is said once more, last
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, NamedTuple, TextIO

import psutil  # type: ignore[import-untyped]

from hvdvae.deputy import Deputy
from hvdvae.signals import STOPPING

DYING = re.compile(rb"hvdvae: (deadline of .* exceeded|uncaught exception on rank|error)")
"""What ranks say before they end the job. A launcher that lost a host has been seen to go on without any rank."""
FINISHED = b"hvdvae: finished, results in "
"""What rank 0 says last."""
CAUSE = re.compile(rb"hvdvae: ((?:the cause, on rank|error[: (]|deadline of [^\n]* exceeded)[^\n]*)\r?\n")
"""What a rank says of why the job ends, in one line. A launcher adds lines of its own, up to twenty."""
SAVED = b": saved at step "
"""What rank 0 says after a signal."""
LONGEST_LINE = 2000
DYING_SECONDS = 60.0
END_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
LONGEST_PAUSE = 600.0
LAUNCHERS = {"mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.hydra", "orterun", "prterun", "srun"}
"""What hands a SIGUSR1 on to its ranks."""
SHELLS = ("bash", "sh", "dash", "zsh", "ksh")
MENDED_BY_USERS = (2, 126, 127)
"""Exit statuses that would be the same again: our own errors, and a command that cannot be run."""
LOST_STATUS = 75
"""EX_TEMPFAIL, as of a deadline."""
PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How patient a supervisor is; seconds."""

    restarts: int
    backoff: float
    """Before the first restart; twice as long before each further one."""
    silence: float
    """That the command may say nothing."""
    grace: float
    """That it has after a signal, to save and leave."""


class End(NamedTuple):
    """How a supervised command ended."""

    status: int
    """As a shell has it: 128 and the number of the signal that ended it."""
    signal: int
    """That somebody sent to the supervisor, or to the ranks, to stop it; 0: nobody, or it was done by then."""
    said_finished: bool = False
    """Whether it said that it has its results (FINISHED)."""
    for_good: bool = False
    """Whether a signal came that does not announce a later stretch: not SIGUSR1 alone."""
    said_saved: bool = False
    """Whether it said that it saved before it left (SAVED)."""
    cause: str = ""
    """What a rank said first of why the job ends, where other lines came behind it."""


def supervise(command: Sequence[str], policy: Policy, results: Callable[[], object] | None) -> End:
    """Run a command until it has done its work, or nothing helps. Blocks; only the main thread can call it.

    `results`: what stands where its results will, another value once they do, and None for nothing; no function where
    its status is proof enough. Mutates the signal handlers of the process while it runs, and makes orphans of the
    command children of this process.
    """
    _adopt_orphans()
    with _noted_signals() as received:
        for failures in range(policy.restarts + 1):
            before = results() if results is not None else None
            end = _run(list(command) if not failures else _resuming(command), policy, received)
            if end.status == 0:
                if results is None or end.said_finished or results() not in (None, before):
                    return End(0, 0)
                if not end.signal:
                    _say(
                        "the launcher ended with 0, and the job has no results: it did not say that it is finished, "
                        "and wrote no summary.json in its --out"
                    )
                end = end._replace(status=128 + end.signal if end.signal else LOST_STATUS)
            if end.signal or end.status in MENDED_BY_USERS:
                _say_cause(end)
                return end
            if failures == policy.restarts:
                _say(f"ended with status {end.status}; no restart is left of {policy.restarts} (--restarts)")
                _say_cause(end)
                return end
            pause = min(policy.backoff * 2**failures, LONGEST_PAUSE)
            _say(f"ended with status {end.status}; restart {failures + 1} of {policy.restarts} in {pause:g} s")
            _sleep(pause, until=lambda: bool(received))
            if received:
                return End(128 + received[0], received[0], for_good={*received} != {signal.SIGUSR1})
    raise AssertionError("a loop of at least one turn returns")


def _run(command: Sequence[str], policy: Policy, received: list[int]) -> End:
    """Once."""
    try:
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        _say(f"{command[0]}: {error.strerror or error}")
        return End(127 if isinstance(error, FileNotFoundError) else 126, 0)
    deputy = Deputy(job, policy.grace, _ask_to_leave)
    words = _Words(job)
    asked_at: float | None = None
    reason = ""
    try:
        while job.poll() is None:
            _sleep(0.2, until=lambda: job.poll() is not None)
            now = time.monotonic()
            if received and asked_at is None:
                asked_at = now
                _say(f"{signal.Signals(received[0]).name}: asking the job to save and leave")
                _ask_to_leave(job.pid)
            reason = _reason_to_end(words, policy, asked_at, now)
            if received.count(signal.SIGINT) > 1:
                reason = "a second SIGINT"
            if reason:
                _say(f"{reason}; ending it")
                break
    finally:
        deputy.dismiss()
        _end(job)
    words.close()
    status = job.returncode if job.returncode >= 0 else 128 - job.returncode
    if received:
        for_good = {*received} != {signal.SIGUSR1}
        return End(status, received[0], words.said_finished, for_good, words.said_saved, words.cause)
    if reason and status == 0:
        status = LOST_STATUS  # It left in peace when it was ended, and has not done its work.
    # Ranks that got the signal themselves, as from `scancel --signal` or sbatch's --signal without B:.
    stopped = status - 128 if status - 128 in STOPPING and not reason else 0
    for_good = stopped not in (0, signal.SIGUSR1)
    return End(status, stopped, words.said_finished, for_good, words.said_saved, words.cause)


def _reason_to_end(words: "_Words", policy: Policy, asked_at: float | None, now: float) -> str:
    if asked_at is not None and now - asked_at > policy.grace:
        return f"the job has not left {policy.grace:g} s after a signal (--grace)"
    # Who goes on talking lives: it was one rank of those that others go on without.
    if words.said_dying and now - words.last > DYING_SECONDS:
        return f"the job said that it ends, and nothing for {DYING_SECONDS:g} s, and its launcher goes on"
    if now - words.last > policy.silence:
        return f"the job has said nothing for {policy.silence:g} s (--silence)"
    return ""


class _Words:
    """What a job says, passed through; when it did so last, and whether it said that it ends."""

    def __init__(self, job: "subprocess.Popen[bytes]") -> None:
        self.last = time.monotonic()
        self.said_dying = self.said_finished = self.said_saved = False
        self._cause = b""
        self._behind_cause = False
        pipes = ((job.stdout, sys.stdout), (job.stderr, sys.stderr))
        self._threads = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in pipes]
        for thread in self._threads:
            thread.start()

    def _pass_on(self, pipe: IO[bytes], to: TextIO) -> None:
        tail = b""
        while some := os.read(pipe.fileno(), 65536):
            self.last = time.monotonic()
            # A line may come in two pieces.
            tail = (tail + some)[-LONGEST_LINE - len(some) :]
            self.said_dying |= bool(DYING.search(tail))
            self.said_finished |= FINISHED in tail
            self.said_saved |= SAVED in tail
            self._note_cause(tail, some)
            with suppress(OSError):  # Whoever listened has gone; the job goes on, and must not block on a full pipe.
                os.write(to.fileno(), some)

    @property
    def cause(self) -> str:
        """What was said of why the job ends; "" where nothing came behind it, as it is the last line then."""
        return self._cause.decode(errors="replace").strip() if self._behind_cause else ""

    def _note_cause(self, tail: bytes, some: bytes) -> None:
        if self._cause:
            self._behind_cause |= bool(some.strip())
        elif found := CAUSE.search(tail):
            self._cause = found[1]
            self._behind_cause = bool(tail[found.end() :].strip())

    def close(self) -> None:
        """All that was said has been passed on; blocks for a moment only, though an orphan hold the pipe."""
        for thread in self._threads:
            thread.join(END_SECONDS)


def _ask_to_leave(job: int) -> None:
    """SIGUSR1, by the launcher, which may stand behind a script of the user's, who would die of it.

    So would horovodrun: there the ranks of this host get it, and one is enough.
    """
    try:
        tree = [psutil.Process(job)]
    except psutil.Error:
        return  # It has ended meanwhile.
    tree += _children(tree[0])
    programs = {process.pid: _program(process) for process in tree}
    if "horovodrun" in programs.values():
        asked = [process for process in tree if _is_rank(process)]
        if not asked:  # All are on other hosts, and nobody can ask them.
            tree[0].terminate()
            return
    else:
        launchers = [process for process in tree if programs[process.pid] in LAUNCHERS]
        asked = launchers or [process for process in tree if programs[process.pid] not in (*SHELLS, "")]
        # Those on top: they pass it on.
        below = {child.pid for process in asked for child in _children(process)}
        asked = [process for process in asked if process.pid not in below] or tree[:1]
    for process in asked:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGUSR1)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    return []


def _program(process: psutil.Process) -> str:
    """Name of the program that a process runs, of a script or a module where it is an interpreter."""
    with suppress(psutil.Error):
        words = [os.path.basename(word) for word in process.cmdline()[:4]]
        if words[:1] and words[0].startswith("python"):
            words = [word for word in words[1:] if not word.startswith("-")]
        return words[0] if words else ""
    return ""


def _is_rank(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        ranks = {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"}
        return bool(ranks & process.environ().keys()) and "train" in process.cmdline()
    return False


def _end(job: "subprocess.Popen[bytes]") -> None:
    """Leave nothing running: SIGTERM first, by which a launcher ends its ranks, also on other hosts."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            job.kill()
    job.wait()
    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, END_SECONDS)


def _resuming(command: Sequence[str]) -> list[str]:
    """The command, told to go on from its newest good checkpoint."""
    parts: list[list[str]] = [[]]
    for word in command:
        if word == ":":  # mpirun starts several programs, each with words of its own.
            parts.append([":"])
        elif word != "--overwrite":
            parts[-1].append(word)
    return [word for part in parts for word in (part if "--resume" in part else [*part, "--resume"])]


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Inside, signals that ask to stop are noted in the list, in the order they came."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # Ignored where nohup, or a shell, wants the job to outlive a terminal.
    heard = [*STOPPING, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sleep(seconds: float, *, until: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not until() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def _adopt_orphans() -> None:
    """Whatever a launcher leaves behind becomes a child of this process, which can then end it. Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def _say_cause(end: End) -> None:
    if end.cause:
        _say(end.cause)


def _say(text: str) -> None:
    sys.stderr.write(f"hvdvae supervise: {text}\n")
    sys.stderr.flush()
