"""What a stage of a language model holds at its worst moment, in bytes. Pure arithmetic on outlines.

Follows what the training code does: weights in the master type; under autocast a low-precision copy of every matrix
on the gradient path; optimizer state of exactly what is trained; a loss that makes logits in pieces and the LM head's
gradient, in float32, along the way. The backward pass is walked part by part, since gradients grow while activations
go: the peak is the largest moment of it, not the sum of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache_store.formats.dtypes import ITEM_BYTES
from workers.models.base import StageMemory
from workers.models.causal_lm.network.pieces import block_rows, chunk_rows, loss_rows
from workers.models.causal_lm.outline import LMPartOutline, PartFacts
from workers.specs.experiment import COMPUTED, OptimizerSpec, TrainSpec
from workers.specs.language import LoraSpec
from workers.update_slices import DRAWS, WORKING, slice_size

#: Bytes of a weight of a frozen part, with its share of a scale: a row's (int8), a block of 64's (nf4).
_QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
#: Adapters are float32 whatever the weights are.
_ADAPTER_BYTES = 4
#: bitsandbytes: two moments of a byte, and two float32 scales a block of 256.
_EIGHT_BIT_BYTES = 2 + 2 * 4 / 256
#: Snapshot batches that wait on the host: one being filled, two waiting, one in the step.
_HOST_BUFFERS = 4


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
class _Part:
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
    #: Elements that it trains together with the embedding, which counts them.
    shared: int

    @property
    def facts(self) -> PartFacts:
        return self.outline.facts


def stage_memory(
    path: Sequence[LMPartOutline],
    trained: frozenset[str],
    train: TrainSpec,
    *,
    master: str,
    prefix: Sequence[LMPartOutline] = (),
    stored_item_bytes: int | None = None,
    on_host: bool = False,
) -> StageMemory:
    """Memory of the stage that trains the parts `trained` of `path`.

    master: type of the weights. prefix: frozen parts that run on the device before every micro-batch.
    stored_item_bytes: of an element of the snapshots the stage reads; None: it reads tokens. on_host: the device is the
    host, so the batches that wait and the best epoch's weights count too.
    """
    types = Types.of(master, train.precision)
    parts = [_part(part, part.name in trained, train, types) for part in path]
    tokens = train.micro * max(part.outline.tokens for part in parts)
    trainable = sum(part.trainable for part in parts)
    gradients = sum(part.trainable_bytes for part in parts)
    weights = sum(part.weights_bytes for part in parts)
    optimizer = optimizer_bytes(train.optimizer, trainable, gradients)
    kind = "cpu" if on_host else "cuda"
    draws, updating = _update(parts, train, types, kind)
    held = weights + optimizer + draws + _waiting(path, tokens, train, types, stored_item_bytes, on_host)
    if on_host and train.commit == "best" and train.epochs > 1:
        held += gradients
    accumulates = train.micro < train.batch_size
    if accumulates:
        held += gradients
    first = next((index for index, part in enumerate(parts) if part.trainable), len(parts))
    saving = parts[first:]
    kept = [_kept(part, tokens, train.micro, types) + _copies(part, types) for part in saving]
    waiting = kept
    if train.activation_checkpointing:
        waiting = [_input(part, tokens, types) for part in saving]
    loss = _loss(parts[-1], tokens, train, types, kind)
    moments = [sum(waiting) + loss]
    made = 0
    for part, whole, left, before in zip(
        reversed(saving), reversed(kept), reversed(waiting), _before(waiting), strict=True
    ):
        fresh = _largest_gradient(part) if accumulates else part.trainable_bytes
        moments.append(before + left + (whole if whole != left else 0) + made + _backward(part, tokens, types))
        # What the LM head gives to a shared matrix waits for what the embedding gives: these are added at the end.
        made += (0 if accumulates else part.trainable_bytes) + types.master * part.shared
        moments.append(before + made + (fresh if accumulates else 0))
    moments.append((0 if accumulates else gradients) + updating)
    if prefix:
        # Its blocks stay; what it works with is gone when the step begins.
        held += _elements(prefix) * types.master
        moments.append(max(_forward(part, train.micro * part.tokens, types) for part in prefix))
    peak = held + max(moments)
    committed = types.master * _elements([part.outline for part in parts if part.trained])
    return StageMemory(trainable, weights, gradients, optimizer, sum(waiting), loss, peak, committed)


def optimizer_bytes(spec: OptimizerSpec, trainable: int, weights_bytes: int) -> int:
    """State of an optimizer over parameters of this number and size: torch's has the type of its parameters."""
    if spec.name == "adamw8bit":
        return round(trainable * _EIGHT_BIT_BYTES)
    if spec.rounding == "compensated" and weights_bytes < 4 * trainable:
        # Moments in float32, and the error that was made, in the type of the weights.
        moments = 2 if spec.name == "adamw" else int(spec.momentum > 0)
        return 4 * moments * trainable + weights_bytes
    if spec.name == "adamw":
        return 2 * weights_bytes
    return weights_bytes if spec.momentum else 0


