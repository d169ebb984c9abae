"""Predictions for the dry run and the policy: parameters, memory, bytes, floating-point work, seconds.

All pure arithmetic on outlines. Memory follows what `torch.cuda.max_memory_allocated` counts: tensors, not
the context of the device. Seconds use the nominal rates below unless the configuration gives a measured one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cache_store.formats.encodings import ENCODINGS, EncodingName
from orchestrator.config.rates import ACTIVATION_BYTES, Rates
from workers.domains.planning import LoadSeconds, SplitRows
from workers.models.base import FrozenBytes, StageParts, two_at_a_time
from workers.specs.experiment import TrainSpec
from workers.specs.tier_bytes import LEAVING_BYTES, tier_bytes

if TYPE_CHECKING:
    from workers.models.base import StageMemory
    from workers.models.counting import Shape
    from workers.models.outline import ChainOutline, PartOutline


STORE_READ_BYTES_PER_S = 1.5e9
STORE_WRITE_BYTES_PER_S = 0.4e9
DECODE_IMAGES_PER_S = 4000.0
NOTHING_TO_LOAD = LoadSeconds()
#: Starting a task and committing its record, whatever it does.
TASK_SECONDS = 0.05


#: Micro-batches on the host at one time: one being filled, two that wait, one in the step.
WAITING_BATCHES = 4
#: A checkpoint is written out of the stage's own tensors, in less than this beside them
#: (docs/design/016-checkpoints.md).
CHECKPOINT_BUFFER = 64 << 20
#: Checkpoints in the store at one time: two are kept while a third is written.
CHECKPOINTS = 3


@dataclass(frozen=True)
class Estimate:
    """Predictions for one node. `peak_bytes`: device memory, `optimizer_bytes` of it the optimizer's state.
    `snapshot_bytes`: what it adds to the store in snapshots."""

    parameters: int = 0
    trainable: int = 0
    peak_bytes: int = 0
    snapshot_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    optimizer_bytes: int = 0
    #: Of a stage, beside its process and the store: batches that wait, the best epoch's weights, a buffer and what
    #: `memory` keeps there; and on disk the checkpoints, the commit and what `memory` keeps there.
    #: Left out of a summary of an earlier version (`reports.record_json.OPTIONAL`).
    host_bytes: int | None = field(default=None, metadata={"optional": True})
    disk_bytes: int | None = field(default=None, metadata={"optional": True})
    #: Of a stage: what crosses the link between host and device in all of it, either way.
    link_bytes: int | None = field(default=None, metadata={"optional": True})
    #: Of a stage that a gang trains: its ranks. Memory of device and host is then one rank's, the first one's.
    ranks: int | None = field(default=None, metadata={"optional": True})

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads: samples of each split, and elements and their bytes of one sample. `load`: what loading takes
    where they are raw."""

    rows: SplitRows
    elements: int
    item_bytes: int
    reads_snapshots: bool = False
    load: LoadSeconds = NOTHING_TO_LOAD


def epochs_to_run(train: TrainSpec, rows: int) -> int:
    """Epochs a stage can reach: its setting, or fewer where a step limit ends it before."""
    if train.exit.steps is None:
        return train.epochs
    return min(train.epochs, math.ceil(train.exit.steps / steps_an_epoch(train, rows)))


def steps_to_run(train: TrainSpec, rows: int) -> int:
    """Optimizer steps a stage can reach."""
    steps = train.epochs * steps_an_epoch(train, rows)
    return steps if train.exit.steps is None else min(steps, train.exit.steps)


