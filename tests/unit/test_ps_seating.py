"""Workers keep to cores of their own where servers have none left, and servers go where they are waited for."""

import os

import pytest

pytest.importorskip("mpi4py", reason="parameter servers need mpi4py")

from mpi4py import MPI

from hvdvae.ps.seating import Seat, take_seat, worker_cores


@pytest.mark.parametrize(
    ("workers", "servers", "cores", "expected"),
    [
        (2, 1, range(2), [{0}, {1}]),
        (2, 2, [4, 6], [{4}, {6}]),
        (3, 2, range(4), [{0}, {1}, {2}]),
        (2, 3, range(4), [{0, 1}, {2, 3}]),
        # Servers have room, one of both is not there, or there is less than a core for each worker.
        (2, 1, range(3), []),
        (2, 0, range(2), []),
        (0, 2, range(1), []),
        (3, 1, range(2), []),
    ],
)
def test_workers_share_the_cores(workers: int, servers: int, cores: list[int], expected: list[set[int]]) -> None:
    assert worker_cores(workers, servers, list(cores)) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_who_sits_down_gets_up_again() -> None:
    free = os.sched_getaffinity(0)
    first = {min(free)}
    seat = Seat(own=first)
    try:
        assert os.sched_getaffinity(0) == first
    finally:
        seat.leave()
    assert os.sched_getaffinity(0) == free


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_server_goes_to_who_waits() -> None:
    free = os.sched_getaffinity(0)
    first, last = {min(free)}, {max(free)}
    seat = Seat({0: first, 1: last})
    try:
        assert os.sched_getaffinity(0) == free
        for worker, cores in ((1, last), (0, first), (7, free)):  # The last is on another host.
            seat.join(worker)
            assert os.sched_getaffinity(0) == cores
        seat.join(0)
        seat.rise()
        assert os.sched_getaffinity(0) == free
        seat.join(0)
    finally:
        seat.leave()
    assert os.sched_getaffinity(0) == free


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_that_a_process_may_not_have_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.sched_getaffinity(0)
    seat = Seat({0: {100_000}})
    seat.join(0)
    assert os.sched_getaffinity(0) == free


def test_alone_there_is_nobody_to_make_room_for() -> None:
    free = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    take_seat(MPI.COMM_SELF, 0, workers=1).leave()
    assert not free or os.sched_getaffinity(0) == free
