"""Where a text classifier starts, and how it leaves: transformers' own loader and folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_store.errors import ConfigError, first_line
from cache_store.storage.durable import write_atomically
from workers.models.base import Export
from workers.models.causal_lm.counting import count_parameters, embed_facts, layer_facts
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.outline import PartFacts
from workers.models.causal_lm.pretrained.checkpoint import weights_digest
from workers.models.causal_lm.pretrained.identity import file_digests
from workers.models.causal_lm.pretrained.import_parts import companion_files
from workers.models.causal_lm.pretrained.locate import locate
from workers.models.causal_lm.pretrained.safetensors_files import weight_files
from workers.models.chain import ModulePath
from workers.models.hf_text.outline import HFTextOutline
from workers.models.hf_text.parts import Frame, HFTextParts, assemble, part_names
from workers.models.hf_text.skeleton import build_network, build_skeleton
from workers.models.hf_text.structure import Structure, find_structure
from workers.models.library.transformers_classifiers import Kind, Transformers, with_architecture
from workers.specs.language import CausalLMSpec, HFTextSpec

TEXTS = Kind("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text classifier")
#: Classes of a network that is only looked at.
_ANY = 2


def as_language(model: HFTextSpec) -> CausalLMSpec:
    """Where the files of a model lie, as what finds those of language models takes it."""
    return CausalLMSpec(
        family="causal_lm",
        path=model.path,
        revision=model.revision,
        config=model.config,
        tokenizer=model.tokenizer,
    )


#: Settings that decide how texts are tokenized.
_TOKENIZING = ("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")


def tokenizing(model: HFTextSpec) -> CausalLMSpec:
    """Where the tokenizer lies, and what of the architecture decides how texts are tokenized."""
    located = locate(as_language(model), weights=False)
    whole = with_architecture(model, TEXTS, None if located is None else str(located.folder)).config or {}
    return replace(as_language(model), config={key: whole[key] for key in _TOKENIZING if key in whole})


def look(model: HFTextSpec) -> HFTextOutline:
    """The model of a user's spec in figures; nothing is allocated. ConfigError for whatever is missing, or no chain."""
    located = locate(as_language(model), weights=False)
    whole = with_architecture(model, TEXTS, None if located is None else str(located.folder))
    skeleton = build_skeleton(whole, _ANY)
    found = find_structure(skeleton)
    _try_frame(whole, skeleton, found)
    has_weights = located is not None and (located.commit is not None or bool(weight_files(located.folder)))
    return HFTextOutline(
        config=whole.config or {},
        hidden=found.hidden,
        positions=_positions(skeleton, found),
        weights_digest=weights_digest(located) if located is not None and has_weights else None,
        has_weights=has_weights,
        blocks={name: _facts(skeleton, found, name) for name in part_names(found)[:-1]},
        files=file_digests(replace(as_language(model), config=whole.config), located),
    )


def _try_frame(whole: HFTextSpec, skeleton: PreTrainedModel, found: Structure) -> None:
    """Make what layers are given, once. ConfigError where that takes weights that are not there."""
    inputs = _sample(whole)
    try:
        Frame(skeleton, found, torch.device("cpu"))(inputs["input_ids"], inputs)
    except ConfigError:
        raise
    except Exception as error:  # whatever a forward raises that is given no hidden states of its own
        name = skeleton.config.model_type
        raise refuse(
            f"{name!r} is no chain of embedding, layers and head: what its layers are given cannot be made without "
            f"its weights: {first_line(error)}",
            "model.config",
        ) from error


def head_facts(model: HFTextSpec, classes: int) -> PartFacts:
    """Count the head of a model whose `config` is whole; it runs once a sample, on what is pooled."""
    skeleton = build_skeleton(model, classes)
    found = find_structure(skeleton)
    part = assemble(skeleton, found, "head")
    parameters, buffers = count_parameters(part)
    matrices = sum(parameter.numel() for parameter in part.parameters() if parameter.ndim > 1)
    return PartFacts(parameters, buffers, macs=matrices, saved=4 * found.hidden)


def _facts(skeleton: PreTrainedModel, found: Structure, name: str) -> PartFacts:
    part = assemble(skeleton, found, name)
    if name == "embed":
        # A normalisation's input and a dropout's mask, for every token.
        return replace(embed_facts(part), saved=2 * found.hidden)
    return layer_facts(part, skeleton.config, int(name.removeprefix("layer")), found.hidden)


