"""Run as a program: a Ray cluster of a head without devices and three nodes of one, ordered about by lines on
standard input. `three_nodes.py FOLDER` prints the address, then answers every line with one line of JSON.

    remove N | kill N | add     take node N away in order; kill its raylet; add another node like the first
    left                        {"nodes", "actors", "groups", "held"}: alive nodes, living actors, placement groups,
                                devices that somebody holds

On a busy machine a raylet may give up while it starts: it is then started again.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# As RayHome does for other processes; Ray reads this when it is imported.
os.environ["RAY_TMPDIR"] = sys.argv[1]

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

ZONES = ("a", "b", "b")
# A raylet waits half a minute for its agent, too little on a busy machine, and dies. Without what the dashboard needs
# the agent loads in a fraction of the time.
ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not wanted here")


def stubborn(start: Any) -> Any:
    for attempt in range(20):
        try:
            return start()
        except Exception as error:  # noqa: BLE001  Ray raises a bare Exception
            print(f"attempt {attempt + 1}: {error}", file=sys.stderr, flush=True)
    raise SystemExit("no node starts")


def main() -> None:
    cluster = stubborn(
        lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    )

    def add(zone: str) -> Any:
        return stubborn(lambda: cluster.add_node(num_cpus=1, labels={"zone": zone}))

    nodes = [add(zone) for zone in ZONES]
    say(cluster.address)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "remove":
            cluster.remove_node(nodes[int(arguments[0])])
        elif command == "kill":
            nodes[int(arguments[0])].kill_raylet()
        elif command == "add":
            nodes.append(add(ZONES[0]))
        say(left(cluster.address) if command == "left" else "done")
    cluster.shutdown()


def left(address: str) -> dict[str, Any]:
    # Connected for this look alone: whoever stays connected to a raylet goes with it when it is killed.
    with ray.init(address=address, log_to_driver=False):
        return _left()


def _left() -> dict[str, Any]:
    have, free = ray.cluster_resources().get("CPU", 0), ray.available_resources().get("CPU", 0)
    return {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "actors": sum(actor["State"] != "DEAD" for actor in actors().values()),
        "groups": sum(group["state"] != "REMOVED" for group in placement_group_table().values()),
        "held": have - free,
    }


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
