"""Labelled text as far as planning needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cache_store.suggest import did_you_mean
from workers.domains.planning import DomainPlanning, SplitRows
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.specs.language import CausalLMSpec, LabelledTextSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from workers.data.text.labelled.corpus import LabelledOutline
    from workers.data.text.preview import Preview

#: Bytes of a text's token, about.
_BYTES_PER_TOKEN = 4
_SPLITS = ("train", "validation", "test")


class LabelledPlanning(DomainPlanning[LabelledTextSpec, "LabelledOutline"]):
    """See `workers.domains.planning.DomainPlanning`."""

    data = LabelledTextSpec
    raw = "text"
    libraries = ("tokenizers", "transformers")
    group_rows = 32
    evaluation_batch = 64

    def metrics(self, data: LabelledTextSpec) -> tuple[str, ...]:
        return ("accuracy", "loss")

    def inspect(self, data: LabelledTextSpec, seed: int) -> LabelledOutline:
        from workers.data.text.labelled.corpus import inspect_labelled

        return inspect_labelled(data, seed)

    def rows(self, data: LabelledTextSpec, outline: LabelledOutline) -> SplitRows:
        return SplitRows(**outline.rows)

    def problems(self, data: LabelledTextSpec) -> Iterator[Finding]:
        from workers.data.text.labelled.rows import WORDS

        for key, share in (("validation", data.validation), ("test", data.test)):
            if share >= 1 and share != int(share):
                yield ("data", key), f"{share}: must be a fraction below 1 or a whole number of samples"
        for word in data.columns or {}:
            if word not in WORDS:
                hint = did_you_mean(word, WORDS)
                yield (
                    ("data", "columns"),
                    f"{word!r} is nothing that a column can be{hint}; allowed: {', '.join(WORDS)}",
                )
        if data.labels is not None and len(set(data.labels)) < max(2, len(data.labels)):
            yield ("data", "labels"), f"{', '.join(data.labels) or 'none'}: must be at least two, each of its own name"
        for split in data.files or {}:
            if split not in _SPLITS:
                hint = did_you_mean(split, _SPLITS)
                yield ("data", "files"), f"{split!r} is no split{hint}; allowed: {', '.join(_SPLITS)}"
        if data.files is not None and "train" not in data.files:
            yield ("data", "files"), "none given for train"

    def classes(self, outline: LabelledOutline) -> int:
        return len(outline.class_names)

    def views(self, data: LabelledTextSpec) -> None:
        return None

    def sample(self, data: LabelledTextSpec, outline: LabelledOutline) -> Shape:
        mean = outline.bytes / max(1, sum(outline.rows.values())) / _BYTES_PER_TOKEN
        return (max(2, min(data.sequence_length, round(mean))),)

    def checked_sample(self, data: LabelledTextSpec) -> Shape:
        return (2,)  # which chain there is does not depend on how long a sample is

    def without_files(self, data: LabelledTextSpec, outline: LabelledOutline) -> LabelledTextSpec:
        return replace(data, path=None, files=None, labels=outline.class_names)

    def task(self, data: LabelledTextSpec, fingerprint: str, seed: int, tokenizing: CausalLMSpec | None) -> DataTask:
        return DataTask(data=data, fingerprint=fingerprint, seed=seed, model=tokenizing)

    def preview(
        self, data: LabelledTextSpec, tokenizing: CausalLMSpec | None, seed: int, split: str, rows: int
    ) -> Preview:
        from workers.data.text.labelled.preview import preview_labelled

        return preview_labelled(data, expect(CausalLMSpec, tokenizing), seed, split, rows)

    def words(self, data: LabelledTextSpec, outline: LabelledOutline, count_text: Callable[[int], str]) -> str:
        rows, (tokens,) = self.rows(data, outline), self.sample(data, outline)
        return (
            f"{data.name}: {rows.train} + {rows.validation} + {rows.test} samples of about {tokens} tokens, "
            f"{len(outline.class_names)} classes" + "".join(f"; {note}" for note in outline.notes)
        )

    def train_sets_words(self, views: int) -> str:
        return "train"

    def export_facts(self, data: LabelledTextSpec, outline: LabelledOutline) -> dict[str, Any]:
        return {"class_names": list(outline.class_names), "preprocessing": {"max_length": data.sequence_length}}


LABELLED = LabelledPlanning()
