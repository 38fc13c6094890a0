"""The table of places, and what is wrong with them: pure."""

from itertools import combinations

import pytest

from hvdvae.cli import main
from hvdvae.cli.placement import (
    Place,
    absent_hosts,
    announce,
    check_hosts,
    check_slurm,
    check_versions,
    crowded,
    table,
)
from hvdvae.errors import WorldError
from hvdvae.launcher import Launch
from hvdvae.world import World
from hvdvae.world.probe import Pair, rounds, slow_pairs


def place(rank: int, host: str = "a", role: str = "trains", **changes: object) -> Place:
    values = {"device": "cpu", "cores": [0, 1], "quota": None, "threads": 1, "versions": {"torch": "2"}, **changes}
    return Place(rank, host, role, **values)  # type: ignore[arg-type]


def test_the_table_has_a_line_for_those_that_are_alike() -> None:
    places = [place(0, device="cuda:0"), place(1, device="cuda:1"), place(2, "b", threads=2)]
    places += [place(3, "b", "serves"), place(4, role="serves")]
    assert table(places).splitlines() == [
        "  host  ranks  role    device          cores  threads a rank",
        "  a     0-1    trains  cuda:0, cuda:1  2      1",
        "  a     4      serves  cpu             2      1",
        "  b     2      trains  cpu             2      2",
        "  b     3      serves  cpu             2      1",
    ]


def test_a_host_with_more_threads_than_cores_is_named() -> None:
    assert crowded([place(0), place(1)]) == []
    assert crowded([place(0), place(1, "b", threads=2)]) == []
    (warning,) = crowded([place(0), place(1), place(2, role="serves"), place(3, "b")])
    assert "a has 2 cores for 3 threads of 3 ranks" in warning
    (warning,) = crowded([place(0, quota=1.5), place(1, quota=1.5)])
    assert "a has 1.5 cores for 2 threads" in warning


def test_ranks_that_share_a_gpu_are_named() -> None:
    # Where each sees a GPU of its own, all are cuda:0.
    assert crowded([place(rank, device="cuda:0", gpu=f"GPU-{rank}") for rank in range(2)]) == []
    assert crowded([place(0, gpu="GPU-0"), place(1, "b", gpu="GPU-0")]) == []
    (warning,) = crowded([place(rank, gpu=f"GPU-{rank % 2}", cores=[0, 1, 2]) for rank in range(3)])
    assert "a: 2 ranks share the GPU GPU-0: start as many ranks there as it has GPUs" in warning


def test_hosts_with_other_libraries_are_named() -> None:
    check_versions([place(0), place(1, "b")])
    with pytest.raises(WorldError, match=r"torch is 3 on rank 1 \(b\) and 2 on rank 0 \(a\)"):
        check_versions([place(0), place(1, "b", versions={"torch": "3"})])
    with pytest.raises(WorldError, match=r"horovod is None on rank 1 \(b\) and 1 on rank 0"):
        check_versions([place(0, versions={"horovod": "1"}), place(1, "b", versions={})])


@pytest.mark.parametrize(
    ("environ", "size", "strategy", "warning"),
    [
        ({}, 2, "allreduce", ""),
        ({"SLURM_NTASKS": "2"}, 2, "allreduce", ""),
        ({"SLURM_NTASKS": "1"}, 1, "allreduce", ""),
        ({"SLURM_NTASKS": "8"}, 1, "local", "1 ranks of the 8 tasks"),
        ({"SLURM_NTASKS": "8"}, 4, "allreduce", "4 ranks of the 8 tasks"),
        ({"SLURM_NTASKS": "2"}, 8, "allreduce", "8 ranks in a Slurm job of 2 tasks (SLURM_NTASKS): more than"),
        ({"SLURM_NTASKS": "2(x3)"}, 4, "allreduce", ""),
        ({"SLURM_JOB_NUM_NODES": "2"}, 1, "allreduce", ""),  # mpirun -np 1, or srun -n1: as asked
    ],
)
def test_ranks_and_the_tasks_of_slurm(environ: dict[str, str], size: int, strategy: str, warning: str) -> None:
    assert check_slurm(environ, Launch(launcher="mpirun", size=size), strategy).startswith(warning)


