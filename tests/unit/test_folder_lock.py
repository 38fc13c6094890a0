"""Two runs never write to one folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from hvdvae.cli import folder_lock
from hvdvae.cli.folder_lock import hold, release
from hvdvae.errors import BusyError, ConfigError

HOLD = """
import sys, time
from pathlib import Path
from hvdvae.cli.folder_lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.3)


def test_another_process_is_named_until_it_has_ended(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"is written by process {other.pid} on "):
            hold(tmp_path)
    finally:
        other.kill()
        other.wait()
    hold(tmp_path)
    release()


def test_a_process_may_hold_what_it_held_and_lets_go(tmp_path: Path) -> None:
    hold(tmp_path)
    hold(tmp_path)
    release()
    release()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    other.kill()
    other.wait()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*none: cannot write there"):
        hold(tmp_path / "none")


def test_a_lock_that_no_run_wrote_stays_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for mine in (b"my notes\n", b"\xff\xfe"):
        lock.write_bytes(mine)
        with pytest.raises(ConfigError, match=r"a file lock that no run wrote.*--overwrite"):
            hold(tmp_path)
        assert lock.read_bytes() == mine
    hold(tmp_path, replaces=True)
    release()
    # Of a run that ended.
    assert lock.read_text().startswith("process ")
    hold(tmp_path)
    release()


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    (tmp_path / "run").mkdir()
    for target in ("victim", "new"):
        (tmp_path / "run" / "lock").unlink(missing_ok=True)
        (tmp_path / "run" / "lock").symlink_to(tmp_path / target)
        with pytest.raises(ConfigError, match="cannot write there"):
            hold(tmp_path / "run", replaces=True)
    assert (tmp_path / "victim").read_text() == ""
    assert not (tmp_path / "new").exists()
