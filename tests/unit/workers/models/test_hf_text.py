"""Text classifiers of transformers as chains: forward, gradients, padding, stages, exports; and what is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_classifiers import ARCHITECTURES, CLASSES, CPU, chain_of, inputs_of, modules_of, network_of, text_spec
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from cache_store.errors import ConfigError
from workers.models.base import Export
from workers.models.chain import ModulePath
from workers.models.hf_text.library import head_facts
from workers.models.hf_text.parts import HFTextParts
from workers.models.registry import family
from workers.specs.language import HFTextSpec, LabelledTextSpec

FAMILY: Any = family("hf_text")
TARGETS = torch.tensor([0, 3, 1, 4])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def own(network: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Scores of transformers' own forward."""
    taken = inspect.signature(type(network).forward).parameters
    scores: torch.Tensor = network(**{name: tensor for name, tensor in inputs.items() if name in taken}).logits
    return scores


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_padded_batches_are_bit_identical_to_the_networks_own_forward(name: str) -> None:
    spec = text_spec(name)
    network = network_of(spec)
    parts, path = chain_of(spec, network)
    for lengths in ((9, 4, 12, 1), (7, 7)):
        inputs = inputs_of(spec, lengths)
        context = parts.context(CPU)(inputs["input_ids"], inputs)
        with torch.no_grad():
            assert torch.equal(path.eval()((inputs["input_ids"],), context), own(network, inputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_end_to_end_training_are_bit_identical_with_dropout(name: str) -> None:
    spec = text_spec(name)
    network = network_of(spec).train()
    parts, path = chain_of(spec, network)
    inputs = inputs_of(spec)
    context = parts.context(CPU)(inputs["input_ids"], inputs)
    torch.manual_seed(3)
    F.cross_entropy(own(network, inputs), TARGETS).backward()
    torch.manual_seed(3)
    F.cross_entropy(path.train()((inputs["input_ids"],), context), TARGETS).backward()
    there = {key: tensor.grad for part in path.parts.values() for key, tensor in part.named_parameters()}
    assert len(there) == len(list(network.parameters()))
    for key, parameter in network.named_parameters():
        assert torch.equal(there[key], parameter.grad), key


def test_a_head_draws_no_random_numbers_for_what_comes_before_the_layers() -> None:
    """GPT-2 has dropout between its embeddings and its layers, and none in its head."""
    spec = text_spec("gpt2")
    parts, path = chain_of(spec, network_of(spec))
    inputs = inputs_of(spec)
    context = parts.context(CPU)(inputs["input_ids"], inputs)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    path.parts["head"].train()((torch.ones(4, 12, 32),), context)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_comes_out_at_padding_and_how_far_it_reaches_changes_no_score(name: str) -> None:
    """So snapshots need no padding: rows of tokens, padded with zeros as far as their batch, give the same bits."""
    spec = text_spec(name)
    parts, path = chain_of(spec, network_of(spec))
    inputs = inputs_of(spec)
    context = parts.context(CPU)(inputs["input_ids"], inputs)
    blocks = list(path.eval().parts.values())
    with torch.no_grad():
        value = (inputs["input_ids"],)
        for index, block in enumerate(blocks):
            if index == 2:
                tokens = inputs["attention_mask"].bool()
                value = (value[0].masked_fill(~tokens[..., None], 0.0),)
            value = block(value, context)
        assert torch.equal(value, path((inputs["input_ids"],), context))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stage_of_segprop_and_one_of_lw_train_what_they_should(name: str) -> None:
    spec = text_spec(name)
    state = network_of(spec).state_dict()
    parts = HFTextParts(spec, CLASSES)
    modules = modules_of(parts, state)
    head = {key: state[key] for key in parts.state_names("head")}
    inputs = inputs_of(spec)
    segprop = {name: modules[name] for name in ("embed", "layer0", "layer1", "head")}
    lw = {
        **{name: modules_of(parts, state)[name] for name in ("embed", "layer0")},
        "aux": parts.build_aux(2, 0, CPU, head),
    }
    for stage, trained in ((segprop, ("layer1", "head")), (lw, ("layer0", "aux"))):
        path = ModulePath(stage, trained).train()
        before = {key: tensor.detach().clone() for key, tensor in path.named_parameters()}
        context = parts.context(CPU)(inputs["input_ids"], inputs)
        loss = F.cross_entropy(path((inputs["input_ids"],), context), TARGETS)
        loss.backward()
        torch.optim.SGD([p for p in path.parameters() if p.requires_grad], lr=0.1).step()
        moved = {key.split(".")[1] for key, tensor in path.named_parameters() if not torch.equal(before[key], tensor)}
        assert moved == set(trained)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_count_every_parameter(name: str) -> None:
    spec = text_spec(name)
    chain = FAMILY.outline(spec, FAMILY.inspect(spec), (12,), CLASSES)
    counted = sum(part.parameters for part in (*chain.blocks, chain.head))
    assert counted == sum(parameter.numel() for parameter in network_of(spec).parameters())
    assert [block.name for block in chain.blocks] == ["embed", "layer0", "layer1", "layer2"]
    assert chain.head.outputs == ((CLASSES,),)
    assert chain.blocks[1].flops > 2 * 12 * sum(
        layer.weight.numel()
        for layer in HFTextParts(spec, CLASSES).build("layer0", CPU).modules()
        if isinstance(layer, nn.Linear)
    )
    assert head_facts(spec, CLASSES).parameters == chain.head.parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_export_is_loaded_by_transformers_with_equal_scores_and_names_of_classes(name: str, tmp_path: Path) -> None:
    spec = text_spec(name)
    network = network_of(spec)
    names = ("a", "b", "c", "d", "e")
    export = Export(spec, CLASSES, iter([("", network.state_dict())]), {"vocab.txt": b"x"}, {"class_names": names}, {})
    FAMILY.export(export, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for tensor in loaded.parameters():
        # Where a file is mapped, weights begin at any address, and kernels add up in another order.
        tensor.data = tensor.data.clone()
    inputs = inputs_of(spec)
    with torch.no_grad():
        assert torch.equal(own(loaded.eval(), inputs), own(network, inputs))
    assert loaded.config.id2label == dict(enumerate(names))
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == b"x"


def saved(folder: Path, spec: HFTextSpec, drop: str = "") -> HFTextSpec:
    """A folder of the network's weights, without those whose names begin with `drop`, and the user's spec for it."""
    network = network_of(spec)
    state = {key: value for key, value in network.state_dict().items() if not (drop and key.startswith(drop))}
    network.save_pretrained(folder, state_dict=state)
    return HFTextSpec(family="hf_text", path=str(folder), tokenizer="bytes")


def test_pretrained_weights_are_taken_and_what_a_checkpoint_lacks_of_the_head_stays_random(tmp_path: Path) -> None:
    spec = text_spec("roberta")
    state = network_of(spec).state_dict()
    given = saved(tmp_path / "whole", spec)
    found = FAMILY.inspect(given)
    start = FAMILY.start(given, found)
    same = FAMILY.library(start).initial_state(CLASSES, 7)
    assert all(torch.equal(state[key], tensor) for key, tensor in same.items())
    other = FAMILY.library(start).initial_state(3, 7)
    changed = [key for key, tensor in other.items() if not torch.equal(state[key], tensor)]
    assert changed == ["classifier.out_proj.weight"] or changed == [
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ]
    bare = saved(tmp_path / "bare", spec, "classifier.")
    lacking = FAMILY.library(FAMILY.start(bare, FAMILY.inspect(bare))).initial_state(CLASSES, 7)
    assert {key for key, tensor in lacking.items() if not torch.equal(state[key], tensor)} == {
        "classifier.dense.weight",
        "classifier.out_proj.weight",
    }
    assert FAMILY.weights_digest(given, found) != FAMILY.weights_digest(bare, FAMILY.inspect(bare))


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    given = saved(tmp_path / "cut", text_spec("bert"), "bert.encoder.layer.1.output.dense")
    start = FAMILY.start(given, FAMILY.inspect(given))
    with pytest.raises(ConfigError, match=r"lacks weights of bert: bert.encoder.layer.1.output.dense.bias"):
        FAMILY.library(start).initial_state(CLASSES, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "albert", "num_hidden_layers": 3}, "0 lists of 3 layers were found"),
        ({"model_type": "mpnet", "num_hidden_layers": 2}, "beside hidden states, what weights outside them make"),
        ({"model_type": "t5"}, "it is an encoder with a decoder"),
        ({"model_type": "bart"}, "it is an encoder with a decoder"),
        ({"model_type": "fnet", "num_hidden_layers": 2}, "takes no input_ids and attention_mask"),
        (
            {"model_type": "deberta-v2", "relative_attention": True},
            "beside hidden states, what weights outside them make",
        ),
        (
            {"model_type": "ibert", "num_hidden_layers": 2},
            "what its layers are given cannot be made without its weights",
        ),
        (
            {"model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": 2},
            "Cannot handle batch sizes > 1 if no padding token",
        ),
        ({"model_type": "bertt"}, "no text classifier of that kind; did you mean 'bert'"),
        ({"model_type": "vit"}, "no text classifier of that kind"),
        ({"model_type": "bert", "hidden_size": 30}, "transformers builds no text classifier of 'bert'"),
    ],
)
def test_what_is_no_chain_or_no_classifier_is_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    given = HFTextSpec(family="hf_text", config={**small, **config} if config["model_type"] != "t5" else config)
    with pytest.raises(ConfigError, match=words) as refused:
        FAMILY.inspect(given)
    assert str(refused.value.details["where"]).startswith("model")


