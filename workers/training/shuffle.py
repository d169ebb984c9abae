"""Order the samples of an epoch: a function of the seed, the stage, the epoch and where samples lie, alone.

The seed of every order is `order_seed`, which the name of the stage is part of: what the last step of an epoch leaves
out (training.drop_last), or what comes late in it, is not the same in every stage.

*global*: every order of all samples is equally likely; any batch may need any shard. *window*: the shards are
visited in a shuffled order, a few of them open at a time, and samples are drawn from the open ones. No torch here:
who produces shards asks the same functions in which order they will be wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.seeds import derive_seed

Order = npt.NDArray[np.int64]


def order_seed(seed: int, stage: str | None) -> int:
    """Derive the seed of a stage's orders from that of the run: the same in all its rounds, on all its ranks, and in
    every regime that has a stage of this name. `stage`: `StageTask.ordered_by`; None has the run's own seed."""
    return seed if stage is None else derive_seed(seed, "orders of", stage)


def epoch_order(seed: int, epoch: int, rows: int) -> Order:
    """Permute 0..rows-1 (int64): a function of (seed, epoch, rows) alone. `seed`: an `order_seed`, as below."""
    return _generator(seed, "order", epoch).permutation(rows)


def shard_order(seed: int, epoch: int, shards: int) -> Order:
    """Order the shards of a set as they are first wanted under `windowed_order`: a permutation (int64)."""
    return _generator(seed, "shards", epoch).permutation(shards)


def windowed_order(seed: int, epoch: int, shard_sizes: Sequence[int] | Order, window: int) -> Order:
    """Permute the samples of a set (int64) so that an epoch needs at most `window` shards at any place.

    `shard_sizes`: samples of each shard, in data set order (sample 0 is the first of shard 0). Shards open in
    `shard_order`, one after the other as the order advances. A sample comes at a place that is uniform over the time
    its shard is open, which is as long as `window` shards take: so with a window of 1 the samples of a shard are
    shuffled among themselves, and a window of all shards is `epoch_order`, the same bits.
    ValueError: a window below 1 or a negative size.
    """
    sizes = np.asarray(shard_sizes, np.int64)
    if window < 1 or (sizes < 0).any():
        raise ValueError(f"window is {window}, the smallest shard {sizes.min(initial=0)}: at least 1 and 0 are needed")
    samples = int(sizes.sum())
    if window >= len(sizes):
        return epoch_order(seed, epoch, samples)
    opens = np.empty(len(sizes), np.int64)
    opens[shard_order(seed, epoch, len(sizes))] = np.arange(len(sizes))
    # Time runs in shards: the one that opens at k is open from k to k + window.
    times = np.repeat(opens, sizes) + window * _generator(seed, "window", epoch).random(samples)
    return np.argsort(times, kind="stable").astype(np.int64, copy=False)


def _generator(seed: int, purpose: str, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, epoch)))
