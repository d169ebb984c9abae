"""Token sequences and their next tokens: the causal language models' domain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from cache_store.formats.codec import Field
from cache_store.snapshots.store import SnapshotStore
from workers.data.text.source import TextBatch, TextSource
from workers.device import DTYPES, to_device
from workers.domains.base import Batch, Rows, Source
from workers.models.causal_lm.network import parts, readout
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.lora import add_lora, merged_state
from workers.models.causal_lm.network.quantized import quantize
from workers.models.causal_lm.network.skeleton import build_skeleton, master_dtype
from workers.models.chain import Boundary, State, cpu_state
from workers.specs.experiment import Experiment, Precision, TrainSpec
from workers.specs.language import CausalLMSpec, TextSpec


class TextDomain:
    monitor: Literal["accuracy", "loss"] = "loss"
    unit = "samples"
    row_unit = "tokens"

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.model, CausalLMSpec)
        assert isinstance(experiment.data, TextSpec)
        self._experiment = experiment
        self._model = experiment.model
        self._data = experiment.data
        self._frames: dict[torch.device, Frame] = {}

    # -- parts --------------------------------------------------------------------------------------------

    def part_names(self) -> list[str]:
        return parts.part_names(self._model)

    def part_state_names(self, part: str) -> list[str]:
        return parts.part_state_names(self._model, part)

    def build_part(self, part: str, device: torch.device) -> nn.Module:
        return parts.build_part(self._model, part, device)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        raise AssertionError("decoder layers all meet the same boundary: there is nothing to adapt")

    def build_aux(self, source: int, seed: int, device: torch.device, head: State | None) -> nn.Module:
        """A copy of the model's own norm and LM head."""
        assert head is not None
        module = self.build_part("head", device)
        module.load_state_dict(head, strict=True)
        return module

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:
        is_head = isinstance(module, parts.Head)
        if train.lora is not None:
            add_lora(module, train.lora, seed, lm_head=train.lm_head == "lora")
        if is_head and train.lm_head != "lora":
            cast("parts.Head", module).output_layer().requires_grad_(train.lm_head == "train" and train.lora is None)

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:
        if train.frozen_weights != "full":
            quantize(module, train.frozen_weights, DTYPES[train.precision])

    def final_state(self, module: nn.Module) -> State:
        return (
            merged_state(module) if any("lora_" in name for name, _ in module.named_parameters()) else cpu_state(module)
        )

    # -- rows ---------------------------------------------------------------------------------------------

    def source(self, data_result: Mapping[str, Any], snapshots: SnapshotStore, split: str) -> Source:
        return TextSource(self._experiment, data_result, snapshots, split)

    def views(self, source: Source) -> int:
        return 1

    def rows(self, source: Source, index: np.ndarray) -> Rows:
        batch = cast("TextSource", source).batch(index)
        return Rows(index, batch.targets, batch)

    def target_counts(self, source: Source, index: np.ndarray) -> np.ndarray:
        counts: np.ndarray = cast("TextSource", source).targets[index]
        return counts

    def load(self, source: Source, rows: Rows, view: int | None) -> Boundary:
        return (cast("TextBatch", rows.text).ids,)

    def batch(
        self,
        rows: Rows,
        boundary: Boundary,
        *,
        stored: bool,
        device: torch.device,
        precision: Precision,
        channels_last: bool = False,
    ) -> Batch:
        text = cast("TextBatch", rows.text)
        (value,) = (to_device(tensor, device) for tensor in boundary)
        if stored:
            (value,) = self.as_input((value,), precision)
            value = _padded(value, text)
        context = self._frame(device)(value, text.position_ids, text.attention_mask, text.where)
        return Batch((value,), to_device(rows.targets, device), context, rows)

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        # The residual stream keeps the type of the weights; autocast computes what it adds in its own.
        return tuple(tensor.to(master_dtype(self._model)) for tensor in boundary)

    def _frame(self, device: torch.device) -> Frame:
        if device not in self._frames:
            self._frames[device] = Frame(self._model, device, longest=self._data.sequence_length)
        return self._frames[device]

    # -- snapshots ----------------------------------------------------------------------------------------

    @cached_property
    def _hidden(self) -> int:
        return int(build_skeleton(self._model).config.get_text_config().hidden_size)

    def fields(self, blocks: int, dtype: str) -> tuple[Field, ...]:
        return (Field("x", dtype, (self._hidden,)),)

    def offsets(self, source: Source) -> np.ndarray | None:
        return cast("TextSource", source).offsets

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        return cast("TextSource", source).token_rows(index)

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        (hidden,) = boundary
        mask = cast("TextBatch", batch.rows.text).attention_mask
        flat = hidden.flatten(0, 1)
        return (flat if mask is None else flat[to_device(_kept(mask), flat.device)],)

    def view_identity(self, view: int | None) -> Any:
        return None

    def model_identity(self) -> Any:
        # The names in the states' digests say the depth; the rest of the computation is in the configuration.
        config = {key: value for key, value in (self._model.config or {}).items() if key != "num_hidden_layers"}
        return {"config": config, "master": self._model.master, "attention": self._model.attention}

    # -- objective ----------------------------------------------------------------------------------------

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        return readout.loss(output, targets, train.label_smoothing), None

    def scorer(self, source: Source, device: torch.device) -> TextScorer:
        return TextScorer(cast("TextSource", source), device)


