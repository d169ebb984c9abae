"""The contract between the training code and a kind of data; see `workers.domains.registry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cache_store.formats.codec import Field
from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.models.base import Parts
from workers.models.chain import Boundary, State
from workers.models.counting import Shape
from workers.models.registry import family_of
from workers.specs.experiment import Experiment, Precision, TrainSpec
from workers.specs.results import ByClass
from workers.versions import installed


class Source(Protocol):
    """One split of a prepared data set, sample by sample."""

    rows: int
    #: Digest of everything that determines its samples and their order.
    identity: str


@dataclass(frozen=True)
class Rows:
    """Some samples on the host: which, what is to be predicted, and what their shape needs to be known."""

    index: np.ndarray
    #: Images: classes (B,) int64, or targets of another kind (B, …). Text: next tokens (N,) int64 of the positions that
    #: count.
    targets: Tensor
    #: Text: the padded batch; None for images.
    text: Any = None


@dataclass(frozen=True)
class Batch:
    """Some samples on the device, as a path takes them."""

    boundary: Boundary
    targets: Tensor
    #: What parts need beside the boundary (text: positions, masks, rotary embeddings); None for images.
    context: Any
    rows: Rows
    #: False where another rank of a gang has the same samples, and counts them.
    counts: bool = True


@dataclass(frozen=True)
class StandIn:
    """Made-up samples on the host."""

    rows: Rows
    #: Boundary 0.
    boundary: Boundary
    #: Rows of a snapshot set that so many samples take.
    set_rows: int


class Scorer(Protocol):
    """Sums what a path makes of a split, on the device, and reads it out once."""

    #: All that was summed: those of two parts of a split, added, are those of the whole.
    sums: Tensor

    def add(self, output: Any, batch: Batch) -> None:
        """Take in the path's output for one batch."""

    def metrics(self) -> dict[str, float]:
        """At least `loss` and what the domain's `monitor` names. The only synchronization with the device."""

    def by_class(self) -> ByClass | None:
        """How single classes fared; None where that was not counted. Waits for the device."""


class FamilyParts:
    """The first half of every domain: the parts, as the family of the model makes them."""

    def __init__(self, parts: Parts, experiment: Experiment) -> None:
        self._parts = parts
        self._computing = {"code": experiment.code, "versions": installed(family_of(experiment.model).libraries)}

    def part_names(self) -> list[str]:
        return self._parts.names()

    def part_state_names(self, part: str) -> list[str]:
        return self._parts.state_names(part)

    def build_part(self, part: str, device: torch.device) -> nn.Module:
        return self._parts.build(part, device)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        return self._parts.build_adapter(source, target, seed, device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: State | None) -> nn.Module:
        return self._parts.build_aux(source, seed, device, head)

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:
        self._parts.prepare_training(part, module, train, seed)

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:
        self._parts.prepare_frozen(part, module, train)

    def sharing_parts(self) -> tuple[str, ...]:
        return self._parts.sharing()

    def tie(self, modules: Mapping[str, nn.Module], train: TrainSpec | None) -> None:
        self._parts.tie(modules, train)

    def final_state(self, module: nn.Module) -> State:
        return self._parts.final_state(module)

    def adapter_state(self, module: nn.Module) -> State:
        return self._parts.adapter_state(module)

    def fields(self, blocks: int, dtype: str) -> tuple[Field, ...]:
        return tuple(Field(name, dtype, shape) for name, shape in self._parts.boundary(blocks).items())

    def model_identity(self) -> Any:
        return {"model": self._parts.identity(), **self._computing}


class Domain(Protocol):
    """Images or text. One object serves one task."""

    #: Which validation metric chooses epochs, a key of `workers.domains.metrics.METRICS`.
    monitor: str
    #: What a sample and a row of a snapshot set are called.
    unit: str
    row_unit: str

    # -- parts --------------------------------------------------------------------------------------------

    def part_names(self) -> list[str]:
        """Blocks in forward order, then `head`."""

    def part_state_names(self, part: str) -> list[str]:
        """Names in the part's state dict, without allocating it."""

    def build_part(self, part: str, device: torch.device) -> nn.Module:
        """The part, allocated, weights unset."""

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        """Training-only map from boundary `source` to the input of block `target` (n: the head)."""

    def build_aux(self, source: int, seed: int, device: torch.device, head: State | None) -> nn.Module:
        """LW's local head on boundary `source`; `head`: the state of the real head, where it starts from that."""

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:
        """Make the part ready to be trained: freeze what stays, put low-rank adapters in. All its parameters require
        gradients before."""

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:
        """Make a part of a stage's path whose matrices stay as they are (it is not trained, or by low-rank adapters
        alone) ready for it: fewer bits, where that is asked for. The part has its weights and is on its device."""

    def sharing_parts(self) -> tuple[str, ...]:
        """The parts that `tie` lets share a tensor."""

    def tie(self, modules: Mapping[str, nn.Module], train: TrainSpec | None) -> None:
        """Let parts, prepared as above, hold a tensor together that the model shares between them. `train`: of the
        stage; None: nothing is trained."""

    def final_state(self, module: nn.Module) -> State:
        """A trained part's own tensors, named as `part_state_names` does, to be written before they change."""

    def adapter_state(self, module: nn.Module) -> State:
        """A trained part's low-rank adapters, which `final_state` has merged; {} where it has none."""

    # -- rows ---------------------------------------------------------------------------------------------

    def source(self, data: Commit, snapshots: SnapshotStore, split: str) -> Source:
        """Open a split of the prepared data, by the commit of the data node. DataError when its sets can neither be
        read nor restored."""

    def views(self, source: Source) -> int:
        """Augmentation views: epoch e uses view e mod views."""

    def rows(self, source: Source, index: np.ndarray) -> Rows:
        """Targets and shapes of some samples, without their inputs."""

    def target_counts(self, source: Source, index: np.ndarray) -> np.ndarray:
        """How many targets each of these samples has: int64, like `index`."""

    def load(self, source: Source, rows: Rows, view: int | None) -> Boundary:
        """Boundary 0 of these samples, host tensors."""

    def batch(
        self,
        rows: Rows,
        boundary: Boundary,
        *,
        stored: bool,
        device: torch.device,
        precision: Precision,
        channels_last: bool = False,
    ) -> Batch:
        """Host tensors as a batch on the device. `stored`: `boundary` holds rows of a snapshot set."""

    def stand_in(self, samples: int, sample: Shape) -> StandIn:
        """Samples that stand for any of this shape: what a stage takes is counted with them."""

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        """What a frozen prefix gave, or what was stored of it, in the type in which the next part takes it."""

    # -- snapshots ----------------------------------------------------------------------------------------

    def fields(self, blocks: int, dtype: str) -> tuple[Field, ...]:
        """What a row of the boundary after the first `blocks` blocks holds."""

    def offsets(self, source: Source) -> np.ndarray | None:
        """First set row of every sample, int64 (samples + 1,); None where a sample is a row."""

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        """The rows of a snapshot set that belong to these samples, in order."""

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        """A boundary computed from `batch` as rows of a snapshot set (nothing padded)."""

    def view_identity(self, view: int | None) -> Any:
        """JSON that names everything a view depends on."""

    def model_identity(self) -> Any:
        """JSON that names the architecture, where digests of states do not, and the code and versions that compute."""

    # -- objective ----------------------------------------------------------------------------------------

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        """(mean loss over the targets, how many were predicted right or None), on the device."""

    def scorer(self, source: Source, device: torch.device, *, by_class: bool = False) -> Scorer:
        """A fresh scorer for one pass over the split. `by_class`: single classes are counted, too, if there are any."""
