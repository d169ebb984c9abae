"""Text classifiers of many architectures, and what comes of each as a chain, for docs/architectures.md."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text_classifiers import ARCHITECTURES, CLASSES, CPU, chain_of, inputs_of, modules_of, network_of, text_spec
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from workers.models.base import Export
from workers.models.chain import ModulePath
from workers.models.hf_text.parts import HFTextParts
from workers.models.registry import family
from workers.specs.language import HFTextSpec

TARGETS = torch.tensor([0, 3, 1, 4])
_NAMED: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
#: Architectures, with the settings that a small one needs.
TEXTS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bart": {},
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "bloom": {"hidden_dropout": 0.1},
    "camembert": {},
    "canine": {},
    "convbert": {"embedding_size": 32, "head_ratio": 2},
    "data2vec-text": {},
    "deberta": {"relative_attention": True},
    "deberta-v2": {"relative_attention": True},
    "distilbert": ARCHITECTURES["distilbert"],
    "electra": {"embedding_size": 16},
    "ernie": {},
    "esm": {},
    "eurobert": _NAMED,
    "fnet": {},
    "gpt2": _NAMED,
    "ibert": {},
    "jina_embeddings_v3": {},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "llama": _NAMED,
    "longformer": {},
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 32},
    "modernbert": ARCHITECTURES["modernbert"],
    "mpnet": {},
    "nomic_bert": {},
    "nystromformer": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **_NAMED},
    "qwen3": ARCHITECTURES["qwen3"],
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": ARCHITECTURES["roberta"],
    "roberta-prelayernorm": {},
    "roformer": {"embedding_size": 32},
    "squeezebert": {"embedding_size": 32},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
}


def examine_text(spec: HFTextSpec) -> tuple[int, int, str]:
    """Try one: blocks, parameters, and in words what is not equal. ConfigError where it is refused."""
    state = family("hf_text").library(spec).initial_state(CLASSES, 3)  # type: ignore[attr-defined]
    network = network_of(spec)
    network.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    parts = HFTextParts(spec, CLASSES)
    tried: tuple[Callable[[HFTextSpec, Any], str], ...] = (_chain, _stages, _export)
    return (
        len(parts.names()) - 1,
        sum(parameter.numel() for parameter in network.parameters()),
        "; ".join(filter(None, (one(spec, network) for one in tried))),
    )


def _chain(spec: HFTextSpec, network: Any) -> str:
    """Compare scores and gradients in training, dropout and all."""
    parts, path = chain_of(spec, network)
    inputs = inputs_of(spec)
    context = parts.context(CPU)(inputs["input_ids"], inputs)
    torch.manual_seed(1)
    want = network.train()(**dict(context.inputs)).logits
    torch.manual_seed(1)
    given = path.train()((inputs["input_ids"],), context)
    if not torch.equal(want, given):
        return "scores differ in training"
    F.cross_entropy(want, TARGETS).backward()
    F.cross_entropy(given, TARGETS).backward()
    trained = {key: tensor.grad for part in path.parts.values() for key, tensor in part.named_parameters()}
    for key, parameter in network.named_parameters():
        there, own = (torch.zeros(()) if grad is None else grad for grad in (trained[key], parameter.grad))
        if not torch.equal(there, own):
            return f"gradients differ, first of {key}"
    return ""


def _stages(spec: HFTextSpec, network: Any) -> str:
    """Train two steps of SegProp's first stage (embedding, layer, head) and of LW's (embedding, layer, local head)."""
    parts, state = HFTextParts(spec, CLASSES), network.state_dict()
    head = {key: state[key] for key in parts.state_names("head")}
    for regime, last in (("SegProp", "head"), ("LW", "aux")):
        modules = modules_of(parts, state)
        end = modules["head"] if last == "head" else parts.build_aux(2, 0, CPU, head)
        path = ModulePath(
            {"embed": modules["embed"], "layer0": modules["layer0"], last: end}, ("embed", "layer0", last)
        )
        before = {key: tensor.detach().clone() for key, tensor in path.train().named_parameters()}
        optimizer = torch.optim.AdamW(path.parameters(), lr=1e-3)
        inputs = inputs_of(spec)
        for _ in range(2):
            optimizer.zero_grad()
            context = parts.context(CPU)(inputs["input_ids"], inputs)
            loss = F.cross_entropy(path((inputs["input_ids"],), context), TARGETS)
            loss.backward()
            optimizer.step()
        moved = {key.split(".")[1] for key, p in path.named_parameters() if not torch.equal(before[key], p)}
        if not torch.isfinite(loss) or moved != {"embed", "layer0", last}:
            return f"one stage of {regime} does not train"
    return ""


def _export(spec: HFTextSpec, network: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        export = Export(spec, CLASSES, iter([("all", dict(network.state_dict()))]), {}, {}, {})
        family("hf_text").export(export, Path(folder) / "model")
        loaded = AutoModelForSequenceClassification.from_pretrained(Path(folder) / "model").eval()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            # Where a file is mapped, weights begin at any address, and kernels add up in another order.
            tensor.data = tensor.data.clone()
        parts, _ = chain_of(spec, network)
        inputs = inputs_of(spec)
        given = dict(parts.context(CPU)(inputs["input_ids"], inputs).inputs)
        with torch.no_grad():
            same = torch.equal(loaded(**given).logits, network.eval()(**given).logits)
    return "" if same else "the exported folder gives other scores"


def text_case(name: str) -> HFTextSpec:
    """A task's spec of an architecture. ConfigError where planning refuses it."""
    return text_spec(name, **TEXTS[name])
