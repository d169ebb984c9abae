"""What ZeRO-3 asks of a stage before any rank meets another."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from cache_store.errors import ConfigError
from workers.distributed.zero3 import by_part, deepspeed_for


def test_a_machine_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"zero3: needs DeepSpeed on every machine: .*segprop\[deepspeed\]"):
        deepspeed_for(torch.device("cpu"))


def test_every_part_has_a_group_of_its_own_so_that_steps_are_counted_by_part() -> None:
    names = ["layer0/a", "layer0/b", "head/norm"]
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 2, 3)]
    assert [[len(parameter) for parameter in members] for members in by_part(names, parameters)] == [[1, 2], [3]]