def test_parts_that_do_not_compute_what_the_network_does_are_refused_before_anything_is_trained() -> None:
    spec = text_spec("roformer", embedding_size=32)
    with pytest.raises(ConfigError, match="roformer: its parts cannot be run"):
        FAMILY.library(spec).initial_state(CLASSES, 0)


def test_a_network_that_mixes_padding_into_its_tokens_is_refused() -> None:
    """A convolution over tokens reads their neighbours, which snapshots do not hold."""
    spec = text_spec("convbert", embedding_size=32, head_ratio=2)
    with pytest.raises(ConfigError, match="what comes out at padding changes its scores"):
        FAMILY.library(spec).initial_state(CLASSES, 0)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ConfigError, match="code that comes with a checkpoint"):
        FAMILY.inspect(HFTextSpec(family="hf_text", path=str(tmp_path)))


def test_samples_are_no_longer_than_the_network_has_positions() -> None:
    for name, positions in (("bert", 40), ("roberta", 38)):
        spec = replace(text_spec(name), tokenizer="bytes", config={**(text_spec(name).config or {}), "vocab_size": 300})
        found = FAMILY.inspect(spec)
        assert found.positions == positions
        fits, longer = (LabelledTextSpec(sequence_length=length) for length in (positions, positions + 1))
        assert list(FAMILY.data_problems(spec, found, fits)) == []
        (problem,) = FAMILY.data_problems(spec, found, longer)
        assert problem[0] == ("data", "sequence_length")


def test_a_tokenizer_must_be_there_and_fit() -> None:
    spec = text_spec("bert")
    found = FAMILY.inspect(spec)
    (missing,) = FAMILY.data_problems(spec, found, LabelledTextSpec(sequence_length=8))
    assert missing[0] == ("model", "tokenizer")
    (larger,) = FAMILY.data_problems(replace(spec, tokenizer="bytes"), found, LabelledTextSpec(sequence_length=8))
    assert "257 tokens" in larger[1]
