"""The watchdog: who waits for whom, and an end to waits that nothing else can interrupt."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from hvdvae.deadline import EXIT_CODE, Departure, Group, State, Watchdog


class Others:
    """Other ranks that answer as told."""

    def __init__(self, *states: State) -> None:
        self.lost: set[int] = set()
        self.departed: dict[int, Departure] = {}
        self.left: list[Departure] = []
        self.states = {state.rank: state for state in states}

    def leave(self, departure: Departure) -> None:
        self.left.append(departure)

    def answer(self, state: Callable[[], State]) -> None:
        """Nobody asks."""

    def ask(self, state: Callable[[], State], seconds: float) -> dict[int, State]:
        return self.states


def state(rank: int, waiting: str, step: int = 3) -> State:
    return State(rank=rank, host=f"node{rank}", step=step, waiting=waiting, seconds=4.2, where=f"train.py:{rank}")


def test_the_report_says_who_waits_for_whom_where_and_at_what_step() -> None:
    others = Others(state(1, "sum"), state(3, ""), state(4, "barrier"), state(5, "sum", step=2))
    watchdog = Watchdog(rank=0, size=6, seconds=4, inquiry=others)
    lines = watchdog.report(state(0, "sum"), others.states).splitlines()
    assert lines[0] == (
        "hvdvae: deadline of 4 s exceeded (--deadline): rank 0 (node0) waits in 'sum' for 4.2 s, step 3, at train.py:0"
    )
    assert lines[1:5] == [
        "  also there: rank 1 (node1) waits in 'sum' for 4.2 s, step 3, at train.py:1",
        "  waited for: rank 3 (node3) computes, step 3, at train.py:3",
        "  waited for: rank 4 (node4) waits in 'barrier' for 4.2 s, step 3, at train.py:4",
        "  waited for: rank 5 (node5) waits in 'sum' for 4.2 s, step 2, at train.py:5",
    ]
    assert len(lines) == 6
    assert "waited for: rank 2 does not answer" in lines[5]


def test_the_report_says_where_nobody_can_be_asked() -> None:
    text = Watchdog(rank=1, size=2, seconds=4).report(state(1, "sum"), {})
    assert "which rank is late is not known" in text
    assert "not known" not in Watchdog(rank=0, size=1, seconds=4).report(state(0, "sum"), {})


def test_the_state_is_of_the_watched_thread() -> None:
    watchdog = Watchdog(rank=2, size=3, seconds=4)
    watchdog.step = 17
    assert watchdog.state().waiting == ""
    with watchdog.waiting("outer"):
        with watchdog.waiting("inner"):
            assert watchdog.state().waiting == "inner"
        found = watchdog.state()
    assert (found.rank, found.step, found.waiting) == (2, 17, "outer")
    assert "deadline.py" in found.where
    assert watchdog.state().waiting == ""


def test_waits_are_summed_and_nested_ones_count_once() -> None:
    watchdog = Watchdog(rank=0, size=1, seconds=4)
    begin = time.monotonic()
    with watchdog.waiting("outer"), watchdog.waiting("inner"):
        time.sleep(0.2)
    assert 0.2 <= watchdog.waited <= time.monotonic() - begin, "once, however long it took"
    with pytest.raises(KeyError), watchdog.waiting("fails"):
        raise KeyError
    assert watchdog.state().waiting == "", "a wait ends also by an exception"


CASE = """
import sys, time
from hvdvae.deadline import Watchdog

# Waits are short beside the deadline, also where a sleep takes a second more; together they are longer.
watchdog = Watchdog(rank=0, size=2, seconds=2.0)
watchdog.step = 4711
watchdog.start()

def many_short_waits():
    for _ in range(6):
        with watchdog.waiting("something short"):
            time.sleep(0.4)
    time.sleep(2.5)  # Computing is no wait.

def a_call_that_never_returns():
    with watchdog.waiting("the sum of gradients"):
        time.sleep(60)

many_short_waits()
print("reached", flush=True)
if "stop" in sys.argv:
    watchdog.stop()
    with watchdog.waiting("after the end"):
        time.sleep(2.9)
    sys.exit(0)
a_call_that_never_returns()
"""


def test_a_wait_past_its_deadline_ends_the_process_with_its_stack() -> None:
    run = subprocess.run([sys.executable, "-c", CASE], capture_output=True, text=True, timeout=50)
    assert run.returncode == EXIT_CODE == 75
    assert run.stdout == "reached\n", "short waits and computing are no reason"
    assert "deadline of 2 s exceeded" in run.stderr
    assert "'the sum of gradients'" in run.stderr
    assert "step 4711" in run.stderr
    assert "a_call_that_never_returns" in run.stderr


def test_a_stopped_watchdog_ends_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", CASE, "stop"], capture_output=True, text=True, timeout=50)
    assert (run.returncode, run.stderr) == (0, "")


PATIENT = """
import sys, time
from hvdvae.deadline import State, Watchdog

