"""deploy/ as it would run: head, workers and submitter as processes with the manifests' own commands and environment,
a folder as the shared volume, and the RayJob's own entrypoint."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import render
from planning import merged
from pods import Pods, environment_of, ray_start, submit_command
from running import ROOT, TINY, checkpoints, final_digests, summary_of, wait_for

from orchestrator.cli import main
from orchestrator.runs.prepare import prepare

#: Of the test's own cluster: whoever joins it needs a token, and this one is made up here.
TOKEN = secrets.token_hex(32)
#: In place of the image's quickstart: two regimes for two workers, with stages of some seconds and many checkpoints.
SMALL = merged(
    {key: value for key, value in TINY.items() if key != "resources"},
    {
        "regimes": ["segprop", "lw"],
        "training.epochs": 4,
        "training.checkpoint_every_s": 0.01,
        "split.base": 3,
        "evaluation.stages": False,
    },
)
#: Seconds where nothing else runs; a busy machine needs several attempts for a Ray node.
pytestmark = pytest.mark.timeout(1500)
HEAD, SUBMITTER = 0, 3
PODS = 4


@dataclass
class Cluster:
    """Head, two workers and room for a submitter. `volume` is what the pods see as /data."""

    pods: Pods
    job: dict[str, Any]
    maps: dict[str, dict[str, str]]
    logs: Path
    #: The Ray nodes' own processes, by pod.
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def volume(self) -> Path:
        return self.pods.data

    @property
    def run_dir(self) -> Path:
        return self.volume / "runs" / "quickstart"

    def submitter(self, command: str, name: str, **more: str) -> subprocess.Popen[bytes]:
        """The command in the submitter's pod, with its environment."""
        container = self.job["submitterPodTemplate"]["spec"]["containers"][0]
        environment = {**environment_of(container, self.maps, TOKEN), **more}
        with (self.logs / f"{name}.log").open("wb") as output:
            return self.pods.run(SUBMITTER, command, environment, output)

    def ask(self, command: str, name: str = "ask", timeout_s: float = 120, **more: str) -> tuple[int, str]:
        """Exit code and output of a command in the submitter's pod."""
        code = self.submitter(command, name, **more).wait(timeout=timeout_s)
        return code, self.log(name)

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def status(self, submission: str) -> str:
        client = f"from ray.job_submission import JobSubmissionClient as C; c = C('{self.pods.dashboard}')"
        code, text = self.ask(f"python -c \"{client}; print(c.get_job_status('{submission}').value)\"", "status")
        assert code == 0, text
        return text.split()[-1]

    def start(self, index: int, group: dict[str, Any]) -> subprocess.Popen[bytes]:
        container = group["template"]["spec"]["containers"][0]
        assert container["workingDir"] == "/opt/segprop"
        address = None if index == HEAD else self.pods.gcs
        environment = environment_of(container, self.maps, TOKEN)
        # KubeRay: the address of the GCS, from inside.
        environment["RAY_ADDRESS"] = self.pods.gcs.replace(self.pods.gcs.partition(":")[0], "127.0.0.1")
        if address is not None:
            environment["RAY_ADDRESS"] = address
        with (self.logs / f"pod-{index}.log").open("wb") as output:
            return self.pods.run(index, ray_start(group, address, self.pods.replacements(index)), environment, output)

    def bring_up(self, index: int, group: dict[str, Any]) -> None:
        """Start a node and wait for it. Ray gives a raylet 30 s to register, too few on a busy machine: KubeRay then
        starts another pod, and so do we."""
        log = self.logs / f"pod-{index}.log"
        for _ in range(10):
            process = self.nodes[index] = self.start(index, group)
            ended = process.poll
            wait_for(lambda: "Ray runtime started" in log.read_text() or ended() is not None, 240, log.read_text)  # noqa: B023
            if process.poll() is None:
                wait_for(lambda: self.probe(index, group, "startupProbe") or ended() is not None, 120, log.read_text)  # noqa: B023
            if process.poll() is None:
                return
        raise AssertionError(log.read_text())

    def probe(self, index: int, group: dict[str, Any], kind: str) -> bool:
        """What the kubelet would find: an HTTP answer below 400, without a token, from the pod's own network."""
        probe = group["template"]["spec"]["containers"][0][kind]["httpGet"]
        assert probe["port"] == 52365
        url = self.pods.agent(index) + probe["path"]
        code = f"import urllib.request; urllib.request.urlopen('{url}', timeout=5)"
        return self.pods.run(index, f'python -c "{code}"', {}, subprocess.DEVNULL).wait(timeout=60) == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    objects = render(ROOT / "deploy" / "overlays" / "cpu-smoke")
    job = next(item["spec"] for item in objects if item["kind"] == "RayJob")
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        image, data, logs = (folder / part for part in ("image", "data", "logs"))
        for path in (image / "configs", image / "bin", data, logs):
            path.mkdir(parents=True)
        for package in ("cache_store", "workers", "orchestrator"):
            shutil.copytree(ROOT / package, image / package, ignore=shutil.ignore_patterns("__pycache__"))
        (image / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
        shutil.copy(ROOT / "deploy" / "docker" / "segprop-pre-stop", image / "bin")
        pods = Pods(folder, image, data)
        found = Cluster(pods, job, maps, logs)
        try:
            pods.open(PODS)
            spec = job["rayClusterSpec"]
            (workers,) = spec["workerGroupSpecs"]
            assert workers["replicas"] == 2
            groups = [spec["headGroupSpec"], workers, workers]
            for index, group in enumerate(groups):
                found.bring_up(index, group)
            yield found
        finally:
            pods.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The weights of an uninterrupted run in this process."""
    folder = tmp_path_factory.mktemp("reference")
    resources = {"runner": "local", "device": "cpu", "slots": 1, "threads": 1}
    config = folder / "quickstart.yaml"
    config.write_text(yaml.safe_dump({**SMALL, "run_dir": str(folder / "run"), "resources": resources}))
    assert main(["run", str(config), "--quiet"]) == 0
    return final_digests(prepare(config))


def test_the_probes_answer_without_a_token_and_nothing_else_does(cluster: Cluster) -> None:
    spec = cluster.job["rayClusterSpec"]
    groups = [spec["headGroupSpec"], spec["workerGroupSpecs"][0], spec["workerGroupSpecs"][0]]
    for index, group in enumerate(groups):
        assert cluster.probe(index, group, "livenessProbe")
        assert cluster.probe(index, group, "readinessProbe")
    command = f"ray job list --address {cluster.pods.dashboard}"
    code, text = cluster.ask(command, RAY_AUTH_TOKEN="x" * 64)
    assert code != 0
    assert "401" in text or "403" in text or "uthentication" in text, text
    code, text = cluster.ask(command)
    assert code == 0, text


@pytest.mark.long
def test_a_job_stopped_midway_and_run_again_ends_with_the_weights_of_an_uninterrupted_run(
    cluster: Cluster, reference: dict[str, dict[str, str]]
) -> None:
    job = cluster.job
    environment = json.dumps(yaml.safe_load(job["runtimeEnvYAML"]))
    address = cluster.pods.dashboard

    # As a user submits: code and configuration travel.
    command = (
        f"ray job submit --address {address} --working-dir . --no-wait --submission-id first "
        f"--runtime-env-json '{environment}' -- {job['entrypoint']}"
    )
    code, text = cluster.ask(command, "first")
    assert code == 0, text
    store = cluster.volume / "store"
    wait_for(lambda: any(checkpoints(store)), 300, lambda: cluster.ask(f"ray job logs --address {address} first")[1])
    code, text = cluster.ask(f"ray job stop --address {address} first", "stop", timeout_s=180)
    assert code == 0, text
    assert cluster.status("first") == "STOPPED"
    assert summary_of(cluster.run_dir)["status"] == "stopped"
    _, log = cluster.ask(f"ray job logs --address {address} first")
    assert "run the same command to go on" in log

    # As KubeRay submits: the image's own code, the RayJob's own entrypoint.
    code, text = cluster.ask(submit_command(job, address, "second"), "second", timeout_s=600)
    assert code == 0, text
    assert cluster.status("second") == "SUCCEEDED", text
    summary = summary_of(cluster.run_dir)
    assert summary["status"] == "done"
    assert set(summary["regimes"]) == {"segprop", "lw"}
    assert len({item["where"]["host"] for item in summary["work"]}) == (2 if cluster.pods.isolated else 1)
    config = cluster.run_dir / "config.yaml"
    prepared = prepare(config, [f"run_dir={cluster.run_dir}", f"store={store}"])
    assert final_digests(prepared) == reference

    # The submitter's pod may be tried again: it follows the job that is there.
    code, text = cluster.ask(submit_command(job, address, "second"), "again")
    assert code == 0, text
    assert "segprop/stage1" in text or "done" in text


def test_a_job_whose_results_would_stay_in_its_own_copy_is_refused_with_the_reason(cluster: Cluster) -> None:
    address = cluster.pods.dashboard
    command = (
        f"ray job submit --address {address} --working-dir . --submission-id lost "
        "-- python -m orchestrator.run configs/quickstart.yaml run_dir=runs/lost"
    )
    code, text = cluster.ask(command, "lost", timeout_s=200)
    assert code != 0
    assert "run_dir: runs/lost: would lie in this job's copy of the working directory" in text


def test_a_head_that_is_taken_away_lets_its_run_checkpoint_first(cluster: Cluster) -> None:
    if not cluster.pods.isolated:
        pytest.skip("without process namespaces the hook would look at this machine's processes")
    address = cluster.pods.dashboard
    places = "store=/data/store2 run_dir=/data/runs/taken"
    entrypoint = f"python -m orchestrator.run configs/quickstart.yaml {places} seed=7 training.epochs=40"
    code, text = cluster.ask(
        f"ray job submit --address {address} --no-wait --submission-id taken -- {entrypoint}", "taken"
    )
    assert code == 0, text
    wait_for(lambda: any(checkpoints(cluster.volume / "store2")), 300, lambda: "no checkpoint")
    # What Prometheus would find meanwhile, at the port the pod monitor names.
    metrics = (
        "python -c \"import urllib.request as r; print(r.urlopen('http://localhost:8080/metrics').read().decode())\""
    )

    def measured() -> bool:
        with (cluster.logs / "metrics.log").open("wb") as output:
            cluster.pods.run(HEAD, metrics, {}, output).wait(timeout=60)
        return "ray_segprop_slot_busy{" in cluster.log("metrics")

    wait_for(measured, 60, lambda: cluster.log("metrics")[-2000:])
    hook = cluster.job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]
    started = time.monotonic()
    assert cluster.pods.execute(cluster.nodes[HEAD], " ".join(hook["exec"]["command"])).wait(timeout=200) == 0
    assert time.monotonic() - started < 90
    wait_for(lambda: cluster.status("taken") == "FAILED", 30, lambda: cluster.status("taken"))
    assert summary_of(cluster.volume / "runs" / "taken")["status"] == "stopped"
    assert os.listdir(cluster.volume / "store2" / "nodes")
