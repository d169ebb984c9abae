"""Small real runs for the tests: digits at 8x8, ResNet-18 with a small stem, one thread."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from planning import merged
from safetensors.torch import load_file

from cache_store.records.nodes import Commit, NodeStore
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.plan.graph import Node
from orchestrator.runs.prepare import Prepared, prepare
from workers.control import ThreadControl
from workers.specs.orders import WorkOrder
from workers.tasks.execute import execute

ROOT = Path(__file__).parents[2]
#: Where stages run: `make test-cuda` runs the tests that need no Ray on a GPU.
DEVICE = torch.device(os.environ.get("SEGPROP_TEST_DEVICE", "cpu"))

TINY: dict[str, Any] = {
    "model": {"name": "resnet18", "stem": "small", "hidden": 32},
    "data": {
        "name": "digits",
        "image_size": 8,
        "augment": "light",
        "flip": False,
        "views": 1,
        "validation": 48,
        "train_limit": 96,
        "test_limit": 64,
    },
    "training": {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 1e-3}},
    # Three sizes of shards: one, two and four groups.
    "snapshots": {"group_rows": 16, "shard_bytes": 300_000},
    "regimes": ["segprop"],
    "resources": {"runner": "local", "device": DEVICE.type, "slots": 1, "threads": 1},
}

ALL_KINDS = ("data", "model", "train", "materialize", "evaluate", "average")


def write_config(folder: Path, changes: dict[str, Any] | None = None, name: str = "tiny") -> Path:
    """A configuration whose run directory is `folder`/run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merged({**TINY, "run_dir": str(folder / "run")}, changes or {}), sort_keys=False))
    return path


@dataclass
class Lab:
    """A plan whose nodes run in this process, one by one, so that a test can look and meddle in between."""

    prepared: Prepared
    control: ThreadControl = field(default_factory=ThreadControl)

    @classmethod
    def make(cls, folder: Path, changes: dict[str, Any] | None = None) -> Lab:
        """Labs of one folder share its store."""
        return cls(prepare(write_config(folder, {"store": str(folder / "store"), **(changes or {})})))

    @property
    def store(self) -> str:
        return self.prepared.config.store

    @property
    def storage(self) -> Storage:
        return open_storage(self.store)

    @property
    def nodes(self) -> NodeStore:
        return NodeStore(self.storage)

    def node(self, label: str) -> Node:
        found = [node for node in self.prepared.plan.nodes if node.label == label]
        assert len(found) == 1, (label, [node.label for node in self.prepared.plan.nodes])
        return found[0]

    def order(self, node: Node) -> WorkOrder:
        nodes = self.nodes
        parents: dict[str, Commit] = {}
        for role, parent in node.parents.items():
            commit = nodes.commit_of(parent)
            assert commit is not None, f"{node.label} needs {role} first"
            parents[role] = commit
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            parents=parents,
            store=self.store,
            device=str(DEVICE),
            threads=1,
        )

    def run(self, label: str, control: Any = None) -> Commit:
        """Run a node and, first, whatever it needs that is not committed."""
        return self._run(self.node(label), control)

    def prepare(self, label: str) -> None:
        """Run whatever a node needs first, and not the node."""
        for parent in self.node(label).parents.values():
            self._run(self.prepared.plan.node(parent))

    def _run(self, node: Node, control: Any = None) -> Commit:
        nodes = self.nodes
        for parent in node.parents.values():
            if nodes.commit_of(parent) is None:
                self._run(self.prepared.plan.node(parent))
        commit = execute(self.order(node), control or self.control)
        assert commit is not None, node.label
        return commit

    def run_all(self, kinds: tuple[str, ...] = ALL_KINDS) -> None:
        for node in self.prepared.plan.nodes:
            if node.kind in kinds:
                self._run(node)

    def commit(self, label: str) -> Commit:
        commit = self.nodes.commit_of(self.node(label).id)
        assert commit is not None, label
        return commit

    def forget(self, label: str) -> None:
        """As if the node had never run; its attempts' files stay."""
        (Path(self.store) / "nodes" / self.node(label).id / "commit.json").unlink()

    def weights(self, label: str) -> dict[str, torch.Tensor]:
        """Every tensor a train node committed, `<part>/<name>`."""
        commit = self.commit(label)
        return {
            f"{part}/{name}": tensor
            for part in commit.result["parts"]
            for name, tensor in load_file(Path(self.store) / commit.files[f"{part}.safetensors"].path).items()
        }

    def snapshots(self, label: str) -> SnapshotSet:
        """The set a materialize node made."""
        return SnapshotStore(self.storage).load(self.commit(label).result["set"])

    def linked_copy(self, folder: Path) -> Lab:
        """The same plan over a copy of the store. Files are hard links: replace them, never write into them."""
        shutil.copytree(self.store, folder / "store", copy_function=os.link)
        config = self.prepared.config.model_copy(update={"store": str(folder / "store")})
        return Lab(replace(self.prepared, config=config))


