"""Exported language models through the public benchmarks, on local files: real questions, a real model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import gguf_file

SHARED = Path(os.environ.get("SEGPROP_SHARED") or Path(__file__).resolve().parents[4] / "shared")
DATA = SHARED / "data"

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install segprop[eval]")
pytestmark = pytest.mark.skipif(
    not (DATA / "mmlu").is_dir(),
    reason=f"no MMLU files in {DATA}: set SEGPROP_SHARED to the folder that holds data/",
)

from orchestrator import cli  # noqa: E402
from workers.judge.harness import HarnessSpec, score  # noqa: E402
from workers.judge.model import JudgedModel  # noqa: E402
from workers.judge.scores import Score  # noqa: E402

MMLU = HarnessSpec(data=DATA, limit=1, subjects=("anatomy", "management"), batch_size=4)
WINOGRANDE = HarnessSpec(data=DATA, limit=4, batch_size=4)


@pytest.fixture(scope="module")
def original() -> JudgedModel:
    """SmolLM2-135M-Instruct as it comes, with its embeddings tied."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    source: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    return JudgedModel(model.eval(), AutoTokenizer.from_pretrained(**source))


@pytest.fixture(scope="module")
def untouched(original: JudgedModel) -> tuple[Score, Score]:
    return score(original, "mmlu", MMLU), score(original, "winogrande", WINOGRANDE)


@pytest.fixture(scope="module")
def exported(original: JudgedModel, untouched: tuple[Score, Score], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as segprop exports them where a stage parted them: the LM head a matrix of its own."""
    folder = tmp_path_factory.mktemp("exported")
    model = original.model
    del model.config.quantization_config  # of the GGUF file; these weights are plain float32
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    original.tokenizer.save_pretrained(folder)
    return folder


def test_the_exported_model_scores_as_the_untouched_one(
    exported: Path, untouched: tuple[Score, Score], tmp_path: Path
) -> None:
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    common = ["--data", str(DATA), "--batch-size", "4", "--quiet"]
    for before, options in zip(
        untouched,
        (
            ["--tasks", "mmlu", "--subjects", "anatomy,management", "--limit", "1"],
            ["--tasks", "winogrande", "--limit", "4"],
        ),
        strict=True,
    ):
        out = tmp_path / "scores.json"
        assert cli.main(["judge", str(exported), *common, *options, "--out", str(out)]) == 0
        [model] = json.loads(out.read_text())["models"]
        # Accuracy, its error, every subject, and the digest of all log-likelihoods.
        assert model["scores"] == [json.loads(json.dumps(before.to_json()))]


def test_few_questions_are_told_apart_by_their_log_likelihoods(
    original: JudgedModel, exported: Path, untouched: tuple[Score, Score]
) -> None:
    """The equality above means something: one weight changed in one layer is another digest."""
    weight = original.model.model.layers[20].mlp.down_proj.weight
    with torch.no_grad():
        weight[0] *= 1.01
        found = score(original, "winogrande", WINOGRANDE)
        weight[0] /= 1.01
    assert found.notes["answers"] != untouched[1].notes["answers"]


def test_scores_say_how_they_were_made(untouched: tuple[Score, Score]) -> None:
    mmlu, winogrande = untouched
    assert (mmlu.n, mmlu.shots, mmlu.metric) == (2, 5, "acc")
    assert sorted(part.task for group in mmlu.parts for part in group.parts) == ["mmlu_anatomy", "mmlu_management"]
    assert (winogrande.n, winogrande.shots) == (4, 5)
    assert winogrande.notes["examples"] == "train_l.jsonl"
