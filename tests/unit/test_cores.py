"""Threads of a rank: never another's cores, never more than the control group grants."""

from pathlib import Path
from typing import Any

import pytest

from hvdvae import cores
from hvdvae.world import World

ALL = set(range(8))
UNLIMITED = float("inf")


@pytest.mark.parametrize(
    ("everyone", "quota", "expected"),
    [
        ([("a", ALL)], UNLIMITED, [8]),
        ([("a", ALL), ("a", ALL)], UNLIMITED, [4, 4]),
        ([("a", ALL)] * 3, UNLIMITED, [2, 2, 2]),
        ([("a", ALL)] * 9, UNLIMITED, [1] * 9),
        ([("a", ALL), ("b", ALL)], UNLIMITED, [8, 8]),
        ([("a", {0, 1}), ("a", {2, 3})], UNLIMITED, [2, 2]),
        ([("a", {0, 1, 2}), ("a", {2, 3, 4, 5}), ("b", {0})], UNLIMITED, [1, 2, 1]),
        ([("a", ALL)], 2.0, [2]),
        ([("a", {0, 1}), ("a", {2, 3})], 2.0, [1, 1]),
        ([("a", ALL)], 0.5, [1]),
        ([("a", ALL), ("a", ALL), ("a", ALL, True)], UNLIMITED, [3, 3, 1]),
        ([("a", ALL), ("b", ALL), ("a", ALL, True)], 4.0, [3, 4, 1]),
    ],
)
def test_cores_are_shared_fairly(everyone: list[tuple[Any, ...]], quota: float, expected: list[int]) -> None:
    seats = [cores.Seat(*seat) for seat in everyone]
    assert [cores.fair_threads(rank, seats, quota) for rank in range(len(seats))] == expected


@pytest.mark.parametrize(
    ("everyone", "expected"),
    [
        ([("a", ALL), ("a", ALL)], [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ([("a", ALL), ("b", ALL), ("a", ALL), ("b", ALL)], [{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5, 6, 7}, {4, 5, 6, 7}]),
        ([("a", ALL)] * 3, [{0, 1}, {2, 3}, {4, 5}]),
        ([("a", ALL), ("a", ALL), ("a", ALL, True)], [{0, 1, 2}, {3, 4, 5}, set()]),
        # One of its own is too few; alone, or placed by a launcher, there is nothing to do.
        ([("a", ALL)] * 5, [set()] * 5),
        ([("a", ALL), ("b", ALL)], [set(), set()]),
        ([("a", {0, 1, 2, 3}), ("a", {4, 5, 6, 7})], [set(), set()]),
    ],
)
def test_ranks_keep_to_cores_by_their_place_on_the_host(
    everyone: list[tuple[Any, ...]], expected: list[set[int]]
) -> None:
    seats = [cores.Seat(*seat) for seat in everyone]
    assert [cores.own_cores(rank, seats, sorted(ALL)) for rank in range(len(seats))] == expected


def test_neighbouring_cores_are_of_one_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of two cores with two threads each, numbered as Linux often does: threads last."""
    monkeypatch.setattr(cores, "_CORES", tmp_path)
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number // 2 % 2}\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    assert cores.in_neighbourhood(ALL) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert cores.in_neighbourhood({9, 8}) == [8, 9], "where nothing is known"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("max 100000\n", UNLIMITED), ("what\n", UNLIMITED)],
)
def test_the_control_groups_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: float
) -> None:
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")
    assert cores.granted_cores({}) == UNLIMITED
    (tmp_path / "cgroup" / "job" / "step").mkdir(parents=True)
    for place in ("cgroup", "cgroup/job", "cgroup/job/step"):
        (tmp_path / "own").write_text("0::/job/step\n")
        (tmp_path / place / "cpu.max").write_text(content)
        assert cores.granted_cores({}) == expected
        (tmp_path / place / "cpu.max").unlink()


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", UNLIMITED)])
def test_the_quota_of_control_groups_of_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: float
) -> None:
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("11:memory:/other\n4:cpu,cpuacct:/job/step\n0::/\n")
    job = tmp_path / "cgroup" / "cpu" / "job"
    job.mkdir(parents=True)
    (job / "cpu.cfs_quota_us").write_text(quota + "\n")
    (job / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.granted_cores({}) == expected


@pytest.mark.parametrize(
    ("environ", "expected"), [({"SLURM_CPUS_ON_NODE": "3"}, 3.0), ({"SLURM_CPUS_ON_NODE": ""}, 8.0)]
)
def test_slurm_counts_where_no_affinity_holds_a_job_to_its_cores(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: float
) -> None:
    monkeypatch.setattr(cores, "_cgroup_cores", lambda: 8.0)
    assert cores.granted_cores(environ) == expected


def test_one_process_takes_what_it_may_run_on() -> None:
    assert 1 <= cores.threads_of_rank(World.alone(device="cpu")) <= len(cores.available_cores())


def test_where_there_is_no_affinity_all_cores_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert cores.available_cores() == {0, 1, 2}