def digests(commit: Commit) -> dict[str, str]:
    """Part -> digest of the state a train node committed."""
    return {name: part["digest"] for name, part in commit.result["parts"].items()}


def checksums(snapshots: SnapshotSet) -> list[str]:
    """xxh3 of every shard file of a set, from its records."""
    records = Path(snapshots.storage.uri.removeprefix("file://")) / "sets" / snapshots.spec.id / "commits"
    return [json.loads(path.read_text())["xxh3_128"] for path in sorted(records.iterdir())]


def final_digests(prepared: Prepared, store: str | None = None) -> dict[str, dict[str, str]]:
    """Regime -> part -> digest of its final weights."""
    nodes = NodeStore(open_storage(store or prepared.config.store))
    result: dict[str, dict[str, str]] = {}
    for name, regime in prepared.plan.regimes.items():
        result[name] = {}
        for part, node_id in regime.weights.items():
            commit = nodes.commit_of(node_id)
            assert commit is not None, f"{name}: {part} is not committed"
            result[name][part] = digests(commit)[part]
    return result


class StopAfter(ThreadControl):
    """Asks to stop at the n-th look; `error` stands for a crash there."""

    def __init__(self, looks: int, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.left = looks
        self.error = error

    def should_stop(self) -> bool:
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error("crashed here")
        return self.left <= 0


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's state as it is now."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# -- whole runs as the user starts them ---------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class RayHome:
    """A temporary folder of Ray sessions, and every process that belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGPROP_"))}
        return {**kept, "RAY_TMPDIR": str(self.folder), **more}

    def start(self, *arguments: str, output: Path, **more: str) -> subprocess.Popen[bytes]:
        """`python -m orchestrator.run …` as a process of its own."""
        with output.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator.run", *arguments],
                cwd=ROOT,
                env=self.environment(**more),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> dict[int, str]:
        """Pid -> title of the living processes whose environment, arguments or open files point here.

        Ray's workers overwrite their environment with a title, but write their logs under the folder."""
        found: dict[int, str] = {}
        needle = str(self.folder).encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                title = (entry / "cmdline").read_bytes()
                mine = needle in title or b"RAY_TMPDIR=" + needle in (entry / "environ").read_bytes()
                mine = mine or any(os.readlink(link).startswith(str(self.folder)) for link in (entry / "fd").iterdir())
            except OSError:
                continue
            if mine and state != "Z":
                found[int(entry.name)] = title.replace(b"\0", b" ").decode(errors="replace")
        return found

    def workers(self) -> list[int]:
        return [pid for pid, title in self.processes().items() if title.startswith("ray::Worker")]

    def wait_gone(self, *, killed: bool = False, timeout_s: float = 60.0) -> None:
        """Until no process is left; fails when some stay.

        `killed`: Ray was given no time to end. Its two agents then leave by themselves after a minute in which
        they look for the head node: they are not waited for, the fixture ends them."""

        def left() -> dict[int, str]:
            return {
                pid: title.strip()
                for pid, title in self.processes().items()
                if not (killed and title.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent")))
            }

        wait_for(lambda: not left(), timeout_s, lambda: f"left behind: {left()}")

    def run_through_kills(self, config: Path, *, driver: Sequence[str], workers: Sequence[str]) -> None:
        """Run a configuration again and again until it gets through, while driver and workers kill themselves once at
        each of these points (`name:visit`). Every kill happened, and each of the driver's cost one start."""
        folder, output = config.parent, config.parent / "output.txt"
        kills = {point: folder / f"killed-{point.replace(':', '-')}" for point in (*driver, *workers)}
        armed = ",".join(f"{point}:{marker}" for point, marker in kills.items())
        codes: list[int] = []
        while not codes or codes[-1] != 0:
            assert len(codes) <= len(driver), output.read_text()[-4000:]
            process = self.start(str(config), "--quiet", output=output, SEGPROP_CRASH=armed)
            codes.append(process.wait(timeout=400))
            assert codes[-1] in (0, -signal.SIGKILL), output.read_text()[-4000:]
            self.wait_gone(killed=codes[-1] != 0)
        missed = [point for point, marker in kills.items() if not marker.exists()]
        assert not missed, f"never reached: {missed}"
        assert codes == [-signal.SIGKILL] * len(driver) + [0]

    def kill_all(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_for(condition: Callable[[], Any], timeout_s: float, message: Callable[[], str] = lambda: "timed out") -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, message()
        time.sleep(0.02)
    return value


def checkpoints(store: Path) -> Iterator[Path]:
    """Published mid-stage checkpoints."""
    return store.glob("nodes/*/checkpoints/*/*/manifest.json")


def summary_of(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary
