"""Build the stage graph that a configuration asks for.

Pure: configuration, outlines of the chain and of the data set go in, nodes come out (`graph` says what these
are). No torch, no Ray, no clock, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.plan.after_stage import reference_of
from orchestrator.plan.graph import Plan
from orchestrator.plan.node_table import NodeTable
from orchestrator.plan.regime_builder import add_regime
from orchestrator.plan.regime_state import Collected, FilesRead, PlanInputs, Speeds

if TYPE_CHECKING:
    from orchestrator.config.schema import Config
    from workers.domains.planning import AnyOutline
    from workers.models.outline import ChainOutline
    from workers.specs.results import MeasuredCosts


def build_plan(
    config: Config,
    outlines: Mapping[str, ChainOutline],
    data: AnyOutline,
    *,
    found: object | None = None,
    read: FilesRead | None = None,
    speeds: Speeds | None = None,
    figures: Mapping[str, MeasuredCosts] | None = None,
    versions: Mapping[str, Mapping[str, str]] | None = None,
) -> Plan:
    """Build the graph of all regimes. `outlines`: regime name -> its chain. `found`: what the model's family found when
    it looked at the model. `read`: identities of files. `speeds`: of the workers. `figures`: what measure nodes found,
    by node id; a plan without them decides by counting and names the nodes as `unmeasured`. `versions`: kind of node ->
    package -> version, part of the ids. ConfigError when a regime insists on snapshots that exceed the budget."""
    read = read or FilesRead()
    inputs = PlanInputs(config, data, found, read.weights, speeds or Speeds(), figures or {}, read.questions)
    collected = Collected(NodeTable(versions))
    reference = reference_of(config)
    # Nodes come before those that have them as parents.
    ordered = sorted(config.regimes, key=lambda name: name != reference)
    added = {name: add_regime(inputs, collected, config.regime(name), outlines[name]) for name in ordered}
    regimes = {name: added[name] for name in config.regimes}
    return Plan(
        collected.table.nodes(),
        tuple(collected.targets),
        regimes,
        collected.original,
        tuple(collected.unmeasured),
        judged=collected.judged,
    )
