"""Shared memory of killed jobs is cleared; what a process has, or may be about to have, is not."""

import mmap
import os
import socket
from pathlib import Path

import pytest

from hvdvae.cli import leftovers

HOST = socket.gethostname()


def segment(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(bytes(mmap.PAGESIZE))
    return path


@pytest.fixture(autouse=True)
def _all_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a change of a file cannot be set."""
    monkeypatch.setattr(leftovers, "YOUNG_SECONDS", -1.0)


def test_what_no_process_has_mapped_is_cleared_and_said(tmp_path: Path) -> None:
    for name in (f"sm_segment.{HOST}.0.5ab0001.0", f"vader_segment.{HOST}.0.5ab0001.1"):
        segment(tmp_path, name)
    said = leftovers.clear(tmp_path)
    assert said == f"cleared 2 segments (0 MiB) in {tmp_path} that killed jobs had left behind"
    assert list(tmp_path.iterdir()) == []
    assert leftovers.clear(tmp_path) == ""


def test_what_a_process_has_stays(tmp_path: Path) -> None:
    path = segment(tmp_path, f"sm_segment.{HOST}.0.5ab0001.0")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert leftovers.clear(tmp_path) == ""
        assert path.exists()
    assert "cleared 1" in leftovers.clear(tmp_path)


@pytest.mark.parametrize(
    "name", [f"other.{HOST}.0.5ab0001.0", "sm_segment.another-host.0.5ab0001.0", "psm_1a2b3c4d", "torch_123_0"]
)
def test_what_is_not_of_an_mpi_on_this_host_stays(tmp_path: Path, name: str) -> None:
    path = segment(tmp_path, name)
    assert leftovers.clear(tmp_path) == ""
    assert path.exists()


def test_links_young_segments_and_those_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    link = tmp_path / f"sm_segment.{HOST}.0.5ab0001.0"
    link.symlink_to(mine)
    assert leftovers.clear(tmp_path) == ""
    link.unlink()
    path = segment(tmp_path, f"sm_segment.{HOST}.0.5ab0001.1")
    monkeypatch.setattr(leftovers, "YOUNG_SECONDS", 60.0)
    assert leftovers.clear(tmp_path) == ""
    monkeypatch.setattr(leftovers, "YOUNG_SECONDS", -1.0)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert leftovers.clear(tmp_path) == ""
    assert path.exists()


def test_nothing_is_cleared_where_nobody_knows_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(tmp_path, f"sm_segment.{HOST}.0.5ab0001.0")
    monkeypatch.setattr(leftovers, "_mapped", lambda: None)
    assert leftovers.clear(tmp_path) == ""
    assert path.exists()
    assert leftovers.clear(tmp_path / "nowhere") == ""
