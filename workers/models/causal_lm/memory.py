"""What a stage of a language model holds at its worst moment, in bytes. Pure arithmetic on outlines.

Follows what the training code does: weights in the master type; under autocast a low-precision copy of every matrix
on the gradient path; optimizer state of exactly what is trained; a loss that makes logits in pieces and the LM head's
gradient, in float32, along the way. The backward pass is walked part by part, since gradients grow while activations
go: the peak is the largest moment of it, not the sum of everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from workers.models.base import FrozenBytes, StageMemory, two_at_a_time
from workers.models.causal_lm.gathered import Gathered, gathered
from workers.models.causal_lm.kept import Held, Part, Types, held_activations, hidden_width, is_head
from workers.models.causal_lm.network.pieces import block_rows, chunk_rows, in_one_piece, loss_rows
from workers.models.causal_lm.outline import LinearFacts, LMPartOutline
from workers.specs.experiment import TrainSpec
from workers.specs.language import LoraSpec
from workers.specs.memory import ON_DEVICE, Activations, MemorySpec
from workers.specs.ranks import ONE_DEVICE, Ranks
from workers.specs.tier_bytes import LEAVING_BYTES, tier_bytes
from workers.update_slices import FOUR_BIT_WORKING, WORKING, slice_size

#: Bytes of a weight of a frozen part, with its share of a scale: a row's (int8), a block of 64's (nf4).
_QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
#: Adapters are float32 whatever the weights are.
_ADAPTER_BYTES = 4
#: Snapshot batches that wait on the host: one being filled, two waiting, one in the step.
_HOST_BUFFERS = 4


def stage_memory(
    path: Sequence[LMPartOutline],
    trained: frozenset[str],
    train: TrainSpec,
    *,
    master: str,
    prefix: Sequence[LMPartOutline] = (),
    stored_item_bytes: int | None = None,
    on_host: bool = False,
    memory: MemorySpec = ON_DEVICE,
    active: frozenset[str] | None = None,
    ranks: Ranks = ONE_DEVICE,
) -> StageMemory:
    """Memory of the stage that trains the parts `trained` of `path`, or (at one time) `active` ones of them.

    master: type of the weights. prefix: frozen parts that run on the device before every micro-batch.
    stored_item_bytes: of an element of the snapshots the stage reads; None: it reads tokens. on_host: the device is the
    host, so the batches that wait and the best epoch's weights count too. memory: what lies beside the device. ranks:
    the devices that hold the stage together; figures are one rank's, but for `trainable` and `committed`, and `train`
    says what a rank takes of a step.
    """
    types = Types.of(master, train.precision)
    now = trained if active is None else trained & active
    parts = [_part(part, part.name in now, train, types, memory) for part in path]
    tokens = train.micro * max(part.outline.tokens for part in parts)
    trainable = sum(part.trainable for part in parts)
    gradients = ranks.share(sum(part.trainable_bytes for part in parts))
    weights = ranks.share(sum(part.weights_bytes for part in parts if not part.away))
    beside = dataclasses.replace(memory, optimizer=ranks.zero3.optimizer) if ranks.updates_on_host else memory
    tiers = tier_bytes(train.optimizer, beside, ranks.share(trainable), gradients, on_host=on_host)
    apart = memory.updates_on_host and not on_host
    leaving = apart or memory.masters != "none"
    accumulates = train.micro < train.batch_size or leaving or ranks.strategy == "zero3"
    # The LM head's gradient is added to what is there in the product that makes it, where nobody waits for it.
    adds = accumulates and not leaving and ranks.size == 1 and _keeps_logits(parts[-1], tokens, types)
    walk = _Walk(parts, types, train, memory, ranks, tokens, accumulates, adds, "cpu" if on_host else "cuda")
    # Elsewhere, or in float32, updating takes nothing beside what changes.
    updating = 0 if leaving else walk.update()
    held = (
        (0 if ranks.weights_on_host else weights)
        + walk.gathered.always
        + tiers.in_peak(on_host=on_host)
        + _waiting(path, tokens, train, types, stored_item_bytes, on_host)
    )
    if on_host and train.commit == "best" and train.epochs > 1:
        # Of all that the stage trains in time.
        in_time = [_part(part, part.name in trained, train, types, memory) for part in path]
        held += ranks.share(sum(part.trainable_bytes for part in in_time))
    if apart:
        held += min(LEAVING_BYTES, gradients)
    elif accumulates and not leaving and not ranks.updates_on_host:
        held += gradients
    if stored_item_bytes is not None and not walk.first:
        held -= _batch_kept(walk.saving[0], tokens, types, memory.activations_of(train))
    moments = [*walk.backward(), *walk.forward(), (0 if accumulates else gradients) + updating]
    away = walk.kept.away + sum(part.weights_bytes for part in parts if part.away)
    away += weights if ranks.weights_on_host and ranks.zero3.parameters == "host" else 0
    if prefix:
        # Its blocks stay, unless they lie on the host; what it works with is gone when the step begins.
        sizes = [_elements([part]) * types.master for part in prefix]
        working = max(_forward(part, train.micro * part.tokens, types) for part in prefix)
        if memory.frozen == "host":
            moments.append(two_at_a_time(sizes) + working)
            away += sum(sizes)
        else:
            held += sum(sizes)
            moments.append(working)
    if on_host:
        held, away = held + away, 0
    committed = types.master * _elements([part for part in path if part.name in trained])
    state = tiers.state_in_peak(beside, on_host=on_host)
    return StageMemory(
        trainable=trainable,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=walk.kept.resting,
        loss=walk.loss,
        peak=held + max(moments),
        committed=committed,
        away=away,
    )


@dataclass(frozen=True)
class _Walk:
    """A step of a stage, moment by moment. Bytes beside what is there all the time."""

    parts: Sequence[Part]
    types: Types
    train: TrainSpec
    memory: MemorySpec
    ranks: Ranks
    #: Of a micro-batch.
    tokens: int
    #: Gradients of earlier micro-batches are there all the time.
    accumulates: bool
    #: The LM head's are added to them where they are made.
    adds: bool
    #: Type of the device.
    kind: str

    @cached_property
    def first(self) -> int:
        """The first part that trains."""
        return next((index for index, part in enumerate(self.parts) if part.trainable), len(self.parts))

    @cached_property
    def saving(self) -> Sequence[Part]:
        return self.parts[self.first :]

    @cached_property
    def gathered(self) -> Gathered:
        return gathered(self.parts, self.ranks, self.types)

    @cached_property
    def streamed(self) -> _Streamed:
        return _streamed(self.parts)

    @cached_property
    def kept(self) -> Held:
        activations = self.memory.activations_of(self.train)
        return held_activations(self.saving, self.tokens, self.train.micro, self.types, activations)

    @cached_property
    def loss(self) -> int:
        return _loss(self.parts[-1], self.tokens, self.train, self.types, self.kind)

    def backward(self) -> Iterator[int]:
        """Yield what is there when the forward pass is through, and while and after each part's backward pass."""
        yield self.kept.resting + self.loss + self.gathered.loss
        made = 0
        for index, part in reversed(list(enumerate(self.saving))):
            number = self.first + index
            brought = self.streamed.backward[number] + self.gathered.backward[number]
            added = self.adds and is_head(part.outline)
            yield self.kept.during[index] + made + brought + _backward(part, self.tokens, self.types, added)
            # What the LM head gives to a shared matrix waits for what the embedding gives: these are added at the end.
            made += 0 if self.accumulates else self.ranks.share(part.trainable_bytes)
            made += 0 if added else self.types.master * part.shared
            fresh = 0 if added or self.ranks.splits or not self.accumulates else _largest_gradient(part)
            yield self.kept.after[index] + made + fresh + self.gathered.ending[number]

    def forward(self) -> Iterator[int]:
        """Yield what is there while each part's forward pass runs, where weights come for it."""
        for index, (streamed, brought) in enumerate(zip(self.streamed.forward, self.gathered.forward, strict=True)):
            if streamed or brought:
                saved = self.kept.forward[index - self.first] if index >= self.first else 0
                yield saved + streamed + brought + self._passing(self.parts[index].outline)

    def _passing(self, outline: LMPartOutline) -> int:
        """What works in a part's forward pass. Logits are made by the loss."""
        if is_head(outline):
            return self.tokens * outline.inputs[0][-1] * (2 * self.types.master + 4)
        return _forward(outline, self.tokens, self.types)

    def update(self) -> int:
        """Return what updating narrow weights takes while a slice of them is changed, and torchao on a CPU for a whole
        tensor. Others are changed in place."""
        spec = self.train.optimizer
        own = [part for part in self.parts if part.trainable and not part.adapted]
        whole = FOUR_BIT_WORKING.get(self.kind, 0) if spec.name == "adamw4bit" else 0
        if not own or (self.types.master == 4 and not whole):
            return 0
        size = slice_size(self.kind)
        moments = {"adamw": 2, "sgd": int(spec.momentum > 0)}.get(spec.name, 0)
        moments = moments if spec.rounding != "compensated" else 0
        largest = self.ranks.share(max(_largest_tensor(part) for part in own))
        if whole:
            return 4 * whole * largest
        return 4 * (WORKING + moments) * min(size, largest)


