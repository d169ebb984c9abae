"""A device that is too small is told by name, with what helps."""

from __future__ import annotations

import pytest
import torch

from cache_store.errors import OutOfDeviceMemory
from workers.control import ThreadControl
from workers.specs.orders import WorkOrder
from workers.tasks import execute

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB. "
    "Including non-PyTorch memory, this process has 78.08 GiB memory in use."
)


def test_running_out_of_device_memory_names_the_stage_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(order: WorkOrder, control: ThreadControl) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(execute, "_execute", fill)
    order = WorkOrder("n", "train", {"name": "stage1-base"}, {}, "unused", "cuda:0", 1)
    with pytest.raises(OutOfDeviceMemory) as found:
        execute.execute(order, ThreadControl())
    text = str(found.value)
    assert text.startswith(
        "stage1-base: out of memory on cuda:0: Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
    )
    assert "training.accumulate" in text
    assert not found.value.retryable
