"""A fork server: it has imported the code of a run, and forks the process of each run.

These imports take seconds, which runs then need not wait for. Nothing else is done before the fork:
no thread is started, no connection opened, no model loaded.

Run as ``python -m fedloom.deployment.fork_server``; for each line of its standard input, the arguments of
Flower's ``flwr-serverapp`` as a list in JSON, a process is forked. It ends with the one that started it,
and with it the processes of runs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

from fedloom.runs.parent_process import end_with_parent

NEEDED = ("fedloom.deployment.serverapp", "flwr.superlink.cli.flwr_serverapp")
"""Modules that the process of a run imports."""


def main() -> None:
    """Fork until the input ends."""
    end_with_parent()
    for name in NEEDED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the exit status of a run
    for line in sys.stdin:
        if os.fork() == 0:
            run_process(json.loads(line))
            return


def run_process(arguments: list[str]) -> None:
    """Run as the process of a run."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # Flower sends the output of such a process nowhere
        os.dup2(nowhere, descriptor)
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    sys.argv = ["flwr-serverapp", *arguments]
    try:
        flwr_serverapp()
    except SystemExit as end:  # how Flower ends the process: all has been sent and closed by then
        code = end.code if isinstance(end.code, int) else 1
    else:
        code = 0
    os._exit(code)  # a normal interpreter shutdown took seconds


if __name__ == "__main__":
    main()
