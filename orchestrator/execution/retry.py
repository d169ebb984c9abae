"""Decide whether a failed node is worth another attempt, and when. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.errors import CorruptShard, Interrupted, MissingShard, SegpropError
from orchestrator.runners.base import Failed


@dataclass(frozen=True)
class Retry:
    after_s: float


@dataclass(frozen=True)
class GiveUp:
    reason: str


@dataclass(frozen=True)
class NodeRetries:
    """How often the driver tries a node, and how long it waits: `first_wait_s`, twice that, … up to `longest_wait_s`.

    Of one network call a worker makes, `cache_store.storage.retry.RetryPolicy` decides."""

    max_attempts: int
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0

    def decide(self, failure: Failed, attempts: int) -> Retry | GiveUp:
        """Decide after `attempts` attempts, this one included.

        Lost workers, passing storage faults and damaged data (quarantined by then) are tried again. Bad input,
        diverged training and defects are final: they would fail the same way.
        """
        error = failure.error
        reason = error.message if isinstance(error, SegpropError) else f"{type(error).__name__}: {error}"
        if isinstance(error, Interrupted):
            return GiveUp(reason)
        passing = failure.lost or isinstance(error, CorruptShard | MissingShard)
        passing = passing or (isinstance(error, SegpropError) and error.retryable)
        if not passing:
            return GiveUp(reason)
        if attempts >= self.max_attempts:
            return GiveUp(f"{reason} (after {attempts} attempts)")
        return Retry(min(self.longest_wait_s, self.first_wait_s * 2 ** (attempts - 1)))
