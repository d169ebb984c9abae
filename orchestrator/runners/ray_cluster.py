"""Join or start the Ray cluster a run works on, see its machines, check that all of them see the store."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache_store.errors import SegpropError, UserError, first_line
from orchestrator.runners import shared_storage
from orchestrator.runners.machines import Machine
from orchestrator.runners.ray_worker import answer

#: Ray gives its own processes 15 s each to come up, too few on a very busy machine, and then gives up.
LOCAL_STARTS = 4
#: What is left of a Ray that was started here gets this long to end by itself once it has been shut down.
LEAVING_S = 5.0
#: A machine that has not answered the probe of the store by then is left out of it, with a warning.
PROBE_DEADLINE_S = 60.0

#: Environment variables of Ray: whether a cluster asks for a token, the token, and the file that holds it.
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

_log = logging.getLogger("segprop.cluster")


@dataclass(frozen=True)
class Process:
    """A process of this machine; a later one with its number is another."""

    pid: int
    #: When it started, in ticks of the system's clock; None where there was no such process any more.
    since: int | None

    @classmethod
    def now(cls, pid: int) -> Process:
        """Return the process that has this number now."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return cls(pid, None)
        # Fields 3 and 22 of proc(5). One that has ended and waits for its parent to ask is no process any more.
        return cls(pid, None if fields[0] in "ZX" else int(fields[19]))


def living(processes: Iterable[Process]) -> set[Process]:
    """Return those that have not ended."""
    return {process for process in processes if process.since is not None and process == Process.now(process.pid)}


def connect(address: str | None, cpus: int) -> frozenset[Process]:
    """Join the cluster at `address`, else that of RAY_ADDRESS, else start one on this machine with `cpus` CPUs.

    Returns the processes that were started for it, for `disconnect`; none of a cluster that was there. Raises UserError
    when the cluster does not let us in, does not fit this program, or would be started without a token.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        # "local": without it ray.init would join whatever `ray start` left running on this machine.
        secure_token()
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus}
        # Ray's own default is 15: beside any other load on the machine its workers would hardly run.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        started = init(options, attempts=1 if address else LOCAL_STARTS)
        return frozenset() if address else started
    except (ConnectionError, RayError) as error:  # of a missing token Ray says so itself, before it asks anybody
        cause = first_line(error.__cause__ or error)
        if not address:
            raise SegpropError(f"Ray does not start on this machine: {cause}") from error
        raise UserError(
            f"resources.address: no Ray cluster lets us in at {address} ({cause}); is it running, and, where "
            "it asks for tokens, is RAY_AUTH_MODE=token set with a token at hand?"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UserError(f"resources.address: this program does not fit the cluster at {address}: {error}") from None


def secure_token() -> None:
    """Make sure, before `ray.init` starts a cluster, that it asks for a token which no other user can read.

    Ray's processes listen on all interfaces, also where the cluster is this machine alone, and Ray makes its token in a
    file that everybody may read. Without one in RAY_AUTH_TOKEN or the file of RAY_AUTH_TOKEN_PATH (by default
    ``~/.ray/auth_token``) a new one is written there, mode 0600; where that cannot be, it lies in this process's
    environment, from which Ray's inherit it. UserError where RAY_AUTH_MODE switches tokens off.
    """
    mode = os.environ.get(MODE)
    if mode is not None and mode.lower() != "token":
        raise UserError(
            f"{MODE}={mode}: the Ray that a run starts listens on all interfaces of this machine, and without a token "
            f"whoever reaches it may run code here; allowed: leave {MODE} out (a token is made), join a cluster of "
            "your own by resources.address, or take resources.runner: local"
        )
    if os.environ.get(TOKEN):
        return
    try:
        named = os.environ.get(TOKEN_PATH)
        _own_token(Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token")
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        os.environ[TOKEN] = secrets.token_hex(32)


def _own_token(path: Path) -> None:
    """Have a token in `path` that its owner alone can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # Linked into place, so that another run that starts now reads a whole token or none.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            os.unlink(draft)
    status = path.stat()
    if status.st_mode & 0o077 and status.st_uid == os.getuid():
        path.chmod(0o600)


def disconnect(started: Collection[Process]) -> None:
    """Leave the cluster, and end what is left of the processes `started` for it and of theirs, its workers among them.

    Ray ends the workers it knows. One that has said goodbye to it and hangs in its exit, or what a worker started and
    left, would stay for ever.
    """
    there = living(process for root in started for process in (root, *_descendants(root.pid)))
    ray.shutdown()
    deadline = time.monotonic() + LEAVING_S
    while (there := living(there)) and time.monotonic() < deadline:
        time.sleep(0.02)
    _end(there)


def init(options: Mapping[str, Any], attempts: int) -> frozenset[Process]:
    """Call `ray.init`, again where Ray's own processes did not come up in time, and return the processes it started.

    SegpropError when they never do. What a start that failed has started is ended: Ray forgets it, and it would outlive
    this process.
    """
    left = attempts
    while True:
        left -= 1
        before = _descendants(os.getpid())
        try:
            ray.init(**options)
            return frozenset(_descendants(os.getpid()) - before)
        except Exception as error:  # of its own processes Ray raises nothing more special
            if type(error) is not Exception:
                raise
            ray.shutdown()
            _end(_descendants(os.getpid()) - before)
            if not left:
                raise SegpropError(f"Ray does not start on this machine: {first_line(error)}") from error
            _log.warning("Ray did not start in its own time, once more: %s", first_line(error))


def _descendants(pid: int) -> set[Process]:
    """List the living processes below one; none where the system does not say."""
    found: set[Process] = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(Process.now(int(child)) for child in listing.read_text().split())
    return found.union(*(_descendants(process.pid) for process in found))


def _end(processes: Iterable[Process]) -> None:
    for process in living(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def living_nodes() -> list[dict[str, Any]]:
    """List the cluster's nodes as Ray tells them, without those that are gone."""
    return [node for node in ray.nodes() if node["Alive"]]


def machine_of(node: Mapping[str, Any]) -> Machine:
    """Return what a node offers."""
    resources = node["Resources"]
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return Machine(
        resources.get("CPU", 0), resources.get("GPU", 0), dict(node.get("Labels") or {}), tuple(sorted(kinds))
    )


def probe_store(store: str, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check that every machine reads what the driver wrote, and back. UserError naming those that do not see it."""
    question = shared_storage.ask(store)
    names = _names(nodes)
    sent = time.time()
    calls = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        call = answer.options(scheduling_strategy=pinned).remote(question, node["NodeID"], names[node["NodeID"]])
        calls[call] = node["NodeID"]
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=PROBE_DEADLINE_S)
    received = time.time()
    answers: list[tuple[str, shared_storage.Answer]] = []
    for call in done:
        try:
            answers.append((calls[call], ray.get(call)))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayError as error:  # it is gone, or going: no work will be given to it
            _log.warning("%s did not answer: %s", names[calls[call]], first_line(error))
    for call in late:
        _log.warning("%s has not said within %g s whether it sees the store", names[calls[call]], PROBE_DEADLINE_S)
        ray.cancel(call, force=True)
    shared_storage.judge(question, answers)
    for warning in shared_storage.clock_warnings([found for _, found in answers], sent, received):
        _log.warning("%s", warning)


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return node id -> what people call the machine; with a part of the id where several nodes share a host."""
    hosts = Counter(node["NodeManagerHostname"] for node in nodes)
    return {
        node["NodeID"]: node["NodeManagerHostname"]
        + (f" (Ray node {node['NodeID'][:8]})" if hosts[node["NodeManagerHostname"]] > 1 else "")
        for node in nodes
    }
