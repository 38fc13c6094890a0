"""Signals as a flag: a run ends after a whole step, not in the middle of one."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from hvdvae.signals import STOPPING, caught


@pytest.mark.parametrize("number", STOPPING)
def test_each_signal_sets_the_flag_and_interrupts_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with caught() as flag:
        assert flag.number == 0
        os.kill(os.getpid(), number)
        assert flag.number == number
    assert signal.getsignal(number) == before


def test_a_repeated_sigterm_is_still_only_a_flag() -> None:
    """mpirun and Slurm repeat it while the run saves."""
    with caught() as flag:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert flag.number == signal.SIGTERM


@pytest.fixture(autouse=True)
def _default_ctrl_c() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_means_it() -> None:
    with caught() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_handler_that_was_not_python_does_not_break_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C library's own handler reads as None, which cannot be set again."""
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with caught() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.number == signal.SIGTERM
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_forked_child_ends_by_sigterm_and_leaves_other_signals_to_its_parent() -> None:
    """A pool ends its workers so, and waits for them."""
    with caught() as flag:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.number == signal.SIGTERM, "the parent catches it as before"


def test_other_threads_catch_nothing_and_still_run() -> None:
    numbers: list[int] = []

    def run() -> None:
        with caught() as flag:
            numbers.append(flag.number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert numbers == [0]
