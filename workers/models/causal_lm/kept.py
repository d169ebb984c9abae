"""What the parts of a language model's path keep for the backward pass, in bytes. Pure arithmetic on outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache_store.formats.dtypes import ITEM_BYTES
from workers.models.causal_lm.outline import LMPartOutline, PartFacts
from workers.specs.experiment import COMPUTED
from workers.specs.memory import Activations


@dataclass(frozen=True)
class Types:
    """Bytes of an element: of weights and the residual stream, and of what matrix products make."""

    master: int
    computed: int

    @property
    def casts(self) -> bool:
        """Autocast copies weights and inputs into another type."""
        return self.master != self.computed

    @classmethod
    def of(cls, master: str, precision: str) -> Types:
        computed = master if precision == "fp32" else COMPUTED[precision]
        return cls(ITEM_BYTES[master], ITEM_BYTES[computed])


@dataclass(frozen=True)
class Part:
    """One part of a path with what is trained in it."""

    outline: LMPartOutline
    trained: bool
    #: What trains are low-rank adapters; its own weights stay.
    adapted: bool
    trainable: int
    trainable_bytes: int
    weights_bytes: int
    #: Its matrices are in few bits: products make a whole one for a moment, and keep none.
    packed: bool
    #: Its weights lie on the host.
    away: bool
    #: Elements that it trains together with the embedding, which counts them.
    shared: int
    #: Elements a token that its matrices with adapters read, all taken together.
    adapter_inputs: int = 0

    @property
    def facts(self) -> PartFacts:
        return self.outline.facts


@dataclass(frozen=True)
class Held:
    """Bytes of activations on the device, of the parts from the first trained one on."""

    #: When the forward pass is through.
    resting: int
    #: While a part's backward pass runs, in the order of the path; and when it is over.
    during: tuple[int, ...]
    after: tuple[int, ...]
    #: While a part's forward pass runs, but for what works in it.
    forward: tuple[int, ...]
    #: On the host meanwhile.
    away: int = 0


def held_activations(parts: Sequence[Part], tokens: int, samples: int, types: Types, activations: Activations) -> Held:
    """What lies where, for `memory.activations`. `tokens`: of a micro-batch, `samples`: its samples."""
    whole = [_kept(part, tokens, samples, types) + _copies(part, types) for part in parts]
    inputs = [_input(part, tokens, types) for part in parts]
    resting = [
        _resting(part, each, entering, tokens, types, activations)
        for part, each, entering in zip(parts, whole, inputs, strict=True)
    ]
    if activations == "host":
        return _on_host(parts, whole, inputs)
    before = [sum(resting[:index]) for index in range(len(parts))]
    runs_again = [activations in ("recompute", "selective") or part.away for part in parts]
    during = tuple(
        earlier + each + (entering if again else 0)
        for earlier, each, entering, again in zip(before, whole, inputs, runs_again, strict=True)
    )
    forward = tuple(earlier + each for earlier, each in zip(before, resting, strict=True))
    return Held(sum(resting), during, tuple(before), forward)


def _on_host(parts: Sequence[Part], whole: Sequence[int], inputs: Sequence[int]) -> Held:
    """On the device are the activations of a part and of the one before it, on their way; of the last two always."""
    leaving = [entering if part.away else each for part, each, entering in zip(parts, whole, inputs, strict=True)]
    staying = sum(leaving[-2:])
    before = [leaving[index - 1] if index else 0 for index in range(len(parts))]
    during = tuple(
        earlier + each + (entering if part.away else 0)
        for earlier, each, entering, part in zip(before, whole, inputs, parts, strict=True)
    )
    forward = tuple(earlier + each for earlier, each in zip(before, leaving, strict=True))
    return Held(staying, during, tuple(before), forward, sum(leaving[:-2]))


def _resting(part: Part, whole: int, entering: int, tokens: int, types: Types, activations: Activations) -> int:
    """What stays of a part until its backward pass."""
    if activations == "selective":
        return entering + tokens * types.computed * _products(part)
    return entering if activations == "recompute" or part.away else whole


def _products(part: Part) -> int:
    """Elements a token of what selective recomputing keeps: results of linear layers and of attention."""
    if is_head(part.outline) or part.outline.name == "embed":
        return 0
    kept = part.facts.kept
    # Queries, keys, values and the result of attention; the network's products; and what both add to the stream.
    return kept.attention + (2 if kept.gated else 1) * kept.inner + 2 * hidden_width(part)


def is_head(outline: LMPartOutline) -> bool:
    return outline.name in ("head", "aux")


def hidden_width(part: Part) -> int:
    """Width of the residual stream."""
    outline = part.outline
    return (outline.inputs if is_head(outline) else outline.outputs)[0][-1]


def _kept(part: Part, tokens: int, samples: int, types: Types) -> int:
    """Activations of one part for the backward pass."""
    facts, kept = part.facts, part.facts.kept
    if part.outline.name == "embed":
        return 8 * tokens if part.trained else 0
    bytes_a_token = 4 * kept.rms_inputs + types.master * kept.layer_norm_inputs
    if is_head(part.outline):
        # Where only some positions count they are copied first; the result and its gradient stay for the loss.
        copied = types.master * hidden_width(part) if types.master < 4 else 0
        normed = types.master * kept.rms_inputs if part.trained and not part.adapted else 0
        return tokens * (bytes_a_token + copied + normed + 2 * types.master * hidden_width(part))
    if part.trained:
        if not part.adapted:
            # Multiplied with a weight that trains.
            bytes_a_token += types.master * kept.rms_inputs
        bytes_a_token += _read_by_linears(part, types)
    inner = (3 if kept.gated else 1) + (1 if part.trained and not _copied_by_adapters(part, types) else 0)
    bytes_a_token += types.computed * (kept.attention + inner * kept.inner)
    scores = (4 + types.computed) * facts.heads * (tokens // samples) if facts.keeps_scores else 0
    return tokens * (bytes_a_token + scores)


def _copied_by_adapters(part: Part, types: Types) -> bool:
    """Whether every adapter keeps its own copy of what it reads: peft makes it float32, autocast narrow again."""
    return part.adapted and types.computed < 4


def _read_by_linears(part: Part, types: Types) -> int:
    """Bytes a token of what linear layers keep of what they read: their own copy under autocast, else the one result
    that all read. The network's last one is counted with its products, unless adapters copy."""
    if _copied_by_adapters(part, types):
        return types.computed * part.adapter_inputs
    kept = part.facts.kept
    return types.computed * kept.fed if types.casts else types.master * kept.norm_results


def _copies(part: Part, types: Types) -> int:
    """Low-precision copies of weights that autograd holds on to. The LM head's belongs to the loss."""
    if not types.casts or part.packed or part.outline.name == "embed" or is_head(part.outline):
        return 0
    return types.computed * part.facts.matrices


def _input(part: Part, tokens: int, types: Types) -> int:
    if part.outline.name == "embed":
        return 8 * tokens
    # The head's result and its gradient outlive its own recomputation.
    return tokens * types.master * hidden_width(part) * (3 if is_head(part.outline) else 1)