def _positions(skeleton: PreTrainedModel, found: Structure) -> int | None:
    """Tokens of the longest sample that there are positions for. Some networks begin to count behind the number of the
    padding token."""
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    tables = (module for path in found.front for module in skeleton.get_submodule(path).modules())
    for table in tables:
        if isinstance(table, nn.Embedding) and table.num_embeddings == positions and table.padding_idx is not None:
            return positions - table.padding_idx - 1
    return positions


_LOADING = '''"""Load this model with transformers alone: `model = load()`. With the tokenizer of this folder, scores
for texts are `model(**tokenizer(texts, padding=True, return_tensors="pt")).logits`."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification


def load():
    return AutoModelForSequenceClassification.from_pretrained(Path(__file__).parent).eval()
'''


class TextTransformers(Transformers):
    """One network; `spec.config` is its whole architecture."""

    kind = TEXTS
    loading = _LOADING

    def __init__(self, model: HFTextSpec) -> None:
        located = locate(as_language(model), weights=True)
        folder = None if located is None else str(located.folder)
        self.spec = replace(with_architecture(model, TEXTS, folder), path=None, revision=None, tokenizer=None)
        self.model, self.segments = self.spec, "auto"
        self._take(self.spec.config or {}, folder)

    def may_lack(self, classes: int) -> list[str]:
        # What comes behind the layers is made for a task, so checkpoints of another task have another, or none.
        skeleton = build_skeleton(self.spec, classes)
        return list(assemble(skeleton, find_structure(skeleton), "head").state_dict())

    def initial_state(self, classes: int, seed: int) -> dict[str, Tensor]:
        state = super().initial_state(classes, seed)
        # Before hours are spent on it.
        self._verify(state, classes)
        return state

    def export(self, export: Export, target: Path) -> None:
        """As `save_pretrained` writes it, with the tokenizer's files."""
        for name, data in export.companions.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target / name, data)
        super().export(export, target)

    @torch.no_grad()
    def _verify(self, state: Mapping[str, Tensor], classes: int) -> None:
        """Compare the chain with the network's own forward, on padded samples. ConfigError where they differ, or where
        that depends on what comes out at padding."""
        network = build_network(self.spec, classes)
        network.load_state_dict(dict(state), strict=True)
        parts, device = HFTextParts(self.spec, classes), torch.device("cpu")
        modules: dict[str, nn.Module] = {}
        for name in parts.names():
            modules[name] = parts.build(name, device)
            modules[name].load_state_dict({key: state[key] for key in parts.state_names(name)}, strict=True)
        inputs = _sample(self.spec)
        try:
            context = parts.context(device)(inputs["input_ids"], inputs)
            given = ModulePath(modules, ()).eval()((inputs["input_ids"],), context)
            same = torch.equal(network(**dict(context.inputs)).logits, given)
            bare = _without_padding(modules, inputs, context)
        except Exception as error:  # whatever a forward raises at what it is not given
            raise refuse(f"{self.words}: its parts cannot be run: {first_line(error)}", "model.config") from error
        if not same:
            raise refuse(f"{self.words}: its parts give other scores than its own forward", "model.config")
        if not torch.equal(bare, given):
            problem = "what comes out at padding changes its scores, and hidden states are stored without padding"
            raise refuse(f"{self.words}: {problem}", "model.config")


def _without_padding(modules: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], context: Any) -> Tensor:
    """The scores of the parts where hidden states at padding are zeros, as they are where they were stored."""
    tokens = inputs["attention_mask"].bool()[..., None]
    *blocks, head = modules.values()
    value: Any = (inputs["input_ids"],)
    for block in blocks:
        value = (block(value, context)[0] * tokens,)
    scores: Tensor = head(value, context)
    return scores


def _sample(spec: HFTextSpec) -> dict[str, Tensor]:
    """Two samples, the second of them padded."""
    ids = torch.arange(12).view(2, 6) + 5
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    vocabulary = int((spec.config or {}).get("vocab_size") or ids.max() + 1)
    padding = int((spec.config or {}).get("pad_token_id") or 0)
    return {"input_ids": (ids % vocabulary).where(mask > 0, padding), "attention_mask": mask}


def companions(model: HFTextSpec) -> dict[str, bytes]:
    """The tokenizer's files, by name."""
    language = as_language(model)
    located = locate(language, weights=False)
    try:
        files = companion_files(language, located)
    except OSError as error:
        raise ConfigError(f"model.path: the tokenizer cannot be read: {error}", where="model.path") from error
    return {name: data for name, data in files.items() if name not in ("config.json", "generation_config.json")}
