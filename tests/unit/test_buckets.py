"""Whatever arrives in whatever order: ranks send the same sequence, and every arrival is in something that is sent."""

from hypothesis import given
from hypothesis import strategies as st

from hvdvae.strategies.buckets import Buckets

PLACES = [slice(0, 5), slice(5, 6), slice(6, 9), slice(9, 30), slice(30, 31), slice(31, 32)]


def test_neighbours_from_the_end_up_to_the_limit() -> None:
    buckets = Buckets(PLACES, 8)
    assert [sorted(bucket.members) for bucket in buckets] == [[4, 5], [3], [0, 1, 2]] or [
        sorted(bucket.members) for bucket in buckets
    ] == [[4, 5], [3], [1, 2], [0]]
    for bucket in buckets:
        for number, place in bucket.members.items():
            start = bucket.place.start
            assert slice(place.start + start, place.stop + start) == PLACES[number]


@given(
    arrivals=st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=4),
    limit=st.integers(1, 40),
)
def test_ranks_send_the_same_and_nothing_stays_behind(arrivals: list[list[int]], limit: int) -> None:
    ranks = [Buckets(PLACES, limit) for _ in arrivals]
    sent: list[list[int]] = [[] for _ in arrivals]
    carried = [0 for _ in arrivals]
    waiting: list[list[int]] = [[] for _ in arrivals]
    for rank, (buckets, numbers) in enumerate(zip(ranks, arrivals, strict=True)):
        for number in numbers:
            buckets.of(number).arrived.add(number)
            waiting[rank].append(number)
            for bucket in buckets.due():
                sent[rank].append(bucket.place.start)
                carried[rank] += sum(one in bucket.members for one in waiting[rank])
                waiting[rank] = [one for one in waiting[rank] if one not in bucket.members]
    agreed = [max(counts) for counts in zip(*(buckets.wanted() for buckets in ranks), strict=True)]
    for rank, buckets in enumerate(ranks):
        for bucket in buckets.missing(agreed):
            sent[rank].append(bucket.place.start)
            carried[rank] += sum(one in bucket.members for one in waiting[rank])
            waiting[rank] = [one for one in waiting[rank] if one not in bucket.members]
    assert all(one == sent[0] for one in sent), "ranks that send others wait for ever"
    assert carried == [len(numbers) for numbers in arrivals]
    assert not any(waiting)
    for buckets in ranks:
        buckets.begin_round()
        assert buckets.wanted() == [0] * len(buckets)


def test_what_is_held_back_is_sent_after_what_was_dropped() -> None:
    buckets = Buckets(PLACES, 1)
    first = next(iter(buckets))
    number = next(iter(first.members))
    first.arrived.add(number)
    assert [bucket is first for bucket in buckets.due()] == [True]
    buckets.drop()
    buckets.holds = True
    first.arrived.add(number)
    assert not [*buckets.due()]
    assert not [*buckets.missing([bucket.sent for bucket in buckets], is_empty=True)], "this rank was the first"
    buckets.begin_round()
    assert buckets.wanted()[0] == 1
    assert [bucket is first for bucket in buckets.due()] == [True]
