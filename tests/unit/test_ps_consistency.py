"""The policies under any order of arrivals, deaths and joins: bounds hold, nobody waits for ever, nothing is lost."""

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hvdvae.ps.consistency import Answer, Apply, Consistency, Drop, policy

POLICIES: dict[str, dict[str, Any]] = {
    "asp": {},
    "ssp 0": {"staleness": 0},
    "ssp 1": {"staleness": 1},
    "ssp 3": {"staleness": 3},
    "bsp": {},
    "bsp with a backup": {"backup": 1},
}


class Cluster:
    """Workers that compute or wait, and what a server would have done; checks every promise after every event."""

    def __init__(self, name: str, workers: int) -> None:
        self.name, self.options = name, POLICIES[name]
        self.policy: Consistency = policy(name.split()[0], range(workers), **self.options)
        self.computing = set(range(workers))
        self.pending: set[int] = set()
        """Pushed, neither applied nor dropped."""
        self.waiting: set[int] = set()
        self.pushed: Counter[int] = Counter()
        self.applied: Counter[int] = Counter()
        self.dropped: Counter[int] = Counter()
        self.version = 0
        self.next_name = workers

    def push(self, worker: int) -> None:
        self.computing.remove(worker)
        self.waiting.add(worker)
        self.pending.add(worker)
        self.pushed[worker] += 1
        self.act(self.policy.push(worker))

    def leave(self, worker: int) -> None:
        self.computing.discard(worker)
        self.waiting.discard(worker)
        self.act(self.policy.leave(worker))
        self.pending.discard(worker)

    def join(self) -> None:
        self.waiting.add(self.next_name)
        self.act(self.policy.join(self.next_name))
        self.next_name += 1

    def act(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Apply):
                assert action.workers == tuple(sorted(set(action.workers)))
                for worker in action.workers:
                    self.pending.remove(worker)
                    self.applied[worker] += 1
                self.version += 1
            elif isinstance(action, Drop):
                self.pending.remove(action.worker)
                self.dropped[action.worker] += 1
            else:
                assert isinstance(action, Answer)
                self.waiting.remove(action.worker)
                self.computing.add(action.worker)
                assert action.worker not in self.pending, "answered before its push was dealt with"
        self.check()

    def check(self) -> None:
        alive = self.computing | self.waiting
        assert set(self.policy.clocks) == alive
        assert not alive or self.computing, "everybody waits: for ever"
        if "staleness" in self.options and alive:
            slowest = min(self.policy.clocks.values())
            assert all(self.policy.clocks[worker] - slowest <= self.options["staleness"] for worker in self.computing)
        for worker, count in self.pushed.items():
            assert self.applied[worker] + self.dropped[worker] + (worker in self.pending) == count


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=200)
@given(data=st.data())
def test_promises_hold_whatever_happens(name: str, data: st.DataObject) -> None:
    cluster = Cluster(name, data.draw(st.integers(2, 5), "workers"))
    for _ in range(data.draw(st.integers(0, 60), "events")):
        event = data.draw(st.sampled_from(["push"] * 8 + ["leave", "join"]))
        if event == "join" and cluster.computing:
            cluster.join()
        elif event == "leave" and len(cluster.computing | cluster.waiting) > 1:
            cluster.leave(data.draw(st.sampled_from(sorted(cluster.computing | cluster.waiting))))
        elif cluster.computing:
            cluster.push(data.draw(st.sampled_from(sorted(cluster.computing))))


@pytest.mark.parametrize("name", POLICIES)
def test_round_after_round_everybody_gets_on(name: str) -> None:
    cluster = Cluster(name, 4)
    for _ in range(50):
        for worker in sorted(cluster.computing):
            cluster.push(worker)
    assert min(cluster.policy.clocks.values()) >= 40


@pytest.mark.parametrize("staleness", [0, 2])
def test_ssp_lets_a_worker_run_ahead_so_far_and_no_farther(staleness: int) -> None:
    ssp = policy("ssp", range(2), staleness=staleness)
    for _ in range(staleness):
        assert ssp.push(0) == [Apply((0,)), Answer(0)]
    assert ssp.push(0) == [Apply((0,))], "applied, and waits at the bound"
    assert ssp.push(1) == [Apply((1,)), Answer(0), Answer(1)]


def test_ssp_forgets_the_dead() -> None:
    ssp = policy("ssp", range(3), staleness=0)
    assert ssp.push(0) == [Apply((0,))]
    assert ssp.push(1) == [Apply((1,))]
    assert ssp.leave(2) == [Answer(0), Answer(1)]


def test_bsp_sums_in_the_workers_order_whatever_the_arrivals() -> None:
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        bsp = policy("bsp", range(3))
        actions = [action for worker in order for action in bsp.push(worker)]
        assert actions == [Apply((0, 1, 2)), Answer(0), Answer(1), Answer(2)]


def test_the_slowest_are_dropped_and_rejoin_the_step_that_runs() -> None:
    bsp = policy("bsp", range(3), backup=1)
    bsp.push(0)
    assert bsp.push(2) == [Apply((0, 2)), Answer(0), Answer(2)]
    assert bsp.push(1) == [Drop(1), Answer(1)]
    assert bsp.push(1) == []
    assert bsp.push(0) == [Apply((0, 1)), Answer(0), Answer(1)]


def test_a_stranger_is_refused() -> None:
    for name in ("asp", "ssp", "bsp"):
        with pytest.raises(ValueError, match="worker 7"):
            policy(name, range(2)).push(7)


def test_a_late_joiner_begins_with_the_slowest() -> None:
    ssp = policy("ssp", range(2), staleness=5)
    for _ in range(3):
        ssp.push(0)
        ssp.push(1)
    ssp.push(0)
    ssp.join(2)
    assert ssp.clocks == {0: 4, 1: 3, 2: 3}