class Others:
    lost, departed = set(), {}
    def answer(self, state): ...
    def ask(self, state, seconds):
        alive = not told
        return {1: State(1, "node1", 0, "", 0.0, "download.py:1")} if alive else {}

told = []
watchdog = Watchdog(rank=0, size=2, seconds=0.4, inquiry=Others())
watchdog.start()
with watchdog.waiting("the download of rank 1", patient=True):
    time.sleep(1.5)
    print("went on", flush=True)
    told.append(True)
    time.sleep(60)
"""


def test_a_patient_wait_lasts_while_the_others_answer() -> None:
    run = subprocess.run([sys.executable, "-c", PATIENT], capture_output=True, text=True, timeout=40)
    assert run.stdout == "went on\n", "past the deadline, for the other rank lived"
    assert run.returncode == EXIT_CODE
    assert "rank 1 does not answer" in run.stderr


SOONER = """
from hvdvae import deadline

deadline.LOCKED_SECONDS = deadline.STUCK_SECONDS = deadline.ANSWER_SECONDS = 0.3
"""


LEFT = """
import time
from hvdvae.deadline import Departure, Group, Watchdog

class Others:
    lost = set()
    departed = {1: Departure(1, "node1", 3, {"all": 2}), 2: Departure(2, "node2", 5, {"all": 3})}
    def answer(self, state): ...
    def ask(self, state, seconds): return {}

watchdog = Watchdog(rank=0, size=4, seconds=60, inquiry=Others())
watchdog.step = 4
watchdog.start()
everybody = Group("all", (0, 1, 2, 3))
for number in range(2):
    with watchdog.waiting(f"sum {number}", group=everybody):
        time.sleep(1.7)
with watchdog.waiting("sum of others", group=Group("0,3", (0, 3))):
    time.sleep(1.7)
with watchdog.waiting("some wait"):
    time.sleep(1.7)
print("went on", flush=True)
with watchdog.waiting("sum 3", group=everybody):
    time.sleep(60)
"""


def test_a_wait_for_a_rank_that_has_left_before_ends_at_once() -> None:
    """Not one that it came to: the others may be late; nor one that it has no part in."""
    run = subprocess.run([sys.executable, "-c", SOONER + LEFT], capture_output=True, text=True, timeout=40)
    assert run.stdout == "went on\n"
    assert run.returncode == EXIT_CODE
    assert "hvdvae: error: rank 1 (node1) has finished after 3 steps, and rank 0 " in run.stderr
    assert "waits in 'sum 3'" in run.stderr


def test_a_rank_that_leaves_says_how_far_it_came() -> None:
    others, everybody = Others(), Group("all", (0, 1))
    watchdog = Watchdog(rank=0, size=2, seconds=4, inquiry=others)
    with watchdog.waiting("sum", group=everybody), watchdog.waiting("something else"):
        watchdog.step = 7
    watchdog.leave()
    assert [(one.steps, one.waits) for one in others.left] == [(7, {"all": 1})]


DEADLOCK = PATIENT.replace(
    'State(1, "node1", 0, "", 0.0, "download.py:1")', 'State(1, "node1", 0, WHERE, 9.0, "x.py:1")'
)


def test_patient_waits_for_each_other_in_different_operations_end() -> None:
    """All answer, and none will ever move; in the same operation they may be under way in it."""
    for where, seconds in (("the download of rank 1", 1.5), ("another wait", 0.4)):
        code = DEADLOCK.replace("WHERE", repr(where))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
        assert run.returncode == EXIT_CODE
        assert (run.stdout == "went on\n") == (seconds > 1), where
        assert ("rank 1 (node1) waits in 'another wait'" in run.stderr) == (seconds < 1)


STUCK = SOONER + PATIENT.replace("alive = not told", "time.sleep(60); alive = False")


def test_an_inquiry_that_gets_stuck_does_not_keep_the_job() -> None:
    run = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=40)
    assert run.returncode == EXIT_CODE
    assert "rank 1 does not answer" in run.stderr


HOLDS_THE_LOCK = f"""
{SOONER}
import ctypes
from hvdvae.deadline import Watchdog

watchdog = Watchdog(rank=0, size=2, seconds=0.2)
watchdog.start()
with watchdog.waiting("a library"):
    import time
    time.sleep(0.1)
    ctypes.PyDLL(None).sleep(60)
"""


def test_a_library_that_keeps_the_interpreters_lock_ends_too() -> None:
    run = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=50)
    assert run.returncode != 0
    assert "Timeout" in run.stderr