def frozen_bytes(parts: Sequence[LMPartOutline], rows: int, *, master: str, precision: str) -> int:
    """Pushing `rows` samples through frozen parts at once: all weights, and one part's working set."""
    types = Types.of(master, precision)
    return _elements(parts) * types.master + max(
        (_forward(part, rows * part.tokens, types) for part in parts), default=0
    )


def _elements(parts: Sequence[LMPartOutline]) -> int:
    return sum(part.parameters + part.buffer_elements for part in parts)


def _part(outline: LMPartOutline, trained: bool, train: TrainSpec, types: Types) -> _Part:
    elements = outline.parameters + outline.buffer_elements
    weights = types.master * elements
    packed = _QUANTIZED.get(train.frozen_weights)
    few = packed is not None and outline.name.startswith("layer") and not (trained and train.lora is None)
    if packed is not None and few:
        matrices = sum(linear.inputs * linear.outputs for linear in outline.facts.linears)
        weights += round(matrices * packed) - types.master * matrices
    if not trained:
        return _Part(outline, False, False, 0, 0, weights, few, 0)
    if train.lora is not None:
        adapted = _adapter_parameters(outline, train.lora, train.lm_head == "lora")
        size = _ADAPTER_BYTES * adapted
        return _Part(outline, True, True, adapted, size, weights + size, few, 0)
    trainable = outline.parameters
    if train.lm_head == "frozen":
        # A matrix that is LM head and embedding in one is frozen where it embeds, too.
        matrices = sum(linear.inputs * linear.outputs for linear in outline.facts.linears)
        trainable -= matrices - outline.tied if _is_head(outline) else outline.tied
    shared = outline.tied if _is_head(outline) and train.lm_head == "train" else 0
    return _Part(outline, True, False, trainable, types.master * trainable, weights, False, shared)


def _adapter_parameters(outline: LMPartOutline, lora: LoraSpec, lm_head: bool) -> int:
    linears = outline.facts.linears
    if _is_head(outline):
        linears = linears if lm_head else ()
    else:
        linears = tuple(linear for linear in linears if lora.adapts(linear.name))
    return sum(lora.rank * (linear.inputs + linear.outputs) for linear in linears)


def _is_head(outline: LMPartOutline) -> bool:
    return outline.name in ("head", "aux")


def _vocabulary(outline: LMPartOutline) -> int:
    return outline.outputs[0][-1]


def _hidden(part: _Part) -> int:
    """Width of the residual stream."""
    outline = part.outline
    return (outline.inputs if _is_head(outline) else outline.outputs)[0][-1]


