"""Renders deploy/: with `kubectl kustomize` where it is on PATH, else with the small renderer below.

The renderer knows exactly what deploy/ uses and refuses everything else: `resources`, `components`, `namespace`,
`configMapGenerator` (envs, literals, files, merge), JSON 6902 `patches`, `images` by tag and `replacements`. A test
holds it against kubectl, so that machines with and without it check the same objects.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KUBECTL = shutil.which("kubectl")

#: Kinds without a namespace among those that are rendered here.
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
_KNOWN = {
    "apiVersion", "kind", "resources", "components", "namespace", "configMapGenerator", "generatorOptions", "patches",
    "images", "replacements",
}  # fmt: skip


class RenderError(Exception):
    """A kustomization that cannot be rendered, or that uses what the renderer does not know."""


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization, in no particular order."""
    return with_kubectl(folder) if KUBECTL else by_hand(folder)


def with_kubectl(folder: Path) -> list[Object]:
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def by_hand(folder: Path) -> list[Object]:
    return _accumulate(folder.resolve(), [])


def _accumulate(folder: Path, objects: list[Object]) -> list[Object]:
    """`objects` and what the kustomization in `folder` adds, everything changed as it says."""
    document = _read(folder / "kustomization.yaml")
    unknown = sorted(set(document) - _KNOWN)
    if unknown:
        raise RenderError(f"{folder}: {', '.join(unknown)}: not known to this renderer")
    for name in document.get("resources", []):
        path = folder / name
        added = _accumulate(path, []) if path.is_dir() else _objects(path)
        for item in added:
            _refuse_twice(objects, item)
        objects = [*objects, *added]
    for generator in document.get("configMapGenerator", []):
        objects = _generate(folder, generator, document.get("generatorOptions", {}), objects)
    for name in document.get("components", []):
        component = folder / name
        if _read(component / "kustomization.yaml")["kind"] != "Component":
            raise RenderError(f"{component}: not a component")
        objects = _accumulate(component.resolve(), objects)
    for patch in document.get("patches", []):
        _only(patch, {"target", "patch"})
        chosen = _select(objects, patch["target"])
        for operation in yaml.safe_load(patch["patch"]):
            for item in chosen:
                json_patch(item, operation)
    if "namespace" in document:
        for item in objects:
            if item["kind"] not in CLUSTER_SCOPED:
                item["metadata"]["namespace"] = document["namespace"]
            elif item["kind"] == "Namespace":
                item["metadata"]["name"] = document["namespace"]
    for image in document.get("images", []):
        _only(image, {"name", "newTag"})
        for item in objects:
            _retag(item, image["name"], image["newTag"])
    for replacement in document.get("replacements", []):
        _replace(objects, replacement)
    return objects


def _read(path: Path) -> Object:
    if not path.is_file():
        raise RenderError(f"{path}: no such file")
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


def _objects(path: Path) -> list[Object]:
    if not path.is_file():
        raise RenderError(f"{path}: no such file")
    # Through JSON: aliases of one anchor become values of their own.
    return [json.loads(json.dumps(item)) for item in yaml.safe_load_all(path.read_text()) if item]


def _only(mapping: Object, allowed: set[str]) -> None:
    if set(mapping) - allowed:
        raise RenderError(f"{sorted(set(mapping) - allowed)}: not known to this renderer")


def _refuse_twice(objects: list[Object], item: Object) -> None:
    if any(_identity(other) == _identity(item) for other in objects):
        raise RenderError(f"{_identity(item)}: there twice")


def name_of(item: Object) -> str:
    return f"{item['kind']} {item['metadata']['name']}"


def _identity(item: Object) -> tuple[str, str, str]:
    return item["apiVersion"], item["kind"], item["metadata"]["name"]


def _select(objects: list[Object], target: Object) -> list[Object]:
    _only(target, {"kind", "name"})
    found = [item for item in objects if item["kind"] == target["kind"] and item["metadata"]["name"] == target["name"]]
    if not found:
        raise RenderError(f"no {target['kind']} named {target['name']}")
    return found


def _generate(folder: Path, generator: Object, shared: Object, objects: list[Object]) -> list[Object]:
    _only(generator, {"name", "behavior", "envs", "literals", "files", "options"})
    data: dict[str, str] = {}
    for name in generator.get("envs", []):
        lines = (line.strip() for line in (folder / name).read_text().splitlines())
        data |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    data |= dict(literal.split("=", 1) for literal in generator.get("literals", []))
    for name in generator.get("files", []):
        data[Path(name).name] = (folder / name).read_text()
    if generator.get("behavior") == "merge":
        (existing,) = _select(objects, {"kind": "ConfigMap", "name": generator["name"]})
        existing["data"] |= data
        return objects
    if not shared.get("disableNameSuffixHash"):
        raise RenderError(f"{generator['name']}: names with a hash are not known to this renderer")
    labels = {**shared.get("labels", {}), **generator.get("options", {}).get("labels", {})}
    metadata = {"name": generator["name"], **({"labels": labels} if labels else {})}
    return [*objects, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}]


def json_patch(item: Any, operation: Object) -> None:
    """One operation of RFC 6902 in place: add, replace or remove."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    here = item
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here[part]
    key: Any = last if isinstance(here, dict) else len(here) if last == "-" else int(last)
    if operation["op"] == "add" and isinstance(here, list):
        here.insert(key, copy.deepcopy(operation["value"]))
    elif operation["op"] == "add":
        here[key] = copy.deepcopy(operation["value"])
    elif operation["op"] == "replace":
        here[key]  # must be there
        here[key] = copy.deepcopy(operation["value"])
    elif operation["op"] == "remove":
        del here[key]
    else:
        raise RenderError(f"{operation['op']}: not known to this renderer")


def walk(value: Any, visit: Callable[[Object], None]) -> None:
    """Calls `visit` with every mapping in `value`."""
    if isinstance(value, dict):
        visit(value)
        for child in value.values():
            walk(child, visit)
    elif isinstance(value, list):
        for child in value:
            walk(child, visit)


def _retag(item: Object, name: str, tag: str) -> None:
    def visit(mapping: Object) -> None:
        for key in ("containers", "initContainers"):
            for container in mapping.get(key) or []:
                if container.get("image", "").partition(":")[0] == name:
                    container["image"] = f"{name}:{tag}"

    walk(item, visit)


def _replace(objects: list[Object], replacement: Object) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath")
    (item,) = _select(objects, source)
    value: Any = item
    for part in path.split("."):
        if part not in value:
            raise RenderError(f"replacement: {path} is not in {_identity(item)}")
        value = value[part]
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths", "options"})
        for other in _select(objects, target["select"]):
            for field_path in target["fieldPaths"]:
                *parents, last = field_path.split(".")
                here = other
                for part in parents:
                    here = here.setdefault(part, {})
                here[last] = copy.deepcopy(value)
