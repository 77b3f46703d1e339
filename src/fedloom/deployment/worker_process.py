"""The process of a worker: it takes the lock of its folder before slow imports.

Run as ``python -m fedloom.deployment.worker_process HOME``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fedloom.deployment.worker_lock import LOCK
from fedloom.errors import FedloomError
from fedloom.runs.parent_process import end_with_parent
from fedloom.storage.files import lock


def main() -> None:
    """Run the worker of the folder on the command line, unless another one runs."""
    end_with_parent()
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    client_folder = Path(sys.argv[1])
    try:
        held = lock(client_folder / LOCK)
    except FedloomError as error:
        sys.exit(f"ERROR {error}")
    if held is not None:
        from fedloom.deployment.worker import run

        sys.exit(run(client_folder))


if __name__ == "__main__":
    main()
