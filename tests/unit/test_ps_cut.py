"""A consistent copy: what belongs to it is applied, what does not waits, and nothing is lost."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from hvdvae.ps.cut import Asked, Cut

PUSH = np.zeros(1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), st.randoms())
def test_all_servers_copy_after_the_same_pushes(clocks: list[tuple[int, int]], random: object) -> None:
    """Two servers that have come to different clocks of each worker, whatever order pushes come in."""
    target = [max(pair) for pair in clocks]
    for server in range(2):
        cut, mine = Cut(), {worker: pair[server] for worker, pair in enumerate(clocks)}
        cut.frozen = True
        cut.asked = Asked(0, PUSH, target)
        pushes = [worker for worker in mine for _ in range(mine[worker], target[worker] + 1)]
        random.shuffle(pushes)  # type: ignore[attr-defined]
        applied = []
        for worker in pushes:
            assert not cut.is_complete(mine) or mine == dict(enumerate(target))
            cut.hold(worker, PUSH)
            for other, _ in cut.due(mine):
                mine[other] += 1
                applied.append(other)
        assert cut.is_complete(mine)
        assert mine == dict(enumerate(target))
        # Each worker has pushed once more than belonged to the copy.
        assert sorted(worker for worker, _ in cut.end()) == list(mine)
        assert not cut.frozen
        assert cut.due(mine) == []


def test_a_push_that_is_sent_again_is_held_once() -> None:
    cut = Cut()
    cut.hold(1, PUSH)
    cut.hold(1, PUSH)
    assert [worker for worker, _ in cut.end()] == [1]


def test_a_dead_worker_is_not_waited_for() -> None:
    cut = Cut()
    cut.frozen = True
    cut.asked = Asked(0, PUSH, [2, 3])
    cut.hold(1, PUSH)
    cut.forget(1)
    assert cut.due({0: 2}) == []
    assert cut.is_complete({0: 2})
    assert cut.end() == []