class TextScorer:
    """Mean negative log-likelihood over targets, perplexity, share of targets predicted right; of questions (splits
    with all candidates) the loss of the right answers, and how often the right one is the likeliest (`accuracy`)."""

    def __init__(self, source: TextSource, device: torch.device) -> None:
        self._source = source
        #: By sample: summed negative log-likelihood, targets predicted right.
        self.sums = torch.zeros((2, source.rows), dtype=torch.float64, device=device)

    def add(self, output: Any, batch: Batch) -> None:
        nll, correct = readout.token_scores(output, batch.targets)
        text = cast("TextBatch", batch.rows.text)
        rows = torch.from_numpy(batch.rows.index)[text.where // text.ids.shape[1]].to(nll.device)
        self.sums.index_add_(1, rows, torch.stack((nll, correct.float())).double())

    def metrics(self) -> dict[str, float]:
        nll, correct = self.sums.cpu().numpy()
        targets = self._source.targets
        if self._source.groups is None:
            return _figures(nll.sum(), correct.sum(), targets.sum())
        group, right = self._source.groups
        figures = _figures(nll[right].sum(), correct[right].sum(), targets[right].sum())
        return {**figures, "token_accuracy": figures["accuracy"], "accuracy": _answered(nll, group, right)}


def _figures(nll: float, correct: float, targets: float) -> dict[str, float]:
    loss = float(nll / max(targets, 1))
    return {"loss": loss, "accuracy": float(correct / max(targets, 1)), "perplexity": float(np.exp(min(loss, 700.0)))}


def _answered(nll: np.ndarray, group: np.ndarray, right: np.ndarray) -> float:
    """Share of groups whose least summed negative log-likelihood is the right candidate's (the first of equals)."""
    order = np.lexsort((np.arange(len(nll)), nll, group))
    first = np.r_[True, np.diff(group[order]) != 0]
    return float(right[order][first].mean())


def _kept(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


def _padded(flat: Tensor, text: TextBatch) -> Tensor:
    """Rows (tokens, D) as (B, T, D), zeros at padding."""
    shape = (*text.ids.shape, flat.shape[-1])
    if text.attention_mask is None:
        return flat.view(shape)
    padded = flat.new_zeros((shape[0] * shape[1], shape[2]))
    return padded.index_copy_(0, to_device(_kept(text.attention_mask), flat.device), flat).view(shape)
