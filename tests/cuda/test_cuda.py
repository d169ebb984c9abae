"""What only a CUDA device can show: whole runs on it, half precision with a scaler, memory as its allocator counts it,
a step loop that does not wait for it."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import LLAMA, lm_changes
from running import ROOT, Lab, RayHome, StopAfter, digests, summary_of
from safetensors.torch import save

from cache_store.errors import Interrupted, OutOfDeviceMemory
from workers.models.causal_lm.network.linear_loss import linear_cross_entropy
from workers.models.causal_lm.network.link import Link
from workers.training import batches, clocks
from workers.training.checkpoints.live import LiveTensors
from workers.training.optimizer import StageStep

WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
IMAGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, channels_last": {"training.precision": "bf16", "training.channels_last": True},
    "fp16 with its scaler, clipped": {"training.precision": "fp16", "training.clip": 1.0},
}


def lab(folder: Path, kind: str, changes: dict[str, Any]) -> Lab:
    base = lm_changes(folder) if kind == "text" else {}
    return Lab.make(folder, {**base, **changes})


# -- whole runs -----------------------------------------------------------------------------------------------


def test_quickstart_runs_on_the_device_is_killed_and_goes_on(home: RayHome, tmp_path: Path) -> None:
    arguments = [
        str(ROOT / "configs/quickstart.yaml"),
        "--quiet",
        "resources.runner=local",
        "resources.device=cuda",
        "training.epochs=2",
        "training.checkpoint_every_s=1e-6",
    ]
    found = {}
    for name, crash in (("whole", None), ("killed", "stage.step:40")):
        run_dir, output = tmp_path / name, tmp_path / f"{name}.txt"
        more = {} if crash is None else {"SEGPROP_CRASH": f"{crash}:{tmp_path / 'marker'}"}
        code = home.start(*arguments, f"run_dir={run_dir}", output=output, **more).wait(timeout=280)
        if crash is not None:
            assert code == -signal.SIGKILL, output.read_text()[-3000:]
            code = home.start(*arguments, f"run_dir={run_dir}", output=output).wait(timeout=280)
        assert code == 0, output.read_text()[-3000:]
        found[name] = summary_of(run_dir)
        for stage in (stage for regime in found[name]["regimes"].values() for stage in regime["stages"]):
            assert stage["peak_device_bytes"] > 0
    for name, regime in found["whole"]["regimes"].items():
        again = found["killed"]["regimes"][name]
        assert regime["final"]["metrics"]["accuracy"] > 0.5
        assert again["final"]["metrics"] == regime["final"]["metrics"]


# -- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 3, 9])
def test_a_checkpoint_holds_the_moment_it_was_begun_at_whatever_is_asked_of_the_device_after(written: int) -> None:
    device = torch.device("cuda")
    state = {
        "model/wide": torch.randn(3000, 4000, device=device),
        "model/low": torch.randn(999, device=device).bfloat16(),
        "model/conv": torch.randn(64, 64, 3, 3, device=device).to(memory_format=torch.channels_last),
    }
    expected = save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    stream = LiveTensors(state, state.keys(), allowed=1 << 30)
    pieces = stream.pieces()
    begun = [bytes(next(pieces)) for _ in range(written)]
    for tensor in state.values():
        stream.before_update()
        tensor.add_(1.0)
    assert b"".join([*begun, *(bytes(piece) for piece in pieces)]) == expected


# -- the same bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", IMAGES)
def test_a_stopped_stage_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    changes = {**IMAGES[case], "model.dropout": 0.5}
    stage = "segprop/stage2-seg2"
    whole = lab(tmp_path / "whole", "images", changes).run(stage)
    broken = lab(tmp_path / "broken", "images", changes)
    broken.prepare(stage)
    with pytest.raises(Interrupted):
        broken.run(stage, StopAfter(8))
    resumed = broken.run(stage)
    assert resumed.result["resumed"]
    assert digests(resumed) == digests(whole)


# -- no waiting -----------------------------------------------------------------------------------------------


@contextmanager
def no_synchronization() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guarded(function: Callable[..., Any], guard: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    calls = 0

    def inner(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 2:  # handles, optimizer state, the first choice of kernels
            return function(*args, **kwargs)
        with guard():
            return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize("source", ["raw", "stored"])
@pytest.mark.parametrize("case", IMAGES)
def test_nothing_in_a_step_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, source: str
) -> None:
    made = lab(tmp_path, "images", IMAGES[case])
    label = "segprop/stage1-base" if source == "raw" else "segprop/stage2-seg2"
    made.prepare(label)
    inputs = batches.RawInputs if source == "raw" else batches.StoredInputs
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 1e9)
    for owner, name in ((inputs, "finish"), (StageStep, "backward"), (StageStep, "update")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name), no_synchronization))
    assert made.run(label).result["steps"] == 12


@pytest.mark.parametrize("intermediate", ["omit", "frozen"])
def test_nothing_in_a_language_model_s_step_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intermediate: str
) -> None:
    """Loss, gradients and update; the masks are the model's own code, which looks at positions once a batch."""
    changes = {"model.config": WIDE, "split.intermediate": intermediate, "training.precision": "bf16"}
    made = lab(tmp_path, "text", {**changes, "training.epochs": 2})
    label = next(node.label for node in made.prepared.plan.nodes if node.label.startswith("segprop/stage2"))
    made.prepare(label)
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 1e9)
    for name in ("backward", "update"):
        monkeypatch.setattr(StageStep, name, guarded(getattr(StageStep, name), no_synchronization))
    assert made.run(label).result["steps"] == 8


