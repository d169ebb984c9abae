"""Say what every regime may spend on training, in one measure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from orchestrator.config.values import NonBlank, Seconds, Section

#: A number, or the name of a regime.
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)] | NonBlank


class BudgetConfig(Section):
    """What each regime may spend, so that they are compared on equal terms: exactly one of these. `training.epochs`, of
    every stage that has no epochs of its own in `regimes.<name>.stages`, becomes the most that keeps within it. A
    number, or the name of a regime, whose own epochs stay."""

    flops: Amount | None = Field(
        default=None, description="Floating-point operations of the stages and of what makes snapshots, as predicted."
    )
    seconds: Seconds | NonBlank | None = Field(
        default=None,
        description="Predicted time of the same, one after the other, at the speed of `resources.gflops` or the "
        "nominal one of the device.",
    )
    samples: Amount | None = Field(default=None, description="Samples that the stages train on, with repetition.")
    updates: Amount | None = Field(default=None, description="Optimizer steps of all stages.")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            given = [name for name in cls.model_fields if raw.get(name) is not None]
            if len(given) != 1 and set(raw) <= set(cls.model_fields):
                raise ValueError(f"must be exactly one of {', '.join(cls.model_fields)}")
        return raw

    @property
    def measure(self) -> str:
        """The name of what is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def amount(self) -> float | str:
        """How much of it, or the name of a regime."""
        found: float | str = getattr(self, self.measure)
        return found
