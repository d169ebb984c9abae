"""What we do not ship in deploy/, whether or not a cluster would take it.

Every check returns sentences that say which object, where and what is wrong; none means it passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from kustomize import CLUSTER_SCOPED, Object, name_of

from orchestrator.execution.driver import STOP_GRACE_S


@dataclass(frozen=True)
class Pod:
    """A pod template and what KubeRay makes of it."""

    owner: str
    role: str  # head, worker, submitter
    template: Object
    labels: dict[str, str]
    autoscaling: bool

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def clusters(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for item in objects:
        if item["kind"] == "RayCluster":
            yield name_of(item), item["spec"]
        elif item["kind"] == "RayJob" and "rayClusterSpec" in item["spec"]:
            yield name_of(item), item["spec"]["rayClusterSpec"]


def pods(objects: list[Object]) -> list[Pod]:
    """Every pod template in the objects. KubeRay's own labels are on them already."""
    found = []
    for owner, spec in clusters(objects):
        autoscaling = spec.get("enableInTreeAutoscaling", False)
        for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
            role = "head" if group is spec["headGroupSpec"] else "worker"
            labels = group["template"].get("metadata", {}).get("labels", {})
            added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": role}
            found.append(Pod(owner, role, group["template"], {**labels, **added}, autoscaling))
    for item in objects:
        template = item["spec"].get("submitterPodTemplate") if item["kind"] == "RayJob" else None
        if template is not None:
            labels = template.get("metadata", {}).get("labels", {})
            found.append(Pod(name_of(item), "submitter", template, labels, False))
    return found


def policy_problems(objects: list[Object], configs: Path) -> list[str]:
    """What we do not ship. `configs`: the folder of the configurations that come with the image."""
    found = []
    for pod in pods(objects):
        found += [f"{pod.owner} {pod.role}: {text}" for text in _pod_problems(pod)]
    found += _secret_problems(objects)
    found += _network_problems(objects)
    found += _copies_problems(objects)
    found += _reference_problems(objects)
    for item in objects:
        if item["kind"] == "RayJob":
            found += [f"{name_of(item)}: {text}" for text in _run_problems(item, configs)]
    for owner, spec in clusters(objects):
        authentication = spec.get("authOptions", {})
        if authentication.get("mode") != "token" or not authentication.get("secretName"):
            found.append(f"{owner}: authOptions must be mode token with a secretName")
        if spec.get("enableInTreeAutoscaling"):
            options = spec.get("autoscalerOptions", {})
            found += [f"{owner} autoscaler: {text}" for text in _container_problems({"name": "autoscaler", **options})]
    return found


VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "downwardAPI", "ephemeral", "csi"}


def _pod_problems(pod: Pod) -> Iterator[str]:
    spec = pod.spec
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or security.get("runAsUser", 0) == 0:
        yield "must run as a user that is not root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile must be RuntimeDefault"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is not allowed"
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES:
            yield f"volume {volume['name']}: {', '.join(sorted(kinds - VOLUMES))} is not allowed"
        if "emptyDir" in kinds and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']}: emptyDir needs a sizeLimit"
    # The autoscaler beside the head asks the Kubernetes API for pods; nothing else does.
    allowed = pod.role == "head" and pod.autoscaling
    if spec.get("automountServiceAccountToken") is not allowed:
        yield f"automountServiceAccountToken must be {str(allowed).lower()}"
    if not spec.get("priorityClassName"):
        yield "priorityClassName must be set"
    for container in pod.containers:
        yield from _container_problems(container)
        image = container.get("image", "")
        tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{container['name']}: image {image!r} must name a version or a digest"
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        needed = {"/tmp"} if pod.role == "submitter" else {"/tmp", "/tmp/ray", "/dev/shm"}
        if missing := sorted(needed - mounts):
            yield f"{container['name']}: with a read-only file system {', '.join(missing)} must be mounted"
        if pod.role == "submitter":
            continue
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe not in container:
                yield f"{container['name']}: needs a {probe}"
        if "preStop" not in container.get("lifecycle", {}):
            yield f"{container['name']}: needs a preStop hook, or stages lose their steps since the last checkpoint"
    if pod.role != "submitter" and spec.get("terminationGracePeriodSeconds", 30) <= STOP_GRACE_S:
        yield f"terminationGracePeriodSeconds must exceed the driver's {STOP_GRACE_S:g} s to checkpoint"


