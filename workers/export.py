"""The outcome of a regime as a folder that the library of its model's family loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.errors import CorruptRecord, UserError
from cache_store.records.nodes import Commit, NodeStore
from cache_store.records.record_io import dump_record, read_local
from cache_store.storage.durable import typed_errors, write_atomically
from workers.file_digests import file_digest
from workers.models.base import COMPANION, AdapterExport, AdapterPiece, Export
from workers.models.registry import family_of
from workers.overlap import TrainedQuestions
from workers.specs.as_json import from_json
from workers.specs.experiment import Experiment
from workers.specs.export_files import CARD, EXPORTED, TRAINED_QUESTIONS
from workers.specs.language import LoraSpec
from workers.specs.model import ModelSpec
from workers.specs.results import HeldParts, ModelResult, StageResult

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
    _write_record(target, sources, files)


def export_adapter(
    trained: Trained, lineage: Mapping[str, Sequence[Commit]], base: ModelSpec, nodes: NodeStore, target: Path
) -> None:
    """Write the low-rank adapters that stages trained as the folder `target`, in place of what it holds.

    `lineage`: part -> what trained it since the initial weights; `base`: as those were read. UserError where a stage
    trained whole weights, or no adapters are kept; StoreErrors as `Storage.write`.
    """
    sources = sources_of(trained.parts)
    pieces = {part: [*_pieces(part, found, nodes)] for part, found in lineage.items()}
    with typed_errors("write", target):
        family_of(trained.experiment.model).export_adapter(
            AdapterExport(
                model=trained.experiment.model,
                base=base,
                pieces=pieces,
                companions=_companions(trained.model_commit(), trained.data_commit, nodes),
                sources=sources,
            ),
            target,
        )
        files = {name: [path.stat().st_size, file_digest(path)] for name, path in sorted(_files(target).items())}
    _write_record(target, sources, files)


def _write_record(target: Path, sources: Mapping[str, list[str]], files: Mapping[str, Any]) -> None:
    record = {"format": FORMAT, "sources": sources, "files": files}
    write_atomically(target / EXPORTED, dump_record(record, f"the files of {target}"))


def _pieces(part: str, lineage: Sequence[Commit], nodes: NodeStore) -> Iterator[AdapterPiece]:
    """Yield what stages trained on a part; nothing of those that had no adapter on it, or were left out."""
    from workers.weights import read_tensors

    for commit in lineage:
        result = commit.read(StageResult)
        if not result.epochs:
            continue
        train = result.train_spec or {}
        if train.get("lora") is None:
            raise UserError(
                f"--adapter: {result.stage} trained whole weights of {part} (training.lora: null), which no low-rank "
                "adapter can say; leave --adapter out"
            )
        if result.adapters is None:
            raise UserError(
                f"--adapter: {result.stage} was trained by a version that kept its adapters merged alone; train it "
                "again in another run directory and store, or leave --adapter out"
            )
        held = result.adapters.get(part)
        if held is not None:
            yield AdapterPiece(
                tensors=partial(read_tensors, nodes, commit.files[held.file]),
                lora=from_json(LoraSpec, train["lora"]),
                frozen_weights=train["frozen_weights"],
                precision=train["precision"],
            )


def _is_whole(target: Path, sources: Mapping[str, list[str]]) -> bool:
    """Tell whether every file of an export of these sources is there, by length and digest."""
    try:
        record = read_local(target / EXPORTED)
        if record is None or record.get("format") != FORMAT or record.get("sources") != sources:
            return False
    except (OSError, CorruptRecord, AttributeError):
        return False
    return not damaged_files(target)


def damaged_files(target: Path) -> list[str]:
    """Name the files of an export that are missing, or not as they were written; the record of them, where that cannot
    be read."""
    try:
        record = read_local(target / EXPORTED)
        files = _files(target)
        return [
            name
            for name, (size, digest) in (record or {})["files"].items()
            if name not in files or files[name].stat().st_size != size or file_digest(files[name]) != digest
        ]
    except (OSError, CorruptRecord, KeyError, TypeError, ValueError, AttributeError):
        return [EXPORTED]


def _files(target: Path) -> dict[str, Path]:
    """Return the regular files of an exported folder by name, without the record of them and the card."""
    found = {path.relative_to(target).as_posix(): path for path in target.rglob("*")}
    return {
        name: path
        for name, path in found.items()
        if name not in (EXPORTED, CARD) and path.is_file() and not path.is_symlink()
    }


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
