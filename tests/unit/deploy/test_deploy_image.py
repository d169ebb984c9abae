"""The image: pinned, not root, nothing from outside the lock; and the hook that lets stages checkpoint."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "deploy" / "docker"
HOOK = DOCKER / "segprop-pre-stop"


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def stages(dockerfile: str) -> dict[str, str]:
    """Stage -> what it is built from."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)}


def test_there_is_a_cpu_and_a_cuda_target_on_one_base_pinned_by_digest(dockerfile: str) -> None:
    found = stages(dockerfile)
    assert {"cpu", "cuda"} <= set(found)
    outside = {base for base in found.values() if base not in found}
    assert outside == {"${PYTHON_IMAGE}@${PYTHON_DIGEST}"}
    assert re.search(r"^ARG PYTHON_DIGEST$", dockerfile, re.MULTILINE), "no default: it would go stale unnoticed"


def test_everything_comes_from_the_lock_with_hashes_and_no_index_is_named(dockerfile: str) -> None:
    installs = re.findall(r"uv pip install (.*)", dockerfile)
    assert len(installs) == 2
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation ." in installs[1]
    (tool,) = re.findall(r"pip install (?!.*requirements)(.* -r .*)", dockerfile)
    assert "--require-hashes --no-deps -r uv.lock" in tool
    locked = (DOCKER / "uv.lock").read_text()
    assert re.search(r"^uv==[\d.]+ \\\n    --hash=sha256:[0-9a-f]{64}", locked, re.MULTILINE)
    assert not re.search(r"index-url|extra-index|find-links|https?://", dockerfile)


def test_it_runs_as_a_number_that_is_not_root_in_both_targets(dockerfile: str) -> None:
    users = re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)
    assert users == ["1000:1000"]
    # Both targets come after the stage that sets it, and neither sets another.
    assert dockerfile.index("USER 1000") < dockerfile.index("FROM runtime AS cpu")


def test_the_build_context_has_what_the_dockerfile_copies_and_little_else(dockerfile: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "everything is left out by default"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in allowed)


def test_the_packages_of_the_project_are_all_copied(dockerfile: str) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for top in {name.rstrip("*") for name in packages}:
        assert f"COPY {top} {top}\n" in dockerfile


def test_ray_in_the_manifests_is_ray_of_the_lock() -> None:
    (version,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    cluster = yaml.safe_load((ROOT / "deploy" / "base" / "cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == version


# -- segprop-pre-stop -----------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with processes of a pod: the test's own processes are in nobody's way."""
    folder = tmp_path / "proc"
    folder.mkdir()
    add(folder, 1, "ray", "start", "--head")
    (folder / "self").mkdir()
    return folder


def add(proc: Path, pid: int, *arguments: str) -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in arguments))


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[bytes]]:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def start(proc: Path, seconds: int = 20) -> subprocess.Popen[bytes]:
    environment = {"PATH": "/usr/bin:/bin", "SEGPROP_PROC": str(proc), "SEGPROP_PRE_STOP_S": str(seconds)}
    return subprocess.Popen(["bash", str(HOOK)], env=environment)


@pytest.mark.parametrize(
    "program",
    [
        ("-m", "orchestrator.run"),
        ("-u", "-m", "orchestrator.run"),
        ("/opt/venv/bin/segprop", "run"),
        ("/opt/venv/bin/segprop", "sweep"),
    ],
    ids=" ".join,
)
def test_the_hook_stops_the_driver_and_waits_until_it_is_gone(
    proc: Path, driver: subprocess.Popen[bytes], program: tuple[str, ...]
) -> None:
    add(proc, driver.pid, "/opt/venv/bin/python", *program, "configs/quickstart.yaml", "store=/data/s")
    hook = start(proc)
    assert driver.wait(timeout=20) == 7, "it got SIGTERM, not SIGKILL"
    time.sleep(1.5)
    assert hook.poll() is None, "the driver is still in the table"
    (proc / str(driver.pid) / "cmdline").unlink()
    assert hook.wait(timeout=20) == 0


def test_the_hook_waits_for_a_stage_without_signalling_it(proc: Path, driver: subprocess.Popen[bytes]) -> None:
    add(proc, driver.pid, "ray::Worker.run")
    hook = start(proc)
    time.sleep(1.5)
    assert hook.poll() is None
    assert driver.poll() is None, "Ray's own processes are left to Ray"
    add(proc, driver.pid, "ray::Worker")
    assert hook.wait(timeout=20) == 0


def test_the_hook_has_nothing_to_do_with_others(proc: Path, driver: subprocess.Popen[bytes]) -> None:
    add(proc, driver.pid, "/bin/sh", "-c", "python -m orchestrator.run configs/quickstart.yaml")
    started = time.monotonic()
    assert start(proc).wait(timeout=20) == 0
    assert time.monotonic() - started < 5
    assert driver.poll() is None
    assert driver.send_signal(signal.SIGTERM) is None


def test_the_hook_gives_up_in_time(proc: Path, driver: subprocess.Popen[bytes]) -> None:
    add(proc, driver.pid, "ray::Worker.run")
    assert start(proc, seconds=1).wait(timeout=20) == 0
