"""Orders of an epoch: global, and by shard with a window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.training.shuffle import Order, epoch_order, order_seed, shard_order, windowed_order

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30)


def shards_of(order: Order, sizes: list[int]) -> Order:
    return np.searchsorted(np.cumsum(sizes), order, side="right")


@given(st.integers(0, 2**62), st.integers(0, 50), SIZES, st.integers(1, 40))
@settings(deadline=None)
def test_every_sample_comes_once_and_never_needs_more_shards_than_the_window(
    seed: int, epoch: int, sizes: list[int], window: int
) -> None:
    order = windowed_order(seed, epoch, sizes, window)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
    shards = shards_of(order, sizes)
    used, first = np.unique(shards, return_index=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    for place in range(len(shards)):
        assert np.count_nonzero((first <= place) & (place <= last)) <= window
    assert set(used) == {i for i, size in enumerate(sizes) if size}


def test_an_order_is_a_function_of_seed_epoch_sizes_and_window() -> None:
    sizes = [40] * 50
    order = windowed_order(1, 2, sizes, 4)
    assert np.array_equal(order, windowed_order(1, 2, np.array(sizes), 4))
    others = [windowed_order(2, 2, sizes, 4), windowed_order(1, 3, sizes, 4), windowed_order(1, 2, sizes, 5)]
    assert not any(np.array_equal(order, other) for other in others)


def test_a_window_of_all_shards_is_the_global_order() -> None:
    assert np.array_equal(windowed_order(5, 1, [8, 8, 3], 3), epoch_order(5, 1, 19))
    assert np.array_equal(windowed_order(5, 1, [19], 1), epoch_order(5, 1, 19))


def test_a_window_of_one_visits_whole_shards_in_their_order_each_shuffled() -> None:
    sizes = [100, 50, 70, 1, 30]
    order = windowed_order(3, 0, sizes, 1)
    visits = shard_order(3, 0, 5)
    assert np.array_equal(shards_of(order, sizes), np.repeat(visits, np.array(sizes)[visits]))
    assert any(np.diff(order[shards_of(order, sizes) == i]).min() < 0 for i in (0, 1, 2))


def test_shards_are_first_wanted_in_their_order() -> None:
    sizes = [500] * 20
    shards = shards_of(windowed_order(0, 0, sizes, 6), sizes)
    firsts = np.unique(shards, return_index=True)[1]
    assert np.array_equal(np.argsort(firsts), shard_order(0, 0, 20))


def test_batches_mix_samples_of_about_as_many_shards_as_the_window_holds() -> None:
    sizes = [200] * 40
    shards = shards_of(windowed_order(0, 0, sizes, 8), sizes)
    middle = shards[len(shards) // 2 :][:64]
    assert len(np.unique(middle)) >= 7


@pytest.mark.parametrize(("sizes", "window"), [([4, 4], 0), ([4, -1], 1)])
def test_impossible_windows_are_refused(sizes: list[int], window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        windowed_order(0, 0, sizes, window)


def test_every_stage_orders_its_epochs_in_its_own_way_and_leaves_other_samples_out() -> None:
    orders = [epoch_order(order_seed(3, stage), 0, 100) for stage in ("stage1-base", "stage2-seg2", "stage3-seg3")]
    left_out = [frozenset(order[96:].tolist()) for order in orders]
    assert len(set(left_out)) == 3
    assert np.array_equal(orders[0], epoch_order(order_seed(3, "stage1-base"), 0, 100))
    assert order_seed(3, "stage1-base") != order_seed(4, "stage1-base")
