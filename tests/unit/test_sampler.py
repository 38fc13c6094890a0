"""The order of an epoch and its cut over ranks: cover laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdvae.data import epoch_order, local_batch, rank_indices, steps_left
from hvdvae.errors import DataError

SEEDS = st.integers(0, 2**64 - 1)
counts = st.integers(1, 300)
batches = st.integers(1, 40)
sizes = st.integers(1, 8)


def step_examples(order, start, batch, size):
    return np.concatenate([rank_indices(order, start, batch, rank, size) for rank in range(size)])


def seen_in(seed, epoch, n, batch, size):
    order, batch = epoch_order(seed, epoch, n), local_batch(n, batch, size)
    steps = steps_left(n, batch, size)
    return np.concatenate([step_examples(order, k * batch * size, batch, size) for k in range(steps)])


@given(SEEDS, st.integers(0, 1000), counts)
def test_epoch_is_one_global_permutation_and_a_pure_function(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, n))


def test_orders_differ_by_seed_and_by_epoch():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1, 2**32, 2**63) for epoch in range(6)}
    assert len(orders) == 24


def test_positions_are_spread_evenly():
    n, epochs = 40, 400
    position = np.zeros(n)
    for epoch in range(epochs):
        position[epoch_order(7, epoch, n)] += np.arange(n)
    mean = position / epochs
    assert abs(mean - (n - 1) / 2).max() < 5 * n / np.sqrt(12 * epochs)


@given(SEEDS, st.integers(0, 50), counts, batches, sizes)
@settings(max_examples=150)
def test_an_epoch_shows_no_example_twice_and_leaves_out_less_than_a_global_batch(seed, epoch, n, batch, size):
    if n < size:
        with pytest.raises(DataError, match=f"{n} training examples.*{size} ranks"):
            local_batch(n, batch, size)
        return
    seen = seen_in(seed, epoch, n, batch, size)
    assert len(set(seen)) == len(seen) > 0
    assert n - len(seen) < local_batch(n, batch, size) * size


@given(SEEDS, st.integers(0, 50), counts, batches, sizes)
@settings(max_examples=150)
def test_four_consecutive_epochs_show_every_example(seed, epoch, n, batch, size):
    if n < size:
        return
    seen = np.concatenate([seen_in(seed, e, n, batch, size) for e in range(epoch, epoch + 4)])
    assert set(seen) == set(range(n))


@given(SEEDS, st.integers(0, 50), st.integers(4, 300), batches, sizes)
@settings(max_examples=150)
def test_a_remainder_up_to_a_quarter_leaves_nobody_out_twice_in_four_epochs(seed, epoch, n, batch, size):
    if n < size or n % (local_batch(n, batch, size) * size) > n // 4:
        return
    left_out = [
        example for e in range(epoch, epoch + 4) for example in set(range(n)) - set(seen_in(seed, e, n, batch, size))
    ]
    assert len(left_out) == len(set(left_out))


@given(SEEDS, counts, st.integers(1, 10), sizes)
def test_ranks_together_see_the_global_batch_of_one_process(seed, n, batch, size):
    if n < batch * size:
        return
    order = epoch_order(seed, 0, n)
    assert steps_left(n, batch, size) == steps_left(n, batch * size, 1)
    for start in range(0, steps_left(n, batch, size) * batch * size, batch * size):
        np.testing.assert_array_equal(
            step_examples(order, start, batch, size), rank_indices(order, start, batch * size, 0, 1)
        )


@given(SEEDS, counts, batches, sizes, batches, sizes, st.data())
@settings(max_examples=150)
def test_an_epoch_resumed_at_another_size_covers_exactly_the_rest(seed, n, batch, size, batch2, size2, data):
    if n < max(size, size2):
        return
    order = epoch_order(seed, 3, n)
    batch, batch2 = local_batch(n, batch, size), local_batch(n, batch2, size2)
    done = data.draw(st.integers(0, steps_left(n, batch, size)))
    before = [step_examples(order, k * batch * size, batch, size) for k in range(done)]
    start = done * batch * size
    rest = steps_left(n, batch2, size2, start)
    after = [step_examples(order, start + k * batch2 * size2, batch2, size2) for k in range(rest)]
    seen = np.concatenate([*before, *after]) if before or after else np.array([], int)
    np.testing.assert_array_equal(seen, order[: len(seen)])
    assert n - len(seen) < max(batch2 * size2, 1)


def test_a_step_beyond_the_epoch_or_a_rank_beyond_the_world_is_refused():
    order = epoch_order(0, 0, 10)
    for start, rank in ((7, 0), (-1, 0), (0, 2)):
        with pytest.raises(ValueError, match="no step"):
            rank_indices(order, start, 2, rank, 2)