def _container_problems(container: Object) -> Iterator[str]:
    name, security = container["name"], container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield f"{name}: allowPrivilegeEscalation must be false"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: all capabilities must be dropped"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: readOnlyRootFilesystem must be true"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield f"{name}: must not run as root"
    for kind in ("requests", "limits"):
        held = container.get("resources", {}).get(kind, {})
        missing = sorted({"cpu", "memory", "ephemeral-storage"} - set(held))
        if missing:
            yield f"{name}: resources.{kind} lacks {', '.join(missing)}"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{name}: hostPort is not allowed"


_SECRET = re.compile(r"token(?!s|i)|passw|secret|credential|(access|api|private)_?key", re.IGNORECASE)


def _secret_problems(objects: list[Object]) -> Iterator[str]:
    """Secrets are made by hand; here they are only named."""
    for item in objects:
        if item["kind"] == "Secret":
            yield f"{name_of(item)}: a Secret with its data in the repository"
        if item["kind"] == "ConfigMap":
            for key in item.get("data", {}):
                if _SECRET.search(key):
                    yield f"{name_of(item)}: {key} looks like a secret in clear"
        if item["kind"] == "RayJob":
            text = f"{item['spec'].get('entrypoint', '')} {item['spec'].get('runtimeEnvYAML', '')}"
            for key in re.findall(r"([\w.]+)\s*[=:]", text):
                if _SECRET.search(key):
                    yield f"{name_of(item)}: {key} looks like a secret in clear"
    for pod in pods(objects):
        for container in pod.containers:
            for variable in container.get("env", []):
                if _SECRET.search(variable["name"]) and "value" in variable:
                    yield f"{pod.owner} {pod.role}: {variable['name']} looks like a secret in clear"


def _matches(selector: Object, labels: dict[str, str]) -> bool:
    if set(selector) - {"matchLabels"}:
        raise NotImplementedError(f"selector {selector}")
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _network_problems(objects: list[Object]) -> Iterator[str]:
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    closed = {
        direction
        for item in policies
        if item["spec"]["podSelector"] == {}
        for direction in item["spec"]["policyTypes"]
        if not item["spec"].get(direction.lower())
    }
    for direction in ("Ingress", "Egress"):
        if pods(objects) and direction not in closed:
            yield f"no NetworkPolicy denies {direction} to every pod by default"
    for pod in pods(objects):
        if not any(
            item["spec"]["podSelector"] and _matches(item["spec"]["podSelector"], pod.labels) for item in policies
        ):
            yield f"{pod.owner} {pod.role}: no NetworkPolicy lets it talk to anything; is its label missing?"
    for item in policies:
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in item["spec"].get(direction, []):
                if not rule.get(peers):
                    yield f"{name_of(item)}: an {direction} rule without {peers} opens it to the world"
                for peer in rule.get(peers, []):
                    if direction == "ingress" and peer.get("namespaceSelector") == {}:
                        yield f"{name_of(item)}: pods of any namespace come in by a label that anybody may give"
                    block = peer.get("ipBlock", {})
                    if block.get("cidr") == "0.0.0.0/0" and (
                        direction == "ingress"
                        or "169.254.169.254/32" not in block.get("except", [])
                        or not rule.get("ports")
                    ):
                        yield (
                            f"{name_of(item)}: {direction} with any address must be outward, name ports and spare the "
                            "cloud's metadata service"
                        )


_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def _copies_problems(objects: list[Object]) -> Iterator[str]:
    """Copies of a store's files must leave room in the volume they lie in: a disk does not show its sizeLimit."""
    maps = {item["metadata"]["name"]: item.get("data", {}) for item in objects if item["kind"] == "ConfigMap"}
    for pod in pods(objects):
        if pod.role == "submitter":
            continue
        for container in pod.spec["containers"]:
            given: dict[str, str] = {}
            for source in container.get("envFrom", []):
                given |= maps.get(source.get("configMapRef", {}).get("name"), {})
            (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/tmp"]
            (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]]
            bounds = {
                "the sizeLimit of /tmp": _bytes(volume["emptyDir"].get("sizeLimit", "0Gi")),
                "its ephemeral storage": _bytes(container["resources"]["limits"].get("ephemeral-storage", "0Gi")),
            }
            for what, bound in bounds.items():
                if int(given.get("SEGPROP_CACHE_BYTES", bound)) > bound // 2:
                    yield f"{pod.owner} {pod.role}: SEGPROP_CACHE_BYTES must be below half of {what}"


