"""Updated weights on their way from where updates are computed to the device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Uploads(Protocol):
    """What brings pieces of weights to the device."""

    def begin(self) -> None:
        """Begin an update: nothing that was asked of the device before may see what is sent from now on."""

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy a piece (N,) into the device's (N,), rounded to its type, by the time of `finish`. `source` is not
        changed until the next `begin`."""

    def finish(self) -> None:
        """End the update: whatever is asked of the device from now on sees all that was sent."""


class DirectUploads:
    """Between tensors of one machine's memory, at once."""

    def begin(self) -> None:
        """Everything before has happened."""

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def finish(self) -> None:
        """Everything has arrived."""
