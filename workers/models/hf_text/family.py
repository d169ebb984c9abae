"""Text classifiers of transformers as a model family. Loads torch and transformers when a model is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cache_store.errors import ConfigError
from workers.models.base import COMPANION, Capabilities, Finding, Parts, Start, Traits, Written
from workers.models.hf_text.outline import HFTextOutline, text_chain
from workers.models.library.family import LibraryFamily
from workers.specs.experiment import ImageSpec
from workers.specs.language import CausalLMSpec, HFTextSpec, LabelledTextSpec, TextSpec
from workers.specs.model import FileDigests, ModelSpec, expect

if TYPE_CHECKING:
    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape
    from workers.models.library.networks import Library
    from workers.models.outline import ChainOutline

_DECODERS = "is for causal_lm"


class HFTextFamily(LibraryFamily[HFTextSpec, HFTextOutline]):
    """Every text classifier of transformers that is an embedding, layers one after the other, and a head."""

    name = "hf_text"
    spec = HFTextSpec
    domain = "labelled"
    traits = Traits(
        noun="a text classifier",
        stem=1,
        adapters=False,
        copies_head=True,
        alike_layers=True,
        pipeline="text-classification",
        can=Capabilities(
            lora=_DECODERS,
            lm_head=_DECODERS,
            frozen_weights=_DECODERS,
            masters=_DECODERS,
            omit=_DECODERS,
            fp8="fp8: is for causal_lm; allowed: plain, lossless, int8",
            sharding=f"{_DECODERS}; allowed: ddp",
            auto_micro="auto: is for causal_lm; allowed: a number",
            judged=_DECODERS,
            channels_last="true: is for images",
            head_convs="is for ResNets and VGGs; a text classifier has split.head",
            variant="is for ResNets and VGGs; a text classifier's local heads are copies of its own",
        ),
    )
    libraries = ("torch", "transformers")

    def inspect(self, model: HFTextSpec) -> HFTextOutline:
        from workers.models.hf_text.library import look

        return look(model)

    def outline(self, model: HFTextSpec, found: HFTextOutline | None, sample: Shape, classes: int) -> ChainOutline:
        from workers.models.hf_text.library import head_facts

        known = expect(HFTextOutline, found)
        return text_chain(known, head_facts(self._whole(model, known), classes), sample[0], classes)

    def architecture(self, model: HFTextSpec, found: HFTextOutline | None) -> HFTextSpec:
        whole = self._whole(model, expect(HFTextOutline, found))
        return replace(whole, path=None, revision=None, tokenizer=None)

    def start(self, model: HFTextSpec, found: HFTextOutline | None) -> HFTextSpec:
        return replace(self._whole(model, expect(HFTextOutline, found)), attention="sdpa")

    def weights_digest(self, model: HFTextSpec, found: HFTextOutline | None) -> str | None:
        return expect(HFTextOutline, found).weights_digest

    def file_digests(self, model: HFTextSpec, found: HFTextOutline | None) -> FileDigests:
        return expect(HFTextOutline, found).files

    def pretrained(self, model: HFTextSpec) -> bool:
        return model.path is not None

    def missing_weights(self, model: HFTextSpec, found: HFTextOutline | None) -> str | None:
        if model.path is None or expect(HFTextOutline, found).has_weights:
            return None
        return (
            f"model.path: {model.path} has a config.json but no *.safetensors: it can be planned for (--dry-run), not "
            "trained; without model.path, model.config starts from random weights"
        )

    def words(self, model: HFTextSpec, found: HFTextOutline | None) -> str:
        known = expect(HFTextOutline, found)
        weights = model.path or "random weights"
        if model.path is not None and not known.has_weights:
            weights += " (no weights there: it can be planned, not run)"
        return f"{known.config.get('model_type')}, {len(known.blocks) - 1} layers, {weights},"

    def tokenizing(self, model: HFTextSpec) -> CausalLMSpec:
        from workers.models.hf_text.library import tokenizing

        return tokenizing(model)

    def data_problems(
        self, model: HFTextSpec, found: HFTextOutline, data: ImageSpec | TextSpec | LabelledTextSpec
    ) -> Iterator[Finding]:
        text = expect(LabelledTextSpec, data)
        if found.positions is not None and text.sequence_length > found.positions:
            message = f"{text.sequence_length}: the model has positions for {found.positions} tokens"
            yield ("data", "sequence_length"), message
        yield from _tokenizer(self.tokenizing(self._whole(model, found)), found)

    def parts(self, model: HFTextSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.hf_text.parts import HFTextParts

        return HFTextParts(model, classes)

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from workers.models.hf_text.library import companions

        beside = companions(expect(HFTextSpec, start.model))
        for name, data in beside.items():
            attempt.write(f"{COMPANION}{name}", data)
        return replace(super().write_start(start, attempt, control), companions=tuple(sorted(beside)))

    def library(self, model: ModelSpec) -> Library:
        from workers.models.hf_text.library import TextTransformers

        return TextTransformers(expect(HFTextSpec, model))

    def _whole(self, model: HFTextSpec, found: HFTextOutline) -> HFTextSpec:
        return replace(model, config=dict(found.config))


def _tokenizer(model: CausalLMSpec, found: HFTextOutline) -> Iterator[Finding]:
    """The tokenizer must be there and fit the model. A folder without weights can be planned for without it."""
    from workers.data.text.tokens.tokenizers import load_tokenizer

    if model.tokenizer is None and not found.has_weights:
        if model.path is None:
            yield ("model", "tokenizer"), "none given; random weights need one: a folder, a hub id, or bytes"
        return
    try:
        load_tokenizer(model)
    except ConfigError as error:
        key, _, message = error.message.partition(": ")
        yield tuple(key.split(".")), message


HF_TEXT = HFTextFamily()
