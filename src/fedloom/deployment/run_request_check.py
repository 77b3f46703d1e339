"""Checks the experiment of a waiting run, so that mistakes are reported at once.

It is a process of its own, as it needs seconds and some hundred megabytes to import what knows every
setting, and who watches a run is to need neither.

Run as ``python -m fedloom.deployment.run_request_check HOME ID``; prints a mistake, and exits with its
code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.participants import requested_run
from fedloom.deployment.run_requests import RunRequest, run_request_file
from fedloom.display.untrusted_text import message
from fedloom.errors import FedloomError


def main() -> int:
    """Check the named run request."""
    server_folder, id = ServerFolder(Path(sys.argv[1]).resolve()), sys.argv[2]
    run_request = RunRequest.read(run_request_file(server_folder, id))
    os.chdir(run_request.cwd)
    try:
        if run_request.resume is None:
            requested_run(server_folder, run_request)
    except FedloomError as error:
        print(message(str(error)))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
