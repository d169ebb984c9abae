"""Keep beside a run's configuration all that its results are written from, so that they can be written again without
the data set and the original model: the plan, what each regime's export says, what was configured.

`<run_dir>/plan.json` is made here and read here alone. A record of another version counts as none: whoever needs it
plans again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_store.errors import CorruptRecord
from cache_store.keys import digest_json
from cache_store.records.record_io import MAX_PLAN_BYTES, dump_record, parse_record
from cache_store.storage.durable import read_regular
from orchestrator.config.regimes import yardstick_of
from orchestrator.plan.experiment import experiment_of
from orchestrator.plan.graph import FORMAT as PLAN_FORMAT
from orchestrator.plan.graph import Plan
from orchestrator.reports.records import About
from orchestrator.runs.prepare import Prepared
from orchestrator.units import human_count
from workers.specs.as_json import from_json, to_json
from workers.specs.experiment import Experiment

#: In a run directory.
FILE = "plan.json"
FORMAT = 1


@dataclass(frozen=True)
class Recorded:
    """What results are written from. `run_dir` and `store` are not part of the record: a directory may move."""

    run: str
    run_dir: Path
    store: str
    plan: Plan
    #: By regime.
    experiments: Mapping[str, Experiment]
    #: JSON facts of the data, as `DomainPlanning.export_facts` gives them.
    data_facts: Mapping[str, Any] = field(default_factory=dict)
    #: Whether an export copies something of the data's commit.
    reads_data: bool = False
    reuse_versions: Mapping[str, str] = field(default_factory=dict)
    about: About | None = None

    @classmethod
    def of(cls, prepared: Prepared) -> Recorded:
        """Take from a prepared run what its results are written from."""
        config, found = prepared.config, prepared.found
        return cls(
            run=config.run,
            run_dir=prepared.run_dir,
            store=config.store,
            plan=prepared.plan,
            experiments={
                name: experiment_of(config, config.regime(name), prepared.data, found) for name in prepared.plan.regimes
            },
            data_facts=config.domain.export_facts(config.data, prepared.data),
            reads_data=config.domain.export_reads_data(config.data),
            reuse_versions={str(package): version for package, version in config.reuse_versions.items()},
            about=About(
                model=config.family.words(config.model, found).rstrip(","),
                data=config.domain.words(config.data, prepared.data, human_count),
                seed=config.seed,
                yardstick=yardstick_of(config),
                class_names=tuple(config.domain.export_facts(config.data, prepared.data).get("class_names", ()))
                or None,
                source=Path(prepared.source).name,
            ),
        )

    @property
    def digest(self) -> str:
        """Another one wherever some node's id, or the set of nodes, is another."""
        return digest_json(sorted(node.id for node in self.plan.nodes))

    def to_bytes(self) -> bytes:
        """Write the record. StoreError when it is longer than records may be (some ten thousand nodes)."""
        body = {
            "format": FORMAT,
            "plan_format": PLAN_FORMAT,
            "run": self.run,
            "plan": to_json(self.plan),
            "experiments": {name: to_json(each) for name, each in self.experiments.items()},
            "data_facts": dict(self.data_facts),
            "reads_data": self.reads_data,
            "reuse_versions": dict(self.reuse_versions),
            "about": None if self.about is None else to_json(self.about),
        }
        return dump_record(json.loads(json.dumps(body)), f"the plan of {self.run}", MAX_PLAN_BYTES)


def read_recorded(run_dir: Path, store: str) -> Recorded | None:
    """Read what a run directory holds; None where there is no record, or none of this version."""
    path = run_dir / FILE
    try:
        body = parse_record(read_regular(path, MAX_PLAN_BYTES + 1), str(path), MAX_PLAN_BYTES)
        if (body.get("format"), body.get("plan_format")) != (FORMAT, PLAN_FORMAT):
            return None
        # Older programs wrote sets that are held.
        plan = {key: value for key, value in body["plan"].items() if key != "held"}
        return Recorded(
            run=body["run"],
            run_dir=run_dir,
            store=store,
            plan=from_json(Plan, {"coming": [], **plan}),
            experiments={name: from_json(Experiment, each) for name, each in body["experiments"].items()},
            data_facts=body["data_facts"],
            reads_data=bool(body["reads_data"]),
            reuse_versions=body["reuse_versions"],
            about=None if body["about"] is None else from_json(About, body["about"]),
        )
    except (OSError, CorruptRecord, KeyError, TypeError, ValueError, AttributeError):
        return None
