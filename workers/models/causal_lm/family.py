"""Hugging Face decoders as a model family. Loads torch and transformers when a model is looked at, not before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cache_store.errors import ConfigError, Interrupted
from cache_store.suggest import did_you_mean
from workers.control import Update
from workers.models.base import (
    COMPANION,
    AdapterExport,
    Capabilities,
    Export,
    Finding,
    FrozenBytes,
    ModelFamily,
    Parts,
    StageMemory,
    StageParts,
    StageTraining,
    Start,
    Ties,
    TrainedParts,
    Traits,
    Written,
)
from workers.models.causal_lm import memory
from workers.models.causal_lm.outline import LMOutline, LMPartOutline, lm_chain
from workers.models.causal_lm.remembered import Answer, remembered_outline
from workers.models.causal_lm.tie import ties
from workers.specs.as_json import to_json
from workers.specs.experiment import MOST_SWALLOWED, ImageSpec, TrainSpec
from workers.specs.export_files import FACTS, Facts
from workers.specs.language import CausalLMSpec, LabelledTextSpec, TextSpec
from workers.specs.model import FileDigests, expect
from workers.specs.results import PartRecord

if TYPE_CHECKING:
    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape
    from workers.models.outline import ChainOutline, PartOutline


class CausalLMFamily(ModelFamily[CausalLMSpec, LMOutline]):
    """See `workers.models.base.ModelFamily`."""

    name = "causal_lm"
    spec = CausalLMSpec
    domain = "text"
    traits = Traits(
        noun="a decoder",
        stem=1,
        adapters=False,
        copies_head=True,
        alike_layers=True,
        scores_original=True,
        # At a vocabulary of 128,000 it decides what fits.
        large_optimizer=True,
        pipeline="text-generation",
        can=Capabilities(
            lora=None,
            lm_head=None,
            auto_micro=None,
            frozen_weights=None,
            masters=None,
            omit=None,
            fp8=None,
            sharding=None,
            judged=None,
            channels_last="true: is for images",
            head_convs="is for ResNets and VGGs; a decoder has split.head",
            variant="is for ResNets and VGGs; a decoder's local heads are copies of its own",
        ),
    )
    libraries = ("torch", "transformers")

    def narrow_weights(self, model: CausalLMSpec, found: LMOutline | None) -> bool:
        return _master(model, found) != "float32"

    def inspect(self, model: CausalLMSpec) -> LMOutline:
        return remembered_outline(model, _look)

    def outline(self, model: CausalLMSpec, found: LMOutline | None, sample: Shape, classes: int) -> ChainOutline:
        return lm_chain(expect(LMOutline, found), sample[0])

    def outputs(self, found: LMOutline | None, classes: int | None) -> int:
        return expect(LMOutline, found).vocabulary

    def architecture(self, model: CausalLMSpec, found: LMOutline | None) -> CausalLMSpec:
        """The architecture alone; and where its code lies, for a checkpoint whose code the user trusts."""
        config = dict(expect(LMOutline, found).config)
        alone = replace(model, gguf=None, tokenizer=None, prune=(), config=config)
        return alone if model.trust_remote_code else replace(alone, path=None, revision=None)

    def start(self, model: CausalLMSpec, found: LMOutline | None) -> CausalLMSpec:
        return replace(model, attention="sdpa", config=dict(expect(LMOutline, found).config))

    def weights_digest(self, model: CausalLMSpec, found: LMOutline | None) -> str | None:
        return expect(LMOutline, found).weights_digest

    def file_digests(self, model: CausalLMSpec, found: LMOutline | None) -> FileDigests:
        return expect(LMOutline, found).files

    def pretrained(self, model: CausalLMSpec) -> bool:
        return model.path is not None

    def tokenizing(self, model: CausalLMSpec) -> CausalLMSpec:
        # What matters to a tokenizer, its vocabulary and its positions.
        return replace(model, attention="sdpa", master="float32", prune=())

    def data_problems(
        self, model: CausalLMSpec, found: LMOutline, data: ImageSpec | TextSpec | LabelledTextSpec
    ) -> Iterator[Finding]:
        text = expect(TextSpec, data)
        yield from _positions(found, text)
        yield from _isolation(model, found, text)
        yield from _tokenizer(model, found, text)

    def stage_problems(
        self, stage: TrainedParts, chain: ChainOutline, train: TrainSpec, rows: int
    ) -> Iterator[Finding]:
        yield from _adapted(stage, cast("Sequence[LMPartOutline]", chain.blocks), train)

    def missing_weights(self, model: CausalLMSpec, found: LMOutline | None) -> str | None:
        if model.path is None or expect(LMOutline, found).has_weights:
            return None
        return (
            f"model.path: {model.path} has a config.json but no weights: it can be planned for (--dry-run), not "
            "trained; allowed: a folder with *.safetensors, or without model.path random weights for model.config"
        )

    def words(self, model: CausalLMSpec, found: LMOutline | None) -> str:
        language = expect(LMOutline, found)
        weights = model.path or "random weights"
        if model.path is not None and not language.has_weights:
            weights += " (no weights there: it can be planned, not run)"
        return f"{language.config.get('model_type')}, {language.layers} layers, {weights},"

    def notes(self, model: CausalLMSpec, found: LMOutline | None, stages: Sequence[StageTraining]) -> Iterator[str]:
        language = expect(LMOutline, found)
        rounded = [stage.train.optimizer.lr for stage in stages if stage.train.optimizer.rounding == "nearest"]
        if _master(model, found) == "bfloat16" and rounded:
            share = swallowed_share(min(rounded), language.config)
            if share > MOST_SWALLOWED:
                yield (
                    f"Rounding to bfloat16 will take about {share:.0%} of the updates (model.master bfloat16, "
                    f"training.optimizer.rounding nearest, lr {min(rounded):g}); stochastic or compensated lose none."
                )
        coefficient, routed = language.balance_coefficient, any(facts.routers for facts in language.parts.values())
        if coefficient and routed and not any(trains_router(language, stage) for stage in stages):
            yield (
                "All routers of experts are frozen: they go on choosing as they do, so their balance loss "
                f"(router_aux_loss_coef {coefficient:g}) is not counted, and none is needed."
            )

    def ties(
        self,
        model: CausalLMSpec,
        found: LMOutline | None,
        stages: Sequence[tuple[TrainedParts, TrainSpec]],
        *,
        in_turn: bool,
    ) -> Ties:
        language = expect(LMOutline, found)
        return ties(stages, language.vocabulary * language.hidden, in_turn=in_turn) if language.tied else Ties()

    def stage_memory(self, model: CausalLMSpec, found: LMOutline | None, stage: StageParts) -> StageMemory:
        return memory.stage_memory(
            cast("Sequence[LMPartOutline]", stage.path),
            stage.trained,
            stage.train,
            active=stage.active,
            master=_master(model, found),
            prefix=cast("Sequence[LMPartOutline]", stage.prefix),
            stored_item_bytes=stage.stored_item_bytes,
            on_host=stage.on_host,
            memory=stage.memory,
            ranks=stage.ranks,
        )

    def frozen_bytes(
        self, model: CausalLMSpec, found: LMOutline | None, parts: Sequence[PartOutline], rows: int, precision: str
    ) -> FrozenBytes:
        own = cast("Sequence[LMPartOutline]", parts)
        return memory.frozen_bytes(own, rows, master=_master(model, found), precision=precision)

    def parts(self, model: CausalLMSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.causal_lm.training import CausalLMParts

        return CausalLMParts(model)

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        """One file a part, written as it is read: the model is never held whole."""
        from workers.models.causal_lm.network.parts import part_names
        from workers.models.causal_lm.pretrained.import_parts import companions, import_parts
        from workers.models.causal_lm.trials.verify import verify_chain
        from workers.models.chain import write_part

        model = expect(CausalLMSpec, start.model)
        # Before hours are spent on it: a small model of this architecture gives the same logits as a chain and alone.
        verify_chain(model)
        total = len(part_names(model))
        parts: dict[str, PartRecord] = {}
        for name, state in import_parts(model, start.seed):
            parts[name] = write_part(attempt, name, state)
            control.progress(Update(phase="import", done=len(parts), total=total, unit="parts"))
            if control.should_stop():
                raise Interrupted("the import of the model was stopped; it starts again with the next run")
        beside = companions(model)
        for name, data in beside.items():
            attempt.write(f"{COMPANION}{name}", data)
        return Written(parts=parts, companions=tuple(sorted(beside)))

    def export(self, export: Export, target: Path) -> None:
        """A folder that `AutoModelForCausalLM` loads, one part in memory at a time."""
        import shutil

        from workers.models.causal_lm.pretrained.export import write_folder

        facts = Facts(sources=export.sources, companions=export.companions).to_bytes()
        # The folder appears whole, with what says whose it is: an export that was killed has left another name behind.
        for outdated in (target, *target.parent.glob(f".{target.name}.*")):
            shutil.rmtree(outdated, ignore_errors=True)
        write_folder(expect(CausalLMSpec, export.model), export.states, {**export.companions, FACTS: facts}, target)

    def export_adapter(self, export: AdapterExport, target: Path) -> None:
        """A folder that PEFT loads on the base; merged into it, it is what `export` writes."""
        from workers.models.causal_lm.pretrained.adapter_folder import write_adapter

        write_adapter(export, target)


def _look(model: CausalLMSpec) -> LMOutline:
    """Look at a model anew. Loads torch and transformers: only they know every architecture."""
    from workers.models.causal_lm.inspect import inspect

    return inspect(model)


def _adapted(stage: TrainedParts, blocks: Sequence[LMPartOutline], train: TrainSpec) -> Iterator[Finding]:
    """Check that low-rank adapters go where there are linear layers: every name that is asked for is one's."""
    lora = train.lora
    if lora is None or lora.targets == "all-linear":
        return
    names = {block.name: [linear.name for linear in block.facts.linears] for block in blocks}
    every = sorted({name for own in names.values() for name in own})
    known = sorted({name.rpartition(".")[2] for name in every})
    allowed = f"allowed: all-linear, or some of {', '.join(known)}"
    unknown = [target for target in lora.targets if not any(replace(lora, targets=(target,)).adapts(n) for n in every)]
    for target in unknown:
        yield ("lora", "targets"), f"no linear layer is called {target!r}{did_you_mean(target, known)}; {allowed}"
    bare = [part for part in stage.trained if names.get(part) and not any(map(lora.adapts, names[part]))]
    if bare and not unknown:
        yield ("lora", "targets"), f"{', '.join(lora.targets)}: {bare[0]} of {stage.name} has none of them; {allowed}"


