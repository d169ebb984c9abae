"""Try every causal LM that transformers knows as a chain, on a tiny model of its kind.

A family is either supported (the chain equals the model's own forward: logits, gradients, padding, packed documents,
both attention kernels, import and export) or refused with a reason. `docs/generate_model_families.py` writes the table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cache_store.errors import ConfigError
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.parts import build_part, part_names
from workers.models.causal_lm.network.readout import loss
from workers.models.causal_lm.network.recording import accepts
from workers.models.causal_lm.pretrained.export import write_folder
from workers.models.causal_lm.pretrained.import_parts import companions, import_parts
from workers.models.causal_lm.trials.isolation import keeps_documents_apart
from workers.models.causal_lm.trials.tiny_configs import VOCABULARY, WINDOW, tiny_config
from workers.models.causal_lm.trials.verify import random_model, verify_chain
from workers.specs.language import CausalLMSpec

#: model_type of every architecture that transformers builds as a causal LM.
FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

_LENGTH = 20
#: Settings that decide whether a family is supported: tried beside the default ones.
VARIANTS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
}


@dataclass(frozen=True)
class Family:
    """Say what came of trying one architecture."""

    model_type: str
    #: Settings that differ from the default ones.
    settings: Mapping[str, Any]
    supported: bool
    #: Packed documents are kept apart (only of supported ones).
    isolates: bool = False
    #: Why it is refused.
    reason: str = ""


def examine(model_type: str, variant: bool = False) -> Family:
    """Try one architecture; `variant`: with the settings of `VARIANTS`.

    Raises nothing but what is wrong with this package: AssertionError for a chain that differs from the model, or any
    error that is no ConfigError.
    """
    settings = VARIANTS[model_type] if variant else {}
    spec = CausalLMSpec(family="causal_lm", config={**tiny_config(model_type), **settings})
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            isolates = _examine(spec, Path(folder))
    except ConfigError as refusal:
        return Family(model_type, settings, supported=False, reason=refusal.message)
    return Family(model_type, settings, supported=True, isolates=isolates)


def _examine(spec: CausalLMSpec, folder: Path) -> bool:
    """Compare one architecture in all ways; return whether it keeps packed documents apart."""
    kernels: tuple[Literal["sdpa", "eager"], ...] = ("sdpa", "eager")
    for attention in kernels:
        task = _task(replace(spec, attention=attention))
        verify_chain(task)
        model = random_model(task)
        _compare_logits(task, model)
        _compare_gradients(task, model)
    task = _task(spec)
    _round_trip(random_model(task), folder)
    return keeps_documents_apart(task)


def _task(spec: CausalLMSpec) -> CausalLMSpec:
    config = inspect(spec).config
    json.dumps(config, allow_nan=False)  # as tasks are stored
    return replace(spec, config=dict(config))


def _compare_logits(spec: CausalLMSpec, model: PreTrainedModel) -> None:
    ids = torch.randint(4, VOCABULARY, (2, _LENGTH))
    positions = torch.arange(_LENGTH).expand(2, _LENGTH)
    packed = torch.stack([torch.arange(_LENGTH), torch.arange(_LENGTH) % (_LENGTH // 2)])
    mask = torch.arange(_LENGTH)[None] < torch.tensor([[_LENGTH], [WINDOW + 2]])
    with torch.no_grad():
        for name, given in (("plain", (positions, None)), ("packed", (packed, None)), ("padded", (positions, mask))):
            want, got = _own(model, ids, *given), chain_logits(spec, model.state_dict(), ids, *given)
            seen = mask if name == "padded" else torch.ones_like(mask)
            _same(got[seen], want[seen], f"logits of {name} rows with {spec.attention}")


def _own(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if mask is not None:
        given["attention_mask"] = mask.long()
    logits: Tensor = model(**accepts(model, given)).logits
    return logits


def chain_logits(
    spec: CausalLMSpec, state: dict[str, Tensor], ids: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """Compute the logits (B, T, V) of a task's spec, part by part."""
    value: Any = (ids,)
    context = Frame(spec)(ids, positions, mask)
    for part in _parts(spec, state):
        value = part(value, context)
    return cast("Tensor", value.logits()).view(*ids.shape, -1)


def _parts(spec: CausalLMSpec, state: dict[str, Tensor]) -> list[nn.Module]:
    parts = []
    for name in part_names(spec):
        part = build_part(spec, name).eval()
        part.load_state_dict({key: state[key] for key in part.state_dict()})
        parts.append(part)
    return parts


def _compare_gradients(spec: CausalLMSpec, model: PreTrainedModel) -> None:
    ids = torch.randint(4, VOCABULARY, (2, _LENGTH))
    positions = torch.arange(_LENGTH).expand(2, _LENGTH)
    model.zero_grad()
    logits = _own(model, ids, positions, None)
    torch.autograd.backward(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    where = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    value: Any = (ids,)
    context = Frame(spec)(ids, positions, None, where)
    parts = _parts(spec, model.state_dict())
    for part in parts:
        value = part(value, context)
    torch.autograd.backward(loss(value, ids[:, 1:].flatten()))
    got = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in want.items():
        if gradient is not None and gradient.abs().max() > 0:
            _same(got[name], gradient, f"gradient of {name} with {spec.attention}")


def _same(got: Tensor | None, want: Tensor, what: str) -> None:
    close = got is not None and torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-7)
    if not close:
        difference = (
            "none" if got is None else f"{float((got - want).abs().max()):.3g} of {float(want.abs().max()):.3g}"
        )
        raise AssertionError(f"{what} differs from the model's own: {difference}")


def _round_trip(model: PreTrainedModel, folder: Path) -> None:
    """Check that a model saved by transformers, imported, exported and loaded by transformers again is the same."""
    model.save_pretrained(folder / "there")
    task = _task(CausalLMSpec(family="causal_lm", path=str(folder / "there")))
    parts = dict(import_parts(task, 0))
    state = {name: tensor for part in parts.values() for name, tensor in part.items()}
    for name, tensor in model.state_dict().items():
        if not torch.equal(state[name], tensor):
            raise AssertionError(f"{name} is imported as something else")
    write_folder(task, parts.items(), companions(task), folder / "out")
    loaded = cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(folder / "out"))
    ids = torch.randint(4, VOCABULARY, (2, _LENGTH))
    positions = torch.arange(_LENGTH).expand(2, _LENGTH)
    with torch.no_grad():
        _same(_own(loaded, ids, positions, None), _own(model, ids, positions, None), "logits of the export")
