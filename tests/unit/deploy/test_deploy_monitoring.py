"""What is measured, what is scraped and what is shown fit together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from deploy_policy import pods
from kustomize import Object, render

from orchestrator.runners import metrics
from workers.control import Update

ROOT = Path(__file__).resolve().parents[3]
MONITORING = ROOT / "deploy" / "components" / "monitoring"
#: Ray's own dashboards say which metrics there are.
RAYS = "".join(
    path.read_text() for path in (Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards").glob("*panels.py")
)


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(ROOT / "deploy" / "overlays" / "monitoring")


@pytest.fixture(scope="module")
def dashboard(objects: list[Object]) -> dict[str, Any]:
    (item,) = (item for item in objects if item["metadata"]["name"] == "segprop-dashboard")
    assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
    shown: dict[str, Any] = json.loads(item["data"]["segprop.json"])
    return shown


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    named = set(re.findall(r"\bray_(?!io_)[a-z_]+", " ".join(expressions(dashboard))))
    ours = {f"ray_{name}" for name in metrics.MEANINGS}
    unknown = [name for name in named - ours if f"{name}{{" not in RAYS]
    assert unknown == []
    assert ours <= named, "measured, but shown nowhere"


def test_every_panel_obeys_the_choice_of_cluster_and_has_a_place(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        assert expression.count("ray_io_cluster=~") == len(re.findall(r"\bray_(?!io_)[a-z_]+\{", expression))
        assert expression.count("(") == expression.count(")")
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_what_is_scraped_is_what_pods_offer_and_prometheus_may_reach(objects: list[Object]) -> None:
    ports = {
        (pod.role, port["name"]): port["containerPort"]
        for pod in pods(objects)
        for container in pod.containers
        for port in container.get("ports", [])
    }
    by_name = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in objects if "spec" in item}
    rules = by_name["NetworkPolicy", "segprop-metrics"]["ingress"][0]["ports"]
    open_ports = {rule["port"] for rule in rules}
    scraped = [("worker", end) for end in by_name["PodMonitor", "segprop-workers"]["podMetricsEndpoints"]]
    scraped += [("head", end) for end in by_name["ServiceMonitor", "segprop-heads"]["endpoints"]]
    for role, endpoint in scraped:
        assert ports[role, endpoint["port"]] in open_ports
        assert [item["targetLabel"] for item in endpoint["relabelings"]] == ["ray_io_cluster"]


def test_an_idle_slot_has_no_rate_and_a_busy_one_what_its_task_reports() -> None:
    assert metrics.values(None) == {
        "segprop_slot_busy": 0.0,
        "segprop_samples_per_second": 0.0,
        "segprop_tokens_per_second": 0.0,
        "segprop_stalled": 0.0,
    }
    update = Update(phase="train", rate=12.5, loss=2, accuracy=None, hits=3, seconds_left=9.0)
    assert metrics.values(update) == {
        "segprop_slot_busy": 1.0,
        "segprop_samples_per_second": 12.5,
        "segprop_loss": 2.0,
        "segprop_snapshot_hits": 3.0,
        "segprop_seconds_left": 9.0,
    }
    assert set(metrics.values(Update())) == {"segprop_slot_busy"}