def trains_router(language: LMOutline, stage: StageTraining) -> bool:
    """Tell whether a stage trains what chooses experts: the router, or an adapter on it."""
    lora = stage.train.lora
    for facts in (language.parts[part] for part in stage.trained if part in language.parts):
        for router in facts.routers:
            inside = [linear.name for linear in facts.linears if f"{linear.name}.".startswith(f"{router}.")]
            if lora is None or any(lora.adapts(name) for name in inside):
                return True
    return False


def swallowed_share(lr: float, config: Mapping[str, Any]) -> float:
    """Estimate which share of Adam's updates is lost where bfloat16 weights are rounded to the nearest.

    An update of Adam is about as large as the rate. It is lost where it is below half a unit in the last of the
    weight's eight bits, on average a 360th of the weight; weights are taken as normal, as wide as `initializer_range`.
    """
    width = float(config.get("initializer_range") or 0.02)
    return 1.0 - math.erf(lr * 360 / (width * math.sqrt(2.0)))


def _master(model: CausalLMSpec, found: LMOutline | None) -> str:
    """The type of the weights, which `auto` leaves to the checkpoint."""
    return model.master if model.master != "auto" else str(expect(LMOutline, found).config["dtype"])


def _positions(found: LMOutline, data: TextSpec) -> Iterator[Finding]:
    """Samples may not be longer than the model has positions."""
    if found.positions is not None and data.sequence_length > found.positions:
        yield ("data", "sequence_length"), f"{data.sequence_length}: the model has {found.positions} positions"


