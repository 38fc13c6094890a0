"""A supervisor starts a failing job again, hands signals on, ends what hangs, and leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from hvdvae.cli import main
from hvdvae.cli.supervise import leaves_results

JOB = """
import json, os, pathlib, signal, subprocess, sys, time
log = pathlib.Path("log")
calls = len(log.read_text().splitlines()) if log.exists() else 0
def leave(number, frame):
    print("SIGUSR1: saved at step 3", flush=True)
    sys.exit(128 + number)
def finish(status=0):
    if status == 0:
        pathlib.Path("here").mkdir(exist_ok=True)
        pathlib.Path("here/summary.json").write_text("{}")
    sys.exit(status)
signal.signal(signal.SIGUSR1, leave)
"""
STARTED = """
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
"""
"""Tells the test that signals may come."""


class Supervised:
    """`hvdvae supervise` in a process of its own, over a Python script."""

    def __init__(
        self,
        folder: Path,
        body: str,
        *options: str,
        handlers: str = "",
        command: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.folder, self._said = folder, ""
        (folder / "job.py").write_text(JOB + handlers + STARTED + body)
        soon = () if "--restarts" in options and "0" in options else ("--backoff", "0.1")
        supervise = [sys.executable, "-m", "hvdvae", "supervise", *soon, *options, "--"]
        self.process = subprocess.Popen(
            [*supervise, *(command or [sys.executable, "job.py", "train", "--out", "here"])],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def await_calls(self, count: int) -> None:
        """Return once the job has been started so often."""
        give_up = time.monotonic() + 60
        while len(self.calls) < count:
            assert time.monotonic() < give_up
            time.sleep(0.02)

    def await_words(self, words: str) -> None:
        """Return once this has been said."""
        assert self.process.stdout is not None
        while words not in self._said:
            line = self.process.stdout.readline()
            assert line, f"it ended without {words!r}: {self._said}"
            self._said += line

    @property
    def calls(self) -> list[list[str]]:
        """Arguments of each start of the job."""
        log = self.folder / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def finish(self) -> tuple[int, str]:
        """Exit status, and all that was said."""
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, self._said + said


def test_a_job_that_does_its_work_runs_once(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "print('done'); finish()")
    assert job.finish() == (0, "done\n")
    assert job.calls == [["train", "--out", "here"]]


def test_a_job_that_fails_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "finish(75 if calls < 2 else 0)")
    status, said = job.finish()
    assert status == 0
    assert job.calls == [["train", "--out", "here"], *[["train", "--out", "here", "--resume"]] * 2]
    assert said.count("ended with status 75") == 2
    assert "restart 2 of 3 in 0.2 s" in said


def test_a_launcher_that_claims_success_without_results_has_failed(tmp_path: Path) -> None:
    """mpirun ends with 0 where it has lost a host."""
    job = Supervised(tmp_path, "finish() if calls else sys.exit(0)")
    status, said = job.finish()
    assert status == 0
    assert "the launcher ended with 0, and the job has no results" in said
    assert len(job.calls) == 2


def test_the_results_of_an_earlier_run_are_not_this_ones(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "summary.json").write_text("{}")
    os.utime(tmp_path / "here" / "summary.json", (0, 0))
    assert Supervised(tmp_path, "sys.exit(0)", "--restarts", "0").finish()[0] == 75


def test_restarts_end(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--restarts", "1")
    status, said = job.finish()
    assert status == 128 + signal.SIGKILL
    assert len(job.calls) == 2
    assert "no restart is left of 1 (--restarts)" in said


def test_what_only_the_user_can_mend_is_not_tried_again(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "sys.exit(2)")
    assert job.finish()[0] == 2
    assert len(job.calls) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_make_the_job_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    job = Supervised(tmp_path, "time.sleep(60)")
    job.await_calls(1)
    job.process.send_signal(number)
    status, said = job.finish()
    assert status == 128 + signal.SIGUSR1
    assert "saved" in said
    assert f"{number.name}: asking the job to save and leave" in said
    assert len(job.calls) == 1


def test_a_signal_between_two_attempts_ends_the_wait(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "sys.exit(1)", "--backoff", "50")
    job.await_words("restart 1 of 3 in 50 s")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 128 + signal.SIGTERM
    assert len(job.calls) == 1


def test_a_job_that_does_not_leave_is_ended(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    job = Supervised(tmp_path, "time.sleep(60)", "--grace", "0.5", handlers=deaf)
    job.await_calls(1)
    job.process.send_signal(signal.SIGTERM)
    status, said = job.finish()
    assert status == 128 + signal.SIGTERM
    assert "not left 0.5 s after a signal (--grace)" in said


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    job = Supervised(tmp_path, "time.sleep(60)", "--grace", "50", handlers=deaf)
    job.await_calls(1)
    job.process.send_signal(signal.SIGINT)
    job.await_words("SIGINT: asking the job to save and leave")
    job.process.send_signal(signal.SIGINT)
    status, said = job.finish()
    assert status == 128 + signal.SIGTERM
    assert "a second SIGINT; ending it" in said


@pytest.mark.parametrize("launcher", ["mpirun", "python3"])
def test_a_signal_goes_past_a_script_that_would_die_of_it(tmp_path: Path, launcher: str) -> None:
    """The script goes on once the launcher in it, or the program, has left."""
    script = tmp_path / "run.sh"
    (tmp_path / launcher).symlink_to(sys.executable)
    script.write_text(f"#!/bin/bash\n{tmp_path / launcher} job.py\nstatus=$?\necho ended with $status\nexit $status\n")
    job = Supervised(tmp_path, "time.sleep(60)", command=["bash", str(script), "--out", "here"])
    job.await_calls(1)
    job.process.send_signal(signal.SIGTERM)
    status, said = job.finish()
    assert "saved at step 3\nended with 138" in said
    assert status == 128 + signal.SIGUSR1


def test_a_job_that_was_ended_has_not_done_its_work(tmp_path: Path) -> None:
    """Though it leaves in peace, and has nothing to show for what it did."""
    command = ["bash", "-c", "trap 'exit 0' TERM; sleep 50 & wait"]
    job = Supervised(tmp_path, "", "--silence", "1", "--restarts", "0", command=command)
    status, said = job.finish()
    assert status == 75
    assert "has said nothing for 1 s" in said


def test_every_program_of_one_launch_resumes(tmp_path: Path) -> None:
    several = ["train", "--out", "here", ":", "-n", "1", "train", "--overwrite", "--out", "here"]
    job = Supervised(tmp_path, "finish(75 if calls < 1 else 0)", command=[sys.executable, "job.py", *several])
    assert job.finish()[0] == 0
    assert job.calls[1] == ["train", "--out", "here", "--resume", ":", "-n", "1", "train", "--out", "here", "--resume"]


def test_a_silent_job_is_ended_and_started_again(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "time.sleep(60 if calls < 1 else 0); finish()", "--silence", "1")
    status, said = job.finish()
    assert status == 0
    assert "said nothing for 1 s (--silence)" in said
    assert len(job.calls) == 2


def test_ranks_that_a_launcher_left_behind_are_ended(tmp_path: Path) -> None:
    body = """
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(rank.pid, flush=True)
finish()
"""
    status, said = Supervised(tmp_path, body).finish()
    assert status == 0
    assert not psutil.pid_exists(int(said.split()[0]))


def test_a_launcher_that_goes_on_without_ranks_is_ended(tmp_path: Path) -> None:
    """With less time for the dying than users' jobs have."""
    script = "import time; print('hvdvae: deadline of 3 s exceeded (--deadline)', flush=True); time.sleep(60)"
    program = (
        "import sys, hvdvae.supervisor as supervisor; from hvdvae.cli import main; supervisor.DYING_SECONDS = 0.5;"
        f"sys.exit(main(['supervise', '--restarts', '0', '--', sys.executable, '-c', {script!r}, '--out', 'x']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "its launcher goes on; ending it" in ended.stderr


def test_a_job_is_requeued_after_a_signal(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = Supervised(tmp_path, "time.sleep(60)", "--requeue", SLURM_JOB_ID="7", PATH=path)
    job.await_calls(1)
    job.process.send_signal(signal.SIGUSR1)
    status, said = job.finish()
    assert status == 0
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "requeueing Slurm job 7" in said


@pytest.mark.parametrize(
    ("body", "status", "requeued"),
    [
        # Saved, and left.
        ("pathlib.Path('here/checkpoints/step-2.safetensors').write_text(''); sys.exit(138)", 0, True),
        # Left without a step further, as at a final test that takes longer than a stretch.
        ("sys.exit(138)", 138, False),
        # Came to its end meanwhile.
        ("finish()", 0, False),
        # Could not save.
        ("pathlib.Path('here/checkpoints/step-2.safetensors').write_text(''); sys.exit(2)", 2, False),
    ],
)
def test_what_would_come_no_further_is_not_requeued(tmp_path: Path, body: str, status: int, requeued: bool) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (tmp_path / "here" / "checkpoints").mkdir(parents=True)
    (tmp_path / "here" / "checkpoints" / "step-1.safetensors").write_text("")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    warned = f"def warned(number, frame):\n    {body}\nsignal.signal(signal.SIGUSR1, warned)"
    job = Supervised(tmp_path, "time.sleep(60)", "--requeue", handlers=warned, SLURM_JOB_ID="7", PATH=path)
    job.await_calls(1)
    job.process.send_signal(signal.SIGUSR1)
    found, said = job.finish()
    assert found == status, said
    assert (tmp_path / "asked").exists() == requeued
    assert ("has no checkpoint of this stretch" in said) == (status == 138)


def test_a_job_that_is_cancelled_while_it_saves_is_not_requeued(tmp_path: Path) -> None:
    save = "def save(number, frame):\n    while not os.path.exists('cancelled'):\n        time.sleep(0.02)\n"
    handlers = save + "    sys.exit(138)\nsignal.signal(signal.SIGUSR1, save)"
    job = Supervised(tmp_path, "time.sleep(60)", "--requeue", handlers=handlers, SLURM_JOB_ID="7")
    job.await_calls(1)
    job.process.send_signal(signal.SIGUSR1)
    job.await_words("SIGUSR1: asking the job to save and leave")
    job.process.send_signal(signal.SIGTERM)
    (tmp_path / "cancelled").touch()
    status, said = job.finish()
    assert status == 138
    assert "requeueing" not in said


def test_the_job_does_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "print(os.getpid(), flush=True); time.sleep(60)")
    assert job.process.stdout is not None
    rank = int(job.process.stdout.readline())
    job.process.kill()
    psutil.Process(rank).wait(20)
    job.finish()


@pytest.mark.parametrize("in_script", [False, True])
def test_the_job_of_a_supervisor_that_is_killed_saves_and_leaves(tmp_path: Path, in_script: bool) -> None:
    """Also behind a script, which would die of the signal; and what the job says meanwhile ends nothing."""
    (tmp_path / "mpirun").symlink_to(sys.executable)
    script = tmp_path / "run.sh"
    script.write_text(f"{tmp_path / 'mpirun'} job.py\necho left with $? > left\n")
    body = "while True:\n    print('at work', flush=True)\n    time.sleep(0.02)"
    command = ["bash", str(script), "--out", "here"] if in_script else ()
    save = (
        "def save(number, frame):\n    print('saving', flush=True)\n    open('saved', 'w').close()\n    sys.exit(3)\n"
    )
    handlers = f"print(os.getpid(), flush=True)\n{save}signal.signal(signal.SIGUSR1, save)"
    job = Supervised(tmp_path, body, handlers=handlers, command=command)
    assert job.process.stdout is not None
    rank = psutil.Process(int(job.process.stdout.readline()))
    job.await_calls(1)
    job.process.kill()
    rank.wait(50)
    _, said = job.finish()
    assert (tmp_path / "saved").exists()
    assert "the supervisor was killed: asking the job to save and leave" in said
    assert "saving" in said
    assert not in_script or (tmp_path / "left").read_text() == "left with 3\n"


def test_what_does_not_leave_when_its_supervisor_was_killed_is_ended(tmp_path: Path) -> None:
    deaf = "print(os.getpid(), flush=True)\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    job = Supervised(tmp_path, "time.sleep(600)", "--grace", "0.5", handlers=deaf)
    assert job.process.stdout is not None
    rank = psutil.Process(int(job.process.stdout.readline()))
    job.await_calls(1)
    job.process.kill()
    rank.wait(50)
    job.finish()


CAUSE = "hvdvae: the cause, on rank 1 (n1): ValueError: of the user's"
MPI_ABORT = "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD"


@pytest.mark.parametrize("cause", [CAUSE, "hvdvae: error (rank 1 of 2): --data x: found no such file"])
def test_the_cause_is_said_once_more_behind_the_words_of_a_launcher(tmp_path: Path, cause: str) -> None:
    body = f"print({cause!r}, flush=True); print({MPI_ABORT!r}, flush=True); sys.exit(1)"
    status, said = Supervised(tmp_path, body, "--restarts", "1").finish()
    assert status == 1
    assert said.count(cause) == 2, "once a start"
    assert said.splitlines()[-1] == cause.replace("hvdvae:", "hvdvae supervise:")


def test_a_cause_that_is_the_last_line_is_not_repeated(tmp_path: Path) -> None:
    status, said = Supervised(tmp_path, f"print({CAUSE!r}, flush=True); sys.exit(2)").finish()
    assert status == 2
    assert said == f"{CAUSE}\n"


def test_a_terminal_that_is_closed_makes_the_job_save_and_leave(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "time.sleep(60)")
    job.await_calls(1)
    job.process.send_signal(signal.SIGHUP)
    status, said = job.finish()
    assert status == 138
    assert "saved" in said


def test_a_run_that_names_no_folder_has_to_say_that_it_is_finished(tmp_path: Path) -> None:
    """As under launch/mpirun.sh."""
    for words, status in (("'hvdvae: finished, results in runs/x'", 0), ("'hm'", 75)):
        script = f"print({words})"
        command = ["supervise", "--restarts", "0", "--", sys.executable, "-c", script, "train"]
        ended = subprocess.run([sys.executable, "-m", "hvdvae", *command], cwd=tmp_path, timeout=60, check=False)
        assert ended.returncode == status


def test_a_script_of_any_name_has_to_leave_results_in_its_folder(tmp_path: Path) -> None:
    write = (
        "import sys; from pathlib import Path; Path(sys.argv[-1]).mkdir(); Path(sys.argv[-1], 'summary.json').touch()"
    )
    for script, status in (("pass", 75), (write, 0)):
        command = ["supervise", "--restarts", "0", "--", sys.executable, "-c", script, "--out", "run"]
        ended = subprocess.run([sys.executable, "-m", "hvdvae", *command], cwd=tmp_path, timeout=60, check=False)
        assert ended.returncode == status


@pytest.mark.parametrize(
    ("command", "has"),
    [
        ("mpirun -np 2 hvdvae train", True),
        ("./wrap.sh --out=run", True),
        ("./wrap.sh --config run.yaml --out run", True),
        ("mpirun -h n1 hvdvae train --out run", True),
        ("mpirun -np 2 hvdvae train --help", False),
        ("mpirun -np 2 hvdvae train --out run -h", False),
        ("./wrap.sh --help", False),
        ("hvdvae evaluate run", False),
    ],
)
def test_which_commands_leave_results(command: str, has: bool) -> None:
    assert leaves_results(command.split()) == has
    assert leaves_results(["ssh", "host", command]) == has


def test_a_job_that_is_cancelled_is_not_requeued(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "time.sleep(60)", "--requeue", SLURM_JOB_ID="7")
    job.await_calls(1)
    job.process.send_signal(signal.SIGTERM)
    status, said = job.finish()
    assert status == 128 + signal.SIGUSR1
    assert "requeueing" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["supervise", "--", "hvdvae", "train"], "--out"),
        (["supervise", "--requeue", "--", "hvdvae", "train", "--out", "x"], "SLURM_JOB_ID"),
        (["supervise", "--", "hvdvae", "train", "--out", ""], "--out is empty"),
        (["supervise", "--backoff", "-1", "--", "true"], "--backoff is -1"),
    ],
)
def test_bad_supervision(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(words) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("epochs: 3", "no --out"), ("out: x\noverwrite: true", "overwrite")])
def test_a_file_with_which_no_restart_could_go_on_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["supervise", "--", "hvdvae", "train", "--config", str(file)]) == 2
    assert message in capfd.readouterr().err


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hvdvae", "supervise", "--", "no-such-program", "--out", "x"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 127
    assert "no-such-program: No such file" in ended.stderr


def test_what_is_deleted_at_the_start_is_not_deleted_at_a_restart(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB + STARTED + "finish(75 if calls < 1 else 0)")
    words = [
        "-m",
        "hvdvae",
        "supervise",
        "--backoff",
        "0.1",
        "--",
        sys.executable,
        "job.py",
        "--out",
        "here",
        "--overwrite",
    ]
    ended = subprocess.run([sys.executable, *words], cwd=tmp_path, timeout=60)
    assert ended.returncode == 0
    calls = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert calls == [["--out", "here", "--overwrite"], ["--out", "here", "--resume"]]


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    """As in `hvdvae supervise ... | head -1`: the job goes on to its end."""
    (tmp_path / "job.py").write_text(JOB + "print('word ' * 100000, flush=True); open('done', 'w'); finish()")
    words = [sys.executable, "-m", "hvdvae", "supervise", "--", sys.executable, "job.py", "--out", "here"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
