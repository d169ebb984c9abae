"""What fits a named accelerator: the whole question as a user asks it, for an 8B model without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.devices import DEVICES, device_called, device_of_accelerator, usable
from orchestrator.config.load import read_document
from orchestrator.runs.fit import DeviceFit, fit_of
from orchestrator.runs.prepare import prepare, prepare_document

ROOT = Path(__file__).parents[4]
CONFIG = ROOT / "configs" / "llama_segprop.yaml"
WITHOUT_WEIGHTS = [f"model.path={ROOT / 'tests' / 'data' / 'llama-3.1-8b'}", "data.name=stdlib"]


def fit_on(name: str, *overrides: str) -> DeviceFit:
    device = device_called(name)
    document = read_document(CONFIG, [*WITHOUT_WEIGHTS, *overrides])
    return fit_of(prepare_document(document, device=device), device)


def test_a_stage_that_fits_is_left_alone_and_one_that_does_not_gets_settings_that_make_it_fit() -> None:
    found = fit_on("l4")
    first, *others = found.stages
    assert not first.fits
    assert all(stage.fits and stage.change is None for stage in others)
    assert first.change is not None
    assert first.change.keys() == {"micro_batch", "memory.optimizer"}, "all 5.4 B parameters stay trained in full"
    assert first.changed_host_bytes is not None
    # Two moments, copies of the weights and their gradients, two bytes each.
    assert 8 * 5.4e9 < first.changed_host_bytes < 8.2 * 5.4e9
    # The command it prints is one that fits.
    changed = prepare(CONFIG, [*WITHOUT_WEIGHTS, "resources.device=cuda", *found.overrides])
    for node in changed.plan.regimes["segprop"].stages:
        assert changed.plan.node(node).estimate.peak_bytes <= found.usable_bytes


def test_a_base_is_cut_into_pieces_before_it_is_trained_in_less_than_full() -> None:
    found = fit_on("rtx4070ti")
    assert not any(stage.fits for stage in found.stages)
    assert found.change["segprop"] == {
        "micro_batch": 4,
        "memory.frozen": "host",
        "memory.optimizer": "host",
        "split.base_segment_size": 9,
    }
    # A stage behind the base is asked for itself.
    assert found.stages[-1].change == {"micro_batch": 4}
    changed = prepare_document(read_document(CONFIG, [*WITHOUT_WEIGHTS, *found.overrides]), device=DEVICES["rtx4070ti"])
    stages = [changed.plan.node(node).estimate.peak_bytes for node in changed.plan.regimes["segprop"].stages]
    assert len(stages) == len(found.stages) + 1
    assert max(stages) <= found.usable_bytes
    # The next larger piece is too large.
    larger = [*found.overrides[:-1], "regimes.segprop.split.base_segment_size=18"]
    changed = prepare_document(read_document(CONFIG, [*WITHOUT_WEIGHTS, *larger]), device=DEVICES["rtx4070ti"])
    assert changed.plan.node(changed.plan.regimes["segprop"].stages[0]).estimate.peak_bytes > found.usable_bytes


def test_what_does_not_go_together_is_not_proposed() -> None:
    # One program of a whole path has no blocks to bring.
    asked = ["training.compile=true", "training.activation_checkpointing=false", "split.base=28"]
    for stage in fit_on("rtx4070ti", *asked).stages:
        assert not stage.fits
        assert "memory.frozen" not in (stage.change or {})


def test_smaller_micro_batches_come_before_anything_that_changes_what_is_learned() -> None:
    found = fit_on("a100-80", "training.activation_checkpointing=false")
    change = found.stages[0].change
    assert change is not None
    assert change.keys() <= {"micro_batch", "activation_checkpointing"}
    assert all(override.startswith("regimes.segprop.stages.stage1-base.") for override in found.overrides[:1])


def test_an_80_gb_card_holds_the_shipped_run_as_it_is() -> None:
    found = fit_on("h100")
    assert all(stage.fits for stage in found.stages)
    assert not found.overrides
    # A checkpoint is written out of the stage's own tensors; three of them may lie on the disk: weights and two
    # moments.
    assert found.stages[0].host_bytes < 1e9
    assert found.stages[0].disk_bytes > 3 * 6 * 5.4e9


LLAMA_70B = f"model.path={ROOT / 'tests' / 'data' / 'llama-3.1-70b'}"
ONE_CARD = ["resources.gang.size=null", "memory.optimizer=host", "memory.frozen=host", "training.micro_batch=4"]


@pytest.mark.parametrize(
    ("config", "card", "overrides", "as_trained"),
    [
        ("llama_segprop_24gb", "l4", (), "llama_segprop"),
        ("llama_segprop_12gb", "rtx4070ti", (), "llama_segprop"),
        (
            "mistral_nemo_segprop_24gb",
            "l4",
            (f"model.path={ROOT / 'tests' / 'data' / 'mistral-nemo-12b'}",),
            "mistral_nemo_segprop",
        ),
        ("llama70b_segprop", "a100-80", (LLAMA_70B, *ONE_CARD), None),
        ("llama70b_segprop", "l4", (LLAMA_70B, *ONE_CARD, "split.base_segment_size=1"), None),
    ],
)
def test_a_small_card_holds_the_configuration_made_for_it(
    config: str, card: str, overrides: tuple[str, ...], as_trained: str | None
) -> None:
    device = device_called(card)
    document = read_document(ROOT / "configs" / f"{config}.yaml", [*WITHOUT_WEIGHTS, *overrides])
    prepared = prepare_document(document, device=device)
    plan = prepared.plan
    stages = [plan.node(node) for node in plan.regimes["segprop"].stages]
    assert all(stage.estimate.peak_bytes <= device.usable_bytes for stage in stages)
    others = [node.estimate.peak_bytes for node in plan.nodes if node.kind in ("evaluate", "materialize")]
    assert max(others) < device.usable_bytes / 2
    if as_trained is not None:
        # What it trains is what the configuration for 80 GB trains.
        large = prepare(ROOT / "configs" / f"{as_trained}.yaml", [*WITHOUT_WEIGHTS, *overrides]).plan
        trained = {key for node in large.nodes for key in node.task.get("trained", ())}
        assert {key for node in plan.nodes for key in node.task.get("trained", ())} == trained


def test_scoring_that_does_not_fit_is_said_with_what_mends_it() -> None:
    asked = ["training.micro_batch=4", "memory.optimizer=host", "split.base_segment_size=3", "--device", "rtx4070ti"]
    shown = CliRunner().invoke(app, ["plan", str(CONFIG), *WITHOUT_WEIGHTS, *asked]).output
    assert "Scoring and making snapshots takes at most 18.0 GB of the device as it is; with memory.frozen=host" in shown


def test_faster_devices_take_less_time() -> None:
    slow, fast = fit_on("l4").stages, fit_on("h100").stages
    assert all(there.seconds < here.seconds for here, there in zip(slow, fast, strict=True))


def test_the_command_line_says_it_for_people_and_as_json() -> None:
    runner = CliRunner()
    asked = ["plan", str(CONFIG), *WITHOUT_WEIGHTS, "--device", "L4"]
    shown = runner.invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "segprop run" in shown.output
    assert "stages.stage1-base.memory.optimizer=host" in shown.output
    assert "43.5 GB" in shown.output, "host memory that it takes then"
    data = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    assert data["device"]["usable_bytes"] == DEVICES["l4"].usable_bytes
    assert data["device"]["overrides"]
    assert [stage["fits"] for stage in data["device"]["stages"]] == [False, *[True] * 12]


def test_a_device_that_is_not_known_is_bad_input_with_the_nearest_name() -> None:
    with pytest.raises(Exception, match="did you mean 'rtx4090'"):
        device_called("rtx-4090")


def test_every_row_leaves_room_for_the_context_and_names_of_ray_are_unique() -> None:
    names = [name for device in DEVICES.values() for name in device.accelerators]
    assert len(names) == len(set(names))
    for device in DEVICES.values():
        assert 0.8 * device.memory_bytes < device.usable_bytes < device.memory_bytes - 2**30
        assert device.bf16_tflops > device.fp32_tflops
    assert device_of_accelerator("L4") is DEVICES["l4"]
    assert device_of_accelerator(None) is None
    assert usable(0) == 0
