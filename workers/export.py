"""The outcome of a regime as a folder that the library of its model's family loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.errors import CorruptRecord
from cache_store.records.nodes import Commit, NodeStore
from cache_store.records.record_io import dump_record, read_local
from cache_store.storage.durable import typed_errors, write_atomically
from workers.file_digests import file_digest
from workers.models.base import COMPANION, Export
from workers.models.registry import family_of
from workers.overlap import TrainedQuestions
from workers.specs.experiment import Experiment
from workers.specs.export_files import EXPORTED, TRAINED_QUESTIONS
from workers.specs.results import HeldParts, ModelResult

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


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


def export(trained: Trained, nodes: NodeStore, target: Path, *, anew: bool = False) -> None:
    """Write the folder `target`, one part in memory at a time where the family allows it.

    Nothing is written, and torch is not imported, when `target` already holds these very weights, every file as it was
    written; with `anew` it is written all the same. StoreErrors as `Storage.write`.
    """
    experiment = trained.experiment
    sources = sources_of(trained.parts)
    if not anew and _is_whole(target, sources):
        return
    commit = trained.model_commit()
    with typed_errors("write", target):
        family_of(experiment.model).export(
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
        files = {name: [path.stat().st_size, file_digest(path)] for name, path in sorted(_files(target).items())}
    record = {"format": FORMAT, "sources": sources, "files": files}
    write_atomically(target / EXPORTED, dump_record(record, f"the files of {target}"))


def _is_whole(target: Path, sources: Mapping[str, list[str]]) -> bool:
    """Tell whether every file of an export of these sources is there, by length and digest."""
    try:
        record = read_local(target / EXPORTED)
        if record is None or record.get("format") != FORMAT or record.get("sources") != sources:
            return False
        files = _files(target)
        return all(
            name in files and files[name].stat().st_size == size and file_digest(files[name]) == digest
            for name, (size, digest) in record["files"].items()
        )
    except (OSError, CorruptRecord, KeyError, TypeError, ValueError, AttributeError):
        return False


def _files(target: Path) -> dict[str, Path]:
    """Return the regular files of an exported folder by name, without the record of them."""
    found = {path.relative_to(target).as_posix(): path for path in target.rglob("*")}
    return {name: path for name, path in found.items() if name != EXPORTED and path.is_file() and not path.is_symlink()}


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