#: Made by hand, as the README says.
SECRETS = {"segprop-ray-token", "segprop-s3"}


def _reference_problems(objects: list[Object]) -> Iterator[str]:
    """What a pod names must be rendered beside it, or it would wait for ever."""
    there = {(item["kind"], item["metadata"]["name"]) for item in objects}
    namespaces = [item["metadata"]["name"] for item in objects if item["kind"] == "Namespace"]
    for item in objects:
        homeless = item["kind"] not in CLUSTER_SCOPED and item["metadata"].get("namespace") not in namespaces
        if namespaces and homeless:
            yield f"{name_of(item)}: is not in the namespace {namespaces[0]}"
        if item["kind"] == "Namespace":
            level = item["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
            if level != "restricted":
                yield f"{name_of(item)}: must enforce the restricted pod security standard"
    for pod in pods(objects):
        named = {("ServiceAccount", pod.spec.get("serviceAccountName", "default"))}
        named.add(("PriorityClass", pod.spec.get("priorityClassName", "")))
        secrets = set()
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                named.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    named.add(("ConfigMap", source["configMapRef"]["name"]))
                else:
                    secrets.add(source["secretRef"]["name"])
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.owner} {pod.role}: volume {mount['name']} is mounted but not there"
        for kind, name in sorted(named - there):
            yield f"{pod.owner} {pod.role}: {kind} {name} is not there"
        for name in sorted(secrets - SECRETS):
            yield f"{pod.owner} {pod.role}: Secret {name} is nowhere explained"
    for owner, spec in clusters(objects):
        name = spec.get("authOptions", {}).get("secretName", "")
        if name not in SECRETS:
            yield f"{owner}: Secret {name!r} is nowhere explained"


ENTRYPOINT = re.compile(
    r"python -m orchestrator\.run (?P<config>configs/\S+\.yaml) store=(?P<store>\S+) run_dir=(?P<run_dir>\S+)"
    r"( [a-z_.]+=\S+)*"
)


def _run_problems(item: Object, configs: Path) -> Iterator[str]:
    spec = item["spec"]
    match = ENTRYPOINT.fullmatch(spec.get("entrypoint", ""))
    if match is None:
        yield "entrypoint must be `python -m orchestrator.run configs/… store=… run_dir=… [key=value …]`"
    else:
        if not (configs.parent / match["config"]).is_file():
            yield f"entrypoint: {match['config']} does not come with the image"
        for pod in pods([item]):
            claims = {volume["name"] for volume in pod.spec.get("volumes", []) if "persistentVolumeClaim" in volume}
            shared = [
                mount["mountPath"]
                for each in pod.containers
                for mount in each.get("volumeMounts", [])
                if mount["name"] in claims
            ]
            for key in ("store", "run_dir"):
                value = match[key]
                on_volume = any(value == path or value.startswith(f"{path}/") for path in shared)
                if pod.role != "submitter" and "://" not in value and not on_volume:
                    yield f"entrypoint: {key}={value} is on no volume of the {pod.role}"
    if not spec.get("shutdownAfterJobFinishes") or spec.get("ttlSecondsAfterFinished", 0) <= 0:
        yield "must clean up: shutdownAfterJobFinishes with a TTL"
    if "activeDeadlineSeconds" not in spec or "preRunningDeadlineSeconds" not in spec:
        yield "needs activeDeadlineSeconds and preRunningDeadlineSeconds: nothing waits for ever"
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "needs a submitterPodTemplate: KubeRay's own is not restricted and would be refused"
    environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}") or {}
    wait = float(environment.get("env_vars", {}).get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    if wait <= STOP_GRACE_S:
        yield f"RAY_JOB_STOP_WAIT_TIME_S is {wait:g} s; the driver needs {STOP_GRACE_S:g} s to checkpoint"
    for pod in pods([item]):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.role != "submitter" and grace <= wait:
            yield f"{pod.role}: terminationGracePeriodSeconds {grace} must exceed RAY_JOB_STOP_WAIT_TIME_S {wait:g}"
