"""Say how devices share a stage; importable without numpy and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: How the ranks of a gang share a stage: each holds all parameters (`ddp`), or a part of each, by torch (`fsdp2`) or by
#: DeepSpeed (`zero3`).
Strategy = Literal["ddp", "fsdp2", "zero3"]


@dataclass(frozen=True)
class Zero3Spec:
    """Say where the ranks of a `zero3` gang keep their parts. Nothing here changes a result."""

    parameters: Literal["device", "host", "disk"] = "device"
    #: With the float32 weights that updates change, and the gradients on their way there.
    optimizer: Literal["device", "host", "disk"] = "device"
    #: Folder for the files of what is on disk, on every machine.
    disk: str | None = None

    @property
    def files(self) -> bool:
        """Whether anything is in files."""
        return "disk" in (self.parameters, self.optimizer)


#: Where nobody says.
ON_DEVICE = Zero3Spec()


@dataclass(frozen=True)
class Ranks:
    """Say how many devices hold a stage together, and how. `size` 1: one device, no gang."""

    size: int = 1
    strategy: Strategy = "ddp"
    zero3: Zero3Spec = ON_DEVICE

    @property
    def parts(self) -> int:
        """Into how many parts weights, gradients and states are split."""
        return self.size if self.strategy != "ddp" else 1

    @property
    def splits(self) -> bool:
        """Whether each rank holds a part of them only."""
        return self.parts > 1

    @property
    def replicates(self) -> bool:
        """Whether each rank holds all of them, beside others that do."""
        return self.size > 1 and not self.splits

    @property
    def weights_on_host(self) -> bool:
        """Whether a rank's part of the weights lies beside the device."""
        return self.splits and self.strategy == "zero3" and self.zero3.parameters != "device"

    @property
    def updates_on_host(self) -> bool:
        """Whether a rank's part of states and gradients does."""
        return self.splits and self.strategy == "zero3" and self.zero3.optimizer != "device"

    def share(self, whole: int) -> int:
        """Give a rank's part of so many bytes or numbers."""
        return -(-whole // self.parts)


#: Elements that travel together in `zero3`: gradients on their way to their sums, and parameters that are fetched ahead
#: of use. 64 MB of float32, held by every rank. DeepSpeed's own 500 million would be 2 GB.
ZERO3_BUCKET = 1 << 24
#: Elements that are gathered at one time and used again soon: DeepSpeed's own number.
ZERO3_LIVE = 10**9
#: A stage on one device.
ONE_DEVICE = Ranks()
