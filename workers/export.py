"""The outcome of a regime as a folder that the library of its model's family loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.records.nodes import Commit, NodeStore
from workers.models.base import COMPANION, Export
from workers.models.registry import family_of
from workers.overlap import TrainedQuestions
from workers.specs.experiment import Experiment
from workers.specs.export_files import TRAINED_QUESTIONS
from workers.specs.results import HeldParts, ModelResult

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trained:
    """What is exported. `parts` maps every part of the chain to the commit that holds it."""

    experiment: Experiment
    parts: Mapping[str, Commit]
    #: The commit of the initial weights, looked up where something has to be written.
    model_commit: Callable[[], Commit]
    #: JSON facts of the data, as `DomainPlanning.export_facts` gives them.
    data: Mapping[str, Any] = field(default_factory=dict)
    #: The commit of the data, which may say what questions were trained on.
    data_commit: Commit | None = None


def export(trained: Trained, nodes: NodeStore, target: Path) -> None:
    """Write the folder `target`, one part in memory at a time where the family allows it.

    Nothing is written, and torch is not imported, when `target` already holds these very weights.
    """
    experiment = trained.experiment
    family = family_of(experiment.model)
    sources = sources_of(trained.parts)
    files = [target / name for name in family.export_files]
    if all(file.exists() for file in files) and json.loads(files[0].read_text()).get("sources") == sources:
        return
    commit = trained.model_commit()
    family.export(
        Export(
            model=experiment.model,
            classes=experiment.classes,
            states=_states(trained, nodes),
            companions=_companions(commit, trained.data_commit, nodes),
            data=trained.data,
            sources=sources,
        ),
        target,
    )


def _companions(model: Commit, data: Commit | None, nodes: NodeStore) -> dict[str, bytes]:
    """Read the files that go beside the weights. What a model trained further was trained on before stays known."""
    files = {
        name: nodes.read_file(model.files[f"{COMPANION}{name}"]) for name in model.read(ModelResult).companions or ()
    }
    if data is not None and TRAINED_QUESTIONS in data.files:
        new = nodes.read_file(data.files[TRAINED_QUESTIONS])
        found = [new, *([files[TRAINED_QUESTIONS]] if TRAINED_QUESTIONS in files else [])]
        digests = [TrainedQuestions.from_bytes(content, TRAINED_QUESTIONS) for content in found]
        files[TRAINED_QUESTIONS] = reduce(or_, digests).to_bytes()
    return files


def sources_of(parts: Mapping[str, Commit]) -> dict[str, list[str]]:
    """Name the node that each part comes from, and the digest of the file that holds it. Not the attempt: that differs
    between runs that give the same weights."""
    files = {name: commit.read(HeldParts).file_of(name) for name, commit in parts.items()}
    return {name: [commit.node, commit.files[files[name]].sha256] for name, commit in parts.items()}


def _states(trained: Trained, nodes: NodeStore) -> Iterator[tuple[str, dict[str, Tensor]]]:
    import torch

    from workers.domains.registry import domain_of
    from workers.weights import Weights

    commits = {f"weights/{name}": commit for name, commit in trained.parts.items()}
    weights = Weights(nodes, commits, domain_of(trained.experiment), torch.device("cpu"))
    for part in trained.parts:
        yield part, weights.state(part)