# -- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["e2e/e2e", "segprop/stage1-base", "segprop/stage2-seg2", "segprop/stage4-seg4", "lw/stage2-seg2"]
)
def test_the_predicted_peak_of_images_is_within_15_percent_of_the_allocator_s(tmp_path: Path, label: str) -> None:
    changes = {
        "model": {"name": "resnet50", "stem": "imagenet", "head_convs": 3},
        "data.image_size": 96,
        "data.validation": 32,
        "data.train_limit": 192,
        "data.test_limit": 16,
        "training": {"epochs": 2, "batch_size": 64, "precision": "bf16", "channels_last": True, "commit": "last"},
        "regimes": ["e2e", "lw", "segprop"],
        "snapshots": {},
    }
    made = lab(tmp_path, "images", changes)
    measured = made.run(label).result["peak_device_bytes"]
    assert made.node(label).estimate.peak_bytes == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("label", ["e2e/e2e", "segprop/stage1-base", "segprop/stage2-layer4"])
def test_the_predicted_peak_of_text_is_within_15_percent_of_the_allocator_s(tmp_path: Path, label: str) -> None:
    """Of a size at which cuBLAS's workspaces (32 MiB each on Hopper, from torch's allocator) do not count."""
    from large_language_model import LANGUAGE

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "vocab_size": 16384}
    changes = {
        **LANGUAGE,
        "model": {**LANGUAGE["model"], "config": {**LANGUAGE["model"]["config"], **shape}},
        "training": {**LANGUAGE["training"], "epochs": 2, "precision": "bf16"},
    }
    made = lab(tmp_path, "images", changes)
    measured = made.run(label).result["peak_device_bytes"]
    assert made.node(label).estimate.peak_bytes == pytest.approx(measured, rel=0.15)


# -- beside the device ----------------------------------------------------------------------------------------

STREAMED = {
    "model.config": {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "split": {"base": 1, "head": 1, "intermediate": "frozen"},
    "snapshots.mode": "never",
    "training.precision": "bf16",
    "model.master": "bfloat16",
    "data.sequence_length": 128,
    "training.batch_size": 8,
}


@pytest.mark.parametrize(
    "memory",
    [
        {"frozen": "host"},
        {"activations": "recompute"},
        {"activations": "selective"},
        {"activations": "host"},
        {"activations": "host", "frozen": "host"},
    ],
    ids=str,
)
def test_what_lies_beside_the_device_changes_no_bit_and_frees_its_memory(
    tmp_path: Path, memory: dict[str, Any]
) -> None:
    label, found = "segprop/stage2-layer1", {}
    for name, tiers in (("device", {}), ("beside", memory)):
        made = lab(tmp_path / name, "text", {**copy.deepcopy(STREAMED), "memory": tiers})
        found[name] = made.run(label)
    assert digests(found["beside"]) == digests(found["device"])
    assert found["beside"].result["peak_device_bytes"] < found["device"].result["peak_device_bytes"]


@pytest.mark.parametrize("memory", [{"frozen": "host"}, {"activations": "host"}], ids=str)
def test_copies_beside_the_step_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]
) -> None:
    made = lab(tmp_path, "text", {**copy.deepcopy(STREAMED), "memory": memory, "training.epochs": 2})
    label = "segprop/stage2-layer1"
    made.prepare(label)
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 1e9)
    for name in ("backward", "update"):
        monkeypatch.setattr(StageStep, name, guarded(getattr(StageStep, name), no_synchronization))
    assert made.run(label).result["steps"] == 8


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_compiled_stage_learns_what_a_plain_one_does(tmp_path: Path, kind: str) -> None:
    losses = []
    for compile_ in (False, True):
        made = lab(tmp_path / str(compile_), kind, {"training.compile": compile_, "regimes": ["e2e"]})
        losses.append(made.run("e2e/e2e").result["epochs"][-1]["validation_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_loss_and_its_gradients_equal_those_of_the_whole_logits() -> None:
    """A vocabulary of which a block on the device holds a few dozen rows."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128256, 64, device="cuda", dtype=torch.bfloat16) * 0.1
    targets = torch.randint(128256, (300,), device="cuda")
    found = []
    for whole in (False, True):
        h, w = (tensor.clone().requires_grad_(True) for tensor in (hidden, weight))
        if whole:
            value = torch.nn.functional.cross_entropy(h.float() @ w.float().T, targets)
        else:
            value = linear_cross_entropy(h, w, None, targets, Link(), 0.0)
        value.backward()
        found.append((value.detach(), h.grad.float(), w.grad.float()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-3)


def test_a_device_that_is_too_small_is_told_with_what_helps(tmp_path: Path) -> None:
    made = lab(tmp_path, "images", {"data.image_size": 128, "training.batch_size": 96, "regimes": ["e2e"]})
    made.prepare("e2e/e2e")
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(200e6 / whole)
    try:
        with pytest.raises(OutOfDeviceMemory, match=r"e2e: out of memory on cuda: Tried to allocate .*training\.accum"):
            made.run("e2e/e2e")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
