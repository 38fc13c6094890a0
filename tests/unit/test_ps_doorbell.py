"""How workers and servers wake each other."""

import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mpi4py", reason="parameter servers need mpi4py")

from hvdvae.ps import doorbell
from hvdvae.ps.doorbell import Doorbell

WORKER, SERVER = 0, 1


@pytest.fixture
def bells() -> Iterator[list[Doorbell]]:
    """Of a worker and a server, which know each other and nobody else."""
    token = secrets.token_hex(8)
    both = [Doorbell(token, rank, workers=1) for rank in (WORKER, SERVER)]
    for bell in both:
        bell.connect((WORKER, SERVER), all_peers_ring=True)
    for bell in both:
        bell.unlink()
    assert not [*Path("/dev/shm").glob(f"*{token}*")], "a killed process would leave it behind"
    yield both
    for bell in both:
        bell.close()


@pytest.mark.parametrize(("ringer", "sleeper"), [(WORKER, SERVER), (SERVER, WORKER)])
def test_who_is_rung_wakes(bells: list[Doorbell], ringer: int, sleeper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bells[sleeper], "_sleep", 60.0)
    timer = threading.Timer(0.05, bells[ringer].ring, [sleeper])
    timer.start()
    start = time.monotonic()
    bells[sleeper].sleep()
    assert time.monotonic() - start < 30
    timer.join()


@pytest.mark.parametrize(("ringer", "sleeper"), [(WORKER, SERVER), (SERVER, WORKER)])
def test_a_ring_before_the_sleep_is_not_lost_and_many_are_one(
    bells: list[Doorbell], ringer: int, sleeper: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(100_000):  # More than a pipe holds: nobody who rings ever waits.
        bells[ringer].ring(sleeper)
    monkeypatch.setattr(bells[sleeper], "_sleep", 60.0)
    start = time.monotonic()
    bells[sleeper].sleep()
    assert time.monotonic() - start < 30
    monkeypatch.setattr(bells[sleeper], "_sleep", 0.05)
    for _ in range(2):  # A pipe may have been fuller than one read takes.
        start = time.monotonic()
        bells[sleeper].sleep()
    assert time.monotonic() - start > 0.04, "all rings were spent"


@pytest.mark.parametrize("sleeper", [WORKER, SERVER])
def test_nobody_rings_and_it_looks_again(bells: list[Doorbell], sleeper: int) -> None:
    start = time.monotonic()
    bells[sleeper].sleep()
    assert time.monotonic() - start >= 0.9 * doorbell.LONG_SLEEP_SECONDS
    bells[sleeper].expect_strangers()
    bells[sleeper].sleep()
    assert bells[sleeper]._sleep == doorbell.NAP_SECONDS


def test_a_rank_of_another_host_is_not_rung(bells: list[Doorbell]) -> None:
    bells[WORKER].ring(7)


def test_the_death_of_who_is_rung_is_no_error(bells: list[Doorbell]) -> None:
    """Whoever reads a pipe last takes it along."""
    bells[SERVER].close()
    bells[WORKER].ring(SERVER)
    bells[SERVER] = Doorbell(secrets.token_hex(8), SERVER, workers=1)
    bells[SERVER].unlink()
