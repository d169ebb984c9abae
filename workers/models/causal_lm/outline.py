"""A causal LM as arithmetic: parameters, flops, kept activations of every part. Pure: no torch, no transformers.

Figures are of one sample of `tokens` tokens. Parameters are counted exactly when the model is inspected; flops are
2 per multiply-accumulate of linear layers (of experts, those a token visits) and of attention scores and sums, over
all pairs of tokens (a sliding window bounds them). `saved_elements` follows the rules of `chain_outline`, for
attention kernels that keep no scores (sdpa, flash): with `eager` they are added. Fixed per-batch tensors (masks,
rotary embeddings) are nobody's activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_store.errors import ConfigError
from workers.models.causal_lm.tie import EMBEDDING, HEAD
from workers.models.counting import Shape
from workers.models.outline import AlikeChainOutline, PartOutline
from workers.specs.model import FileDigests


@dataclass(frozen=True)
class LinearFacts:
    """One linear layer, by its name inside the part."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class KeptFacts:
    """Elements a token leaves behind in a part for the backward pass, by what keeps them: what trains and in which
    types then says how many bytes that is. Attention scores are not among them."""

    #: Inputs of normalisations: RMSNorm computes in float32 whatever its input's type, LayerNorm's kernel in its own.
    rms_inputs: int = 0
    layer_norm_inputs: int = 0
    #: Results of normalisations, and these once for every linear layer that reads them (each casts its own copy).
    norm_results: int = 0
    fed: int = 0
    #: Queries, keys, values and the result.
    attention: int = 0
    #: Width of the feed-forward network, all visited experts together, and whether a gate multiplies it.
    inner: int = 0
    gated: bool = False


@dataclass(frozen=True)
class PartFacts:
    """What was counted in one part."""

    parameters: int
    buffer_elements: int
    #: Multiply-accumulates of linear layers per token.
    macs: int
    #: Elements autograd keeps per token when the part trains, but for attention scores.
    saved: int
    #: Width of all query heads together, their number, and the tokens a token can look back; 0: no attention.
    attention_width: int = 0
    heads: int = 0
    window: int | None = None
    #: The kernel keeps scores.
    keeps_scores: bool = False
    #: Elements of matrices that are multiplied with (and of their low-precision copies): all but an embedding's.
    matrices: int = 0
    #: What low-rank adapters can be put on.
    linears: tuple[LinearFacts, ...] = ()
    kept: KeptFacts = KeptFacts()
    #: Names of modules that choose experts and have a balance loss.
    routers: tuple[str, ...] = ()


@dataclass(frozen=True)
class LMPartOutline(PartOutline):
    """A part's figures for one sample of `tokens` tokens, and the facts they were made from."""

    facts: PartFacts
    tokens: int
    #: Elements of the matrix that is embedding and LM head in one: the embedding counts it, a head beside it does not.
    tied: int = 0


@dataclass(frozen=True)
class LMOutline:
    """A causal LM in figures, as `inspect` reads them from a config alone.

    config: the whole architecture, for tasks (pruned, tied as it comes, dtype of the master weights). positions: the
    longest sequence the model knows positions for, None when it does not say. weights_digest: identity of the stored
    weights, None for random ones. files: digests of what lies beside them.
    """

    config: dict[str, Any]
    layers: int
    hidden: int
    vocabulary: int
    positions: int | None
    weights_digest: str | None
    has_weights: bool
    #: `embed`, `layer0` …, `head`.
    parts: Mapping[str, PartFacts]
    files: FileDigests

    @property
    def balance_coefficient(self) -> float:
        """What the balance loss of routers is multiplied with; 0 for models that have none."""
        own = self.config.get("text_config") or self.config
        return float(own.get("router_aux_loss_coef") or 0.0)

    @property
    def parameters(self) -> dict[str, int]:
        return {name: facts.parameters for name, facts in self.parts.items()}

    @property
    def tied(self) -> bool:
        """Whether embedding and LM head begin as one matrix."""
        return bool(self.config.get("tie_word_embeddings"))


@dataclass(frozen=True)
class LMChainOutline(AlikeChainOutline):
    """The chain of a language model, whose embedding and LM head may be one matrix."""

    def held_together(self, parts: Sequence[PartOutline]) -> list[PartOutline]:
        """The head without the matrix that is the embedding's, where both are there."""
        matrix = self.classes * self.aux_channels
        held: list[PartOutline] = []
        embedded = False
        for part in parts:
            if isinstance(part, LMPartOutline) and part.name == EMBEDDING:
                part, embedded = replace(part, tied=matrix), True
            elif isinstance(part, LMPartOutline) and part.name == HEAD and embedded:
                part = replace(part, tied=matrix, parameters=part.parameters - matrix)
            held.append(part)
        return held


def lm_chain(lm: LMOutline, tokens: int) -> LMChainOutline:
    """The chain's figures for samples of `tokens` tokens. Block 0 is `embed`, so block j+1 is decoder layer j.

    ConfigError when the model has no positions for so many tokens.
    """
    if tokens < 1 or (lm.positions is not None and tokens > lm.positions):
        raise ConfigError(
            f"data.sequence_length: {tokens} tokens, but the model knows positions for 1-{lm.positions}",
            where="data.sequence_length",
            value=tokens,
        )
    hidden: Shape = (tokens, lm.hidden)
    names = list(lm.parts)
    shapes: dict[str, tuple[Shape, Shape]] = dict.fromkeys(names, (hidden, hidden))
    shapes["embed"] = ((tokens,), hidden)
    shapes["head"] = (hidden, (tokens, lm.vocabulary))
    parts = [_part(name, lm.parts[name], *shapes[name], tokens) for name in names]
    *blocks, head = parts
    return LMChainOutline(
        blocks=tuple(blocks),
        head=head,
        boundaries=(*(block.inputs for block in blocks), head.inputs),
        head_input=head.inputs,
        classes=lm.vocabulary,
        aux_channels=lm.hidden,
    )


def _part(name: str, facts: PartFacts, inputs: Shape, outputs: Shape, tokens: int) -> LMPartOutline:
    seen = tokens if facts.window is None else min(tokens, facts.window)
    pairs = tokens * seen
    saved = facts.saved * tokens
    if facts.keeps_scores:
        # Scores after softmax, in the type of softmax and in that of the values.
        saved += 2 * facts.heads * tokens * tokens
    return LMPartOutline(
        name=name,
        units=(name,),
        inputs=(inputs,),
        outputs=(outputs,),
        parameters=facts.parameters,
        buffer_elements=facts.buffer_elements,
        flops=2 * facts.macs * tokens + 4 * facts.attention_width * pairs,
        saved_elements=saved,
        facts=facts,
        tokens=tokens,
    )