@dataclass(frozen=True)
class _Streamed:
    """Bytes of weights that are on the device for a moment, part by part of the path: while it computes, its own and
    the next one's of those on the host."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]


def _streamed(parts: Sequence[Part]) -> _Streamed:
    numbers = [index for index, part in enumerate(parts) if part.away]
    forward, backward = ([0] * len(parts) for _ in range(2))
    first = next((index for index, part in enumerate(parts) if part.trainable), len(parts))
    returning = [number for number in numbers if number > first]
    for order, bytes_of in ((numbers, forward), (returning[::-1], backward)):
        for number, following in zip(order, [*order[1:], None], strict=False):
            bytes_of[number] = parts[number].weights_bytes
            bytes_of[number] += 0 if following is None else parts[following].weights_bytes
    return _Streamed(tuple(forward), tuple(backward))


def frozen_bytes(parts: Sequence[LMPartOutline], rows: int, *, master: str, precision: str) -> FrozenBytes:
    """Pushing `rows` samples through frozen parts at once: their weights, and one part's working set."""
    types = Types.of(master, precision)
    return FrozenBytes(
        weights=[_elements([part]) * types.master for part in parts],
        working=max((_forward(part, rows * part.tokens, types) for part in parts), default=0),
    )


def _elements(parts: Sequence[LMPartOutline]) -> int:
    return sum(part.parameters + part.buffer_elements for part in parts)


