"""What a model family says of a stage's memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage; `trainable` counts parameters. `peak` is where the walk found most, not the others' sum."""

    trainable: int
    weights: int
    gradients: int
    optimizer: int
    #: Activations of one micro-batch when the forward pass is done, autocast's copies of weights among them.
    activations: int
    #: What making the loss takes beside them.
    loss: int
    peak: int
