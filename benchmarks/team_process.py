"""Starts a team, gives it orders, and says why where it fails."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.crew import ANSWER
from benchmarks.teams import Team
from hvdvae.cli import mpirun

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
"""How long a team may take to start and open the data, which may be a download."""


class TeamError(Exception):
    """A team gave no answer."""


class TeamProcess:
    """A running team. What it prints besides answers goes to standard error."""

    def __init__(self, team: Team, options: dict[str, Any]) -> None:
        """Start it; `options` as worker.main takes them. Raises TeamError where several ranks find no mpirun."""
        self._team = team
        environment = mpirun.environment(os.environ)  # One thread a rank.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [*_launcher(team.ranks), "-m", "benchmarks.worker", team.name, json.dumps(options)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._last_words: deque[str] = deque(maxlen=40)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ready(self) -> dict[str, Any]:
        """Its first answer. Blocks; raises TeamError."""
        return self._answer(START_SECONDS)

    def ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer to an order. Blocks; raises TeamError after `seconds`, or if it ends, and then it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.end()
            raise TeamError(self._why()) from error
        return self._answer(seconds)

    def end(self) -> None:
        """Let it end, by force where it does not. Blocks for some seconds at most."""
        if self._process.stdin is not None:
            with suppress(OSError):  # It has ended already.
                self._process.stdin.close()
        for stop in (None, self._process.terminate, self._kill):
            if stop is not None:
                stop()
            try:
                self._process.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue
        self._listener.join(10)  # Its last words tell why.

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._kill()
            self.end()
            raise TeamError(f"no answer within {seconds:.0f} s") from None
        if answer is None:
            self.end()
            raise TeamError(self._why())
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._answers.put(json.loads(line.removeprefix(ANSWER)))
            elif line.strip():
                self._last_words.append(line.rstrip())
                print(f"[{self._team.name}] {line.rstrip()}", file=sys.stderr)
        self._answers.put(None)

    def _why(self) -> str:
        """The last line that names an error, or else the exit status."""
        named = [line for line in self._last_words if "Error" in line or "error:" in line or "signal" in line]
        return named[-1].strip() if named else f"ended with status {self._process.returncode}"

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def _launcher(ranks: int) -> list[str]:
    python = [sys.executable, "-X", "faulthandler"]
    if ranks == 1:
        return python
    program = mpirun.find()
    if program is None:
        raise TeamError("found no mpirun on PATH or beside this Python: run launch/install.sh, or load your MPI")
    # mpi4py's runner ends all ranks when one raises.
    return [*mpirun.command(program, mpirun.name(program), ranks), *python, "-m", "mpi4py"]
