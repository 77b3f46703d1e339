"""Starts a process for each run when Flower's server requests it, and ends with the server.

Run as ``python -m fedloom.deployment.flower_starter ARGUMENT ...`` with the arguments of
``flower-superexec``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from fedloom.runs.parent_process import end_with_parent, of_this_process


class Forking(SubprocessExecutor):
    """Starts the processes of runs through the fork server (``fork_server.py``), and no others."""

    def __init__(self) -> None:
        """Start the fork server."""
        self._server = self._started()

    def get_eligible_capacity(
        self,
        supported_task_types: set[TaskType],
        *,
        insecure: bool = False,
        root_certificates_path: str | None = None,
    ) -> tuple[set[TaskType], set[str]]:
        """Return what is asked of Flower's server."""
        return {TaskType.SERVER_APP}, set()

    def reconcile(self) -> None:
        """Start the fork server again if it has died; called many times a second."""
        if self._server.poll() is not None:
            self._server = self._started()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Have the process of a run forked."""
        arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
        arguments += ["--root-certificates", str(spec.root_certificates_path)]
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps(arguments).encode() + b"\n")
        except BrokenPipeError:
            return LaunchResult.failed("the fork server has died")
        return LaunchResult.accepted()

    @staticmethod
    def _started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedloom.deployment.fork_server"],
            bufsize=0,
            stdin=subprocess.PIPE,
            env={**os.environ, **of_this_process()},
        )


def main() -> None:
    """Start what Flower's server asks for, until it is stopped."""
    end_with_parent()
    flower: Any = run_superexec
    flower.get_executor = lambda kind, **options: Forking()
    flower_superexec()


if __name__ == "__main__":
    main()
