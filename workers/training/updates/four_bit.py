"""AdamW with moments in 4 bits: torchao's own optimizer in our loop.

torchao computes in float32, packs two codes a byte with a scale for every 128 numbers, and leaves moments of parameters
that have fewer than 4,096 numbers, or no whole number of blocks, as they are. It makes one program of an update by
`torch.compile`; on a CPU that program is run as it is written, so that no C++ compiler is needed and the bits are the
same on every machine. What is checkpointed are codes and scales; the table of codes is a constant of the library.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cache_store.errors import ConfigError
from workers.seeds import derive_seed
from workers.specs.experiment import OptimizerSpec

#: What optimizers keep of a parameter.
StateValue = Tensor | int | float | None
#: Tensors of a packed moment that change, by their names.
PACKED = ("codes", "scale")


def adamw4bit(
    spec: OptimizerSpec, parameters: Sequence[nn.Parameter], seed: Sequence[str | int] = ()
) -> torch.optim.Optimizer:
    """Make torchao's AdamW4bit over these parameters. `seed`: what the draws of stochastic rounding derive from, where
    weights are in bfloat16. ConfigError where a GPU's machine has no C compiler."""
    if any(parameter.device.type == "cuda" for parameter in parameters):
        _check_compiler()
    made: Any = optimizer_class()(
        parameters,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        bf16_stochastic_round=spec.rounding == "stochastic",
    )
    made.seed = tuple(seed)
    optimizer: torch.optim.Optimizer = made
    return optimizer


def _check_compiler() -> None:
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"training.optimizer.name: adamw4bit: torchao's update is compiled on a GPU's machine, which has no C "
            f"compiler ({', '.join(wanted)}); install one (Debian: gcc), or use adamw8bit"
        )


@cache
def optimizer_class() -> Any:
    """Define torchao's AdamW4bit with rates that are plain numbers, and states that go through checkpoints."""
    # An extra without types; its absence is found early.
    torchao: Any = importlib.import_module("torchao.optim")

    class AdamW4bit(torchao.AdamW4bit):  # type: ignore[misc]  # as said above
        seed: tuple[str | int, ...] = ()

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            first = self.param_groups[0]["params"][0]
            plain: Any = torch.compiler.set_stance
            with plain("force_eager") if first.device.type == "cpu" else nullcontext(), self._draws(first):
                return super().step(closure)

        @contextmanager
        def _draws(self, first: nn.Parameter) -> Iterator[None]:
            """Draw the same bits whatever was drawn before: on all ranks, and after a stop."""
            if not self.bf16_stochastic_round:
                yield
                return
            taken = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
            devices = [first.device] if first.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(derive_seed(*self.seed, "rounding", taken))
                yield

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self.state.clear()
            for index, state in state_dict["state"].items():
                self.state[parameters[index]] = self._packed_again(parameters[index], state)

        def _packed_again(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in state.items():
                name, dot, part = key.partition(".")
                if not dot:
                    found[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    continue
                if name not in found:
                    found[name] = self._new_buffer(parameter, name == "exp_avg")
                getattr(found[name], part).copy_(value)
            return found

    return AdamW4bit


def is_packed(value: object) -> bool:
    """Tell whether a state is one of torchao's packed ones."""
    return isinstance(value, Tensor) and type(value) is not Tensor and all(hasattr(value, name) for name in PACKED)


def plain_state(state: Mapping[str, StateValue]) -> dict[str, StateValue]:
    """Name the tensors that a parameter's state is made of: those of packed ones `<key>.<tensor>`."""
    found: dict[str, StateValue] = {}
    for key, value in state.items():
        found |= {f"{key}.{name}": getattr(value, name) for name in PACKED} if is_packed(value) else {key: value}
    return found
