"""What a part costs, counted on its meta module: exact parameters, multiply-accumulates, activations by rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from workers.models.causal_lm.outline import KeptFacts, LinearFacts, PartFacts


@dataclass(frozen=True)
class Widths:
    """Widths of a decoder layer, as its config names them."""

    hidden: int
    heads: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any, index: int, hidden: int) -> Widths:
        """Those of the layer `index`."""
        heads = _of_layer(config, index, "num_attention_heads") or 1
        head_dim = _of_layer(config, index, "head_dim") or hidden // heads
        keys = _of_layer(config, index, "num_key_value_heads") or heads
        return cls(hidden, heads, heads * head_dim, keys * head_dim)


def _of_layer(config: Any, index: int, name: str) -> int | None:
    """A setting of one layer: some configurations give every layer its own."""
    own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
    value = getattr(own, name, None)
    if isinstance(value, list | tuple):
        value = value[index] if index < len(value) else None
    return value if type(value) is int else None


def count_parameters(part: nn.Module) -> tuple[int, int]:
    """Parameters, and elements of buffers."""
    return sum(p.numel() for p in part.parameters()), sum(b.numel() for b in part.buffers())


def embed_facts(part: nn.Module) -> PartFacts:
    """A lookup: it keeps the ids."""
    parameters, buffers = count_parameters(part)
    return PartFacts(parameters, buffers, macs=0, saved=1)


def head_facts(part: nn.Module, hidden: int, vocabulary: int) -> PartFacts:
    """Norm and LM head over all positions. Logits come in pieces: what is kept is the gradient of the hidden states."""
    parameters, buffers = count_parameters(part)
    return PartFacts(
        parameters,
        buffers,
        macs=hidden * vocabulary,
        saved=_norms(part, hidden),
        matrices=hidden * vocabulary,
        linears=_linears(part),
        kept=_normalisations(part, Widths(hidden, 1, 0, 0)),
    )


def layer_facts(part: nn.Module, config: Any, index: int, hidden: int) -> PartFacts:
    """A decoder layer with attention over `config`'s heads and a feed-forward network, gated or not."""
    parameters, buffers = count_parameters(part)
    widths = Widths.of(config, index, hidden)
    macs = _macs(part, _of_layer(config, index, "num_experts_per_tok") or 1)
    attention = hidden * (2 * widths.queries + 2 * widths.keys)
    gated = any("gate" in name for name, _ in part.named_parameters())
    inner = max(0, macs - attention) // (hidden * (3 if gated else 2))
    # Queries, keys, values and the result; the network's products before, in and after the activation.
    saved = _norms(part, hidden) + 2 * widths.queries + 2 * widths.keys + inner * (4 if gated else 2)
    linears = _linears(part)
    fed = sum(linear.inputs for linear in linears if linear.inputs == hidden)
    if widths.queries == hidden and fed > hidden:
        fed -= hidden  # the output projection reads the attention's result, which is kept anyway
    return PartFacts(
        parameters=parameters,
        buffer_elements=buffers,
        macs=macs,
        saved=saved,
        attention_width=widths.queries,
        heads=widths.heads,
        window=_window(config, index),
        keeps_scores=config._attn_implementation == "eager",
        matrices=sum(p.numel() for p in part.parameters() if p.ndim >= 2),
        linears=linears,
        kept=replace(
            _normalisations(part, widths),
            fed=fed,
            attention=2 * widths.queries + 2 * widths.keys,
            inner=inner,
            gated=gated,
        ),
    )


def _linears(part: nn.Module) -> tuple[LinearFacts, ...]:
    """Linear layers, those of GPT-2 (whose matrix lies the other way round) among them."""
    found = []
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            found.append(LinearFacts(name, module.in_features, module.out_features))
        elif type(module).__name__ == "Conv1D":
            inputs, outputs = cast("Tensor", module.weight).shape
            found.append(LinearFacts(name, inputs, outputs))
    return tuple(found)


def _normalisations(part: nn.Module, widths: Widths) -> KeptFacts:
    """What the normalisations of a part keep; those of single heads run over all of them."""
    rms = layer = results = 0
    for name, module in part.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" not in type(module).__name__ or weight is None:
            continue
        own = name.rpartition(".")[2]
        whole = weight.numel() == widths.hidden and not own.startswith(("q", "k"))
        width = widths.hidden if whole else widths.keys if own.startswith("k") else widths.queries
        if isinstance(module, nn.LayerNorm):
            layer += width
        else:
            rms += width
        results += width if whole else 0
    return KeptFacts(rms_inputs=rms, layer_norm_inputs=layer, norm_results=results)


def _macs(part: nn.Module, visited: int) -> int:
    """Multiply-accumulates per token: every matrix once, of stacked experts the `visited` ones."""
    total = 0
    for parameter in part.parameters():
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim == 3:
            total += parameter.numel() // parameter.shape[0] * min(visited, parameter.shape[0])
    return total


def _norms(part: nn.Module, hidden: int) -> int:
    """Kept by normalisations: input, normalised input and result; LayerNorm's one kernel needs no second."""
    total = 0
    for module in part.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and weight is not None and weight.numel() == hidden:
            total += hidden * (2 if isinstance(module, nn.LayerNorm) else 3)
    return total


def _window(config: Any, index: int) -> int | None:
    """How far back a layer's tokens see, when not all the way."""
    window = _of_layer(config, index, "sliding_window")
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return window
