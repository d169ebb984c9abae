"""A text classifier as arithmetic: figures of every part for samples of so many tokens. Pure: no torch.

Parameters are counted exactly; flops are 2 per multiply-accumulate of linear layers and of attention over all pairs of
tokens. `saved_elements` follows the rules of `workers.models.causal_lm.outline`, which is of the same kind of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache_store.errors import ConfigError
from workers.models.causal_lm.outline import PartFacts
from workers.models.counting import Shape
from workers.models.outline import AlikeChainOutline, PartOutline
from workers.specs.model import FileDigests


@dataclass(frozen=True)
class HFTextOutline:
    """What is known of a classifier without its weights.

    config: the whole architecture, for tasks. positions: the longest sequence it knows positions for, None when it does
    not say. weights_digest: identity of the stored weights, None for random ones. files: digests of what lies beside.
    """

    config: dict[str, Any]
    hidden: int
    positions: int | None
    weights_digest: str | None
    has_weights: bool
    #: `embed`, `layer0` …
    blocks: Mapping[str, PartFacts]
    files: FileDigests


def text_chain(found: HFTextOutline, head: PartFacts, tokens: int, classes: int) -> AlikeChainOutline:
    """The chain's figures for samples of `tokens` tokens; ConfigError when the model has no positions for so many."""
    if tokens < 1 or (found.positions is not None and tokens > found.positions):
        raise ConfigError(
            f"data.sequence_length: {tokens} tokens, but the model knows positions for 1-{found.positions}",
            where="data.sequence_length",
            value=tokens,
        )
    hidden: Shape = (tokens, found.hidden)
    blocks = [
        _part(name, facts, (tokens,) if name == "embed" else hidden, hidden, tokens)
        for name, facts in found.blocks.items()
    ]
    return AlikeChainOutline(
        blocks=tuple(blocks),
        head=_part("head", head, hidden, (classes,), 1),
        boundaries=(*(block.inputs for block in blocks), (hidden,)),
        head_input=(hidden,),
        classes=classes,
        aux_channels=found.hidden,
    )


def _part(name: str, facts: PartFacts, inputs: Shape, outputs: Shape, tokens: int) -> PartOutline:
    seen = tokens if facts.window is None else min(tokens, facts.window)
    saved = facts.saved * tokens
    if facts.keeps_scores:
        saved += 2 * facts.heads * tokens * tokens
    return PartOutline(
        name=name,
        units=(name,),
        inputs=(inputs,),
        outputs=(outputs,),
        parameters=facts.parameters,
        # Positions and the like are made again, never trained.
        buffer_elements=0,
        flops=2 * facts.macs * tokens + 4 * facts.attention_width * tokens * seen,
        saved_elements=saved,
    )
