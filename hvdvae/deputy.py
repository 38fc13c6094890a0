"""Stands in for a supervisor that is killed: the job saves and leaves, where nobody else would tell it to.

A killed supervisor can do nothing any more, and what the job says would end in a pipe that nobody reads, which ends a
launcher. So a second process, forked before the job is watched, waits for the end of the first: a pipe tells it. It
then asks the job to leave, passes on what it says, and ends it where it does not leave in time.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO

import psutil  # type: ignore[import-untyped]

END_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


class Deputy:
    """Waits for the death of this process, until `dismiss`."""

    def __init__(self, job: "subprocess.Popen[bytes]", grace: float, ask_to_leave: Callable[[int], None]) -> None:
        """Fork it. `grace`: seconds that the job has to leave; `ask_to_leave`: how it is asked, by its number."""
        sys.stdout.flush()
        sys.stderr.flush()
        theirs, self._ours = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            try:
                os.close(self._ours)
                _wait(theirs, job, grace, ask_to_leave)
            finally:
                os._exit(0)
        os.close(theirs)

    def dismiss(self) -> None:
        """The job has ended, or is ended by this process. Blocks for a moment."""
        with suppress(OSError):
            os.write(self._ours, b"x")
        os.close(self._ours)
        with suppress(ChildProcessError):
            os.waitpid(self._process, 0)


def _wait(pipe: int, job: "subprocess.Popen[bytes]", grace: float, ask_to_leave: Callable[[int], None]) -> None:
    os.setsid()  # Ctrl-C, and a closed terminal, are the supervisor's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        process = psutil.Process(job.pid)
    except psutil.Error:
        return
    if os.read(pipe, 1):
        return
    for source, to in ((job.stdout, 1), (job.stderr, 2)):
        threading.Thread(target=_pass_on, args=(source, to), daemon=True).start()
    _say("the supervisor was killed: asking the job to save and leave")
    tree = [process]
    with suppress(psutil.Error):
        tree += process.children(recursive=True)
    ask_to_leave(job.pid)
    _, left = psutil.wait_procs(tree, timeout=grace)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for one in left:
            with suppress(psutil.Error):
                end(one)
        _, left = psutil.wait_procs(left, timeout=END_SECONDS)


def _pass_on(pipe: IO[bytes], to: int) -> None:
    while some := os.read(pipe.fileno(), 65536):
        with suppress(OSError):  # Whoever listened has gone, too.
            os.write(to, some)


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"hvdvae supervise: {text}\n".encode())
