"""Text as far as planning needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from cache_store.suggest import did_you_mean
from workers.domains.planning import DomainPlanning, SplitRows
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.specs.data_results import DataFigures
from workers.specs.language import CausalLMSpec, TextSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask

if TYPE_CHECKING:
    from workers.data.text.inspect import TextOutline
    from workers.data.text.preview import Preview


class TextPlanning(DomainPlanning[TextSpec, "TextOutline"]):
    """See `workers.domains.planning.DomainPlanning`."""

    data = TextSpec
    raw = "text"
    libraries = ("tokenizers", "transformers")
    group_rows = 16
    evaluation_batch = 16
    # Fine-tuning is often one epoch of large batches: what the last one would leave out is seen by no epoch.
    training = MappingProxyType({"drop_last": False})

    def metrics(self, data: TextSpec) -> tuple[str, ...]:
        return ("loss", "perplexity", "accuracy", "token_accuracy")

    def inspect(self, data: TextSpec, seed: int) -> TextOutline:
        from workers.data.text.inspect import inspect_text

        return inspect_text(data, seed)

    def rows(self, data: TextSpec, outline: TextOutline) -> SplitRows:
        return SplitRows(**{split: outline.rows[split] for split in ("train", "validation", "test")})

    def problems(self, data: TextSpec) -> Iterator[Finding]:
        for key, share in (("validation", data.validation), ("test", data.test)):
            if share >= 1 and share != int(share):
                yield ("data", key), f"{share}: must be a fraction below 1 or a whole number of documents"
        yield from _column_problems(data)
        for key, value, usual in (("system", data.system, None), ("targets", data.targets, "answers")):
            if value != usual and data.name != "chat":
                yield ("data", key), "is for data.name chat"

    def try_sample(self, outline: TextOutline, task: DataTask) -> None:
        from workers.models.causal_lm.remembered import holds_of_data

        data, model = expect(TextSpec, task.data), task.model
        if not outline.sample or model is None:
            return

        def sound() -> bool:
            from workers.data.text.sample import try_sample

            try_sample(data, model, outline.sample)
            return True

        holds_of_data("sample", task, sound)

    def preview(self, data: TextSpec, tokenizing: CausalLMSpec | None, seed: int, split: str, rows: int) -> Preview:
        from workers.data.text.preview import preview_text

        return preview_text(data, expect(CausalLMSpec, tokenizing), seed, split, rows)

    def loss_problems(self, data: TextSpec, found: DataFigures) -> Iterator[Finding]:
        from workers.data.text.samples.statistics import refusals_of

        for setting, text in refusals_of(data, found.statistics or {}):
            yield ("data", setting), text

    def classes(self, outline: TextOutline) -> None:
        return None

    def export_reads_data(self, data: TextSpec) -> bool:
        from workers.data.text.formats import TEXT_FORMATS

        return TEXT_FORMATS[data.name].candidates > 1  # digests of the questions that were trained on

    def views(self, data: TextSpec) -> None:
        return None

    def sample(self, data: TextSpec, outline: TextOutline) -> Shape:
        return (tokens_a_sample(data, outline),)

    def checked_sample(self, data: TextSpec) -> Shape:
        return (1,)  # which chain there is does not depend on how long a sample is

    def without_files(self, data: TextSpec, outline: TextOutline) -> TextSpec:
        return replace(data, path=None)

    def task(self, data: TextSpec, fingerprint: str, seed: int, tokenizing: CausalLMSpec | None) -> DataTask:
        # Text is split before it is packed, so that no document is in two splits: with the seed of the run.
        return DataTask(data=data, fingerprint=fingerprint, seed=seed, model=tokenizing)

    def words(self, data: TextSpec, outline: TextOutline, count_text: Callable[[int], str]) -> str:
        rows, tokens = self.rows(data, outline), tokens_a_sample(data, outline)
        return (
            f"{data.name}: about {rows.train} + {rows.validation} + {rows.test} samples of {tokens} tokens, "
            f"{count_text(tokens * rows.train)} tokens to train on" + "".join(f"; {note}" for note in outline.notes)
        )

    def train_sets_words(self, views: int) -> str:
        return "train"


def _column_problems(data: TextSpec) -> Iterator[Finding]:
    """Check that `columns` say what some layout has."""
    from workers.data.text.corpora.layouts import LAYOUTS, WORDS, one_layout_has

    if data.columns is None:
        return
    at = ("data", "columns")
    if data.column is not None:
        yield at, "not with data.column, which names the column of the messages alone; allowed: one of the two"
    known = {"text": ("text",), "chat": WORDS}.get(data.name)
    if known is None:
        yield at, "is for data.name text and chat"
        return
    unknown = [word for word in data.columns if word not in known]
    for word in unknown:
        hint = did_you_mean(word, known)
        yield at, f"{word!r} is nothing that a column of a {data.name} can be{hint}; allowed: {', '.join(known)}"
    if not unknown and data.name == "chat" and not one_layout_has(data.columns):
        ways = ", or of ".join(", ".join((*layout.needed, *layout.optional)) for layout in LAYOUTS)
        yield at, f"{', '.join(data.columns)} are of no one layout; allowed: columns of {ways}"


def tokens_a_sample(data: TextSpec, outline: TextOutline) -> int:
    """Tokens of a sample, about: what packing makes of it, or a quarter of its bytes."""
    from workers.data.text.formats import data_is_packed

    if data_is_packed(data):
        return data.sequence_length
    mean = outline.bytes / max(1, sum(outline.documents.values())) / 4
    return max(1, min(data.sequence_length, round(mean)))


TEXT = TextPlanning()
