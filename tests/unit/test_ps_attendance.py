"""Who takes part: nobody is told twice that all have ended, and the dead are not waited for."""

import numpy as np

from hvdvae.ps.attendance import Attendance

DONE = np.zeros(1)


def test_the_dead_are_not_waited_for() -> None:
    attendance = Attendance(3)
    attendance.end(0, DONE, clock=5)
    attendance.end(1, DONE, clock=6)
    assert not attendance.all_have_ended
    attendance.die(2, clock=4)
    assert attendance.all_have_ended
    assert attendance.unanswered == {0, 1}


def test_who_was_told_is_told_again_only_where_it_asks_again() -> None:
    attendance = Attendance(2)
    attendance.end(0, DONE, clock=5)
    attendance.end(1, DONE, clock=5)
    attendance.unanswered.clear()
    attendance.die(1, clock=5)
    assert attendance.all_have_ended
    assert attendance.unanswered == set()
    attendance.end(0, DONE, clock=5)
    assert attendance.unanswered == {0}


def test_a_place_that_is_taken_is_waited_for() -> None:
    attendance = Attendance(2)
    attendance.die(1, clock=3)
    attendance.join(1)
    attendance.end(0, DONE, clock=9)
    assert not attendance.all_have_ended
    attendance.end(1, DONE, clock=9)
    assert attendance.all_have_ended
    assert attendance.begin_again() == {0: 9, 1: 9}
    assert not attendance.all_have_ended


def test_all_dead_have_not_ended() -> None:
    attendance = Attendance(1)
    attendance.die(0, clock=1)
    assert not attendance.all_have_ended
