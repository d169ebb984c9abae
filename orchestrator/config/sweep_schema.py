"""What a `sweep:` section may say. Which values are tried follows from it alone: see `sweep_space`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pair = tuple[float, float]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Draw(_Section):
    """The values of one parameter: exactly one of these. Kinds and meanings are those of Ray Tune."""

    grid: tuple[Any, ...] | None = Field(
        default=None, min_length=1, description="Every value, with every value of the other grids."
    )
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1, description="One of these, drawn evenly.")
    uniform: Pair | None = Field(default=None, description="A number between the two, drawn evenly.")
    loguniform: Pair | None = Field(default=None, description="The same on a logarithmic scale, for rates.")
    randint: tuple[int, int] | None = Field(
        default=None, description="A whole number from the first up to, not including, the second."
    )

    @model_validator(mode="after")
    def _one(self) -> Draw:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be exactly one of {', '.join(type(self).model_fields)}")
        if self.grid is not None and len({json.dumps(value, sort_keys=True) for value in self.grid}) != len(self.grid):
            raise ValueError("grid names a value twice")
        for name in ("uniform", "loguniform", "randint"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name} must go from a smaller to a larger number")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError("loguniform must begin above 0")
        return self

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """What is listed, or the two bounds."""
        found: tuple[Any, ...] = getattr(self, self.kind)
        return found


class SchedulerConfig(_Section):
    """Which trials go on. asha and pbt decide after every stage of the metric's regime, on validation."""

    name: Literal["all", "asha", "pbt"] = Field(
        default="all",
        description="all: every trial runs to its end. asha: those behind are stopped early. pbt: those behind take "
        "over the stages of those ahead and go on with changed settings.",
    )
    grace: int = Field(default=1, ge=1, description="asha: stages before the first trial may be stopped.")
    reduction: float = Field(default=2.0, gt=1, description="asha: one in so many goes on from each rung.")
    interval: int = Field(default=1, ge=1, description="pbt: stages between two exchanges.")
    quantile: float = Field(
        default=0.25, gt=0, le=0.5, description="pbt: share that is replaced by as many of the best."
    )
    resample: float = Field(
        default=0.25, ge=0, le=1, description="pbt: how often a setting is drawn anew, not changed."
    )


class SweepConfig(_Section):
    """Many runs of one configuration: Ray Tune tries values, the store makes equal stages run once."""

    parameters: dict[str, Draw] = Field(
        min_length=1, description="Any configuration key, dotted -> its values: `split.base: {grid: [1, 2]}`."
    )
    samples: int = Field(
        default=1, ge=1, le=100_000, description="Draws of what is drawn, each with every point of the grid."
    )
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    metric: str | None = Field(
        default=None,
        description="What trials are compared by: REGIME.SPLIT.NAME, as segprop.validation.accuracy or "
        "segprop.test.loss, or REGIME.FIGURE, as segprop.seconds. null: validation accuracy (of text: loss) of the "
        "first segprop regime.",
    )
    mode: Literal["max", "min"] | None = Field(
        default=None, description="Whether more is better. null: of accuracies it is, of everything else less is."
    )
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1, le=100_000)] = Field(
        default="auto", description="Trials at one time; auto: as many as there are slots, of pbt all."
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Decides what is drawn; not the trials' own seed.")
