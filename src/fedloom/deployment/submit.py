"""Runs between machines: requested here, executed by a process that Flower starts.

Who watches a run does nothing for it: it may be ended and begun again at any time.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedloom.deployment.administration import ask
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.run_requests import Asked, read_run_events, run_event_file, show
from fedloom.deployment.withdrawal import Work
from fedloom.errors import FedloomError, Interrupted, OutputError, SettingsError
from fedloom.runs.observers import RunObserver
from fedloom.settings.toml import parse_toml, require_section
from fedloom.storage.files import lock_owner
from fedloom.storage.run_folder import EXPERIMENT


def ask_for_run(
    server_folder: Path,
    experiment: Path | None,
    assignments: Iterable[str] = (),
    *,
    resume: Path | None = None,
    from_round: int | None = None,
    fresh_clients: Iterable[int] = (),
    name: str | None = None,
) -> dict[str, Any]:
    """Put a run into the queue of a server; return its status.

    Args:
        server_folder: The server's folder.
        experiment: An experiment in TOML; ``None`` to continue the run in ``resume``.
        assignments: As after ``--set``.
        resume: A run folder.
        from_round: Continue after the checkpoint of this round.
        fresh_clients: Clients that start with an empty store.
        name: What the run is called in the queue; the name of the experiment's file or of the run
            folder otherwise.

    Raises:
        ConnectionFailed: No server runs in the folder.
        OutputError: The experiment cannot be read.
        SettingsError: It is not TOML.
    """
    text, called = None, resume.name if resume is not None else ""
    if experiment is not None:
        try:
            text = experiment.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"cannot read the experiment {experiment}: {error}") from None
        require_section(
            parse_toml(text, str(experiment)), str(experiment)
        )  # reported without a server
        called = experiment.stem
    asked = Asked(
        name=name or called,
        cwd=str(Path.cwd()),
        source=str(experiment) if experiment is not None else "the experiment",
        text=text,
        assignments=list(assignments),
        resume=str(resume.resolve()) if resume is not None else None,
        from_round=from_round,
        fresh_clients=list(fresh_clients),
    )
    found: dict[str, Any] = ask(ServerFolder(server_folder), "submit", **asked.model_dump())
    return found


def find_run(server_folder: Path, run: str | None) -> dict[str, Any]:
    """Return the status of the current run, or of the one whose id or name has this beginning.

    Raises:
        ConnectionFailed: No server runs in the folder.
        SettingsError: There is no such run.
    """
    runs = ask(ServerFolder(server_folder), "runs")
    for own in runs:
        if run is None or own["id"].startswith(run) or own["name"] == run:
            found: dict[str, Any] = own
            return found
    there = ", ".join(f"{own['name']} ({own['id'][:8]})" for own in runs) or "none"
    what = "no run is under way" if run is None else f"no run is called {run!r}"
    raise SettingsError([f"{what}; under way or waiting: {there}"], "the command")


def follow(server_folder: Path, run: dict[str, Any], observer: RunObserver) -> str:
    """Show a run until it is over; return its summary. Stopping this does not stop the run.

    Raises:
        FedloomError: The run failed.
        Interrupted: The user stopped the command.
    """
    own = ServerFolder(server_folder)
    path = run_event_file(own, run["id"])

    def is_served() -> bool:  # a server started in the meantime has deleted the file
        return lock_owner(own.lock) is not None and path.exists()

    try:
        return show(read_run_events(path, is_served), observer)
    except KeyboardInterrupt:
        at = "" if server_folder == Path("fedloom-server") else f" --home {server_folder}"
        raise Interrupted(
            f"the run goes on: `fedloom follow{at}` shows it again, `fedloom stop{at}` ends it"
        ) from None
    finally:
        with contextlib.suppress(Exception):
            observer.end()


def before_it(run: dict[str, Any]) -> str:
    """Return which runs a waiting run waits for; empty for other runs."""
    before = [own["name"] for own in run.get("before", [])]
    if not before:
        return ""
    others = f", then {', '.join(before[1:])}" if len(before) > 1 else ""
    return f"waiting for its turn: {before[0]} is under way{others}; `fedloom status` shows how far"


def require_sound(server_folder: Path, run: dict[str, Any]) -> None:
    """Check the experiment of a run that waits for its turn; with a mistake it leaves the queue.

    Raises:
        FedloomError: With every mistake in it.
    """
    words = [
        sys.executable,
        "-m",
        "fedloom.deployment.run_request_check",
        str(server_folder),
        run["id"],
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and done.stdout:  # otherwise it has started, and its events say it
        with contextlib.suppress(FedloomError):
            stop_runs(server_folder, run["id"])
        error = FedloomError(done.stdout.strip())
        error.exit_code = done.returncode
        raise error


def run_again(server_folder: Path, work: Work) -> dict[str, Any]:
    """Request a run again without a member; return its status. A current run is stopped.

    Raises:
        ConnectionFailed: No server runs in the folder.
    """
    for own in ask(ServerFolder(server_folder), "runs"):
        if own["folder"] == str(work.folder.resolve()):
            stop_runs(server_folder, own["id"])
    if work.checkpoint is None:
        again = work.folder / EXPERIMENT
        return ask_for_run(server_folder, again, work.assignments, name=work.anew.name)
    return ask_for_run(server_folder, None, resume=work.folder, from_round=work.checkpoint)


def stop_runs(server_folder: Path, run: str | None) -> list[str]:
    """Stop a run, or all; return the names of those that were stopped.

    Raises:
        ConnectionFailed: No server runs in the folder.
    """
    stopped: list[str] = ask(ServerFolder(server_folder), "stop", run=run)
    return stopped
