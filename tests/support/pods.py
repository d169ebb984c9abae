"""Pods without Kubernetes: processes with the manifests' own commands, environment, volumes and security settings.

Where namespaces are permitted (Linux, root) every pod has its own network address, process table, host name and a
file system of its own: read-only but for its volumes, as uid 1000 without capabilities. The manifests' ports and
paths are then used as they are. Elsewhere pods share this machine's loopback: ports and folders are replaced.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

NETWORK = "10.77.0"
HEAD_SERVICE = "segprop-head-svc.segprop.svc.cluster.local"
#: Ports that KubeRay and Ray use unless told otherwise.
PORTS = {"port": 6379, "dashboard-port": 8265, "metrics-export-port": 8080, "dashboard-agent-listen-port": 52365}

#: Whatever happens to the tests' own process, the machine and with it every pod ends.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
MACHINE_FLAGS = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

#: The machine: a bridge, a network namespace per pod, and a first process that reaps what nobody waits for.
MACHINE = r"""
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/netns
ip link set lo up
ip link add br0 type bridge
ip addr add {network}.1/24 dev br0
ip link set br0 up
for i in $(seq 0 $(({pods} - 1))); do
    ip netns add p$i
    ip link add v$i type veth peer name eth0 netns p$i
    ip link set v$i master br0 up
    ip -n p$i addr add {network}.$((10 + i))/24 dev eth0
    ip -n p$i link set eth0 up
    ip -n p$i link set lo up
    ip -n p$i route add default via {network}.1
done
exec {python} -c 'import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    signal.pause()'
"""

#: One pod's file system, then its command. Arguments: root, host name, KEY=FOLDER mounts after it; reads the command
#: and the environment from the caller. Everything is read-only but the mounts and the emptyDirs.
POD = r"""
set -e
root=$1 name=$2; shift 2
hostname "$name"
mount -t tmpfs -o mode=755 tmpfs "$root"
for folder in /bin /sbin /lib /lib32 /lib64 /libx32; do
    if [ -L $folder ]; then cp -a $folder "$root"; elif [ -d $folder ]; then
        mkdir "$root$folder"; mount --bind -o ro $folder "$root$folder"
    fi
done
mkdir -p "$root"/{usr,etc,proc,sys,dev,tmp}
mount --rbind -o ro /usr "$root/usr"
mount --bind -o ro /etc "$root/etc"
# The head's service by name, as the cluster's DNS has it; nobody else is asked.
for file in hosts nsswitch.conf resolv.conf; do mount --bind "$ETC/$file" "$root/etc/$file"; done
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -m 1777 "$root/tmp/ray"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp/ray"
mount -t proc proc "$root/proc"
mount --rbind -o ro /sys "$root/sys"
for mapping in "$@"; do
    target=${mapping%%=*} source=${mapping#*=} mode=rw
    case $target in ro:*) target=${target#ro:} mode=ro;; esac
    mkdir -p "$root$target"
    mount --bind "$source" "$root$target"
    [ $mode = ro ] && mount -o remount,bind,ro "$root$target"
done
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --inh-caps=-all \
    --bounding-set=-all env --chdir="$WORKDIR" --ignore-environment /bin/bash -c "$COMMAND"
"""


def namespaces_permitted() -> bool:
    if os.environ.get("SEGPROP_TEST_LOOPBACK") or os.geteuid() != 0:
        return False
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "setpriv", "mount"))
    probe = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c", probe]
    return tools and subprocess.run(command, capture_output=True).returncode == 0


# -- what KubeRay makes of a manifest -------------------------------------------------------------------------------


def ray_start(group: dict[str, Any], address: str | None, replaced: dict[str, str] | None = None) -> str:
    """KubeRay's command for a pod of this group. `address`: of the head's GCS, None for the head itself."""
    parameters: dict[str, str] = dict(group.get("rayStartParams", {}))
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters.setdefault("num-cpus", str(limits["cpu"]))
    parameters.setdefault("memory", str(_bytes(limits["memory"])))
    if address is None:
        parameters.setdefault("dashboard-host", "0.0.0.0")
    else:
        parameters.setdefault("address", address)
    parameters.setdefault("metrics-export-port", str(PORTS["metrics-export-port"]))
    parameters.setdefault("dashboard-agent-listen-port", str(PORTS["dashboard-agent-listen-port"]))
    parameters["block"] = "true"
    parameters |= replaced or {}
    flags = [
        f"--{key}" if value.lower() == "true" else f"--{key}={value}"
        for key, value in sorted(parameters.items())
        if value.lower() != "false"
    ]
    role = "--head " if address is None else ""
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {role}{' '.join(flags)}"


def submit_command(job: dict[str, Any], dashboard: str, submission_id: str) -> str:
    """KubeRay's command for the submitter pod."""
    import json

    import yaml

    health = (
        f"import urllib.request; r=urllib.request.urlopen('{dashboard}/api/gcs_healthz', timeout=5); "
        "exit(0 if b'success' in r.read() else 1)"
    )
    environment = json.dumps(json.dumps(yaml.safe_load(job["runtimeEnvYAML"])))
    return (
        f'until python -c "{health}" >/dev/null 2>&1 ; do echo "Waiting for {dashboard}" ; sleep 2 ; done ; '
        f"if ! ray job status --address {dashboard} {submission_id} >/dev/null 2>&1 ; then "
        f"ray job submit --address {dashboard} --no-wait --runtime-env-json {environment} "
        f"--submission-id {submission_id} -- {job['entrypoint'].strip()} ; "
        f"fi ; ray job logs --address {dashboard} --follow {submission_id}"
    )


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}[quantity[-2:]]


