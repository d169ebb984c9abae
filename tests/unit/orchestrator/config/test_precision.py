"""`training.precision: auto`: where it becomes a precision, by what; and precisions that a device only emulates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import SMALL, merged, small_config

from orchestrator.config import precision
from orchestrator.config.load import load
from orchestrator.config.precision import planned_device
from orchestrator.runs.dry_run import print_plan
from orchestrator.runs.prepare import prepare
from workers.specs.capability import Capability, flags_of
from workers.specs.experiment import Precision

NEW, OLD = Capability("cpu", frozenset({"avx512f", "avx512_bf16"})), Capability("cpu", frozenset({"avx2", "avx512f"}))
CONFIGS = Path(__file__).parents[4] / "configs"


@pytest.mark.parametrize(
    ("device", "best", "emulated"),
    [
        (NEW, "bf16", ["fp16"]),
        (Capability("cpu", frozenset({"amx_bf16", "amx_fp16"})), "bf16", []),
        (Capability("cpu", frozenset({"asimd", "bf16", "asimdhp"})), "bf16", []),
        (OLD, "fp32", ["bf16", "fp16"]),
        (Capability("cuda", version=(9, 0)), "bf16", []),
        (Capability("cuda", version=(8, 0)), "bf16", []),
        (Capability("cuda", version=(7, 5)), "fp16", ["bf16"]),
        (Capability("cuda"), "bf16", []),
    ],
)
def test_auto_is_the_precision_that_a_device_has_instructions_for(
    device: Capability, best: str, emulated: list[str]
) -> None:
    every: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    assert device.best == best
    assert [each for each in every if not device.computes(each)] == emulated
    assert [each for each in every if device.warning(each) is not None] == emulated


def test_flags_are_those_of_the_first_core_on_x86_and_arm() -> None:
    assert flags_of("processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n") == {
        "fpu",
        "avx512_bf16",
    }
    assert flags_of("processor\t: 0\nFeatures\t: fp asimd bf16\n") == {"fp", "asimd", "bf16"}
    assert flags_of("") == frozenset()


@pytest.mark.parametrize(
    ("resources", "gpu", "device"),
    [
        ({"device": "cpu"}, (9, 0), OLD),
        ({}, None, OLD),
        ({}, (7, 5), Capability("cuda", version=(7, 5))),
        ({"device": "cuda"}, (9, 0), Capability("cuda", version=(9, 0))),
        ({"device": "cuda"}, None, Capability("cuda")),
        ({"accelerator": "T4"}, None, Capability("cuda", version=(7, 5))),
        ({"accelerator": "H100", "device": "cuda"}, (7, 5), Capability("cuda")),
    ],
)
def test_the_device_is_that_of_the_resources_and_else_this_machines(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], gpu: tuple[int, int] | None, device: Capability
) -> None:
    monkeypatch.setattr(precision, "cpu_capability", lambda: OLD)
    monkeypatch.setattr(precision, "has_gpu", lambda: gpu is not None)
    monkeypatch.setattr(precision, "_oldest_gpu", lambda: gpu)
    assert planned_device(resources) == device


@pytest.mark.parametrize(("device", "best"), [(NEW, "bf16"), (OLD, "fp32")])
def test_auto_is_settled_wherever_a_configuration_may_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Capability, best: str
) -> None:
    monkeypatch.setattr(precision, "cpu_capability", lambda: device)
    config = small_config(
        tmp_path,
        {
            "resources": {"device": "cpu"},
            "training": {"precision": "auto"},
            "regimes": {
                "e2e": {},
                "lw": {"training": {"precision": "fp32"}},
                "segprop": {
                    "training": {"precision": "fp32"},
                    "stages": {"base": {"precision": "auto"}},
                },
            },
        },
    )
    assert config.training.precision == config.regime("e2e").training.precision == best
    assert config.regime("lw").training.precision == "fp32"
    segprop = config.regime("segprop")
    assert [segprop.stage_training(stage).precision for stage in segprop.layout(("seg1", "seg2", "seg3", "seg4"))][
        :2
    ] == [best, "fp32"]
    assert "auto" not in str(config.resolved()["training"]["precision"])


def test_the_dry_run_names_a_precision_that_the_device_emulates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, {"resources": {"device": "cpu"}, "training": {"precision": "bf16"}})))

    def said(device: Capability) -> str:
        monkeypatch.setattr(precision, "cpu_capability", lambda: device)
        stream = io.StringIO()
        print_plan(prepare(path), stream)
        return stream.getvalue()

    assert "Warning: training.precision bf16: this CPU has no instructions for it" in " ".join(said(OLD).split())
    assert "Warning" not in said(NEW)


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.yaml")], ids=lambda path: path.stem)
def test_the_language_configurations_leave_the_precision_to_the_device_and_drop_no_batch(path: Path) -> None:
    text = path.read_text()
    if "causal_lm" not in text:
        return
    assert "precision: auto" in text
    folder = Path(__file__).parents[3] / "data" / ("llama-3.1-70b" if "70b" in path.stem else "llama-3.1-8b")
    config = load(path, [f"model.path={folder}"] if "path:" in text.split("data:")[0] else [])
    assert config.training.drop_last is False
    assert config.training.precision in ("bf16", "fp16", "fp32")


def test_images_drop_the_last_short_batch_and_a_file_may_say_otherwise(tmp_path: Path) -> None:
    assert small_config(tmp_path, {}).training.drop_last is True
    assert small_config(tmp_path, {"training": {"drop_last": False}}).training.drop_last is False
