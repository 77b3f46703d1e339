"""The members that take part in a run, and their client numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.run_requests import RunRequest, experiment_file
from fedloom.errors import SettingsError
from fedloom.experiment.aliases import require_own_names
from fedloom.experiment.experiment import Experiment
from fedloom.federation.records import Participant
from fedloom.security.client_registry import Members
from fedloom.settings.toml import override, read_toml, require_section


def experiment_of(
    path: Path, assignments: Iterable[str], name: str, source: str, members: Members
) -> Experiment:
    """Return the experiment in a file, with one client for each member that takes part.

    Args:
        path: The file.
        assignments: As after ``--set``.
        name: Name of the run.
        source: What the file is called in messages.
        members: The registry.

    Raises:
        SettingsError: With every mistake in it.
    """
    table = read_toml(path)
    require_section(table, source)
    table, notes = require_own_names(override(table, assignments), source)
    federation = table.get("federation", {})
    if isinstance(federation, dict) and "clients" not in federation:
        named = federation.get("members")
        count = len(named) if isinstance(named, list) else len(members.allowed)
        table["federation"] = {**federation, "clients": max(1, count)}
    return replace(Experiment.from_table(table, name=name, source=source), notes=tuple(notes))


def chosen(experiment: Experiment, members: Members) -> list[Participant]:
    """Return the members that an experiment is for, in the order of their clients' numbers.

    Raises:
        SettingsError: No member is allowed, a named member is not allowed, or the experiment is for
            another number of clients.
    """
    federation, allowed = experiment.federation, members.allowed
    names = ", ".join(own.name for own in allowed) or "nobody"
    if federation.members is not None:
        by_name = {own.name: own for own in allowed}
        problems = [
            f"federation.members: {name!r} is not an allowed member; allowed are: {names}"
            for name in federation.members
            if name not in by_name
        ]
        if problems:
            raise SettingsError(problems)
        allowed = [by_name[name] for name in federation.members]
        names = ", ".join(federation.members)
    if not allowed:
        raise SettingsError(
            ["no member is allowed: `fedloom members allow NAME FILE.pub` for each client"]
        )
    if federation.clients != len(allowed):
        raise SettingsError(
            [
                f"federation.clients is {federation.clients}, and {len(allowed)} members are to take "
                f"part ({names}): leave federation.clients out, name those who take part in "
                "federation.members, or allow other members"
            ]
        )
    return [Participant(member.number, member.name) for member in allowed]


def requested_run(
    server_folder: ServerFolder, run_request: RunRequest
) -> tuple[Experiment, list[Participant]]:
    """Return the experiment of a run request, and the members that take part in it.

    Raises:
        SettingsError: With every mistake in it.
    """
    members, file = server_folder.members(), experiment_file(server_folder, run_request.id)
    experiment = experiment_of(
        file, run_request.assignments, run_request.name, run_request.source, members
    )
    return experiment, chosen(experiment, members)


def known(record: dict[str, Any] | None) -> list[Participant] | None:
    """Return the members of a run that has begun, by the content of its ``run.json``."""
    if record is None or "members" not in record:
        return None
    return [Participant(int(own["number"]), str(own["name"])) for own in record["members"]]
