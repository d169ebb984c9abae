"""A checkpoint that brings its own model code: refused by default, and found by every process where it is trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lm_running import LLAMA, lm_changes, write_tokenizer
from running import ROOT, write_config
from safetensors.torch import save_file

from cache_store.errors import ConfigError
from orchestrator.runs.prepare import prepare
from workers.models.causal_lm.pretrained.import_parts import import_parts
from workers.specs.language import CausalLMSpec

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_code"
"""

# A Llama whose MLPs count half: with transformers' own code its logits would be others.
MODELING = """
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from .configuration_own import OwnConfig


class HalfMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 0.5


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = HalfMLP(config)
"""

# In a process of its own: a run, then the code of the export, loaded by transformers alone, beside a plain Llama of
# its weights.
RUN_AND_COMPARE = """
import json, sys, torch
from orchestrator.cli import main
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
config, folder = sys.argv[1:]
code = main(["run", config, "--quiet"])
own = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
config = {key: value for key, value in own.config.to_dict().items() if key not in ("model_type", "auto_map")}
plain = LlamaForCausalLM(LlamaConfig(**config)).eval()
plain.load_state_dict(own.state_dict())
ids = torch.arange(12)[None]
apart = float((own(ids).logits - plain(ids).logits).abs().max())
for layer in plain.model.layers:
    layer.mlp.down_proj.weight.data *= 0.5
equal = torch.allclose(own(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
print(json.dumps([code, type(own).__name__, apart, equal]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with code beside its weights."""
    model = write_tokenizer(tmp_path / "model")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {**LLAMA, "model_type": "own_code", "auto_map": auto_map, "architectures": ["OwnForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    state = {}
    for _, tensors in import_parts(CausalLMSpec(family="causal_lm", config=LLAMA), seed=0):
        state |= tensors
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def changes(folder: Path, **model: object) -> dict[str, object]:
    return {
        **lm_changes(folder),
        "model": {"family": "causal_lm", "path": str(folder / "model"), **model},
        "regimes": ["segprop"],
    }


def test_code_of_a_checkpoint_is_refused_with_the_setting_that_allows_it(folder: Path) -> None:
    (folder / "model" / "modeling_own.py").write_text("raise SystemExit('this must not run')")
    (folder / "model" / "configuration_own.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ConfigError, match=r"own_code.*own code.*model\.trust_remote_code: true"):
        prepare(write_config(folder, changes(folder)))


def test_trusted_code_trains_in_stages_and_goes_along_with_the_export(folder: Path) -> None:
    config = write_config(folder, changes(folder, trust_remote_code=True))
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_COMPARE, str(config), str(folder / "run" / "model" / "segprop")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, kind, apart, equal = json.loads(done.stdout.splitlines()[-1])
    assert (code, kind, equal) == (0, "OwnForCausalLM", True)
    assert apart > 1e-2
    stages = json.loads((folder / "run" / "summary.json").read_text())["regimes"]["segprop"]["stages"]
    assert [stage["name"] for stage in stages] == ["stage1-base", "stage2-layer1"]


# In a process of its own, as transformers keeps code that it has loaded: the ids of a plan's nodes by label.
NODES = """
import json, sys
from orchestrator.runs.prepare import prepare
print(json.dumps({node.label: node.id for node in prepare(sys.argv[1]).plan.nodes}))
"""


def ids(folder: Path, model: Path) -> dict[str, str]:
    config = write_config(folder, changes(folder, path=str(model), trust_remote_code=True))
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NODES, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_another_code_is_another_model_and_a_copy_of_it_the_same(folder: Path, tmp_path: Path) -> None:
    before = ids(folder, folder / "model")
    copy = Path(shutil.copytree(folder / "model", tmp_path / "copy"))
    assert ids(folder, copy) == before
    (copy / "modeling_own.py").write_text(MODELING.replace("0.5", "0.25"))
    after = ids(folder, copy)
    assert after.keys() == before.keys()
    assert [label for label in before if after[label] == before[label]] == ["data"]