def steps_an_epoch(train: TrainSpec, rows: int) -> int:
    """Optimizer steps of one epoch."""
    return max(1, rows // train.batch_size if train.drop_last else math.ceil(rows / train.batch_size))


def views_used(views: int, epochs: int) -> int:
    """Epoch e uses view e mod views, so short stages never see the later ones."""
    return min(views, epochs)


def elements(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def row_bytes(shapes: Iterable[Shape], dtype: str, encoding: EncodingName = "plain") -> int:
    """Stored bytes of one sample at a boundary; of `lossless` the most it takes."""
    return sum(ENCODINGS[encoding].row_bytes(dtype, shape) for shape in shapes)


def prefix_flops(outline: ChainOutline, blocks: Iterable[str]) -> int:
    """Forward work of some blocks for one sample."""
    return sum(outline.part(name).flops for name in blocks)


def _weights_bytes(parts: Sequence[PartOutline], precision: str) -> int:
    parameters = sum(part.parameters for part in parts)
    buffers = sum(part.buffer_elements for part in parts)
    # Autocast keeps a low-precision copy of the weights it meets beside the fp32 masters.
    return 4 * (parameters + buffers) + (0 if precision == "fp32" else 2 * parameters)


def _working_bytes(parts: Sequence[PartOutline], precision: str, rows: int) -> int:
    """Device memory to push `rows` samples through frozen parts, beside their weights: one part's input and output with
    the widest activation inside it (a residual block holds about four at a time)."""
    widest = max((elements(part.inputs) + 4 * elements(part.outputs) for part in parts), default=0)
    return rows * widest * ACTIVATION_BYTES[precision]


def train_estimate(stage: StageParts, inputs: StageInputs, rates: Rates) -> Estimate:
    """Predict one stage over its whole schedule."""
    updated = [part for part in stage.path if part.name in stage.updated]
    trainable = sum(part.parameters for part in updated)
    own = stage.ranks.share(trainable)
    tiers = tier_bytes(stage.train.optimizer, stage.memory, own, 4 * own, on_host=stage.on_host)
    apart = stage.memory.updates_on_host and not stage.on_host
    gradients = min(LEAVING_BYTES, 4 * own) if apart else 4 * own
    frozen = [part for part in stage.path if part.name not in stage.trained]
    peak = (
        stage.ranks.share(_weights_bytes(updated, stage.train.precision) + _lying_bytes(frozen, stage))
        + gradients
        + _gang_bytes(stage, trainable)
        + tiers.in_peak(on_host=stage.on_host)
        + _activation_bytes(stage, inputs)
    )
    if stage.prefix:
        rows = max(stage.train.micro, stage.group_rows)
        peak += _lying_bytes(stage.prefix, stage) + _working_bytes(stage.prefix, stage.train.precision, rows)
    if stage.on_host:
        peak += away_bytes(stage)
    flops = _stage_flops(stage, inputs.rows)
    computing, epochs = flops / rates.flops_per_s[stage.train.precision], epochs_to_run(stage.train, inputs.rows.train)
    loading = epochs * (inputs.rows.train * inputs.load.train + inputs.rows.validation * inputs.load.evaluate)
    seconds = TASK_SECONDS + rates.with_loading(computing, loading)
    if inputs.reads_snapshots:
        rows = epochs * (inputs.rows.train + inputs.rows.validation)
        seconds += rows * inputs.elements * inputs.item_bytes / STORE_READ_BYTES_PER_S
    return Estimate(
        parameters=sum(part.parameters for part in stage.path),
        trainable=trainable,
        peak_bytes=peak,
        flops=flops,
        seconds=seconds,
        optimizer_bytes=tiers.state_in_peak(stage.memory, on_host=stage.on_host),
    )


def _gang_bytes(stage: StageParts, trainable: int) -> int:
    """What a rank holds beside its part: copies of gradients on their way to their sums; or, of parts that are shared
    out, two that are gathered at one time, and the gradients of one, twice."""
    if stage.ranks.replicates:
        return 4 * trainable
    return 4 * 4 * max(part.parameters for part in stage.path) if stage.ranks.splits else 0


def away_bytes(stage: StageParts) -> int:
    """What a stage keeps on the host that is not needed on the device: frozen weights, and activations of a
    micro-batch."""
    away = 0
    if stage.memory.frozen == "host":
        frozen = [*(part for part in stage.path if part.name not in stage.trained), *stage.prefix]
        away += 4 * sum(part.parameters + part.buffer_elements for part in frozen)
    if stage.memory.activations_of(stage.train) == "host":
        leaving = [part.saved_elements for part in _saving(stage)][:-2]
        away += stage.train.micro * sum(leaving) * ACTIVATION_BYTES[stage.train.precision]
    return away


def _activation_bytes(stage: StageParts, inputs: StageInputs) -> int:
    """What the samples of one micro-batch hold on the device at the end of the forward pass."""
    saved = _saved_elements(stage)
    widest = max((elements(part.outputs) for part in stage.path), default=0)
    item = ACTIVATION_BYTES[stage.train.precision]
    return stage.train.micro * (saved * item + 2 * widest * item + 2 * inputs.elements * inputs.item_bytes)


def _saved_elements(stage: StageParts) -> int:
    """Elements of one sample that stay for the backward pass, with those of the block that runs again."""
    saving = _saving(stage)
    entering, whole = [elements(part.inputs) for part in saving], [part.saved_elements for part in saving]
    match stage.memory.activations_of(stage.train):
        case "recompute":
            return sum(entering) + max(whole, default=0)
        case "selective":
            # Of a block's operations about every second one is a product or a convolution.
            return sum(entering) + (sum(whole) + max(whole, default=0)) // 2
        case "host":
            return two_at_a_time(whole)
        case "keep":
            again = [stage.memory.frozen == "host" and part.name not in stage.trained for part in saving]
            resting = sum(few if runs else all_ for few, all_, runs in zip(entering, whole, again, strict=True))
            return resting + max((all_ for all_, runs in zip(whole, again, strict=True) if runs), default=0)


def _lying_bytes(parts: Sequence[PartOutline], stage: StageParts) -> int:
    """Device memory of the weights of frozen parts: of all, or of two at a time."""
    precision = stage.train.precision
    if stage.memory.frozen == "device":
        return _weights_bytes(parts, precision)
    return two_at_a_time([_weights_bytes([part], precision) for part in parts])


def _stage_flops(stage: StageParts, rows: SplitRows) -> int:
    """Work of all epochs: training passes with their backward pass, and validation passes."""
    saving = _saving(stage)
    forward = sum(part.flops for part in (*stage.path, *stage.prefix))
    backward = sum((1 + _weight_gradients(stage, part)) * part.flops for part in saving)
    if stage.memory.activations_of(stage.train) == "recompute":
        backward += sum(part.flops for part in saving)
    elif stage.memory.frozen == "host":
        backward += sum(part.flops for part in saving if part.name not in stage.trained)
    return epochs_to_run(stage.train, rows.train) * (rows.train * (forward + backward) + rows.validation * forward)


def _weight_gradients(stage: StageParts, part: PartOutline) -> int:
    """Whether a part's own matrices get gradients, as 0 or 1: not where adapters are trained in their place, whose own
    work is left out."""
    if part.name not in stage.updated:
        return 0
    if part.name == "head" and stage.train.lm_head != "train":
        return 0
    return int(part.name == "head" or stage.train.lora is None)


def _saving(stage: StageParts) -> Sequence[PartOutline]:
    """From the first trained part on: gradients flow through every later part, frozen or not."""
    first = next((index for index, part in enumerate(stage.path) if part.name in stage.updated), len(stage.path))
    return stage.path[first:]


def by_turns(whole: Estimate, turns: Sequence[Estimate]) -> Estimate:
    """A stage whose parts take turns, each of which trains some of them: memory of the largest turn, work of all in
    equal parts. `whole`: the stage, were all trained at every step."""
    return dataclasses.replace(
        whole,
        peak_bytes=max(turn.peak_bytes for turn in turns),
        optimizer_bytes=max(turn.optimizer_bytes for turn in turns),
        flops=sum(turn.flops for turn in turns) // len(turns),
        seconds=sum(turn.seconds for turn in turns) / len(turns),
    )


def with_rank(alone: Estimate, rank: Estimate, ranks: int) -> Estimate:
    """A stage's predictions with the memory that one of so many ranks takes of its device and its host. Work and time
    stay those of one device: what ranks send to each other has no price here."""
    return dataclasses.replace(
        alone,
        peak_bytes=rank.peak_bytes,
        optimizer_bytes=rank.optimizer_bytes,
        host_bytes=rank.host_bytes,
        ranks=ranks,
    )


def with_memory(predicted: Estimate, memory: StageMemory) -> Estimate:
    """A stage's predictions with the memory that its family knows better."""
    return dataclasses.replace(
        predicted,
        trainable=memory.trainable,
        peak_bytes=memory.peak,
        optimizer_bytes=memory.optimizer,
    )


def with_host(
    predicted: Estimate, stage: StageParts, *, trained: int, committed: int, batch: int, away: int = 0
) -> Estimate:
    """A stage's predictions with what it takes beside the device. Bytes: `trained` of what is updated, `committed` of
    the parts that it belongs to, `batch` of a micro-batch as it is read, `away` of what lies there in place of the
    device."""
    train, ranks = stage.train, stage.ranks
    own = dataclasses.replace(stage.memory, optimizer=ranks.zero3.optimizer) if ranks.updates_on_host else stage.memory
    tiers = tier_bytes(train.optimizer, own, ranks.share(predicted.trainable), trained, on_host=stage.on_host)
    best = trained if train.commit == "best" and train.epochs > 1 else 0
    # What counts as the device's is known by turns of parts, too.
    checkpoint = trained + (predicted.optimizer_bytes or tiers.state) + tiers.masters + best
    beside = 0 if stage.on_host else tiers.host
    if ranks.splits:
        # Checkpoints are whole: the first rank puts them together on its host.
        checkpoint *= ranks.parts
        beside += checkpoint
    return dataclasses.replace(
        predicted,
        host_bytes=best + CHECKPOINT_BUFFER + WAITING_BATCHES * batch + away + beside,
        disk_bytes=CHECKPOINTS * checkpoint + committed + tiers.disk,
    )


def frozen_estimate(
    parts: Sequence[PartOutline],
    *,
    rows: int,
    batch_rows: int,
    precision: str,
    rates: Rates,
    stored_row_bytes: int = 0,
    read_row_bytes: int = 0,
    load_row_seconds: float = 0.0,
    streamed: bool = False,
) -> Estimate:
    """Pushing `rows` samples once through frozen parts: materializing a set, or evaluating. `load_row_seconds`: of one
    core; nothing loads ahead here. `streamed`: weights lie on the host and come two parts at a time."""
    flops = rows * sum(part.flops for part in parts)
    stored = rows * stored_row_bytes
    seconds = TASK_SECONDS + flops / rates.flops_per_s[precision]
    seconds += rows * load_row_seconds / rates.threads
    seconds += stored / STORE_WRITE_BYTES_PER_S + rows * read_row_bytes / STORE_READ_BYTES_PER_S
    held = FrozenBytes(
        weights=[_weights_bytes([part], precision) for part in parts],
        working=_working_bytes(parts, precision, batch_rows),
    )
    return with_held(
        Estimate(
            parameters=sum(part.parameters for part in parts), snapshot_bytes=stored, flops=flops, seconds=seconds
        ),
        held,
        streamed=streamed,
    )


def with_held(predicted: Estimate, held: FrozenBytes, *, streamed: bool) -> Estimate:
    """Put in what frozen parts hold. `streamed`: as for `frozen_estimate`."""
    whole = sum(held.weights)
    weights, host = (two_at_a_time(held.weights), whole) if streamed else (whole, None)
    return dataclasses.replace(predicted, peak_bytes=weights + held.working, host_bytes=host)


def average_estimate(parameters: int, replicas: int) -> Estimate:
    """The mean of `replicas` sets of parts, read and written in the store."""
    read = replicas * parameters * 4 / STORE_READ_BYTES_PER_S
    seconds = TASK_SECONDS + read + parameters * 4 / STORE_WRITE_BYTES_PER_S
    return Estimate(parameters=parameters, flops=replicas * parameters, seconds=seconds)


def data_estimate(rows: int) -> Estimate:
    return Estimate(seconds=TASK_SECONDS + rows / DECODE_IMAGES_PER_S)


def model_estimate(parameters: int) -> Estimate:
    return Estimate(parameters=parameters, seconds=TASK_SECONDS + parameters * 4 / STORE_WRITE_BYTES_PER_S)
