"""The contract between planning and a kind of data: everything that needs no torch.

`workers.domains.registry` has the table; `workers.domains.base` is the other half of a domain, for training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from cache_store.errors import ConfigError
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.specs.data_results import DataFigures
from workers.specs.experiment import ImageSpec, LossSpec, TargetKind, TrainSpec
from workers.specs.language import CausalLMSpec, LabelledTextSpec, TextSpec
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from workers.data.text.preview import Preview

AnyData = ImageSpec | TextSpec | LabelledTextSpec

#: The spec of a data set, and what looking at its files finds.
DataT = TypeVar("DataT", ImageSpec, TextSpec, LabelledTextSpec)
OutlineT = TypeVar("OutlineT")


class AnyOutline(Protocol):
    """What is known of a data set before it is prepared; the rest is between a domain and its own outline."""

    @property
    def fingerprint(self) -> str:
        """Changes with the files."""


@dataclass(frozen=True)
class SplitRows:
    """Samples of the three splits; of packed text, about."""

    train: int
    validation: int
    test: int

    def of(self, split: str) -> int:
        return int(getattr(self, split))


@dataclass(frozen=True)
class LoadSeconds:
    """Seconds in which one core makes a network's input of a prepared sample: to train on, and to evaluate."""

    train: float = 0.0
    evaluate: float = 0.0


class DomainPlanning(ABC, Generic[DataT, OutlineT]):
    """What planning asks of images or text. Stateless; methods load libraries when they are called, never torch."""

    #: The spec class that the section `data` of a configuration is read into.
    data: ClassVar[type[Any]]
    #: What the raw inputs of a chain are called.
    raw: ClassVar[str]
    #: Samples that go through frozen blocks together, and samples of an evaluation batch, where nothing is said.
    group_rows: ClassVar[int]
    evaluation_batch: ClassVar[int]
    #: Packages that prepare the data: another version of one may give other samples.
    libraries: ClassVar[tuple[str, ...]]
    #: Settings of `training` that are other than `TrainSpec` says where nothing is said.
    training: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def metrics(self, data: DataT) -> tuple[str, ...]:
        """Metrics of an evaluation, keys of `workers.domains.metrics.METRICS`; the first is the one that trials of a
        sweep are compared by."""

    def targets(self, name: str, loss: str) -> TargetKind | None:
        """What `data.targets` of a data set of this name is where nothing is said, for a loss of this name; None to
        leave it open."""
        return None

    def loss_refusals(self, data: DataT, train: TrainSpec) -> Iterator[Finding]:
        """What is wrong with `training.loss`, and with settings that depend on it. The keys are those of the
        configuration."""
        if train.loss not in (None, LossSpec()):
            yield ("training", "loss"), "is for images and data of your own; models of text have cross-entropy"

    def loss(self, train: TrainSpec) -> LossSpec | None:
        """The loss as tasks name it; None where it is the domain's own."""
        return None

    def output_problems(self, data: DataT, outline: OutlineT, train: TrainSpec, outputs: int) -> Iterator[Finding]:
        """What does not fit between targets, loss and a head of so many outputs."""
        yield from ()

    @abstractmethod
    def inspect(self, data: DataT, seed: int) -> OutlineT:
        """Look at the files. DataError or ConfigError, all problems at once."""

    def foresee(self, data: DataT, seed: int) -> OutlineT:
        """As `inspect`, but without downloading what the configuration says how to download."""
        return self.inspect(data, seed)

    @abstractmethod
    def rows(self, data: DataT, outline: OutlineT) -> SplitRows:
        """Samples of every split."""

    @abstractmethod
    def problems(self, data: DataT) -> Iterator[Finding]:
        """What is wrong with the section `data`, without looking at files."""

    def row_problems(self, data: DataT, rows: SplitRows) -> Iterator[Finding]:
        """What is wrong with the sizes of the splits, where `inspect` has not said so."""
        yield from ()

    @abstractmethod
    def classes(self, outline: OutlineT) -> int | None:
        """Classes of the data set; None where targets are tokens."""

    @abstractmethod
    def views(self, data: DataT) -> int | Literal["auto"] | None:
        """Augmentation views that are asked for: `auto` leaves them to the plan; None where samples have none."""

    def with_views(self, data: DataT, views: int) -> DataT:
        """The spec with a number of views."""
        return data

    @abstractmethod
    def sample(self, data: DataT, outline: OutlineT) -> Shape:
        """Shape of one sample, about, for predictions."""

    @abstractmethod
    def checked_sample(self, data: DataT) -> Shape | None:
        """Shape of a sample that tells whether there is a chain, before the files are looked at; None where only they
        tell."""

    def load_seconds(self, data: DataT) -> LoadSeconds:
        """What loading raw inputs takes, about; nothing where it is copying alone."""
        return LoadSeconds()

    @abstractmethod
    def without_files(self, data: DataT, outline: OutlineT) -> DataT:
        """The spec freed of where files lie: the store holds the prepared data, so a stage needs no path. With what
        only looking at them found, where a stage needs that."""

    @abstractmethod
    def task(self, data: DataT, fingerprint: str, seed: int, tokenizing: CausalLMSpec | None) -> DataTask:
        """Prepare the data. The task holds what decides the prepared samples and nothing else."""

    @abstractmethod
    def words(self, data: DataT, outline: OutlineT, count_text: Callable[[int], str]) -> str:
        """The data in a few words. `count_text` writes large numbers."""

    @abstractmethod
    def train_sets_words(self, views: int) -> str:
        """Snapshot sets of the training split in a few words; `views` of them."""

    def try_sample(self, outline: OutlineT, task: DataTask) -> None:
        """Try some samples as a data task would prepare them, in about a second. DataError naming what it would
        refuse."""

    def preview(self, data: DataT, tokenizing: CausalLMSpec | None, seed: int, split: str, rows: int) -> Preview:
        """Read the first samples of a split as training will see them. ConfigError where there is nothing to read."""
        raise ConfigError(f"data show is for text, which people can read; data.name {data.name} is {self.raw}")

    def loss_problems(self, data: DataT, found: DataFigures) -> Iterator[Finding]:
        """What is wrong with the data as they were prepared: most samples lost something, and nothing allows that."""
        yield from ()

    def measured(self, data: DataT) -> str | None:
        """Say why it cannot be measured what boundaries know of the targets (evaluation.boundaries); None where it
        can."""
        return "is for images with classes: the boundaries of text are a row a token, and its targets are tokens"

    def export_reads_data(self, data: DataT) -> bool:
        """Tell whether an export copies files that preparing the data has left beside its sets."""
        return False

    def export_facts(self, data: DataT, outline: OutlineT) -> dict[str, Any]:
        """JSON facts of the data that belong beside exported weights."""
        return {}
