"""Decide how often a checkpoint pays. Pure."""

from __future__ import annotations

import math

#: Most of a stage's time that checkpoints may take.
MOST_SHARE = 0.01
#: Bytes a second at which a state is taken to be written before a checkpoint was measured.
ASSUMED_SPEED = 200e6
#: Threads of the host that write a checkpoint: one takes pieces and writes them, one hashes them.
WRITING_THREADS = 2


def cost_s(waited: float, beside: float, threads: int) -> float:
    """Estimate the seconds that a checkpoint took from training on `threads` cores: what training waited for it, and of
    what was written beside it the share of the cores that writing can keep busy."""
    return waited + beside * min(1.0, WRITING_THREADS / threads)


def interval_s(cost: float, between: float) -> float:
    """Compute the seconds between two checkpoints that lose the least time on average.

    `cost`: seconds that a checkpoint takes from training. `between`: seconds between interruptions, on average. J. T.
    Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
    Systems 22 (2006), whose first term is J. W. Young's, Communications of the ACM 17 (1974): sqrt(2 cost between).
    Never so often that checkpoints take more than `MOST_SHARE` of the time.
    """
    half = cost / (2 * between)
    best = between
    if half < 1:
        best = math.sqrt(2 * cost * between) * (1 + math.sqrt(half) / 3 + half / 9) - cost
    return max(best, cost / MOST_SHARE)
