"""Workers keep to cores of their own where servers have none left."""

import os

import pytest

pytest.importorskip("mpi4py", reason="parameter servers need mpi4py")

from mpi4py import MPI

from hvdvae.ps.seating import seat, take_seat


@pytest.mark.parametrize(
    ("workers", "servers", "cores", "expected"),
    [
        (2, 1, range(2), [{0}, {1}]),
        (2, 2, [4, 6], [{4}, {6}]),
        (3, 2, range(4), [{0}, {1}, {2}]),
        (2, 3, range(4), [{0, 1}, {2, 3}]),
        # Servers have room, there are none, or there is less than a core for each worker.
        (2, 1, range(3), [set(), set()]),
        (2, 0, range(2), [set(), set()]),
        (3, 1, range(2), [set(), set(), set()]),
    ],
)
def test_workers_share_the_cores(workers: int, servers: int, cores: list[int], expected: list[set[int]]) -> None:
    assert [seat(place, workers, servers, list(cores)) for place in range(workers)] == expected


def test_a_worker_alone_stays_where_it_is() -> None:
    before = os.sched_getaffinity(0)
    leave = take_seat(MPI.COMM_SELF, serves=False)
    assert os.sched_getaffinity(0) == before
    leave()
    assert os.sched_getaffinity(0) == before
