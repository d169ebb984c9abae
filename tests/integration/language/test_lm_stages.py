"""What one stage of a language model changes, holds, reads and commits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_running import LLAMA, lm_changes
from running import DEVICE, Lab, copied, digests
from safetensors.torch import load_file

from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.data.text.source import TextSource
from workers.domains.registry import domain_of
from workers.models.causal_lm.network.lora import merged_state
from workers.models.chain import ModulePath as ChainPath
from workers.models.chain import State
from workers.specs import as_json
from workers.specs.data_results import TextDataResult
from workers.specs.tasks import StageTask
from workers.tasks import train
from workers.training.trainer import StageTrainer
from workers.weights import Weights

LORA = {"lora": {"rank": 2, "alpha": 8.0}}
BLOCKS = ["embed", "layer0", "layer1", "layer2", "layer3", "layer4", "head"]

#: Every kind of stage there is for decoders.
REGIMES: dict[str, Any] = {
    "e2e": {},
    "lw": {},
    "segprop": {},
    "frozen": {"kind": "segprop", "split": {"intermediate": "frozen"}},
    "bare": {"kind": "segprop", "split": {"base": 0, "head": 0, "segment_size": 2}},
    "ready": {"kind": "segprop", "split": {"train_base": False, "intermediate": "frozen", "base": 3}},
    "never": {"kind": "segprop", "split": {"base": 3}, "snapshots": {"mode": "never"}},
    "fixed": {"kind": "segprop", "split": {"base": 3, "embedding": "frozen"}, "training": {"lm_head": "frozen"}},
    "without": {"kind": "segprop", "split": {"base": 2, "omit": [1, 3]}},
    "lora": {"kind": "segprop", "split": {"base": 3, "intermediate": "frozen"}, "training": LORA},
    "lora-head": {"kind": "segprop", "split": {"base": 4}, "training": {**LORA, "lm_head": "lora"}},
    "lora-all": {"kind": "e2e", "training": LORA},
}

STAGES = {
    "e2e": [("embed layer0 layer1 layer2 layer3 layer4 head", "embed layer0 layer1 layer2 layer3 layer4 head")],
    "lw": [
        ("embed layer0 aux", "embed layer0"),
        *((f"layer{index} aux", f"layer{index}") for index in (1, 2, 3, 4)),
        ("head", "head"),
    ],
    "segprop": [
        ("embed layer0 layer4 head", "embed layer0 layer4 head"),
        *((f"layer{index} layer4 head", f"layer{index} layer4 head") for index in (1, 2, 3)),
    ],
    "frozen": [
        ("embed layer0 layer1 layer2 layer3 layer4 head", "embed layer0 layer4 head"),
        ("layer1 layer2 layer3 layer4 head", "layer1 layer4 head"),
        ("layer2 layer3 layer4 head", "layer2 layer4 head"),
        ("layer3 layer4 head", "layer3 layer4 head"),
    ],
    "bare": [
        ("embed head", "embed head"),
        ("layer0 layer1 head", "layer0 layer1 head"),
        ("layer2 layer3 head", "layer2 layer3 head"),
        ("layer4 head", "layer4 head"),
    ],
    "ready": [("layer3 layer4 head", "layer4 head"), ("layer3 layer4 head", "layer3 layer4 head")],
    "never": [
        ("embed layer0 layer1 layer2 layer4 head", "embed layer0 layer1 layer2 layer4 head"),
        ("layer3 layer4 head", "layer3 layer4 head"),
    ],
    "fixed": [
        ("embed layer0 layer1 layer2 layer4 head", "layer0 layer1 layer2 layer4 head"),
        ("layer3 layer4 head", "layer3 layer4 head"),
    ],
    "without": [("embed layer0 layer2 layer4 head", "embed layer0 layer2 layer4 head")],
    "lora": [
        ("embed layer0 layer1 layer2 layer3 layer4 head", "embed layer0 layer1 layer2 layer4 head"),
        ("layer3 layer4 head", "layer3 layer4 head"),
    ],
    "lora-head": [("embed layer0 layer1 layer2 layer3 layer4 head", "embed layer0 layer1 layer2 layer3 layer4 head")],
    "lora-all": [("embed layer0 layer1 layer2 layer3 layer4 head", "embed layer0 layer1 layer2 layer3 layer4 head")],
}


@dataclass
class Seen:
    """A stage that ran: the states of every part it held, before and after, and what it computed in the end."""

    task: StageTask
    before: dict[str, State]
    after: dict[str, State]
    trainable: set[str]
    merged: dict[str, State]
    commit: Commit


@dataclass
class Story:
    lab: Lab
    stages: dict[str, Seen]

    def of(self, regime: str) -> list[Seen]:
        nodes = self.lab.prepared.plan.regimes[regime].stages
        return [self.stages[node] for node in nodes]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("stages")
    changes = {
        **lm_changes(folder),
        "regimes": REGIMES,
        "model.config": {**LLAMA, "num_hidden_layers": 5},
        # Samples of different lengths: padded in batches, not in snapshots.
        "data.pack": False,
        "data.train_limit": 24,
        "training.micro_batch": 4,
        "snapshots.retention": "keep",
    }
    lab = Lab.make(folder, changes)
    found: dict[str, Seen] = {}

    def states(stage: StageTrainer) -> dict[str, State]:
        parts = {name: copied(part) for name, part in stage.path.module.parts.items()}
        if stage.inputs.prefix is not None:
            parts |= {f"prefix {name}": copied(part) for name, part in stage.inputs.prefix.parts.items()}
        return parts

    class Watched(StageTrainer):
        def run(self) -> Commit:
            before = states(self)
            commit = super().run()
            assert commit is not None
            merged = {name: merged_state(part) for name, part in self.path.module.parts.items()}
            names = {name for name, _ in self.path.module.trained_parameters()}
            found[commit.node] = Seen(self.task, before, states(self), names, merged, commit)
            return commit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "StageTrainer", Watched)
        lab.run_all(("data", "model", "train", "materialize"))
    return Story(lab, found)


def test_regimes_have_the_stages_of_the_design(story: Story) -> None:
    for name, expected in STAGES.items():
        made = [(" ".join(seen.task.path), " ".join(seen.task.trained)) for seen in story.of(name)]
        assert made == expected, name


def test_a_stage_changes_its_named_parameters_and_nothing_else(story: Story) -> None:
    kinds: Counter[str] = Counter()
    for name in REGIMES:
        for seen in story.of(name):
            for part, before in seen.before.items():
                after = seen.after[part]
                moved = {f"{part}/{key}" for key in before if not torch.equal(before[key], after[key])}
                wanted = {key for key in seen.trainable if key.startswith(f"{part}/")}
                assert moved == wanted, f"{name}, {seen.task.name}: {part}"
                kinds["prefix" if part.startswith("prefix") else "trained" if moved else "still"] += 1
    assert min(kinds[kind] for kind in ("prefix", "trained", "still")) > 0


def test_whole_parts_are_trained_except_where_the_configuration_says_less(story: Story) -> None:
    for name in REGIMES:
        lora = name.startswith("lora")
        for seen in story.of(name):
            for part, state in seen.before.items():
                trained = part in seen.task.trained or part == "aux"
                names = {f"{part}/{key}" for key in state if not lora or ".lora_" in key} if trained else set()
                if name == "fixed" and part == "head":
                    names -= {"head/lm_head.weight"}
                if name in ("lora", "lora-all") and part == "head":
                    assert not any(".lora_" in key for key in state), "the LM head has no adapter"
                assert {key for key in seen.trainable if key.startswith(f"{part}/")} == names, (name, part)
    adapted = {key.rpartition(".lora_")[0] for key in story.of("lora-all")[0].trainable}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {key.rpartition(".")[2] for key in adapted} == set(projections)
    assert any("lm_head" in key for key in story.of("lora-head")[0].trainable)


def test_a_stage_commits_what_it_trained_under_the_checkpoints_names_and_no_local_head(story: Story) -> None:
    names = {part: set(load_file(path)) for part, path in _files(story.lab, "model").items()}
    for name in REGIMES:
        for seen in story.of(name):
            assert tuple(seen.commit.result["parts"]) == seen.task.trained
            adapters = {f"{part}.lora.safetensors" for part in seen.commit.result.get("adapters", ())}
            assert bool(adapters) == (seen.task.train.lora is not None), "those of LoRA are kept for PEFT"
            assert set(seen.commit.files) == {f"{part}.safetensors" for part in seen.task.trained} | adapters
            for part in seen.task.trained:
                assert set(load_file(_committed(story.lab, seen.commit, part))) == names[part], (name, part)


def test_low_rank_adapters_are_committed_as_the_matrices_they_amount_to(story: Story) -> None:
    (seen,) = story.of("lora-head")
    checked = 0
    for part in seen.task.trained:
        committed = load_file(_committed(story.lab, seen.commit, part))
        after, before = seen.after[part], seen.before[part]
        for key in (key for key in after if ".lora_A." in key):
            base = key.replace("lora_A.default", "base_layer")
            delta = 4.0 * after[key.replace("lora_A", "lora_B")] @ after[key]  # alpha / rank
            plain = base.replace(".base_layer", "")
            assert float(delta.abs().max()) > 1e-4, plain
            torch.testing.assert_close(committed[plain], before[base] + delta, rtol=0, atol=1e-6)
            checked += 1
        for key in (key for key in after if ".lora_" not in key and ".base_layer." not in key):
            assert torch.equal(committed[key], before[key]), f"{key} has no adapter and stays"
    assert checked == 5 * 7 + 1


def test_a_chain_with_adapters_scores_as_its_committed_weights_do(story: Story) -> None:
    """The validation of a stage runs through the adapters, the evaluation through what was committed."""
    for name in ("lora-all", "lora-head", "e2e"):
        (seen,) = story.of(name)
        own = seen.commit.result["epochs"][-1]["validation_loss"]
        plan = story.lab.prepared.plan
        final = story.lab.run(plan.node(plan.regimes[name].validation).label).result["metrics"]
        assert final["loss"] == pytest.approx(own, rel=1e-5)


def test_parts_nobody_trained_are_in_the_final_chain_as_they_were_imported(story: Story) -> None:
    model = story.lab.commit("model")
    untouched = {"without": {"layer1", "layer3"}, "ready": {"embed", "layer0", "layer1", "layer2"}, "fixed": {"embed"}}
    # Adapters are in decoder layers: embedding and head are committed, and are what they were.
    same = {**untouched, "lora": {"embed", "head"}, "lora-all": {"embed", "head"}, "lora-head": {"embed"}}
    for name in REGIMES:
        weights = story.lab.prepared.plan.regimes[name].weights
        assert list(weights) == BLOCKS
        assert {part for part, node in weights.items() if node == model.node} == untouched.get(name, set()), name
        kept = {part for part, digest in _final(story.lab, name).items() if digest == digests(model)[part]}
        assert kept == same.get(name, set()), name
    frozen_head = load_file(_committed(story.lab, story.of("fixed")[-1].commit, "head"))
    first = load_file(_files(story.lab, "model")["head"])
    assert torch.equal(frozen_head["lm_head.weight"], first["lm_head.weight"])
    assert not torch.equal(frozen_head["model.norm.weight"], first["model.norm.weight"])


def test_a_stage_with_snapshots_holds_its_own_parts_only(story: Story) -> None:
    for name, holds in (("segprop", 2), ("frozen", 4), ("ready", 2), ("lw", 1)):
        seen = story.of(name)[1]
        assert list(seen.before) == list(seen.task.path)
        assert "embed" not in seen.before
        assert len([part for part in seen.before if part.startswith("layer")]) == holds, name
        held = sum(tensor.nbytes for state in seen.before.values() for tensor in state.values())
        assert seen.commit.result["resident_bytes"] == held
    assert set(story.of("never")[1].before) >= {"prefix embed", "prefix layer0", "prefix layer1", "prefix layer2"}


# -- snapshots --------------------------------------------------------------------------------------------------


def test_snapshots_hold_a_row_a_token_and_no_padding(story: Story) -> None:
    sources = {split: _source(story.lab, split) for split in ("train", "validation")}
    assert len(set(np.diff(sources["train"].offsets).tolist())) > 5, "samples differ in length"
    for node in story.lab.prepared.plan.sets:
        commit = story.lab.nodes.commit_of(node.id)
        assert commit is not None
        source = sources[node.task["split"]]
        assert commit.result["bytes"] == source.tokens * LLAMA["hidden_size"] * 4, node.label
        assert commit.result["rows"] == source.rows
        files = list((Path(story.lab.store) / "sets" / commit.result["set"] / "shards").rglob("*"))
        stored = sum(file.stat().st_size for file in files if file.is_file())
        assert stored < commit.result["bytes"] + 2048 * len(files), node.label


def test_each_frozen_block_runs_forward_once_per_sample(story: Story) -> None:
    expected = {
        "e2e": (),
        "lw": BLOCKS[:-1],
        "segprop": BLOCKS[:4],
        "frozen": BLOCKS[:4],
        "bare": BLOCKS[:5],
        "ready": BLOCKS[:4],
        "without": (),
        "lora": BLOCKS[:4],
    }
    rows = sum(_source(story.lab, split).rows for split in ("train", "validation"))
    for name, blocks in expected.items():
        forwards: Counter[str] = Counter()
        for node in story.lab.prepared.plan.nodes:
            if name in node.regimes and node.kind in ("train", "materialize"):
                commit = story.lab.nodes.commit_of(node.id)
                assert commit is not None
                forwards.update(commit.result["forwards"])
        # Looking tokens up costs nothing: what the embedding gives is not worth storing.
        twice = {"embed": 2 * rows} if name == "bare" else {}
        assert forwards == {**dict.fromkeys(blocks, rows), **twice}, name


def test_a_snapshot_is_what_the_frozen_prefix_gives_for_the_sample_alone(story: Story) -> None:
    """Read back sample by sample, unpadded, against the prefix run on that sample in a batch of one."""
    task = story.of("segprop")[2].task
    assert task.boundary is not None
    parents = _parents(story.lab, story.of("segprop")[2].commit.node)
    source = _source(story.lab, "train")
    domain = domain_of(task.experiment)
    weights = Weights(story.lab.nodes, parents, domain, DEVICE)
    prefix = ChainPath({name: weights.build(name) for hop in task.boundary.hops for name in hop}, trained=())
    stored = story.lab.snapshots("segprop/snapshot layer1 train view 0")
    rows = np.concatenate([stored.shard(shard)[0] for shard in range(stored.spec.shards)])
    assert stored.spec.shards > 2
    for sample in range(0, source.rows, 5):
        inputs = domain.rows(source, np.array([sample]))
        batch = domain.batch(inputs, domain.load(source, inputs, 0), stored=False, device=DEVICE, precision="fp32")
        with torch.no_grad():
            (hidden,) = prefix(batch.boundary, batch.context)
        got = torch.from_numpy(rows[source.offsets[sample] : source.offsets[sample + 1]].copy())
        torch.testing.assert_close(got, hidden[0].cpu(), rtol=1e-5, atol=1e-5)


def _source(lab: Lab, split: str) -> TextSource:
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    return TextSource(task.experiment, lab.commit("data").read(TextDataResult), SnapshotStore(lab.storage), split)


def _parents(lab: Lab, node: str) -> dict[str, Any]:
    return {role: lab.nodes.commit_of(parent) for role, parent in lab.prepared.plan.node(node).parents.items()}


def _committed(lab: Lab, commit: Commit, part: str) -> Path:
    return Path(lab.store) / str(commit.files[f"{part}.safetensors"].path)


def _files(lab: Lab, label: str) -> dict[str, Path]:
    commit = lab.commit(label)
    return {part: _committed(lab, commit, part) for part in commit.result["parts"]}


def _final(lab: Lab, regime: str) -> dict[str, str]:
    found = {}
    for part, node in lab.prepared.plan.regimes[regime].weights.items():
        commit = lab.nodes.commit_of(node)
        assert commit is not None
        found[part] = digests(commit)[part]
    return found


# -- ways to the same weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_the_prefix_trains_as_reading_it_does(tmp_path: Path, master: str, precision: str) -> None:
    changes = {
        **lm_changes(tmp_path),
        "model.master": master,
        "training.precision": precision,
        "regimes": {
            "stored": {"kind": "segprop", "snapshots": {"mode": "always"}},
            "never": {"kind": "segprop", "snapshots": {"mode": "never"}},
        },
    }
    lab = Lab.make(tmp_path, changes)
    assert lab.node("stored/stage2-layer1").task["source"] == "snapshots"
    assert lab.node("never/stage2-layer1").task["source"] == "recompute"
    stored, never = (lab.run(f"{name}/stage2-layer1").result["epochs"][-1] for name in ("stored", "never"))
    exact = (master, precision) == ("float32", "fp32")  # else snapshots, or sums, are rounded to bfloat16
    assert never["train_loss"] == pytest.approx(stored["train_loss"], rel=1e-5 if exact else 1e-2)


def test_pruned_layers_are_gone_and_the_rest_keeps_its_weights(tmp_path: Path) -> None:
    from lm_running import imported, write_checkpoint

    path = write_checkpoint(tmp_path / "model", num_hidden_layers=4)
    lab = Lab.make(
        tmp_path, {**lm_changes(tmp_path), "model": {"family": "causal_lm", "path": str(path), "prune": [1, 2]}}
    )
    lab.run("segprop/stage1-base")
    whole, kept = load_file(path / "model.safetensors"), imported(lab)
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"0", "1"}
    for name, tensor in kept.items():
        assert torch.equal(tensor, whole[name.replace("layers.1.", "layers.3.")]), name


def test_new_adapters_begin_without_the_moments_of_merged_ones(tmp_path: Path) -> None:
    changes = {
        **lm_changes(tmp_path),
        "regimes": {"segprop": {"kind": "segprop", "split": {"base": 1, "head": 1, "intermediate": "frozen"}}},
        "training.lora": {"rank": 2},
        "training.lm_head": "lora",
    }
    carry, reset = (Lab.make(tmp_path, {**changes, "training.head_optimizer": how}) for how in ("carry", "reset"))
    first, second, *_ = [node.label for node in carry.prepared.plan.nodes if node.kind == "train"]
    assert carry.node(second).parents["optimizer"] == carry.node(first).id
    shared = set(carry.node(second).task["trained"]) & set(carry.node(first).task["trained"])
    assert "head" in shared
    for label in (first, second):
        weights = [lab.run(label) and lab.weights(label) for lab in (carry, reset)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    saved = load_file(Path(carry.store) / carry.commit(first).files["optimizer.safetensors"].path)
    assert saved == {}


def test_a_model_with_two_rotary_tables_trains_and_scores_alike_in_every_batch(tmp_path: Path) -> None:
    """Phi-3's longrope takes one table or the other by the longest sample of a batch; here by the data set."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 24,
    }
    phi3 = {"model_type": "phi3", "rope_parameters": rope, "original_max_position_embeddings": 24, "pad_token_id": 0}
    changes = {
        **lm_changes(tmp_path),
        "data.pack": False,
        "model": {"family": "causal_lm", "tokenizer": "bytes", "config": {**LLAMA, **phi3}},
        "training.batch_size": 8,
        "regimes": ["e2e"],
    }
    epochs = []
    for batch in (1, 8):
        sizes = {"training.micro_batch": batch, "evaluation.batch_size": batch}
        lab = Lab.make(tmp_path / str(batch), {**changes, **sizes})
        epochs.append(lab.run("e2e/e2e").result["epochs"][-1])
    for figure in ("train_loss", "validation_loss"):
        assert epochs[0][figure] == pytest.approx(epochs[1][figure], rel=1e-5), figure
