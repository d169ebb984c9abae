"""The outline's figures against the real parts: parameters, flops, kept activations; and that it stays pure."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_makers import ARCHITECTURES, lm_spec
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cache_store.errors import ConfigError
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.parts import build_part
from workers.models.causal_lm.network.random_init import random_state
from workers.models.causal_lm.outline import LMOutline, lm_chain

ROOT = Path(__file__).resolve().parents[4]
TOKENS = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wide(name: str, **given: Any) -> Any:
    """Wide enough that per-token statistics do not matter."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return lm_spec(name, **{**size, "n_inner": 256, **given} if name == "gpt2" else {**size, **given})


def test_no_torch_is_imported() -> None:
    code = "import workers.models.causal_lm.outline, sys; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_exact(name: str) -> None:
    spec = lm_spec(name)
    chain = lm_chain(inspect(spec), 16)
    for part in (*chain.blocks, chain.head):
        assert part.parameters == sum(p.numel() for p in build_part(spec, part.name).parameters()), part.name


def measured(spec: Any, name: str, tokens: int, inputs: Tensor) -> tuple[int, int]:
    """Elements autograd keeps of a part's step beside weights and context, and its flops."""
    part = build_part(spec, name).train()
    part.load_state_dict(random_state(spec, name, 0))
    context = Frame(spec)(inputs, torch.arange(tokens)[None])
    fixed = {p.untyped_storage().data_ptr() for p in part.parameters()}
    fixed |= {
        t.untyped_storage().data_ptr()
        for one in context.layers
        for value in (*one.args, *one.kwargs.values())
        for t in (value if isinstance(value, tuple) else [value])
        if isinstance(t, Tensor)
    }
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = part((inputs,), context)
    last = output[0].untyped_storage().data_ptr() if isinstance(output, tuple) else None
    return (
        sum(t.untyped_storage().nbytes() // 4 for pointer, t in kept.items() if pointer != last),
        flops.get_total_flops(),
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "gemma3_text", "gpt_neox", "olmo2", "smollm3"])
def test_kept_activations_and_flops_of_a_layer_are_near_the_measured(name: str) -> None:
    spec = wide(name)
    outline = lm_chain(inspect(spec), TOKENS).part("layer0")
    kept, flops = measured(spec, "layer0", TOKENS, torch.randn(1, TOKENS, 128))
    tolerance = 0.15 if name == "llama" else 0.3
    assert outline.saved_elements == pytest.approx(kept, rel=tolerance)
    if "sliding_window" not in ARCHITECTURES[name]:  # the counter does not know that far tokens are masked
        assert outline.flops == pytest.approx(flops, rel=0.01)


def test_eager_attention_keeps_scores() -> None:
    spec = wide("llama", attention="eager")
    outline = lm_chain(inspect(spec), TOKENS).part("layer0")
    kept, _ = measured(spec, "layer0", TOKENS, torch.randn(1, TOKENS, 128))
    assert outline.saved_elements == pytest.approx(kept, rel=0.2)


def test_figures_of_a_published_model() -> None:
    lm = inspect(
        lm_spec(
            "llama",
            num_hidden_layers=32,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
        )
    )
    assert sum(lm.parameters.values()) == 8_030_261_248
    assert lm.parameters["layer31"] == 218_112_000
    assert lm.parameters["head"] == 525_336_576 + 4096
    chain = lm_chain(lm, 1024)
    assert chain.part("layer0").flops == 2 * 218_103_808 * 1024 + 4 * 4096 * 1024 * 1024
    assert chain.boundaries[0] == ((1024,),)
    assert chain.boundaries[1] == ((1024, 4096),)
    assert len(chain.boundaries) == len(chain.blocks) + 1 == 34


def test_adapters_are_identity_and_auxiliary_heads_whole_heads() -> None:
    chain = lm_chain(inspect(lm_spec("llama")), 16)
    assert chain.adapter(1, 4).parameters == 0
    assert chain.adapter(1, 4).outputs == chain.boundaries[4]
    aux = chain.aux(2)
    assert (aux.name, aux.parameters, aux.outputs) == ("aux", chain.head.parameters, chain.head.outputs)
    with pytest.raises(ValueError, match="outside"):
        chain.aux(9)


def test_windows_bound_the_scores() -> None:
    lm = inspect(lm_spec("gemma3_text"))
    short, far = lm_chain(lm, 16).part("layer0").flops, lm_chain(lm, 16).part("layer1").flops
    assert short < far
    assert lm_chain(lm, 5).part("layer0").flops == lm_chain(lm, 5).part("layer1").flops


@pytest.mark.parametrize("tokens", [0, 65])
def test_more_tokens_than_positions_are_refused(tokens: int) -> None:
    with pytest.raises(ConfigError, match="1-64"):
        lm_chain(inspect(lm_spec("llama")), tokens)


def test_outlines_are_plain_data() -> None:
    lm = inspect(lm_spec("llama"))
    assert json.loads(json.dumps(lm.config)) == lm.config
    assert isinstance(lm, LMOutline)
    assert dataclasses.replace(lm, layers=3) == lm