def _isolation(model: CausalLMSpec, found: LMOutline, data: TextSpec) -> Iterator[Finding]:
    """Check that a model which is to keep packed documents apart does. Tries it only then: it may take seconds."""
    from workers.data.text.formats import data_is_packed

    if not data_is_packed(data) or not data.isolate:
        return

    def tried() -> bool:
        from workers.models.causal_lm.trials.isolation import keeps_documents_apart

        return keeps_documents_apart(replace(model, config=dict(found.config)))

    alone = CAUSAL_LM.architecture(model, found)
    if not _asked(model, "isolates", {"model": to_json(alone)}, tried):
        yield (
            ("data", "isolate"),
            f"true: {found.config.get('model_type')} with model.attention {model.attention} does not keep packed "
            "documents apart; set data.isolate: false, or data.pack: false for a sample a document",
        )


def _tokenizer(model: CausalLMSpec, found: LMOutline, data: TextSpec) -> Iterator[Finding]:
    """The tokenizer must be there, fit the model, and do what the data ask of it. A folder without weights can be
    planned for without its tokenizer too."""
    from workers.data.text.formats import TEXT_FORMATS
    from workers.data.text.tokens.tokenizers import load_tokenizer

    if model.tokenizer is None and not found.has_weights:
        if model.path is None:
            yield ("model", "tokenizer"), "none given; random weights need one: a folder, a hub id, or bytes"
        return
    problem: list[Finding] = []

    def fits() -> bool:
        try:
            TEXT_FORMATS[data.name].encoder(load_tokenizer(replace(model, config=dict(found.config))), data)
        except ConfigError as error:
            key, _, message = error.message.partition(": ")
            problem.append((tuple(key.split(".")), message))
        return not problem

    decides = {"data": data.name, "tokenizer": found.files.tokenizer, "config": dict(found.config)}
    # Without a digest it cannot be read.
    _ = fits() if found.files.tokenizer is None else _asked(model, "encodes", decides, fits)
    yield from problem


def _asked(model: CausalLMSpec, question: str, decides: dict[str, Any], ask: Callable[[], bool]) -> bool:
    """Ask, unless the answer is known to be yes."""
    return ask() if model.trust_remote_code else Answer(question, decides).holds(ask)


CAUSAL_LM = CausalLMFamily()
