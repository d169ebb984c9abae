"""Rules about what is measured of boundaries (`evaluation.boundaries`)."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.schema import Config
from workers.domains.planning import SplitRows
from workers.models.base import Finding
from workers.specs.tasks import LEAST_MEASURED


def problems(config: Config) -> Iterator[Finding]:
    """Check that the data have boundaries of which the measures mean something."""
    if config.evaluation.boundaries is None:
        return
    refusal = config.domain.measured(config.data)
    if refusal is not None:
        yield ("evaluation", "boundaries"), f"{refusal}; allowed here: null"


def row_problems(config: Config, rows: SplitRows) -> Iterator[Finding]:
    """Check that there are samples enough."""
    if config.evaluation.boundaries is not None and 0 < rows.train < LEAST_MEASURED:
        yield (
            ("evaluation", "boundaries"),
            f"{rows.train} training samples are too few to measure with; at least {LEAST_MEASURED}; allowed here: null",
        )
