"""The table of domains: what differs between images, text and labelled text, in two halves.

Planning (`workers.domains.planning`) loads no torch, and neither does importing this module. Training
(`workers.domains.base`) is loaded when it is asked for: stages, snapshots and evaluations are written against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_store.errors import ConfigError
from workers.domains.images.planning import IMAGES
from workers.domains.labelled.planning import LABELLED
from workers.domains.planning import AnyData, DomainPlanning
from workers.domains.text.planning import TEXT
from workers.models.registry import Family, family, family_of
from workers.specs.data_results import DataResult
from workers.specs.experiment import Experiment
from workers.specs.model import ModelSpec
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from cache_store.snapshots.store import SnapshotStore
    from workers.domains.base import Domain
    from workers.overlap import TrainedQuestions

#: A domain's planning half as its table gives it: it takes specs and outlines of its own.
Planning = DomainPlanning[Any, Any]


@dataclass(frozen=True)
class Training:
    """The training half of a domain. `domain`: one object for one experiment. `prepare`: put the data of a data
    task into the store. `questions`: those that it trains on, where its data are questions."""

    domain: Callable[[Experiment], Domain]
    prepare: Callable[[DataTask, SnapshotStore, Callable[..., None]], DataResult]
    questions: Callable[[DataTask], TrainedQuestions | None] = lambda task: None


def _images() -> Training:
    from workers.domains.images.training import ImageDomain, prepare_images

    return Training(ImageDomain, prepare_images)


def _text() -> Training:
    from workers.domains.text.training import TextDomain, prepare_tokens, questions_of

    return Training(TextDomain, prepare_tokens, questions_of)


def _labelled() -> Training:
    from workers.domains.labelled.training import LabelledDomain, prepare_rows

    return Training(LabelledDomain, prepare_rows)


@dataclass(frozen=True)
class Halves:
    """A row of the table."""

    planning: Planning
    training: Callable[[], Training]


DOMAINS: dict[str, Halves] = {
    "images": Halves(IMAGES, _images),
    "text": Halves(TEXT, _text),
    "labelled": Halves(LABELLED, _labelled),
}


def planning_of(model: ModelSpec) -> Planning:
    """The planning half of the domain that a model works on."""
    return planning_of_family(model.family)


def planning_of_family(name: str) -> Planning:
    """The planning half of the domain that the models of a family work on. ConfigError when it is not known."""
    return _halves(family(name)).planning


def domain_of(experiment: Experiment) -> Domain:
    """The training half of an experiment's domain. Loads torch."""
    return _halves(family_of(experiment.model)).training().domain(experiment)


def planning_of_data(data: AnyData) -> Planning:
    """The planning half of the domain that a data set belongs to."""
    return _halves_of_data(data).planning


def prepare_data(task: DataTask, snapshots: SnapshotStore, progress: Callable[..., None]) -> DataResult:
    """Put the data of a data task into the store, whatever its domain."""
    return _halves_of_data(task.data).training().prepare(task, snapshots, progress)


def trained_questions(task: DataTask) -> TrainedQuestions | None:
    """Take the digests of the questions that a data task's runs train on; None where its data is no questions."""
    return _halves_of_data(task.data).training().questions(task)


def _halves(owner: Family) -> Halves:
    if owner.domain not in DOMAINS:
        raise ConfigError(
            f"model.family: {owner.name!r} works on the domain {owner.domain!r}; known: {', '.join(DOMAINS)}",
            where="model.family",
        )
    return DOMAINS[owner.domain]


def _halves_of_data(data: AnyData) -> Halves:
    return next(halves for halves in DOMAINS.values() if halves.planning.data is type(data))
