"""A sample of the architectures that transformers builds as causal LMs; the page that lists them all."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from workers.models.causal_lm.survey import FAMILIES, examine

ROOT = Path(__file__).resolve().parents[4]
PAGE = ROOT / "docs" / "model-families.md"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Every one is there for something the others lack: another word for the number of layers (gpt2, bloom, longcat_flash,
#: nemotron_h), a norm without weights (olmo, nanochat), infinite numbers and buffers that the parent sets (falcon_h1),
#: heads of each layer (gemma4_unified_text), complex rotary embeddings (deepseek_v2), the decoder of two (whisper).
@pytest.mark.parametrize(
    ("name", "isolates"),
    [
        ("gpt2", True),
        ("olmo", True),
        ("nanochat", True),
        ("gemma4_unified_text", True),
        ("deepseek_v2", True),
        ("longcat_flash", True),
        ("apertus", True),
        ("whisper", True),
        ("bloom", False),
        ("nemotron_h", False),
        ("falcon_h1", False),
        ("recurrent_gemma", False),
        ("lfm2", False),
        ("gpt_oss", False),
    ],
)
def test_supported_families_equal_their_own_forward_and_say_whether_documents_stay_apart(
    name: str, isolates: bool
) -> None:
    family = examine(name)
    assert family.supported, family.reason
    assert family.isolates == isolates


@pytest.mark.parametrize(
    ("name", "variant", "words"),
    [
        ("gemma3n_text", False, "take keys and values from layers before them"),
        ("gemma3n_text", True, "embed_tokens_per_layer"),
        ("opt", True, "no norm but 'project_out'"),
        ("openai-gpt", False, "no final norm"),
        ("glm_moe_dsa", True, "hand each other more than the hidden states"),
        ("zaya", False, "hand each other more than the hidden states"),
        ("modernbert-decoder", False, "lm_head.dense.weight"),
        ("electra", False, "is not what embeds its tokens"),
        ("bert", False, "LM head is no linear layer"),
        ("musicgen", False, "several models"),
        ("qwen3_5", False, "multimodal model; take the text model's own config (model_type 'qwen3_5_text'"),
    ],
)
def test_refused_families_are_refused_for_the_true_reason(name: str, variant: bool, words: str) -> None:
    family = examine(name, variant)
    assert not family.supported
    assert words in family.reason


def test_the_page_lists_the_architectures_of_the_installed_transformers() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate_model_families.py"))
    text = PAGE.read_text()
    made_with = re.search(r"transformers ([\d.]+)", text)
    assert made_with is not None
    if made_with[1] != transformers.__version__:
        pytest.skip(f"the page is of transformers {made_with[1]}")
    listed = set(re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE))
    assert listed == set(FAMILIES)
    assert text == module["page"](module["listed"](text)), "run python docs/generate_model_families.py"