def environment_of(container: dict[str, Any], maps: dict[str, dict[str, str]], token: str) -> dict[str, str]:
    """A container's variables as the kubelet and KubeRay (for `authOptions.mode: token`) set them."""
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            variables |= maps[source["configMapRef"]["name"]]
    variables |= {item["name"]: item["value"] for item in container.get("env", [])}
    return {**variables, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


# -- the pods -------------------------------------------------------------------------------------------------------


@dataclass
class Pods:
    """`image`: what lies at /opt/segprop; `data`: the folder that stands for the shared volume."""

    folder: Path
    image: Path
    data: Path
    isolated: bool = field(default_factory=namespaces_permitted)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _machine: subprocess.Popen[bytes] | None = None
    _inside: int = 0

    def open(self, count: int) -> None:
        """Prepare for `count` pods."""
        self._ports = _free_ports(4 * count + 1)
        if not self.isolated:
            return
        script = MACHINE.format(network=NETWORK, pods=count, python=shlex.quote(sys.executable))
        self._machine = subprocess.Popen(
            [*DIES_WITH_US, "unshare", *MACHINE_FLAGS, "bash", "-c", script],
            stdout=subprocess.PIPE,
        )
        assert self._machine.stdout is not None
        assert self._machine.stdout.readline() == b"ready\n"
        (first,) = psutil.Process(self._machine.pid).children()
        self._inside = first.pid
        etc = self.folder / "etc"
        etc.mkdir()
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{NETWORK}.10 {HEAD_SERVICE}\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "resolv.conf").write_text("")
        # Volumes belong to the pods' group, as fsGroup has it.
        for path in (self.data, *self.data.rglob("*")):
            os.chown(path, 1000, 1000)

    @property
    def gcs(self) -> str:
        return f"{HEAD_SERVICE}:6379" if self.isolated else f"127.0.0.1:{self._ports[0]}"

    @property
    def dashboard(self) -> str:
        return f"http://{HEAD_SERVICE}:8265" if self.isolated else f"http://127.0.0.1:{self._ports[1]}"

    def agent(self, index: int) -> str:
        """Where the pod's own probes ask, from inside the pod."""
        return (
            f"http://localhost:{PORTS['dashboard-agent-listen-port'] if self.isolated else self._ports[4 * index + 3]}"
        )

    def replacements(self, index: int) -> dict[str, str]:
        """Flags of `ray start` that must differ on a shared loopback; none where pods are isolated."""
        if self.isolated:
            return {}
        ports = dict(zip(PORTS, map(str, self._ports[4 * index : 4 * index + 4]), strict=True))
        ports["node-ip-address"] = "127.0.0.1"
        if index == 0:
            return {
                **ports,
                "temp-dir": f"{self.folder}/ray",
                "dashboard-host": "127.0.0.1",
                "ray-client-server-port": str(self._ports[-1]),
            }
        return {key: value for key, value in ports.items() if key not in ("port", "dashboard-port")}

    def translate(self, text: str) -> str:
        """The manifests' paths as this machine has them."""
        return text if self.isolated else text.replace("/data", str(self.data))

    def run(
        self, index: int, command: str, environment: dict[str, str], output: IO[bytes] | int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the command in pod `index`: in a file system of its own, in the pod's network."""
        variables = {"PATH": self._path(), **environment}
        exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
        if not self.isolated:
            variables["HOME"] = str(self.folder)
            process = subprocess.Popen(
                ["bash", "-c", self.translate(command)],
                cwd=self.image,
                env={key: self.translate(value) for key, value in variables.items()},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.started.append(process)
            return process
        root = self.folder / f"root-{len(self.started)}"
        root.mkdir()
        # The interpreter, what it imports, and the code: at the paths they have here.
        readable = dict.fromkeys(str(Path(path).resolve()) for path in (sys.base_prefix, sys.prefix))
        mounts = [f"ro:{path}={path}" for path in readable]
        mounts += [f"ro:/opt/segprop={self.image}", f"/data={self.data}"]
        process = subprocess.Popen(
            [
                *("nsenter", "--target", str(self._inside), "--net", "--mount", "--pid", "--"),
                *("ip", "netns", "exec", f"p{index}"),
                *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", POD, "pod", str(root), f"pod-{index}", *mounts),
            ],
            env={
                "PATH": os.environ["PATH"],
                "ETC": str(self.folder / "etc"),
                "WORKDIR": "/opt/segprop",
                "COMMAND": f"export {exports}; {command}",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def execute(self, main: subprocess.Popen[bytes], command: str) -> subprocess.Popen[bytes]:
        """The command inside the pod whose command is `main`, as a preStop hook or `kubectl exec` has it."""
        assert self.isolated
        # unshare's child is the pod's first process, chrooted into its file system.
        (first,) = (item for item in _family(main.pid) if _is_first(item.pid))
        target = str(first.pid)
        return subprocess.Popen(
            [
                "nsenter",
                "--target",
                target,
                "--all",
                "--root",
                "--wd",
                "--",
                "/bin/bash",
                "-c",
                f"export PATH={self._path()}; {command}",
            ]
        )

    def _path(self) -> str:
        return f"{Path(sys.executable).parent}:/opt/segprop/bin:/usr/bin:/bin"

    def close(self) -> None:
        """End everything that was started here, by pid; nothing of it is left."""
        if self._machine is not None:
            for process in psutil.Process(self._machine.pid).children():
                process.kill()  # the first process of the machine: all others go with it
            self._machine.wait(timeout=30)
        for process in self.started:
            if not self.isolated:
                for child in _family(process.pid):
                    child.kill()
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_first(pid: int) -> bool:
    """Whether the process is number 1 of a process namespace of its own."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
    return len(numbers) > 2 and numbers[-1] == "1"


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, outside the range of Ray's workers (10002 to 19999)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
