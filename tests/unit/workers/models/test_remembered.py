"""What a model is is looked at once: plans of the same model load neither torch nor transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lm_running import write_checkpoint
from safetensors.torch import load_file, save_file

from cache_store.errors import ConfigError
from workers import file_digests
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.outline import LMOutline
from workers.models.causal_lm.remembered import remembered_outline
from workers.specs.language import CausalLMSpec

ROOT = Path(__file__).parents[4]
PLAN = """
import sys
from pathlib import Path
from orchestrator.runs.prepare import prepare
prepared = prepare(Path("configs/lm_quickstart.yaml"), [])
print(sorted({"torch", "transformers"} & set(sys.modules)), ",".join(node.id for node in prepared.plan.nodes))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of its own, in which young files too are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "_SETTLED_NS", -1)
    return tmp_path / "cache" / "segprop" / "models"


class Looks:
    """Looks at models, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, spec: CausalLMSpec) -> LMOutline:
        self.count += 1
        return inspect(spec)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_checkpoint(tmp_path / "model"))


def spec_of(folder: Path) -> CausalLMSpec:
    return CausalLMSpec(family="causal_lm", path=str(folder))


def test_the_second_plan_of_a_model_is_the_first_one_without_torch_and_transformers() -> None:
    asked = [sys.executable, "-c", PLAN]
    first, second = (
        subprocess.run(asked, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True, check=True) for _ in range(2)
    )
    loaded, _, nodes = first.stdout.partition("] ")
    assert loaded == "['torch', 'transformers'"
    assert second.stdout == f"[] {nodes}"


def test_a_model_that_is_not_there_is_told_without_torch_and_transformers() -> None:
    code = """
import sys
from orchestrator import cli
code = cli.main(["plan", "configs/llama_segprop.yaml", "model.path=nowhere/at/all"])
print(code, sorted({"torch", "transformers"} & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert "nowhere/at/all" in told.stderr
    assert told.stdout == "2 []\n"


def test_an_answer_from_the_record_is_the_answer(folder: Path) -> None:
    looks = Looks()
    found = [remembered_outline(spec_of(folder), looks) for _ in range(3)]
    assert looks.count == 1
    assert found[0] == found[1] == found[2] == inspect(spec_of(folder))


def test_every_file_that_is_looked_at_decides(folder: Path) -> None:
    looks = Looks()
    remembered_outline(spec_of(folder), looks)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    assert remembered_outline(spec_of(folder), looks).positions == 64

    before = remembered_outline(spec_of(folder), looks).weights_digest
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    assert remembered_outline(spec_of(folder), looks).weights_digest != before

    (folder / "generation_config.json").write_text('{"max_length": 7}')
    remembered_outline(spec_of(folder), looks)
    assert looks.count == 4


def test_a_setting_of_the_model_decides(folder: Path) -> None:
    looks = Looks()
    remembered_outline(spec_of(folder), looks)
    pruned = remembered_outline(replace(spec_of(folder), prune=(0,)), looks)
    assert looks.count == 2
    assert pruned.layers == inspect(spec_of(folder)).layers - 1


def test_a_damaged_record_costs_another_look(folder: Path, cache: Path) -> None:
    looks = Looks()
    whole = remembered_outline(spec_of(folder), looks)
    (record,) = cache.iterdir()
    for damage in (b"", b"{}", record.read_bytes()[:-9], record.read_bytes().replace(b'"layers":', b'"lawyers":')):
        record.write_bytes(damage)
        assert remembered_outline(spec_of(folder), looks) == whole
    assert looks.count == 5


def test_what_was_wrong_is_looked_at_again(folder: Path) -> None:
    looks = Looks()
    shutil.move(folder / "config.json", folder / "elsewhere.json")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no config\.json"):
            remembered_outline(spec_of(folder), looks)
    shutil.move(folder / "elsewhere.json", folder / "config.json")
    remembered_outline(spec_of(folder), looks)
    assert looks.count == 3


def test_models_with_code_of_their_own_are_always_looked_at(folder: Path, cache: Path) -> None:
    looks = Looks()
    for _ in range(2):
        remembered_outline(replace(spec_of(folder), trust_remote_code=True), looks)
    assert looks.count == 2
    assert not cache.exists()
