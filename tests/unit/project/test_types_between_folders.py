"""What goes from one folder to another has a type: no `dict[str, Any]` in what another folder imports."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
UNTYPED = re.compile(r"\b(dict|Mapping)\[str, (Any|object)\]")
#: The one place where a record is made to JSON and read from it.
DOORS = {"to_json", "from_json"}
#: What is JSON by nature, by the reason. A name stands for all of its members.
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "records of the store before they have a type, and the functions that give them one": (
        "cache_store.records.checkpoints.Checkpoint.data",
        "cache_store.records.nodes.Commit.result",
        "cache_store.records.nodes.Attempt",
        "cache_store.records.nodes.NodeStore",
        "cache_store.records.record_io.dump_record",
        "cache_store.records.record_io.has_keys",
        "cache_store.records.record_io.parse_record",
        "cache_store.records.record_io.read_local",
        "workers.specs.as_json",
        "orchestrator.reports.record_json.to_json",
    ),
    "what is hashed: a task as its node's id covers it, a key as its set's id does": (
        "cache_store.snapshots.spec.SetSpec",
        "orchestrator.plan.graph.Node.task",
        "orchestrator.plan.identity.Identity",
        "workers.data.images.augment.augment.view_identity",
        "workers.data.text.samples.stored.Summary",
        "workers.data.text.samples.stored.open_sets",
        "workers.models.causal_lm.pretrained.numbering.signature",
        "workers.snapshots.geometry.Geometry.set_spec",
        "workers.specs.orders.Production.identities",
        "workers.specs.orders.WorkOrder.identity",
        "workers.specs.orders.WorkOrder.task",
    ),
    "kept as it was, for a later reader: tasks and settings beside results, keys of other versions": (
        "orchestrator.reports.commit_view.CommitFigures.others",
        "orchestrator.reports.records.RegimeSummary.diagnoses",
        "orchestrator.reports.records.WorkPlace.others",
        "workers.judge.scores.Score.notes",
        "workers.specs.data_results.ImageDataResult.origin",
        "workers.specs.data_results.TextDataResult.origin",
        "workers.specs.results.JudgedScore.notes",
        "workers.specs.results.StageResult.scaler",
        "workers.specs.results.StageResult.train_spec",
    ),
    "config.json of a language model, which is transformers' own": (
        "workers.models.causal_lm.network.skeleton",
        "workers.models.causal_lm.pretrained.configs.whole_config",
        "workers.models.causal_lm.pretrained.numbering.layer_count",
        "workers.models.causal_lm.pretrained.numbering.layer_kinds",
        "workers.models.causal_lm.pretrained.numbering.pruned",
        "workers.models.causal_lm.trials.tiny_configs.tiny_config",
        "workers.specs.experiment.HFImageSpec.config",
        "workers.specs.language.CausalLMSpec.config",
        "workers.specs.language.HFTextSpec.config",
    ),
    "values of other libraries: arguments of a layer, messages of a chat template, what fsspec knows of a file": (
        "workers.data.files",
        "workers.data.text.corpora.conversations.Conversation.messages",
        "workers.models.causal_lm.network.recording.accepts",
    ),
    "arguments of a function that a user wrote or names": (
        "workers.specs.experiment.ImageSpec.args",
        "workers.specs.experiment.LossSpec.args",
        "workers.specs.experiment.PythonSpec.args",
        "workers.specs.experiment.TimmSpec.args",
        "workers.specs.experiment.TorchvisionSpec.args",
    ),
    "YAML before the schema, and sections that are laid over others": (
        "orchestrator.config.load.document_of",
        "orchestrator.config.load.with_values",
        "orchestrator.config.precision",
        "orchestrator.config.schema.Config.resolved",
        "orchestrator.config.schema.Regime.stages",
        "orchestrator.config.schema.config_of",
        "orchestrator.config.schema.fill_in",
        "orchestrator.config.schema.training_of",
        "orchestrator.config.yaml_loader.Document.data",
        "orchestrator.config.yaml_loader.leaves",
        "orchestrator.status.compare.ComparedRun.settings",
        "orchestrator.trackers.live.Tracked.config",
        "workers.domains.planning.DomainPlanning.training",
        "workers.models.base.ModelFamily.regime_settings",
        "workers.specs.model.ModelSpec.variant",
    ),
    "the schema of configurations, in the terms of JSON schema, and the tables that it names the keys of": (
        "orchestrator.config.values.OneOf.table",
        "orchestrator.runs.json_schema.json_schema",
    ),
    "the file that describes an export": (
        "orchestrator.runs.recorded.Recorded.data_facts",
        "workers.domains.planning.DomainPlanning.export_facts",
        "workers.export.Trained.data",
        "workers.models.base.Export.data",
    ),
}


def sources() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for package in ("orchestrator", "workers", "cache_store")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def untyped(trees: Mapping[str, ast.Module]) -> set[str]:
    """Names of functions, methods and fields that another folder imports and that take or hold what has no type."""
    users: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    users[f"{node.module}.{alias.name}"].add(module.rpartition(".")[0])
    found: set[str] = set()
    for module, tree in trees.items():
        folder = {module.rpartition(".")[0]}
        for item in tree.body:
            name = getattr(item, "name", "_")
            if not name.startswith("_") and (users[f"{module}.{name}"] | users[module]) - folder:
                found |= {f"{module}.{inner}" for inner in untyped_members(item, name)}
    return found


def untyped_members(item: ast.stmt, name: str) -> Iterator[str]:
    if isinstance(item, ast.FunctionDef) and says_nothing(item):
        yield name
    for member in item.body if isinstance(item, ast.ClassDef) else ():
        if isinstance(member, ast.FunctionDef) and member.name not in DOORS and says_nothing(member):
            if member.name == "__init__" or not member.name.startswith("_"):
                yield f"{name}.{member.name}"
        elif isinstance(member, ast.AnnAssign) and UNTYPED.search(ast.unparse(member.annotation)):
            field = ast.unparse(member.target)
            if not field.startswith("_"):
                yield f"{name}.{field}"


def says_nothing(function: ast.FunctionDef) -> bool:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    hints = [argument.annotation for argument in given] + [function.returns]
    return any(hint is not None and UNTYPED.search(ast.unparse(hint)) for hint in hints)


def covers(allowed: str, name: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def test_what_another_folder_imports_has_types() -> None:
    allowed = [name for names in ALLOWED.values() for name in names]
    found = untyped(sources())
    assert sorted(name for name in found if not any(covers(each, name) for each in allowed)) == []
    assert [each for each in allowed if not any(covers(each, name) for name in found)] == [], "nothing to allow"


def test_the_walk_sees_parameters_returns_and_fields_that_cross() -> None:
    here = "class A:\n    f: dict[str, Any]\n    def m(self, x: Mapping[str, object]) -> None: ...\n"
    here += "def g() -> list[dict[str, Any]]: ...\ndef own() -> dict[str, Any]: ...\n"
    there = "from p.here.one import A, g\n"
    near = "from p.here.one import own\n"
    trees = {"p.here.one": ast.parse(here), "p.there.two": ast.parse(there), "p.here.three": ast.parse(near)}
    assert untyped(trees) == {"p.here.one.A.f", "p.here.one.A.m", "p.here.one.g"}