def test_hosts_without_a_rank_are_counted() -> None:
    places = [place(0), place(1)]
    assert absent_hosts({}, places) == absent_hosts({"SLURM_JOB_NUM_NODES": "1"}, places) == ""
    assert "1 of the 3 hosts" in absent_hosts({"SLURM_JOB_NUM_NODES": "3"}, places)


def test_one_process_of_a_job_of_several_tasks_is_refused() -> None:
    with pytest.raises(WorldError, match=r"8 tasks .*srun --mpi=pmix"):
        check_slurm({"SLURM_NTASKS": "8"}, Launch(launcher="none"), "allreduce")


@pytest.mark.parametrize("strategy", ["allreduce", "evaluate"])
@pytest.mark.parametrize("environ", [{}, {"SLURM_NTASKS": "1"}])
def test_one_process_of_a_job_of_several_hosts_is_refused(environ: dict[str, str], strategy: str) -> None:
    """Without --ntasks Slurm counts no tasks."""
    environ = {**environ, "SLURM_JOB_NUM_NODES": "2"}
    alone = {"allreduce": "--strategy local", "evaluate": "srun -N1 -n1"}[strategy]
    with pytest.raises(WorldError, match=rf"2 hosts \(SLURM_JOB_NUM_NODES\).*srun --mpi=pmix .*{alone}"):
        check_slurm(environ, Launch(launcher="none"), strategy if strategy != "evaluate" else None)
    assert check_slurm(environ, Launch(launcher="none"), "local") == ""
    assert check_slurm(environ, Launch(launcher="srun"), strategy) == ""


def test_evaluation_makes_the_same_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert main(["evaluate", "run"]) == 2
    assert "4 tasks (SLURM_NTASKS), but this process was started alone" in capsys.readouterr().err


def test_all_tasks_of_a_job_on_some_of_its_hosts_are_refused() -> None:
    """As by an mpirun that knows no Slurm, or a horovodrun without hosts."""
    environ = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
    here, spread = [place(rank) for rank in range(4)], [place(rank, "ab"[rank % 2]) for rank in range(4)]
    for launcher in ("mpirun", "horovodrun-gloo"):
        with pytest.raises(WorldError, match=r"all 4 ranks run on a, .* has 2 hosts .*--host"):
            check_hosts(environ, Launch(launcher=launcher, size=4), here)
        check_hosts(environ, Launch(launcher=launcher, size=4), spread)
    # A step of one host, fewer ranks than tasks, and no Slurm.
    check_hosts(environ, Launch(launcher="srun", size=4), here)
    check_hosts(environ, Launch(launcher="mpirun", size=3), here[:3])
    check_hosts({}, Launch(launcher="mpirun", size=4), here)


def test_a_lone_process_is_warned_of_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvdvae.cli.placement.available_cores", lambda: {0, 1})
    world, launch = World.alone(device="cpu"), Launch(launcher="none")
    announce(world, "local", launch, 1)
    assert capsys.readouterr().out == ""
    announce(world, "local", launch, 16)
    assert "cores for 16 threads of 1 rank: they will wait for each other. Lower --threads" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_two_hosts_meet_once_and_nobody_is_in_two_pairs(count: int) -> None:
    found = rounds(count)
    assert sorted(pair for pairs in found for pair in pairs) == sorted(combinations(range(count), 2))
    for pairs in found:
        everyone = [host for pair in pairs for host in pair]
        assert len(set(everyone)) == len(everyone)


def test_a_slow_link_is_named() -> None:
    fast = [Pair((a, b), 20e-6, 1.2e9) for a, b in combinations("abc", 2)]
    assert slow_pairs(fast) == []
    assert slow_pairs([]) == []
    (warning,) = slow_pairs([*fast, Pair(("a", "d"), 20e-6, 0.2e9)])
    assert warning.startswith("a and d reach each other slowly: 1600 Mbit/s, 20 us; the median pair has 9600 Mbit/s")
    (warning,) = slow_pairs([*fast, Pair(("a", "d"), 200e-6, 1.2e9)])
    assert "200 us" in warning
    (warning,) = slow_pairs([Pair(("a", "b"), 20e-6, 12e6)])
    assert "96 Mbit/s" in warning