def _part(outline: LMPartOutline, trained: bool, train: TrainSpec, types: Types, memory: MemorySpec) -> Part:
    elements = outline.parameters + outline.buffer_elements
    weights = types.master * elements
    packed = _QUANTIZED.get(train.frozen_weights)
    few = packed is not None and outline.name.startswith("layer") and not (trained and train.lora is None)
    if packed is not None and few:
        matrices = sum(linear.inputs * linear.outputs for linear in outline.facts.linears)
        weights += round(matrices * packed) - types.master * matrices
    if not trained:
        # What parts share stays where both need it.
        away = memory.frozen == "host" and not outline.tied
        return Part(outline, False, False, 0, 0, weights, few, away, 0)
    if train.lora is not None:
        linears = _adapted(outline, train.lora, train.lm_head == "lora")
        adapted = sum(train.lora.rank * (linear.inputs + linear.outputs) for linear in linears)
        size, read = _ADAPTER_BYTES * adapted, sum(linear.inputs for linear in linears)
        return Part(outline, True, True, adapted, size, weights + size, few, False, 0, read)
    trainable = outline.parameters
    if train.lm_head == "frozen":
        # A matrix that is LM head and embedding in one is frozen where it embeds, too.
        matrices = sum(linear.inputs * linear.outputs for linear in outline.facts.linears)
        trainable -= matrices - outline.tied if is_head(outline) else outline.tied
    shared = outline.tied if is_head(outline) and train.lm_head == "train" else 0
    return Part(outline, True, False, trainable, types.master * trainable, weights, False, False, shared)


def _adapted(outline: LMPartOutline, lora: LoraSpec, lm_head: bool) -> Sequence[LinearFacts]:
    """The matrices of a part that get adapters."""
    linears = outline.facts.linears
    if is_head(outline):
        return linears if lm_head else ()
    return tuple(linear for linear in linears if lora.adapts(linear.name))


def _vocabulary(outline: LMPartOutline) -> int:
    return outline.outputs[0][-1]


