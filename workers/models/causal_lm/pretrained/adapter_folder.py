"""Low-rank adapters by themselves, as a folder that PEFT loads on the base they were trained on.

What several stages trained on a layer is one adapter of the sum of their ranks: A matrices one below the other, B
matrices side by side. Where that is more than the layer has inputs or outputs, B @ A itself beside an identity is
smaller, and exact too.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_store.errors import UserError
from workers import tensor_files
from workers.models.base import AdapterExport, AdapterPiece
from workers.models.causal_lm.network.lora import is_linear
from workers.models.causal_lm.network.parts import layer_index
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.network.structure import structure
from workers.specs.experiment import COMPUTED
from workers.specs.export_files import FACTS, Base, Facts
from workers.specs.language import CausalLMSpec
from workers.specs.model import expect

#: As PEFT names them.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
#: What says how the model itself is built and answers: the base has its own.
_OF_THE_BASE = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class _Layer:
    """One linear layer's adapter: `down` (rank, in) and `up` (out, rank), float32; it adds scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


def write_adapter(export: AdapterExport, target: Path) -> None:
    """Write the folder `target` in place of what it holds: `adapter_config.json`, `adapter_model.safetensors`, the
    companions (tokenizer) and `segprop.json`, which says how the base has to be loaded.

    UserError where the base is not one that somebody could load, or where no adapter on one base can say what was
    trained: the message tells which part and why.
    """
    model, base = expect(CausalLMSpec, export.model), expect(CausalLMSpec, export.base)
    _check_base(base)
    quantization = _quantization(model, export.pieces)
    layers = {name: _joined(found) for name, found in _by_layer(export.pieces).items()}
    if not layers:
        raise UserError("no stage trained low-rank adapters (training.lora); leave --adapter out")
    tensors = {f"{_PREFIX}{name}{_A}": layer.down for name, layer in layers.items()}
    tensors |= {f"{_PREFIX}{name}{_B}": layer.up for name, layer in layers.items()}
    put_on = Base(path=base.path, revision=base.revision, quantization=quantization)
    facts = Facts(sources=export.sources, companions=export.companions, base=put_on)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, data in export.companions.items():
        if name not in _OF_THE_BASE:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    (target / FACTS).write_bytes(facts.to_bytes())
    tensor_files.write(target / WEIGHTS, tensors, {"format": "pt"})
    (target / CONFIG).write_text(json.dumps(_config(model, base, export.pieces, layers), indent=2) + "\n")


def _check_base(base: CausalLMSpec) -> None:
    """UserError unless the weights that training started from are a model that can be loaded as it was."""
    if base.path is None:
        raise UserError(
            "--adapter: the model began with random weights, so there is no base to put an adapter on; leave it out"
        )
    if base.prune:
        raise UserError(
            f"--adapter: model.prune took layers away, so the adapter fits no layers of {base.path}; leave it out"
        )


def _by_layer(pieces: Mapping[str, Sequence[AdapterPiece]]) -> dict[str, list[_Layer]]:
    """Linear layer -> its adapters, in the order in which they were trained."""
    found: dict[str, list[_Layer]] = {}
    for trained in pieces.values():
        for piece in trained:
            tensors, scale = piece.tensors(), piece.lora.alpha / piece.lora.rank
            for name in (name.removesuffix(_A) for name in tensors if name.endswith(_A)):
                found.setdefault(name, []).append(_Layer(tensors[f"{name}{_A}"], tensors[f"{name}{_B}"], scale))
    return found


def _joined(layers: Sequence[_Layer]) -> _Layer:
    """Add adapters of one layer up. One alone stays as it is, bit for bit."""
    scale = layers[0].scale
    down = torch.cat([layer.down for layer in layers])
    # A factor of one changes nothing.
    up = torch.cat([layer.up * (layer.scale / scale) for layer in layers], dim=1)
    inputs, outputs = down.shape[1], len(up)
    if len(layers) == 1 or len(down) <= min(inputs, outputs):
        return _Layer(down, up, scale)
    product = (up.double() @ down.double()).float()
    if inputs <= outputs:
        return _Layer(torch.eye(inputs), product, scale)
    return _Layer(product, torch.eye(outputs), scale)


def _config(
    model: CausalLMSpec,
    base: CausalLMSpec,
    pieces: Mapping[str, Sequence[AdapterPiece]],
    layers: Mapping[str, _Layer],
) -> dict[str, Any]:
    """Describe the adapters in PEFT's terms: most layers by `r` and `lora_alpha`, those that differ by name."""
    lora = next(piece.lora for trained in pieces.values() for piece in trained)
    rank, scale = Counter((layer.rank, layer.scale) for layer in layers.values()).most_common(1)[0][0]
    others = {name: layer for name, layer in layers.items() if (layer.rank, layer.scale) != (rank, scale)}
    # Names are patterns there.
    written = {name.replace(".", r"\."): layer for name, layer in others.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": lora.dropout,
        "rank_pattern": {name: layer.rank for name, layer in written.items()},
        "alpha_pattern": {name: _number(layer.scale * layer.rank) for name, layer in written.items()},
        "target_modules": _targets(model, set(layers)),
        "fan_in_fan_out": any(_is_transposed(build_skeleton(model), name) for name in layers),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _number(value: float) -> float | int:
    """Whole numbers as such: some readers of these files take no others."""
    return int(value) if value == int(value) else value


def _targets(model: CausalLMSpec, adapted: set[str]) -> list[str]:
    """Name the layers with adapters: by the last part of their names where all of that name have one, else in full."""
    linear = _linear(build_skeleton(model))
    short = {name: name.rpartition(".")[2] for name in linear}
    partly = {short[name] for name in linear if name not in adapted}
    return sorted({name if short[name] in partly else short[name] for name in adapted})


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def _is_transposed(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def _quantization(
    model: CausalLMSpec, pieces: Mapping[str, Sequence[AdapterPiece]]
) -> dict[str, str | float | bool | list[str]] | None:
    """Say how bitsandbytes has to round the base, as `BitsAndBytesConfig` takes it; None: not at all.

    Parts that were trained over rounded matrices are rounded, all others are not. UserError where a part was rounded
    again after it had changed, or parts in different ways.
    """
    rounded = {part: list(_modes(part, trained)) for part, trained in pieces.items()}
    modes = {mode for found in rounded.values() for mode in found}
    if not modes:
        return None
    if len(modes) > 1:
        raise UserError(f"--adapter: parts were rounded in different ways ({', '.join(sorted(modes))}); leave it out")
    mode = modes.pop()
    layers = structure(model).layers
    inside = tuple(f"{layers}.{layer_index(part)}." for part, found in rounded.items() if found)
    skipped = [name for name in _linear(build_skeleton(model)) if not name.startswith(inside)]
    if mode == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": skipped}
    precision = next(piece.precision for trained in pieces.values() for piece in trained)
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": COMPUTED[precision],
        "llm_int8_skip_modules": skipped,
    }


def _modes(part: str, trained: Sequence[AdapterPiece]) -> Iterator[str]:
    """Yield how a part's matrices were rounded, if they were; the embedding and the head never are."""
    if part in ("embed", "head"):
        return
    for number, piece in enumerate(trained):
        if piece.frozen_weights == "full":
            continue
        if number > 0:
            raise UserError(
                f"--adapter: {part} was trained in several stages and rounded ({piece.frozen_weights}) again after it "
                "had changed, which no adapter on one base can say; leave it out"
            )
        yield piece.frozen_weights
