"""What KubeRay's controller refuses although the CRD allows it.

The rules are those of KubeRay 1.7 (`ray-operator/controllers/ray/utils/validation.go`), for the fields used in deploy/.
Every check returns sentences that say which object and what is wrong; none means it passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml
from kustomize import Object, name_of


def controller_problems(item: Object) -> list[str]:
    """Why KubeRay would refuse a RayCluster or RayJob although the API server took it."""
    found = []
    name, spec = item["metadata"]["name"], item["spec"]
    longest = 53 if item["kind"] == "RayCluster" else 47
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"name must be a DNS-1035 label of at most {longest} characters")
    if item["kind"] == "RayCluster":
        found += _cluster_problems(spec)
    else:
        found += _job_problems(spec)
        if "rayClusterSpec" in spec:
            found += _cluster_problems(spec["rayClusterSpec"])
    return [f"{name_of(item)}: {text}" for text in found]


def _job_problems(spec: Object) -> Iterator[str]:
    shutdown, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished must not be negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules and shutdown:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if "deletionStrategy" in spec:
        yield "deletionStrategy needs a feature gate that is off by default"
    selector = spec.get("clusterSelector")
    if not selector and not spec.get("rayClusterSpec"):
        yield "one of rayClusterSpec and clusterSelector must be set"
    if selector and spec.get("suspend"):
        yield "clusterSelector does not go with suspend"
    if (selector or mode == "InteractiveMode") and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with clusterSelector or InteractiveMode"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode does not go with submitterPodTemplate or submitterConfig"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} must be positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit must not be negative"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is not YAML: {error}"
    else:
        variables = environment.get("env_vars", {}) if isinstance(environment, dict) else None
        if variables is None or not all(isinstance(value, str) for value in variables.values()):
            yield "runtimeEnvYAML must be a mapping whose env_vars are text"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _cluster_problems(spec: Object) -> Iterator[str]:
    autoscaling = spec.get("enableInTreeAutoscaling", False)
    options = spec.get("autoscalerOptions", {})
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    for group in (head, *workers):
        name = group.get("groupName", "head")
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: needs a container"
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
            yield f"{name}: resources both in rayStartParams and in resources"
        if "labels" in parameters:
            yield f"{name}: labels belong to the group, not into rayStartParams"
        never = group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        if autoscaling and options.get("version") == "v2" and not never:
            yield f"{name}: restartPolicy must be Never with autoscaler v2"
    for group in workers:
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not autoscaling and (least is None or most is None):
            yield f"{name}: needs minReplicas and maxReplicas without autoscaling"
        if (least or 0) < 0 or (most if most is not None else 0) < 0:
            yield f"{name}: negative replicas"
        if least is not None and most is not None and least > most:
            yield f"{name}: minReplicas {least} is above maxReplicas {most}"
        if "idleTimeoutSeconds" in group and not (autoscaling and options.get("version") == "v2"):
            yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
        if group.get("suspend"):
            yield f"{name}: suspend needs a feature gate that is off by default"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds must not be negative"
    authentication = spec.get("authOptions", {})
    if authentication.get("mode") == "token":
        if not re.fullmatch(r"v?\d+(\.\d+)+.*", spec.get("rayVersion", "")):
            yield "authOptions.mode token needs rayVersion"
        elif _version(spec["rayVersion"]) < (2, 52, 0):
            yield f"authOptions.mode token needs rayVersion 2.52.0 or later, not {spec['rayVersion']}"
    for gated in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if gated in spec:
            yield f"{gated} needs a feature gate that is off by default"
