"""Runs what Flower starts a process with for each run, so that it ends with the server.

Run as ``python -m fedloom.deployment.flower_starter ARGUMENT ...`` with the arguments of
``flower-superexec``.
"""

from __future__ import annotations

from fedloom.deployment.parent import end_with_parent


def main() -> None:
    """Run it."""
    end_with_parent()
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


if __name__ == "__main__":
    main()
