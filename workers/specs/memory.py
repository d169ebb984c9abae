"""Where a stage keeps what it holds: the section `memory` of a configuration and a field of a stage's task. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from workers.specs.experiment import TrainSpec

#: A section as JSON values.
Json = Mapping[str, Any]
#: What happens to activations between forward and backward pass.
Activations = Literal["keep", "recompute", "selective", "host"]
#: What a configuration leaves to the plan; no task holds it.
AUTO = "auto"
#: Beside the device, nearest first. What is computed there is the same in all of them.
Tier = Literal["device", "host", "disk"]
#: Where weights that nothing trains may lie.
FrozenTier = Literal["device", "host"]


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """Where stages keep what the device need not hold all the time. Every key may also stand in `memory` of a regime,
    and in `memory` of one of its `stages`. `memory: auto` is optimizer, frozen and activations on auto: for every stage
    the fastest, by nominal speeds, that the device (resources.device_memory) and the host (resources.host_memory) have
    room for, settled by the plan."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    #: The optimizer's state. host: in the host's memory, where updates are computed too; gradients leave the device
    #: during the backward pass, and weights come back.
    #: disk: in files under `disk`, read and written piece by piece at the update.
    #: auto: on disk only where `disk` is set.
    optimizer: Tier | Literal["auto"] = "device"
    #: Float32 weights beside bfloat16 ones (model.master: bfloat16), so that no update is rounded away: updates change
    #: them, the device computes with what a bfloat16 holds of them. On the device where the optimizer's state is there,
    #: else on the host or on disk. Gradients are then added up in float32, too.
    masters: Literal["none", "device", "host", "disk"] = "none"
    #: Frozen blocks of a stage: those between its segment and the global head, and those before it where their outputs
    #: are computed again; and all of a network that is scored, or computes snapshots. host: in the host's memory; each
    #: comes to the device while the one before it computes, and in the backward pass again, where it also runs again.
    #: Needs frozen_weights: full.
    frozen: FrozenTier | Literal["auto"] = "device"
    #: What the backward pass needs of the forward pass. keep: all of it stays. recompute: the input of every block,
    #: which runs again. selective: results of matrix products, convolutions and attention, too, so that only cheap
    #: operations run again. host: all of it, in the host's memory but for two blocks at a time. null: recompute where
    #: training.activation_checkpointing is set, else keep.
    activations: Activations | Literal["auto"] | None = None
    #: Folder for the files of what is on disk, on every machine that trains; best on an NVMe disk of its own. They have
    #: no names, so that nothing stays of them when the stage ends or is killed.
    disk: str | None = None

    def activations_of(self, train: TrainSpec) -> Activations:
        """Say what happens to the activations of a stage that is trained so."""
        if self.activations is None or self.activations == "auto":
            return "recompute" if train.activation_checkpointing else "keep"
        return self.activations

    @property
    def open(self) -> bool:
        """Whether something is left to the plan."""
        return AUTO in (self.optimizer, self.frozen, self.activations)

    @property
    def frozen_tier(self) -> FrozenTier:
        """Where frozen blocks lie, once the plan has settled it."""
        return "host" if self.frozen == "host" else "device"

    @property
    def updates_on_host(self) -> bool:
        """Whether updates are computed on the host: where the optimizer's state is."""
        return self.optimizer != "device"

    @property
    def moves_updates(self) -> bool:
        """Whether updates change anything but the weights on the device by states beside them."""
        return self.updates_on_host or self.masters != "none"


#: What a task that says nothing means.
ON_DEVICE = MemorySpec()


def arithmetic(memory: Json) -> Json:
    """Select what decides a result out of a `MemorySpec` as JSON: where updates are computed and in which types. Which
    memory beside the device holds a tensor does not. Empty where everything is as without the section."""
    found: dict[str, Any] = {}
    if memory.get("optimizer", "device") != "device":
        found["updates"] = AUTO if memory["optimizer"] == AUTO else "host"
    if memory.get("masters", "none") != "none":
        found["masters"] = "float32"
    return found
