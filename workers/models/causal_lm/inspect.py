"""What a causal LM is, without its weights: from a config.json, the hub, a GGUF file or a description."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from workers.models.causal_lm.counting import embed_facts, head_facts, layer_facts
from workers.models.causal_lm.network.balance import routers
from workers.models.causal_lm.network.parts import assemble, part_names
from workers.models.causal_lm.network.skeleton import build_skeleton, is_tied, untied
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.outline import LMOutline, PartFacts
from workers.models.causal_lm.pretrained.checkpoint import Checkpoint, weights_digest
from workers.models.causal_lm.pretrained.configs import kept_layers, whole_config
from workers.models.causal_lm.pretrained.identity import file_digests
from workers.models.causal_lm.pretrained.locate import PICKLES, Located, locate
from workers.models.causal_lm.pretrained.numbering import check_numbering
from workers.models.causal_lm.pretrained.safetensors_files import weight_files
from workers.models.causal_lm.trials.verify import verify_chain
from workers.specs.language import CausalLMSpec

__all__ = ["LMOutline", "inspect"]


def inspect(spec: CausalLMSpec) -> LMOutline:
    """The model of a user's spec in figures; nothing is allocated. Its `config` is the one for tasks.

    Reads configuration and the headers of local weight files (from the hub: the configuration alone). ConfigError
    for whatever is missing, gated, damaged, of another shape than the configuration says, or no chain.
    """
    located = locate(spec, weights=False)
    whole = replace(spec, config=whole_config(spec, located))
    found, model = structure(whole), build_skeleton(whole)
    if spec.prune:
        every = replace(spec, prune=())
        unpruned = build_skeleton(replace(every, config=whole_config(every, located)))
        check_numbering(unpruned, model, found.layers, kept_layers(spec, found.count))
    if found.hands_over:
        verify_chain(whole)  # the only way to know whether they do without
    has_weights = located is not None and _has_weights(located)
    if located is not None and has_weights and located.commit is None and located.gguf is None:
        # A GGUF file is checked on import: listing its tensors takes seconds.
        checkpoint = Checkpoint(whole, located)
        if is_tied(whole) and not checkpoint.holds_one_matrix():
            whole = _apart(whole)
    lm_head = cast("nn.Linear", model.get_submodule(found.lm_head))
    if is_tied(whole) and not _alike(model.get_submodule(found.embedding), lm_head):
        whole = _apart(whole)
    hidden, vocabulary = lm_head.in_features, lm_head.out_features
    return LMOutline(
        config=cast("dict[str, object]", whole.config),
        layers=found.count,
        hidden=hidden,
        vocabulary=vocabulary,
        positions=_positions(model.config),
        weights_digest=weights_digest(located) if located is not None and has_weights else None,
        has_weights=has_weights,
        parts={name: _facts(whole, name, hidden, vocabulary) for name in part_names(whole)},
        files=file_digests(whole, located),
    )


def _apart(whole: CausalLMSpec) -> CausalLMSpec:
    return replace(whole, config=untied(whole.config or {}))


def _alike(embedding: nn.Module, lm_head: nn.Module) -> bool:
    """Whether one matrix can be both: some models keep one of them in float32."""
    one, other = cast("Tensor", embedding.weight), cast("Tensor", lm_head.weight)
    return one.shape == other.shape and one.dtype == other.dtype


def _has_weights(located: Located) -> bool:
    """A folder with a config.json alone can be planned for, not trained."""
    if located.gguf is not None or located.commit is not None:
        return True
    pickles = any(any(located.folder.glob(pattern)) for pattern in PICKLES)
    return pickles or bool(weight_files(located.folder))


def _facts(spec: CausalLMSpec, name: str, hidden: int, vocabulary: int) -> PartFacts:
    part = assemble(spec, name)
    if name == "embed":
        return embed_facts(part)
    if name == "head":
        return head_facts(part, hidden, vocabulary)
    facts = layer_facts(part, build_skeleton(spec).config, int(name.removeprefix("layer")), hidden)
    return replace(facts, routers=tuple(router for router, _, _ in routers(spec, part)))


def _positions(config: object) -> int | None:
    for key in ("max_position_embeddings", "n_positions"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    return None
