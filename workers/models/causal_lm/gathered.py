"""What a rank of a gang holds beside its part of a stage, in bytes. Pure arithmetic.

Follows what torch's FSDP2 and DeepSpeed's ZeRO-3 do where `workers.distributed` sets them up: with FSDP2 parts of the
path are gathered one by one and the last one stays whole from its forward pass until its backward pass is through;
with ZeRO-3 what was gathered stays up to a number of elements. `--trace` finds the former in the real step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.models.causal_lm.kept import Part, Types
from workers.specs.ranks import ZERO3_BUCKET, ZERO3_LIVE, Ranks


@dataclass(frozen=True)
class Gathered:
    """Bytes beside a rank's own, part by part of the path."""

    #: While a part's forward pass runs.
    forward: tuple[int, ...]
    #: While a part's backward pass runs, but for the gradients it makes; and at its end with these.
    backward: tuple[int, ...]
    ending: tuple[int, ...]
    #: Throughout: what parts share, buffers, and what is kept double.
    always: int = 0
    #: While the loss is made.
    loss: int = 0


def gathered(parts: Sequence[Part], ranks: Ranks, types: Types) -> Gathered:
    """What `ranks` hold of `parts`, which all of them compute. On one device nothing."""
    if ranks.replicates:
        return _replicated(parts)
    if not ranks.splits:
        return Gathered(*((0,) * len(parts),) * 3)
    return _bucketed(parts, ranks, types) if ranks.strategy == "zero3" else _one_by_one(parts)


def _replicated(parts: Sequence[Part]) -> Gathered:
    """Gradients on their way to their sums are copies, which stay until all are there."""
    nothing = (0,) * len(parts)
    sent = [part.trainable_bytes for part in parts]
    return Gathered(
        nothing,
        tuple(sum(sent[index + 1 :]) for index in range(len(parts))),
        tuple(sum(sent[index:]) for index in range(len(parts))),
    )


def _one_by_one(parts: Sequence[Part]) -> Gathered:
    """FSDP2. Parts arrive in one flat tensor and are copied out of it; in the forward pass it stays until the next part
    arrives, in the backward pass the next part's is there already. Gradients leave in another flat tensor, which stays
    until those of the next part leave."""
    shared = [part.outline.tied > 0 for part in parts]
    whole = [0 if apart else part.weights_bytes for part, apart in zip(parts, shared, strict=True)]
    leaving = [0 if apart else part.trainable_bytes for part, apart in zip(parts, shared, strict=True)]
    together = sum(part.weights_bytes for part, apart in zip(parts, shared, strict=True) if apart)
    before = [0, *whole[:-1]]
    behind = [*leaving[1:], 0]
    forward = tuple(max(own + earlier, 2 * own) for own, earlier in zip(whole, before, strict=True))
    backward = tuple(own + earlier + sent for own, earlier, sent in zip(whole, before, behind, strict=True))
    ending = tuple(
        own_gradients + earlier + max(own + sent, own_gradients)
        for own, earlier, sent, own_gradients in zip(whole, before, behind, leaving, strict=True)
    )
    return Gathered(forward, backward, ending, together, whole[-1])


def _bucketed(parts: Sequence[Part], ranks: Ranks, types: Types) -> Gathered:
    """ZeRO-3. What was gathered stays up to a number of elements; gradients leave in two buckets in turn, beside those
    of the largest tensor. Of what trains there is a float32 tensor that updates change beside the one that is gathered,
    and one for gradients."""
    size = sum(part.weights_bytes for part in parts)
    largest = max(part.weights_bytes for part in parts)
    # What comes from files is not fetched ahead, and none of it is kept for its next use.
    ahead = 0 if ranks.zero3.parameters == "disk" else types.master * (ZERO3_LIVE + ZERO3_BUCKET)
    live = min(size, ahead + largest)
    kept = 0 if ranks.updates_on_host else 4 * sum(ranks.share(part.trainable) for part in parts)
    buckets = min(2 * 4 * ZERO3_BUCKET, 2 * sum(part.trainable_bytes for part in parts))
    return Gathered((live,) * len(parts), (live + buckets,) * len(parts), (live + buckets,) * len(parts), kept, live)
