"""Bytes that the updates of a stage hold, by where they lie. Pure: plans and checks before training need it."""

from __future__ import annotations

from dataclasses import dataclass

from workers.specs.experiment import OptimizerSpec
from workers.specs.memory import MemorySpec

#: bitsandbytes: two moments of a byte, and two float32 scales a block of 256.
_EIGHT_BIT_BYTES = 2 + 2 * 4 / 256
#: torchao: two moments of half a byte, and two float32 scales a block of 128.
_FOUR_BIT_BYTES = 1 + 2 * 4 / 128
#: Pinned buffers of copies between a GPU and the host: two for each direction.
BUFFER_BYTES = 32 << 20
BUFFERS = 4
#: Bytes of gradients that may wait on a GPU for their copies to the host.
LEAVING_BYTES = 512 << 20


@dataclass(frozen=True)
class TierBytes:
    """Bytes beside the parameters and their own gradients. `state` and `masters` are part of the others."""

    #: The optimizer's state, wherever.
    state: int
    #: Float32 masters, wherever.
    masters: int
    device: int
    host: int
    disk: int

    def in_peak(self, *, on_host: bool) -> int:
        """What counts as memory of the device."""
        return self.device + (self.host if on_host else 0)

    def state_in_peak(self, memory: MemorySpec, *, on_host: bool) -> int:
        """What of the optimizer's state does."""
        return self.state if memory.optimizer == "device" or (on_host and memory.optimizer == "host") else 0


def optimizer_bytes(spec: OptimizerSpec, trainable: int, weights_bytes: int) -> int:
    """State of an optimizer over parameters of this number and size: torch's has the type of its parameters."""
    if spec.name == "adamw8bit":
        return round(trainable * _EIGHT_BIT_BYTES)
    if spec.name == "adamw4bit":
        return round(trainable * _FOUR_BIT_BYTES)
    if spec.rounding == "compensated" and weights_bytes < 4 * trainable:
        # Moments in float32, and the error that was made, in the type of the weights.
        moments = 2 if spec.name == "adamw" else int(spec.momentum > 0)
        return 4 * moments * trainable + weights_bytes
    if spec.name == "adamw":
        return 2 * weights_bytes
    return weights_bytes if spec.momentum else 0


def tier_bytes(
    spec: OptimizerSpec, memory: MemorySpec, trainable: int, weights_bytes: int, *, on_host: bool
) -> TierBytes:
    """Bytes of a stage that trains so many parameters, whose weights take `weights_bytes`. `on_host`: the device is the
    host, so that nothing is copied between them."""
    apart = memory.updates_on_host and not on_host
    masters = 4 * trainable if memory.masters != "none" else 0
    updated = masters or weights_bytes
    state = optimizer_bytes(spec, trainable, updated)
    held = {"device": 0, "host": BUFFERS * BUFFER_BYTES if apart else 0, "disk": 0}
    held[memory.optimizer] += state
    if masters or apart:
        held[memory.optimizer if memory.masters == "none" else memory.masters] += updated
        held["host" if memory.updates_on_host else "device"] += updated
    return TierBytes(state, masters, held["device"], held["host"], held["disk"])
