"""Each rule of deploy/ broken once: a broken manifest is refused, with a sentence that says what is wrong."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crd_schema import crd_schema, schema_problems
from deploy_policy import policy_problems
from kuberay_rules import controller_problems
from kustomize import Object, json_patch, render
from manifests import CONFIGS, CRDS, DEPLOY

HEAD = "/spec/headGroupSpec/template/spec"
WORKER = "/spec/workerGroupSpecs/0/template/spec"
JOB_WORKER = "/spec/rayClusterSpec/workerGroupSpecs/0/template/spec"
PROGRAM = "python -m orchestrator.run"
SUBMITTER = "/spec/submitterPodTemplate/spec"


def load(name: str = "base") -> list[Object]:
    return render(DEPLOY / name)


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return load()


@pytest.fixture(scope="module")
def spot() -> list[Object]:
    return load("overlays/autoscaling-spot")


def broken(objects: list[Object], kind: str, *operations: tuple[Any, ...], name: str | None = None) -> list[Object]:
    """A copy of `objects` with JSON patch operations (op, path, value) done to the one of that kind."""
    result = copy.deepcopy(objects)
    (item,) = (item for item in result if item["kind"] == kind and name in (None, item["metadata"]["name"]))
    for operation, path, *value in operations:
        json_patch(item, {"op": operation, "path": path, **({"value": value[0]} if value else {})})
    return result


def without(objects: list[Object], kind: str, name: str) -> list[Object]:
    return [item for item in objects if (item["kind"], item["metadata"]["name"]) != (kind, name)]


POLICY: dict[str, tuple[str, tuple[tuple[Any, ...], ...], str]] = {
    "root by id": ("RayCluster", (("replace", f"{HEAD}/securityContext/runAsUser", 0),), "head: must run as a user"),
    "root allowed": (
        "RayJob",
        (("replace", f"{JOB_WORKER}/securityContext/runAsNonRoot", False),),
        "RayJob segprop worker: must run as a user that is not root",
    ),
    "root again in a container": (
        "RayCluster",
        (("add", f"{WORKER}/containers/0/securityContext/runAsUser", 0),),
        "ray-worker: must not run as root",
    ),
    "no seccomp": ("RayCluster", (("remove", f"{WORKER}/securityContext/seccompProfile"),), "seccompProfile"),
    "privileged": (
        "RayCluster",
        (("add", f"{HEAD}/containers/0/securityContext/privileged", True),),
        "ray-head: allowPrivilegeEscalation",
    ),
    "a capability": (
        "RayCluster",
        (("add", f"{HEAD}/containers/0/securityContext/capabilities/add", ["SYS_PTRACE"]),),
        "ray-head: all capabilities must be dropped",
    ),
    "writable root": (
        "RayJob",
        (("remove", f"{SUBMITTER}/containers/0/securityContext/readOnlyRootFilesystem"),),
        "submitter: ray-job-submitter: readOnlyRootFilesystem",
    ),
    "host network": ("RayCluster", (("add", f"{HEAD}/hostNetwork", True),), "hostNetwork is not allowed"),
    "host path": (
        "RayCluster",
        (("add", f"{WORKER}/volumes/-", {"name": "disk", "hostPath": {"path": "/mnt"}}),),
        "volume disk: hostPath is not allowed",
    ),
    "host port": (
        "RayCluster",
        (("add", f"{HEAD}/containers/0/ports/0/hostPort", 6379),),
        "ray-head: hostPort",
    ),
    "boundless scratch": (
        "RayCluster",
        (("replace", f"{WORKER}/volumes/0/emptyDir", {}),),
        "volume tmp: emptyDir needs a sizeLimit",
    ),
    "a scratch volume that copies fill": (
        "RayCluster",
        (("replace", f"{WORKER}/volumes/0/emptyDir/sizeLimit", "4Gi"),),
        "worker: SEGPROP_CACHE_BYTES must be below half of the sizeLimit of /tmp",
    ),
    "a pod that copies fill": (
        "RayCluster",
        (("replace", f"{WORKER}/containers/0/resources/limits/ephemeral-storage", "6Gi"),),
        "worker: SEGPROP_CACHE_BYTES must be below half of its ephemeral storage",
    ),
    "copies without bound": (
        "ConfigMap",
        (("remove", "/data/SEGPROP_CACHE_BYTES"),),
        "SEGPROP_CACHE_BYTES must be below half",
    ),
    "no memory limit": (
        "RayCluster",
        (("remove", f"{WORKER}/containers/0/resources/limits/memory"),),
        "ray-worker: resources.limits lacks memory",
    ),
    "no requests": (
        "RayJob",
        (("remove", f"{SUBMITTER}/containers/0/resources/requests"),),
        "resources.requests lacks cpu, ephemeral-storage, memory",
    ),
    "latest": ("RayCluster", (("replace", f"{HEAD}/containers/0/image", "segprop:latest"),), "must name a version"),
    "no tag, a registry with a port": (
        "RayCluster",
        (("replace", f"{HEAD}/containers/0/image", "registry.example:5000/segprop"),),
        "must name a version",
    ),
    "no probe": ("RayCluster", (("remove", f"{WORKER}/containers/0/livenessProbe"),), "needs a livenessProbe"),
    "no preStop": ("RayCluster", (("remove", f"{HEAD}/containers/0/lifecycle"),), "needs a preStop hook"),
    "short grace": (
        "RayCluster",
        (("replace", f"{WORKER}/terminationGracePeriodSeconds", 30),),
        "must exceed the driver's 60 s",
    ),
    "no scratch": (
        "RayCluster",
        (("remove", f"{HEAD}/containers/0/volumeMounts/1"),),
        "ray-head: with a read-only file system /tmp/ray must be mounted",
    ),
    "no priority": ("RayCluster", (("remove", f"{HEAD}/priorityClassName"),), "priorityClassName must be set"),
    "unknown priority": (
        "RayCluster",
        (("replace", f"{HEAD}/priorityClassName", "urgent"),),
        "PriorityClass urgent is not there",
    ),
    "an API token in a worker": (
        "RayCluster",
        (("replace", f"{WORKER}/automountServiceAccountToken", True),),
        "automountServiceAccountToken must be false",
    ),
    "a key in the environment": (
        "RayCluster",
        (("add", f"{WORKER}/containers/0/env", [{"name": "HF_TOKEN", "value": "hf_x"}]),),
        "HF_TOKEN looks like a secret in clear",
    ),
    "a key in the map": ("ConfigMap", (("add", "/data/AWS_SECRET_ACCESS_KEY", "x"),), "looks like a secret in clear"),
    "a key in the runtime environment": (
        "RayJob",
        (("replace", "/spec/runtimeEnvYAML", 'env_vars: {RAY_JOB_STOP_WAIT_TIME_S: "120", API_TOKEN: x}'),),
        "API_TOKEN looks like a secret in clear",
    ),
    "no token": ("RayCluster", (("replace", "/spec/authOptions", {"mode": "disabled"}),), "must be mode token"),
    "an unknown secret": (
        "RayCluster",
        (("replace", "/spec/authOptions/secretName", "mine"),),
        "Secret 'mine' is nowhere explained",
    ),
    "no claim": (
        "RayCluster",
        (("replace", f"{WORKER}/volumes/3/persistentVolumeClaim/claimName", "other"),),
        "PersistentVolumeClaim other is not there",
    ),
    "a mount of nothing": (
        "RayCluster",
        (("replace", f"{WORKER}/containers/0/volumeMounts/3/name", "dta"),),
        "volume dta is mounted but not there",
    ),
    "a pod no policy knows": (
        "RayCluster",
        (("remove", "/spec/workerGroupSpecs/0/template/metadata/labels"),),
        "RayCluster segprop worker: no NetworkPolicy lets it talk",
    ),
    "a lax namespace": (
        "Namespace",
        (("replace", "/metadata/labels/pod-security.kubernetes.io~1enforce", "baseline"),),
        "must enforce the restricted pod security standard",
    ),
    "an object elsewhere": (
        "ServiceAccount",
        (("replace", "/metadata/namespace", "default"),),
        "ServiceAccount segprop: is not in the namespace segprop",
    ),
    "another program": ("RayJob", (("replace", "/spec/entrypoint", "bash run.sh"),), "entrypoint must be"),
    "a configuration that is not shipped": (
        "RayJob",
        (("replace", "/spec/entrypoint", f"{PROGRAM} configs/mine.yaml store=/data/s run_dir=/data/r"),),
        "configs/mine.yaml does not come with the image",
    ),
    "results that go with the pod": (
        "RayJob",
        (("replace", "/spec/entrypoint", f"{PROGRAM} configs/quickstart.yaml store=/data/s run_dir=/tmp/r"),),
        "run_dir=/tmp/r is on no volume of the head",
    ),
    "a cluster that stays": ("RayJob", (("replace", "/spec/ttlSecondsAfterFinished", 0),), "must clean up"),
    "a job without end": ("RayJob", (("remove", "/spec/activeDeadlineSeconds"),), "nothing waits for ever"),
    "the default submitter": ("RayJob", (("remove", "/spec/submitterPodTemplate"),), "needs a submitterPodTemplate"),
    "Ray's three seconds to stop": (
        "RayJob",
        (("replace", "/spec/runtimeEnvYAML", "{}"),),
        r"RAY_JOB_STOP_WAIT_TIME_S is 3 s; the driver needs 60 s",
    ),
    "a grace below the job's own": (
        "RayJob",
        (("replace", f"{JOB_WORKER}/terminationGracePeriodSeconds", 100),),
        "worker: terminationGracePeriodSeconds 100 must exceed RAY_JOB_STOP_WAIT_TIME_S 120",
    ),
}


@pytest.mark.parametrize("rule", POLICY)
def test_the_policy_refuses(rule: str, base: list[Object]) -> None:
    kind, operations, expected = POLICY[rule]
    found = policy_problems(broken(base, kind, *operations), CONFIGS)
    assert [text for text in found if re.search(expected, text)], found


OBJECTS: dict[str, tuple[Callable[[list[Object]], list[Object]], str]] = {
    "a Secret with its data": (
        lambda base: [*base, {"kind": "Secret", "metadata": {"name": "s", "namespace": "segprop"}, "data": {}}],
        "Secret s: a Secret with its data",
    ),
    "no default deny": (
        lambda base: without(base, "NetworkPolicy", "segprop-default-deny"),
        "no NetworkPolicy denies Egress",
    ),
    "ingress from everywhere": (
        lambda base: broken(base, "NetworkPolicy", ("add", "/spec/ingress/-", {}), name="segprop-ray"),
        "an ingress rule without from",
    ),
    "ingress of any namespace with a label": (
        lambda base: broken(
            base,
            "NetworkPolicy",
            ("replace", "/spec/ingress/1/from/0/namespaceSelector", {}),
            name="segprop-ray",
        ),
        "by a label that anybody may give",
    ),
    "egress to everywhere": (
        lambda base: broken(
            base,
            "NetworkPolicy",
            ("add", "/spec/egress/-", {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
            name="segprop-ray",
        ),
        "spare the cloud's metadata service",
    ),
}


@pytest.mark.parametrize("rule", OBJECTS)
def test_the_policy_refuses_objects(rule: str, base: list[Object]) -> None:
    change, expected = OBJECTS[rule]
    found = policy_problems(change(base), CONFIGS)
    assert [text for text in found if expected in text], found


def test_the_policy_wants_the_autoscaler_restricted_too(spot: list[Object]) -> None:
    found = policy_problems(
        broken(spot, "RayCluster", ("remove", "/spec/autoscalerOptions/securityContext/readOnlyRootFilesystem")),
        CONFIGS,
    )
    assert "RayCluster segprop autoscaler: autoscaler: readOnlyRootFilesystem must be true" in found


CONTROLLER: dict[str, tuple[str, tuple[tuple[Any, ...], ...], str]] = {
    "a long name": ("RayJob", (("replace", "/metadata/name", "a" * 48),), "at most 47 characters"),
    "a name with a dot": ("RayCluster", (("replace", "/metadata/name", "seg.prop"),), "DNS-1035"),
    "an old Ray with tokens": ("RayCluster", (("replace", "/spec/rayVersion", "2.51.0"),), "2.52.0 or later"),
    "tokens without a version": ("RayCluster", (("remove", "/spec/rayVersion"),), "needs rayVersion"),
    "TTL without shutdown": ("RayJob", (("replace", "/spec/shutdownAfterJobFinishes", False),), "ttlSeconds"),
    "suspend without shutdown": (
        "RayJob",
        (("replace", "/spec/shutdownAfterJobFinishes", False), ("add", "/spec/suspend", True)),
        "suspend needs shutdownAfterJobFinishes",
    ),
    "rules beside shutdown": (
        "RayJob",
        (
            (
                "add",
                "/spec/deletionStrategy",
                {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
            ),
        ),
        "deletionRules and shutdownAfterJobFinishes exclude each other",
    ),
    "neither cluster nor selector": ("RayJob", (("remove", "/spec/rayClusterSpec"),), "one of rayClusterSpec"),
    "retries on a standing cluster": (
        "RayJob",
        (("add", "/spec/clusterSelector", {"ray.io/cluster": "segprop"}),),
        "backoffLimit does not go with clusterSelector",
    ),
    "a sidecar with a template": ("RayJob", (("replace", "/spec/submissionMode", "SidecarMode"),), "SidecarMode"),
    "no time": ("RayJob", (("replace", "/spec/activeDeadlineSeconds", 0),), "activeDeadlineSeconds must be positive"),
    "negative retries": ("RayJob", (("replace", "/spec/backoffLimit", -1),), "backoffLimit must not be negative"),
    "a runtime environment that is not YAML": ("RayJob", (("replace", "/spec/runtimeEnvYAML", "a: ["),), "not YAML"),
    "a number for a variable": (
        "RayJob",
        (("replace", "/spec/runtimeEnvYAML", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 120}"),),
        "env_vars are text",
    ),
    "more than the most": (
        "RayCluster",
        (("replace", "/spec/workerGroupSpecs/0/minReplicas", 3),),
        "above maxReplicas",
    ),
    "no most": (
        "RayCluster",
        (("remove", "/spec/workerGroupSpecs/0/maxReplicas"),),
        "needs minReplicas and maxReplicas",
    ),
    "no container": ("RayCluster", (("replace", f"{WORKER}/containers", []),), "workers: needs a container"),
    "resources twice": (
        "RayCluster",
        (("add", "/spec/headGroupSpec/resources", {"CPU": "1"}),),
        "resources both in rayStartParams",
    ),
    "labels for ray start": (
        "RayCluster",
        (("add", "/spec/workerGroupSpecs/0/rayStartParams/labels", "a=b"),),
        "labels belong to the group",
    ),
    "a gated field": ("RayCluster", (("add", "/spec/networkPolicy", {}),), "networkPolicy needs a feature gate"),
    "idle time without the autoscaler": (
        "RayCluster",
        (("add", "/spec/workerGroupSpecs/0/idleTimeoutSeconds", 60),),
        "idleTimeoutSeconds needs autoscaler v2",
    ),
}


@pytest.mark.parametrize("rule", CONTROLLER)
def test_the_controllers_rules_refuse(rule: str, base: list[Object]) -> None:
    kind, operations, expected = CONTROLLER[rule]
    (item,) = (item for item in broken(base, kind, *operations) if item["kind"] == kind)
    found = controller_problems(item)
    assert [text for text in found if expected in text], found


def test_autoscaler_v2_wants_pods_that_never_restart(spot: list[Object]) -> None:
    for item in broken(spot, "RayCluster", ("replace", f"{WORKER}/restartPolicy", "Always")):
        if item["kind"] == "RayCluster":
            assert controller_problems(item) == [
                "RayCluster segprop: workers: restartPolicy must be Never with autoscaler v2"
            ]


SCHEMA: dict[str, tuple[str, tuple[tuple[Any, ...], ...], str]] = {
    "a misspelt field": ("RayJob", (("add", "/spec/backofLimit", 1),), "'backofLimit' was unexpected"),
    "a misspelt field deep in a pod": (
        "RayJob",
        (("add", f"{JOB_WORKER}/containers/0/imagePullPolice", "Always"),),
        "'imagePullPolice' was unexpected",
    ),
    "text for a number": ("RayJob", (("replace", "/spec/ttlSecondsAfterFinished", "1h"),), "is not of type 'integer'"),
    "a number too large": ("RayJob", (("replace", "/spec/backoffLimit", 2**31),), "is greater than the maximum"),
    "an unknown choice": ("RayCluster", (("replace", "/spec/authOptions/mode", "mtls"),), "is not one of"),
    "a number for text": ("RayCluster", (("replace", "/spec/headGroupSpec/rayStartParams/num-cpus", 0),), "'string'"),
    "no group name": ("RayCluster", (("remove", "/spec/workerGroupSpecs/0/groupName"),), "'groupName' is a required"),
    "no head": ("RayCluster", (("remove", "/spec/headGroupSpec"),), "'headGroupSpec' is a required property"),
    "a quantity that is none": (
        "RayCluster",
        (("replace", f"{WORKER}/containers/0/resources/limits/memory", "6 GB"),),
        "does not match",
    ),
}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Object]:
    if not CRDS.is_dir():
        pytest.skip(f"no CRDs of KubeRay in {CRDS}: set SEGPROP_SHARED to the folder that holds kuberay/")
    return {kind: crd_schema(CRDS / f"ray.io_{kind.lower()}s.yaml") for kind in ("RayCluster", "RayJob")}


@pytest.mark.parametrize("rule", SCHEMA)
def test_the_crds_refuse(rule: str, base: list[Object], schemas: dict[str, Object]) -> None:
    kind, operations, expected = SCHEMA[rule]
    (item,) = (item for item in broken(base, kind, *operations) if item["kind"] == kind)
    found = schema_problems(item, schemas[kind])
    assert [text for text in found if expected in text], found


def test_the_crds_take_numbers_and_text_where_both_are_allowed_and_leave_defaults_out(
    base: list[Object], schemas: dict[str, Object]
) -> None:
    operations = (
        ("replace", f"{WORKER}/containers/0/resources/limits/cpu", 2),
        ("remove", "/spec/workerGroupSpecs/0/minReplicas"),
    )
    (item,) = (item for item in broken(base, "RayCluster", *operations) if item["kind"] == "RayCluster")
    assert schema_problems(item, schemas["RayCluster"]) == []


CORE: dict[str, tuple[str, str | None, tuple[Any, ...], str]] = {
    "a misspelt field": ("NetworkPolicy", "segprop-ray", ("add", "/spec/policyType", []), "policyType"),
    "a port that is text": ("NetworkPolicy", "segprop-ray", ("replace", "/spec/egress/1/ports/0/port", []), "port"),
    "no storage": ("PersistentVolumeClaim", None, ("replace", "/spec/resources", []), "resources"),
    "a priority that is text": ("PriorityClass", "segprop-head", ("replace", "/value", "high"), "high"),
    "a map of numbers": ("ConfigMap", None, ("add", "/data/PORT", 1), "PORT"),
}


@pytest.mark.parametrize("rule", CORE)
def test_kubernetes_schemas_refuse(rule: str, base: list[Object]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kind, name, operation, expected = CORE[rule]
    items = [
        item
        for item in broken(base, kind, operation, name=name)
        if item["kind"] == kind and name in (None, item["metadata"]["name"])
    ]
    with pytest.raises(validator.ValidationError) as caught:
        validator.validate(items[0], "1.34", strict=True)
    assert expected in f"{caught.value.path} {caught.value.message}"


def test_what_is_broken_in_a_copy_of_the_files_is_refused_too(tmp_path: Path) -> None:
    """End to end: a file of deploy/ changed by hand, rendered, judged."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    path = tmp_path / "deploy" / "base" / "cluster.yaml"
    text = path.read_text()
    assert "runAsNonRoot: true" in text
    path.write_text(text.replace("runAsNonRoot: true", "runAsNonRoot: false"))
    found = policy_problems(render(tmp_path / "deploy" / "overlays" / "gpu"), CONFIGS)
    assert len([line for line in found if "must run as a user that is not root" in line]) == 4
