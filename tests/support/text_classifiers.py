"""Tiny text classifiers of many architectures, as transformers has them and as chains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.models.chain import ModulePath
from workers.models.hf_text.parts import HFTextParts
from workers.models.hf_text.skeleton import build_network
from workers.models.registry import family
from workers.specs.language import HFTextSpec

CLASSES, VOCABULARY = 5, 97
CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    # transformers' own 0.02 leaves a network this narrow nearly linear.
    "initializer_range": 0.2,
}
_NAMED = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
#: Every one is there for something the others lack.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {"local_attention": 6, "classifier_pooling": "mean", **_NAMED},
    "electra": {"embedding_size": 16},
    "deberta": {},
    "gpt2": _NAMED,
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2, "use_cache": True, **_NAMED},
}


def text_spec(name: str = "bert", **given: Any) -> HFTextSpec:
    """A task's spec: the whole architecture, a token a byte."""
    own = {key: value for key, value in _SMALL.items() if name != "distilbert" or "size" not in key or "vocab" in key}
    own = {key: value for key, value in own.items() if name != "distilbert" or not key.startswith("num_")}
    config = {"model_type": name, **own, **ARCHITECTURES.get(name, {}), **given}
    spec = HFTextSpec(family="hf_text", tokenizer="bytes", config=config)
    own_family = family("hf_text")
    settled: HFTextSpec = own_family.architecture(spec, own_family.inspect(spec))
    return settled


def network_of(spec: HFTextSpec, seed: int = 0) -> Any:
    """transformers' own network, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(spec, CLASSES)


def inputs_of(spec: HFTextSpec, lengths: Iterable[int] = (9, 4, 12, 1), seed: int = 0) -> dict[str, Tensor]:
    """Padded samples of these lengths, whose second halves are a second text."""
    own = torch.tensor(list(lengths))
    steps = torch.arange(int(own.max()))
    mask = steps < own[:, None]
    padding = (spec.config or {})["pad_token_id"]
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(seed))
    types = (steps >= own[:, None] // 2) & mask
    return {
        "input_ids": ids.where(mask, padding),
        "attention_mask": mask.long(),
        "token_type_ids": types.long() if (spec.config or {}).get("type_vocab_size", 0) > 1 else torch.zeros_like(ids),
    }


def modules_of(parts: HFTextParts, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """All parts, each strictly loaded with its share of `state`; all of `state` is used exactly once."""
    modules, seen = {}, []
    for name in parts.names():
        modules[name] = parts.build(name, CPU)
        names = parts.state_names(name)
        modules[name].load_state_dict({key: state[key].clone() for key in names}, strict=True)
        seen += names
    assert sorted(seen) == sorted(state)
    return modules


def chain_of(spec: HFTextSpec, network: nn.Module) -> tuple[HFTextParts, ModulePath]:
    """The parts, and all of them as one path, with the network's weights."""
    parts = HFTextParts(spec, CLASSES)
    modules = modules_of(parts, network.state_dict())
    return parts, ModulePath(modules, modules.keys())


def word_pieces(folder: Path) -> Any:
    """A tokenizer of words between [CLS] and [SEP] with types for pairs, saved as `save_pretrained` does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(40))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    whole = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    whole.save_pretrained(str(folder))
    return whole
