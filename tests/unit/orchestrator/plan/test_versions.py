"""Versions of what computes are part of every node's id, unless a configuration says which to take for the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planning import plan_of, small_config

from orchestrator.config.compatibility import compatible
from orchestrator.plan.graph import Plan
from orchestrator.runs.prepare import versions_of
from workers.versions import installed


def planned(tmp_path: Path, changes: dict[str, Any] | None = None, **upgraded: str) -> Plan:
    """The plan where these packages have these versions, all others those installed here."""
    config = small_config(tmp_path, changes)
    versions = versions_of(config)
    for kind, found in versions.items():
        versions[kind] = {package: upgraded.get(package, version) for package, version in found.items()}
    return plan_of(config, versions=versions)


def test_a_new_torch_computes_everything_again_but_the_decoded_data(tmp_path: Path) -> None:
    before, after = planned(tmp_path), planned(tmp_path, torch="99.0")
    same = [old.label for old, new in zip(before.nodes, after.nodes, strict=True) if old.id == new.id]
    assert same == ["data"]
    assert {node.versions.get("torch") for node in after.nodes if node.kind != "data"} == {"99.0"}


def test_a_new_pillow_decodes_the_data_again_and_so_everything(tmp_path: Path) -> None:
    before, after = planned(tmp_path), planned(tmp_path, pillow="99.0")
    same = {old.kind for old, new in zip(before.nodes, after.nodes, strict=True) if old.id == new.id}
    assert same == {"model"}


def test_results_of_another_version_are_reused_where_the_configuration_names_it(tmp_path: Path) -> None:
    reused = planned(tmp_path, {"reuse_versions": {"torch": "1.2.3"}})
    assert [node.id for node in reused.nodes] == [node.id for node in planned(tmp_path, torch="1.2.3").nodes]


def test_it_may_be_set_in_a_run_directory_and_is_recorded_there(tmp_path: Path) -> None:
    old = small_config(tmp_path).resolved()
    new = small_config(tmp_path, {"reuse_versions": {"torch": "1.2.3"}}).resolved()
    assert new["reuse_versions"] == {"torch": "1.2.3"}
    assert compatible(old, new) == []


def test_the_build_is_no_version_and_what_is_not_installed_has_none() -> None:
    found = installed(["torch", "no-such-package-of-ours"])
    assert list(found) == ["torch"]
    assert "+" not in found["torch"]
