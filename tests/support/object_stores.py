"""Real S3 servers on loopback, started by the tests: SeaweedFS and rclone, both from PyPI."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import wait_for

KEY, SECRET, BUCKET = "testkey", "testsecret", "bucket"


@dataclass(frozen=True)
class S3Server:
    """A running server. `environment`: what a client needs to find it."""

    endpoint: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    @staticmethod
    def address() -> str:
        """A prefix nobody else uses."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below those that outgoing connections are given."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def program(name: str) -> str:
    """The path of a program installed beside this interpreter; the test is skipped where there is none."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def running(command: list[str], endpoint: str, log: Path) -> Iterator[S3Server]:
    """The server `command` starts, once it answers; killed, with its children, afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(
            lambda: process.poll() is None and _answers(endpoint),
            90,
            lambda: f"{command[0]} does not answer:\n{log.read_text(errors='replace')[-2000:]}",
        )
        yield S3Server(endpoint, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{endpoint}/", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def _puts(server: S3Server) -> bool:
    import obstore
    from obstore.store import S3Store

    client = S3Store(
        BUCKET,
        endpoint=server.endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True, "timeout": "10s"},
        retry_config={"max_retries": 0},
    )
    try:
        obstore.put(client, "ready", b"1")
    except obstore.exceptions.BaseError:
        return False
    return True


@contextlib.contextmanager
def seaweed_server(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS in one process: it honours conditional PUTs."""
    weed = program("weed")
    (folder / "data").mkdir()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    settings = folder / "s3.json"
    settings.write_text(json.dumps({"identities": [identity]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    *others, s3, s3_grpc = free_ports(len(names) + 2)
    command = [
        weed,
        f"-logdir={folder}",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        # Deleted objects keep their room for a while, and all tests of a process write to the same server.
        "-volume.max=400",
        "-filer",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.config={settings}",
        f"-s3.localSocket={folder / 's3.sock'}",
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_grpc}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in zip(names, others, strict=True)),
    ]
    with running(command, f"http://127.0.0.1:{s3}", folder / "weed.txt") as server:
        # The first object makes the bucket, once the volume server has joined.
        wait_for(lambda: _puts(server), 60, lambda: server.log.read_text(errors="replace")[-2000:])
        yield server


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """rclone over a folder: it ignores the condition of a conditional PUT."""
    rclone = program("rclone")
    (folder / "data" / BUCKET).mkdir(parents=True)
    (port,) = free_ports(1)
    command = [
        rclone,
        "serve",
        "s3",
        f"--config={folder / 'rclone.conf'}",
        f"--addr=127.0.0.1:{port}",
        f"--auth-key={KEY},{SECRET}",
        str(folder / "data"),
    ]
    with running(command, f"http://127.0.0.1:{port}", folder / "rclone.txt") as server:
        yield server


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for all tests."""
    with seaweed_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One rclone for all tests."""
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def s3(seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """SeaweedFS, with this process's environment pointing at it and a cache folder of the test's own."""
    use(seaweed, tmp_path, monkeypatch)
    return seaweed


def use(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process at `server`."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SEGPROP_CACHE_DIR", str(tmp_path / "machine"))
