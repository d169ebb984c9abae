"""Rules about what is measured of boundaries (`evaluation.boundaries`)."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.schema import Config
from workers.models.base import Finding


def problems(config: Config) -> Iterator[Finding]:
    """Check that the data have boundaries of which the measures mean something."""
    if config.evaluation.boundaries is None:
        return
    refusal = config.domain.measured(config.data)
    if refusal is not None:
        yield ("evaluation", "boundaries"), f"{refusal}; allowed here: null"
