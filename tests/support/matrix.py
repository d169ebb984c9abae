"""Break every part of a run, in the middle of everything it does, on either kind of store: `make test-matrix`.

    python tests/support/matrix.py [--out FILE] [--count N] [--seed 0] [--only TEXT] [--list]

A case is a fault (of what, which), a moment and a store. Its run starts on Ray as a user starts it, and once the log
says that the moment has come the fault is done: a process is killed, frozen for longer than a lease lives, or refused
memory; the disk is full or read-only; the store's answers stop, or its credentials are refused. What must hold:

    - the run ends with 0 and the tensors and scores of the run left alone, or with an error in our words;
    - with an error, the same command ends so after the fault has passed, within RERUNS times;
    - nothing hangs, no traceback is shown, and no process is left.

Cases are chosen so that every pair of a fault, a moment and a store that can meet does, and come in an order drawn
from the seed. What is in the file of results is not played again, so that hours may be cut into pieces. Needs Linux,
and root for the faults of disks.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faulty_proxy import Fault, FaultyProxy, faulty_proxy
from lm_running import lm_changes, write_checkpoint
from object_stores import S3Server, seaweed_server
from running import RayHome, wait_for, write_config
from text_makers import mmlu_folder

from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage

#: The longest that a command may take, on however busy a machine, and how often it may be called again.
LIMIT_S, RERUNS = 420.0, 3
#: Longer than a lease lives without a sign of life (45 s), and what an outage lasts.
FROZEN_S, OUTAGE_S = 60.0, 15.0
DISK = "400m"
IMAGES: dict[str, Any] = {
    "model": {"family": "vit", "patch": 4, "layers": 3, "hidden": 16, "heads": 2, "mlp": 32},
    "split": {"base": 1, "head": 1},
    "training": {"epochs": 12, "batch_size": 16, "optimizer": {"lr": 1e-3}, "checkpoint_every_s": 0.2},
    "snapshots": {"mode": "always", "group_rows": 16, "shard_bytes": 20_000, "retention": "keep"},
    "data.train_limit": 480,
    "regimes": ["segprop", "e2e"],
}


def _judged(folder: Path) -> dict[str, Any]:
    data = folder / "data"
    if not data.exists():
        mmlu_folder(data / "mmlu", ("anatomy",))
        write_checkpoint(folder / "model", tied=True)
    judge = {"tasks": ["mmlu"], "subjects": ["anatomy"], "shots": 0, "limit": 2, "batch_size": 4, "data": str(data)}
    return {
        **lm_changes(folder),
        "model": {"family": "causal_lm", "path": str(folder / "model")},
        "evaluation": {"stages": False, "judge": judge},
    }


#: What is run -> changes of `running.TINY`, given a folder for its data.
WORLDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "images": lambda _: IMAGES,
    "wave": lambda _: {**IMAGES, "regimes": ["segprop"], "pipeline": "wavefront", "wavefront": {"rounds": 2}},
    "seeds": lambda _: {**IMAGES, "seeds": [0, 1], "regimes": ["segprop"]},
    "judged": _judged,
    "gang": lambda folder: {**lm_changes(folder), "training.epochs": 6, "training.checkpoint_every_s": 0.2},
}
#: Moment -> what is run, and the kind of task that has to be under way; None: everything is committed.
MOMENTS: dict[str, tuple[str, str | None]] = {
    "stage": ("images", "train"),
    "materialize": ("images", "materialize"),
    "evaluate": ("images", "evaluate"),
    "export": ("images", None),
    "wavefront": ("wave", "train"),
    "sweep": ("seeds", "train"),
    "judge": ("judged", "judge"),
}
PROCESSES = ("driver", "worker", "rank", "raylet", "gcs")
#: How Ray's processes call themselves.
TITLES = {"worker": "ray::Worker", "rank": "ray::RayTrainWorker", "raylet": "/raylet/raylet", "gcs": "gcs_server"}
#: Fault -> what it can hit.
FAULTS: dict[str, tuple[str, ...]] = {
    "killed": PROCESSES,
    "frozen": PROCESSES,
    "no memory": ("driver", "worker", "rank"),
    "full": ("disk",),
    "read-only": ("disk",),
    "silent": ("bucket",),
    "refusing": ("bucket",),
}
STORES = ("folder", "s3")


@dataclass(frozen=True, order=True)
class Case:
    """One thing that goes wrong."""

    fault: str
    target: str
    moment: str
    store: str

    @property
    def name(self) -> str:
        return f"{self.target} {self.fault}, {self.moment}, {self.store}"

    @property
    def possible(self) -> bool:
        if self.target == "rank":
            # A gang's run is a world of its own, in which ranks do whatever there is to do.
            return self.moment in ("stage", "materialize", "evaluate", "export")
        return self.store == {"disk": "folder", "bucket": "s3"}.get(self.target, self.store)

    @property
    def world(self) -> str:
        return "gang" if self.target == "rank" else MOMENTS[self.moment][0]

    @property
    def pairs(self) -> set[tuple[str, ...]]:
        event = f"{self.target} {self.fault}"
        return {(event, self.moment), (event, self.store), (self.moment, self.store)}


def every_case() -> list[Case]:
    """Every case there can be."""
    events = [(fault, target) for fault, targets in FAULTS.items() for target in targets]
    cases = [Case(*event, moment, store) for event, moment, store in itertools.product(events, MOMENTS, STORES)]
    return [case for case in cases if case.possible]


def pairwise(cases: Sequence[Case], seed: int) -> list[Case]:
    """Choose cases that hold every pair which some case holds, each time one with the most pairs that are missing."""
    left = list(cases)
    random.Random(seed).shuffle(left)
    missing = set().union(*(case.pairs for case in left))
    chosen: list[Case] = []
    while missing:
        best = max(left, key=lambda case: len(case.pairs & missing))
        chosen.append(best)
        left.remove(best)
        missing -= best.pairs
    return chosen


# -- what a run has left --------------------------------------------------------------------------------------------


def results(store: str) -> dict[str, Any]:
    """Node -> what it found out, for all that trained, scored or asked: weights by digest, scores as they are."""
    storage = open_storage(store)
    nodes = NodeStore(storage)
    found: dict[str, Any] = {}
    for node in storage.list("nodes"):
        commit = nodes.commit_of(node)
        if commit is None:
            continue
        result = commit.result
        if "parts" in result:
            found[node] = {name: part["digest"] for name, part in result["parts"].items()}
        elif "score" in result or "test" in result:
            kept = result.get("score", result.get("test"))
            found[node] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


# -- the faults -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that was called, and the file of what it says."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")


@dataclass
class Stage:
    """Where a case is played: its processes, its disk, its bucket."""

    case: Case
    home: RayHome
    folder: Path
    config: Path
    store: str
    environment: Mapping[str, str]
    proxy: FaultyProxy | None
    draw: random.Random
    driver: Command | None = None
    others: list[Command] = field(default_factory=list)
    started: int = 0

    def start(self) -> Command:
        self.started += 1
        output = self.folder.parent / f"output-{self.started}.txt"
        return Command(self.home.start(str(self.config), "--quiet", output=output, **self.environment), output)

    def pid(self) -> int | None:
        """The process to be hit, one of them by lot; None when there is none."""
        assert self.driver is not None
        if self.case.target == "driver":
            return self.driver.process.pid
        title = TITLES[self.case.target]
        found = sorted(pid for pid, name in self.home.processes().items() if title in name.split(" ")[0])
        return self.draw.choice(found) if found else None

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for path in self.folder.rglob("log.jsonl"):
            with contextlib.suppress(OSError):
                for line in path.read_text().splitlines():
                    with contextlib.suppress(ValueError):
                        found.append(json.loads(line))
        return found

    def under_way(self) -> list[str]:
        """Kinds of the tasks that were given out and have not been committed."""
        running: dict[str, str] = {}
        for line in self.lines():
            if line.get("event") == "submitted":
                running[line["node"]] = line["kind"]
            elif line.get("event") == "committed":
                running.pop(line["node"], None)
        return sorted(running.values())

    def has_come(self, nodes: int) -> bool:
        kind = MOMENTS[self.case.moment][1]
        if kind is not None:
            return kind in self.under_way()
        return sum(line.get("event") == "committed" for line in self.lines()) >= nodes


def kill(stage: Stage) -> None:
    os.kill(_there(stage), signal.SIGKILL)


def freeze(stage: Stage) -> None:
    """Stop a process; of a driver a second one takes the run over meanwhile."""
    pid = _there(stage)
    os.kill(pid, signal.SIGSTOP)
    if stage.case.target == "driver":
        stage.others.append(stage.start())
    time.sleep(FROZEN_S)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def starve(stage: Stage) -> None:
    """No more address space than the process has."""
    pid = _there(stage)
    used = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(used.split()[1]) << 10
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def fill(stage: Stage) -> None:
    filler = stage.folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\1" * size)
        time.sleep(OUTAGE_S)
    filler.unlink()


def lock(stage: Stage) -> None:
    def remount(way: str) -> bool:
        done = subprocess.run(["mount", "-o", f"remount,{way}", str(stage.folder)], capture_output=True, check=False)
        return done.returncode == 0

    # Refused while a file is open for writing.
    wait_for(lambda: remount("ro"), 60)
    time.sleep(OUTAGE_S)
    assert remount("rw")


def silence(stage: Stage) -> None:
    _answer(stage, Fault.RESET_BEFORE)


def refuse(stage: Stage) -> None:
    _answer(stage, Fault.DENIED)


def _answer(stage: Stage, fault: Fault) -> None:
    assert stage.proxy is not None
    stage.proxy.choose = lambda _: fault
    time.sleep(OUTAGE_S)
    stage.proxy.choose = lambda _: None


def _there(stage: Stage) -> int:
    return int(wait_for(stage.pid, 60, lambda: f"no {stage.case.target} among {stage.home.processes()}"))


DO: dict[str, Callable[[Stage], None]] = {
    "killed": kill,
    "frozen": freeze,
    "no memory": starve,
    "full": fill,
    "read-only": lock,
    "silent": silence,
    "refusing": refuse,
}

# -- playing --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a case. `wrong` is empty when all is well."""

    case: str
    fault: str
    target: str
    moment: str
    store: str
    #: Kinds of tasks that were under way.
    during: list[str] = field(default_factory=list)
    #: Exit codes of the commands, in order, and the first error that each said which did not end with 0.
    codes: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    wrong: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Theatre:
    """Plays cases; keeps what the run left alone comes to, world by world."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._expected: dict[str, dict[str, Any]] = {}
        self._nodes: dict[str, int] = {}
        self._s3: S3Server | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Theatre:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expected(self, world: str) -> dict[str, Any]:
        if world not in self._expected:
            place = self.folder / f"alone-{world}"
            config = self._write(place, world, str(place / "store"), "local")
            output = place / "output.txt"
            home = RayHome(place)
            code = home.start(str(config), "--quiet", output=output).wait(timeout=LIMIT_S)
            if code:
                raise SystemExit(f"{world}: the run left alone fails: {output.read_text()[-3000:]}")
            self._expected[world] = results(str(place / "store"))
            self._nodes[world] = len(list((place / "store" / "nodes").glob("*/commit.json")))
            assert len(self._expected[world]) >= 2, self._expected[world]
        return self._expected[world]

    def _write(self, place: Path, world: str, store: str, runner: str) -> Path:
        data = self.folder / "data" / world
        data.mkdir(parents=True, exist_ok=True)
        resources: dict[str, Any] = {"runner": runner, "device": "cpu", "slots": 2, "threads": 1, "max_attempts": 4}
        if world == "gang":
            resources |= {"gang": {"size": 2}}
            del resources["slots"]
        changes = {**WORLDS[world](data), "run_dir": str(place / "run"), "store": store, "resources": resources}
        if world == "gang" and runner == "local":
            # Ranks of a gang are a part of what a stage is: the run left alone has them, too.
            resources["runner"] = "ray"
        return write_config(place, changes)

    def play(self, case: Case) -> Outcome:
        outcome = Outcome(case.name, **asdict(case))
        started = time.monotonic()
        expected = self.expected(case.world)
        with contextlib.ExitStack() as stack:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-", ignore_cleanup_errors=True)))
            place = root / "place"
            if case.target == "disk":
                stack.enter_context(_disk(place))
            else:
                place.mkdir()
            (root / "ray").mkdir()
            home = RayHome(root / "ray")
            stack.callback(home.kill_all)
            store, environment, proxy = str(place / "store"), {}, None
            if case.store == "s3":
                store, environment, proxy = self._bucket(stack, root)
            config = self._write(place, case.world, store, "ray")
            draw = random.Random(f"{self.seed}/{case.name}")
            stage = Stage(case, home, place, config, store, environment, proxy, draw)
            try:
                self._play(stage, outcome, expected)
            except AssertionError as error:
                outcome.wrong = outcome.wrong or str(error)[-2000:]
        outcome.seconds = round(time.monotonic() - started, 1)
        return outcome

    def _bucket(self, stack: contextlib.ExitStack, root: Path) -> tuple[str, dict[str, str], FaultyProxy]:
        if self._s3 is None:
            (self.folder / "weed").mkdir()
            self._s3 = self._stack.enter_context(seaweed_server(self.folder / "weed"))
        proxy = stack.enter_context(faulty_proxy(self._s3.port))
        environment = {
            **self._s3.environment,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "SEGPROP_CACHE_DIR": str(root / "machine"),
        }
        os.environ.update(self._s3.environment)
        return S3Server.address(), environment, proxy

    def _play(self, stage: Stage, outcome: Outcome, expected: dict[str, Any]) -> None:
        stage.driver = stage.start()
        driver = stage.driver
        ended = driver.process.poll
        nodes = self._nodes[stage.case.world]
        wait_for(lambda: stage.has_come(nodes) or ended() is not None, LIMIT_S, lambda: driver.said[-2000:])
        outcome.during = stage.under_way()
        if ended() is None:
            time.sleep(stage.draw.uniform(0, 0.3))
            with contextlib.suppress(ProcessLookupError):
                DO[stage.case.fault](stage)
        for command in (stage.driver, *stage.others):
            self._wait(stage, command, outcome)
        while outcome.codes[-1] != 0 and len(outcome.codes) <= RERUNS + len(stage.others):
            stage.home.wait_gone(killed=True, timeout_s=120)
            self._wait(stage, stage.start(), outcome)
        assert outcome.codes[-1] == 0, f"did not end well: {outcome.said}"
        found = results(stage.store)
        assert found == expected, f"other results: {sorted(set(found) ^ set(expected)) or 'same nodes, other values'}"
        stage.home.wait_gone(killed=True, timeout_s=120)

    def _wait(self, stage: Stage, command: Command, outcome: Outcome) -> None:
        try:
            code = command.process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {command.said[-2000:]}") from None
        text = command.said
        outcome.codes.append(code)
        if code:
            outcome.said.append(next((line[:300] for line in text.splitlines() if line.startswith("segprop: ")), ""))
        assert "Traceback (most recent call last)" not in text, f"a traceback: {text[-2000:]}"
        struck = stage.case.target == "driver" and stage.case.fault in ("killed", "no memory")
        assert code >= 0 or struck, f"ended by signal {-code}: {text[-2000:]}"


def _report(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| fault | cases | right at once | told, then right by the same command | wrong |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_event: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        by_event[f"{outcome.target} {outcome.fault}"].append(outcome)
    for event, each in sorted(by_event.items()):
        wrong = sum(bool(one.wrong) for one in each)
        once = sum(one.codes[:1] == [0] for one in each if not one.wrong)
        lines.append(f"| {event} | {len(each)} | {once} | {len(each) - once - wrong} | {wrong} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play the cases; returns 1 when one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("matrix.jsonl"))
    parser.add_argument("--count", type=int, default=0, help="cases at most; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--all", action="store_true", help="every case, not only one for each pair")
    parser.add_argument("--list", action="store_true", help="say the cases and play none")
    asked = parser.parse_args(arguments)
    cases = every_case()
    cases = [case for case in (cases if asked.all else pairwise(cases, asked.seed)) if asked.only in case.name]
    outcomes: list[Outcome] = []
    if asked.out.exists():
        outcomes = [Outcome(**json.loads(line)) for line in asked.out.read_text().splitlines()]
    done = {outcome.case for outcome in outcomes}
    left = [case for case in cases if case.name not in done]
    if asked.list:
        print("\n".join(case.name for case in left))
        return 0
    if asked.count:
        left = left[: asked.count]
    with tempfile.TemporaryDirectory(prefix="sp-matrix-") as folder, Theatre(Path(folder), asked.seed) as theatre:
        for number, case in enumerate(left, 1):
            outcome = theatre.play(case)
            outcomes.append(outcome)
            with asked.out.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(
                f"[{number}/{len(left)}] {case.name}: {outcome.codes} {outcome.wrong or 'right'} ({outcome.seconds} s)"
            )
            sys.stdout.flush()
    print(_report(outcomes))
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
