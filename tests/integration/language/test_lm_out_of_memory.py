"""A device that runs out of memory in spite of the plan: once more with half a micro-batch, and said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import lm_changes
from running import Lab, digests

from cache_store.errors import OutOfDeviceMemory
from workers.domains.sums import Sums
from workers.training.batches import MicroBatch
from workers.training.optimizer import StageStep

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB. "
    "Including non-PyTorch memory, this process has 78.08 GiB memory in use."
)
LABEL = "segprop/stage2-layer1"


def lab(folder: Path, changes: dict[str, Any] | None = None) -> Lab:
    return Lab.make(folder, {**lm_changes(folder), "regimes": ["segprop"], **(changes or {})})


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a backward pass of more than so many samples end as torch's allocator ends one, in the third step."""

    def too_small(samples: int) -> None:
        backward = StageStep.backward

        def limited(self: StageStep, micro: MicroBatch, sums: Sums) -> torch.Tensor:
            if micro.step >= 2 and len(micro.batch.boundary[0]) > samples:
                raise torch.OutOfMemoryError(SAID)
            return backward(self, micro, sums)

        monkeypatch.setattr(StageStep, "backward", limited)

    return too_small


def test_a_stage_is_trained_once_more_with_half_a_micro_batch_and_says_so(
    tmp_path: Path, device_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    halves = {"regimes": {"segprop": {"stages": {"segments": {"micro_batch": 4}}}}}
    expected = lab(tmp_path / "half", halves).run(LABEL)
    made = lab(tmp_path / "whole")
    made.prepare(LABEL)
    device_of(4)
    with caplog.at_level(logging.WARNING, logger="segprop.worker"):
        found = made.run(LABEL)
    assert found.node == made.node(LABEL).id
    (warning,) = found.result["warnings"]
    assert warning.startswith("out of memory on cpu with 8 samples at a time, in spite of the plan: trained with 4")
    assert f"stage2-layer1: {warning}" in caplog.messages
    assert found.result["train_spec"]["micro_batch"] == 4
    assert digests(found) == digests(expected)


@pytest.mark.parametrize(("changes", "left"), [({}, 2), ({"training.micro_batch": 1}, 0)])
def test_what_is_too_large_in_halves_too_ends_the_stage(
    tmp_path: Path, device_of: Any, changes: dict[str, Any], left: int
) -> None:
    made = lab(tmp_path, changes)
    made.prepare(LABEL)
    device_of(left)
    with pytest.raises(OutOfDeviceMemory, match=r"^stage2-layer1: out of memory on cpu: Tried to allocate 2\.00 GiB"):
        made.run(LABEL)


def test_batch_normalization_keeps_its_micro_batches(tmp_path: Path, device_of: Any) -> None:
    made = Lab.make(tmp_path)
    made.prepare("segprop/stage2-seg2")
    device_of(8)
    with pytest.raises(OutOfDeviceMemory, match=r"^stage2-seg2: out of memory"):
        made.run("segprop/stage2-seg2")