def _kept(part: _Part, tokens: int, samples: int, types: Types) -> int:
    """Activations of one part for the backward pass."""
    facts, kept = part.facts, part.facts.kept
    if part.outline.name == "embed":
        return 8 * tokens if part.trained else 0
    bytes_a_token = 4 * kept.rms_inputs + types.master * kept.layer_norm_inputs
    if _is_head(part.outline):
        # Where only some positions count they are copied first; the result and its gradient stay for the loss.
        copied = types.master * _hidden(part) if types.master < 4 else 0
        normed = types.master * kept.rms_inputs if part.trained and not part.adapted else 0
        return tokens * (bytes_a_token + copied + normed + 2 * types.master * _hidden(part))
    if part.trained:
        if not part.adapted:
            # Multiplied with a weight that trains.
            bytes_a_token += types.master * kept.rms_inputs
        # A linear layer keeps what it reads: its own copy under autocast, else the one result that all read.
        bytes_a_token += types.computed * kept.fed if types.casts else types.master * kept.norm_results
    inner = (3 if kept.gated else 1) + (1 if part.trained else 0)
    bytes_a_token += types.computed * (kept.attention + inner * kept.inner)
    scores = (4 + types.computed) * facts.heads * (tokens // samples) if facts.keeps_scores else 0
    return tokens * (bytes_a_token + scores)


def _copies(part: _Part, types: Types) -> int:
    """Low-precision copies of weights that autograd holds on to. The LM head's belongs to the loss."""
    if not types.casts or part.packed or part.outline.name == "embed" or _is_head(part.outline):
        return 0
    return types.computed * part.facts.matrices


def _input(part: _Part, tokens: int, types: Types) -> int:
    if part.outline.name == "embed":
        return 8 * tokens
    # The head's result and its gradient outlive its own recomputation.
    return tokens * types.master * _hidden(part) * (3 if _is_head(part.outline) else 1)


def _loss(part: _Part, tokens: int, train: TrainSpec, types: Types, kind: str) -> int:
    """Pieces of logits, and the LM head's gradient in float32. The loss is outside of autocast, so its products are in
    the
    type of the weights."""
    vocabulary, hidden, item = _vocabulary(part.outline), _hidden(part), types.master
    matrix = vocabulary * hidden
    rows = min(tokens, chunk_rows(vocabulary))
    if train.lm_head == "lora":
        # Run through autograd, piece by piece: logits, their softmax and its gradient.
        return 3 * 4 * rows * vocabulary
    trains = part.trained and train.lora is None and train.lm_head == "train"
    if item == 4:
        # torch's own.
        return (4 * matrix if trains else 0) + 2 * 4 * rows * vocabulary
    rows = loss_rows(vocabulary, item, 4 * matrix if trains else 0)
    narrow = item * min(tokens, rows) * vocabulary
    blocks = 3 * 4 * min(tokens, rows, block_rows(vocabulary, kind)) * vocabulary
    if not trains:
        return narrow + blocks
    # The first piece's gradient is made in the narrow type; later ones are added to what there is.
    return narrow + max((4 + item) * matrix, 4 * matrix * (tokens > rows) + blocks)


def _update(parts: Sequence[_Part], train: TrainSpec, types: Types, kind: str) -> tuple[int, int]:
    """What updating narrow weights takes: always, and while a slice of them is changed. Others are changed in place."""
    spec = train.optimizer
    own = [part for part in parts if part.trainable and not part.adapted]
    if types.master == 4 or not own:
        return 0, 0
    size = slice_size(kind)
    moments = {"adamw": 2, "sgd": int(spec.momentum > 0)}.get(spec.name, 0) if spec.rounding != "compensated" else 0
    largest = max(_largest_tensor(part) for part in own)
    return 4 * DRAWS * size * (spec.rounding == "stochastic"), 4 * (WORKING + moments) * min(size, largest)


def _largest_tensor(part: _Part) -> int:
    """Numbers in the largest tensor that is trained, about."""
    return min(
        part.trainable, max(_largest_matrix(part), part.outline.parameters if part.outline.name == "embed" else 0)
    )


def _backward(part: _Part, tokens: int, types: Types) -> int:
    """Gradients of activations on the way through a part, and those of weights that are not in their own type yet."""
    if part.outline.name == "embed":
        return 0
    if _is_head(part.outline):
        # The float32 gradient of the LM head, until it is in the type of the weights.
        matrix = _vocabulary(part.outline) * _hidden(part)
        trains = part.trainable + part.shared >= matrix
        return (4 * matrix + (types.master * matrix if types.master < 4 else 0)) if trains else 0
    working = types.computed * 3 * part.facts.kept.inner + 2 * types.master * _hidden(part)
    return tokens * working + (types.computed * _largest_matrix(part) if part.trainable or part.packed else 0)


def _forward(part: LMPartOutline, tokens: int, types: Types) -> int:
    """Working set of a frozen part: residual stream and normed copy, and the network's three products."""
    hidden = (part.inputs if _is_head(part) else part.outputs)[0][-1]
    streams = tokens * hidden * (2 * types.master + 4)
    if part.name == "embed":
        return 8 * tokens + tokens * hidden * types.master
    if _is_head(part):
        vocabulary = _vocabulary(part)
        rows = min(tokens, chunk_rows(vocabulary))
        copy = types.computed * vocabulary * hidden if types.casts else 0
        return streams + 2 * 4 * rows * vocabulary + copy
    facts = part.facts
    copy = types.computed * max((n.inputs * n.outputs for n in facts.linears), default=0) if types.casts else 0
    return streams + tokens * types.computed * max(3 * facts.kept.inner, 2 * facts.kept.attention) + copy


def _largest_matrix(part: _Part) -> int:
    return max((linear.inputs * linear.outputs for linear in part.facts.linears), default=0)


def _largest_gradient(part: _Part) -> int:
    """The gradient that is being added to what earlier micro-batches left."""
    if not part.trainable:
        return 0
    return min(part.trainable_bytes, part.trainable_bytes * _largest_matrix(part) // max(1, part.outline.parameters))


def _before(sizes: Sequence[int]) -> list[int]:
    """For every part from the last to the first: the sum of those before it."""
    found = []
    left = sum(sizes)
    for size in reversed(sizes):
        left -= size
        found.append(left)
    return found


def _waiting(
    path: Sequence[LMPartOutline],
    tokens: int,
    train: TrainSpec,
    types: Types,
    stored_item_bytes: int | None,
    on_host: bool,
) -> int:
    """The batch as it came in, and on the host those loaded ahead of it."""
    if stored_item_bytes is None:
        return 2 * 8 * tokens
    hidden = path[0].inputs[0][-1]
    cast_copy = types.master * hidden * tokens if stored_item_bytes != types.master else 0
    return (_HOST_BUFFERS if on_host else 1) * stored_item_bytes * hidden * tokens + cast_copy
