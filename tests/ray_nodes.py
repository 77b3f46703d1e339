"""Nodes of a Ray cluster as processes of this machine, on its loopback address.

As a program: start a head and as many more nodes as asked, each with one CPU; print the head's address and
the process of each other node's raylet; end with standard input.
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


class Nodes:
    """A cluster with one node more than ``others``."""

    def __init__(self, others, folder):
        self.environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(others), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
        )
        started = json.loads(self._process.stdout.readline())
        self.address, self.others = started["address"], started["others"]

    def kill(self, node):
        """End a node at once, with all that runs on it."""
        raylet = psutil.Process(self.others[node])
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def close(self):
        """End them all."""
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def main():
    """See this file's description."""
    from ray.cluster_utils import Cluster

    count, folder = int(sys.argv[1]), sys.argv[2]
    lean = {"include_log_monitor": False, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "temp_dir": folder, **lean})
    others = [cluster.add_node(num_cpus=1, include_log_monitor=False) for _ in range(count)]
    raylets = [own.all_processes["raylet"][0].process.pid for own in others]
    print(json.dumps({"address": cluster.address, "others": raylets}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    main()