def _loss(part: Part, tokens: int, train: TrainSpec, types: Types, kind: str) -> int:
    """Pieces of logits, and the LM head's gradient in float32; or the gradient of all logits. The loss is outside of
    autocast, so its products are in the type of the weights."""
    vocabulary, hidden, item = _vocabulary(part.outline), hidden_width(part), types.master
    matrix = vocabulary * hidden
    rows = min(tokens, chunk_rows(vocabulary))
    if train.lm_head == "lora":
        # Run through autograd, piece by piece: logits, their softmax and its gradient.
        return 3 * 4 * rows * vocabulary
    trains = part.trained and train.lora is None and train.lm_head == "train"
    if item == 4:
        # torch's own.
        return (4 * matrix if trains else 0) + 2 * 4 * rows * vocabulary
    if trains and _keeps_logits(part, tokens, types):
        return item * tokens * vocabulary + 2 * 4 * min(tokens, block_rows(vocabulary, kind)) * vocabulary
    rows = loss_rows(vocabulary, item, 4 * matrix if trains else 0)
    narrow = item * min(tokens, rows) * vocabulary
    blocks = 2 * 4 * min(tokens, rows, block_rows(vocabulary, kind)) * vocabulary
    if not trains:
        return narrow + blocks
    # The first piece's gradient is made in the narrow type; later ones are added to what there is.
    return narrow + max((4 + item) * matrix, 4 * matrix * (tokens > rows) + blocks)


def _largest_tensor(part: Part) -> int:
    """Numbers in the largest tensor that is trained, about."""
    return min(
        part.trainable, max(_largest_matrix(part), part.outline.parameters if part.outline.name == "embed" else 0)
    )


def _keeps_logits(part: Part, tokens: int, types: Types) -> bool:
    """Whether the gradient of all logits waits for the backward pass, in place of the LM head's own."""
    if not is_head(part.outline) or types.master == 4 or not _trains_matrix(part):
        return False
    return in_one_piece(tokens, _vocabulary(part.outline), hidden_width(part), types.master)


def _trains_matrix(head: Part) -> bool:
    return head.trainable + head.shared >= _vocabulary(head.outline) * hidden_width(head)


def _backward(part: Part, tokens: int, types: Types, added: bool) -> int:
    """Gradients of activations on the way through a part, and those of weights that are not in their own type yet.
    `added`: the LM head's needs no place of its own."""
    if part.outline.name == "embed":
        return 0
    if is_head(part.outline):
        # The float32 gradient of the LM head, until it is in the type of the weights.
        vocabulary, width = _vocabulary(part.outline), hidden_width(part)
        if not _trains_matrix(part):
            return 0
        if _keeps_logits(part, tokens, types):
            return types.master * vocabulary * (tokens + (0 if added else width))
        return (4 + (types.master if types.master < 4 else 0)) * vocabulary * width
    kept = part.facts.kept
    if part.trained and not part.adapted and kept.gated:
        # The product of both branches, which it keeps, is gone when their gradients come.
        return tokens * (types.computed * 2 * kept.inner + types.master * hidden_width(part))
    working = types.computed * 3 * kept.inner + 2 * types.master * hidden_width(part)
    return tokens * working + (types.computed * _largest_matrix(part) if part.trainable or part.packed else 0)


def _forward(part: LMPartOutline, tokens: int, types: Types) -> int:
    """Working set of a frozen part: residual stream and normed copy, and the network's three products."""
    hidden = (part.inputs if is_head(part) else part.outputs)[0][-1]
    streams = tokens * hidden * (2 * types.master + 4)
    if part.name == "embed":
        return 8 * tokens + tokens * hidden * types.master
    if is_head(part):
        vocabulary = _vocabulary(part)
        rows = min(tokens, chunk_rows(vocabulary))
        copy = types.computed * vocabulary * hidden if types.casts else 0
        return streams + 2 * 4 * rows * vocabulary + copy
    facts = part.facts
    copy = types.computed * max((n.inputs * n.outputs for n in facts.linears), default=0) if types.casts else 0
    return streams + tokens * types.computed * max(3 * facts.kept.inner, 2 * facts.kept.attention) + copy


def _largest_matrix(part: Part) -> int:
    return max((linear.inputs * linear.outputs for linear in part.facts.linears), default=0)


def _largest_gradient(part: Part) -> int:
    """The gradient that is being added to what earlier micro-batches left."""
    if not part.trainable:
        return 0
    return min(part.trainable_bytes, part.trainable_bytes * _largest_matrix(part) // max(1, part.outline.parameters))


def _batch_kept(part: Part, tokens: int, types: Types, activations: Activations) -> int:
    """What the first part keeps of its input, in the type of the weights: it is the batch, and counted with that."""
    if part.outline.name == "embed":
        return 0
    kept = part.facts.kept
    # A norm keeps what it reads, but for RMSNorm, which reads a float32 copy.
    as_it_came = activations in ("recompute", "selective") or types.master == 4 or kept.layer_norm_inputs > 0
    hidden = part.outline.inputs[0][-1]
    return types.master * hidden * tokens if as_it_came and activations != "host" else 0


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
