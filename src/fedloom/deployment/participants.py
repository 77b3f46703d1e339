"""Which members take part in a run, and under which client's number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedloom.errors import SettingsError
from fedloom.experiment import Experiment
from fedloom.members import Members
from fedloom.progress import Participant


def chosen(experiment: Experiment, members: Members) -> tuple[Experiment, list[Participant]]:
    """Return the members that an experiment is for, and the experiment with their number.

    Raises:
        SettingsError: Nobody is let in, somebody is named who is not, or the experiment is for another
            number of clients.
    """
    federation, allowed = experiment.federation, members.allowed
    names = ", ".join(own.name for own in allowed) or "nobody"
    if federation.members is not None:
        by_name = {own.name: own for own in allowed}
        problems = [
            f"federation.members: {name!r} is not let in; let in are: {names}"
            for name in federation.members
            if name not in by_name
        ]
        if problems:
            raise SettingsError(problems)
        allowed = [by_name[name] for name in federation.members]
        names = ", ".join(federation.members)
    if not allowed:
        raise SettingsError(
            ["nobody is let in: `fedloom members allow NAME FILE.pub` for each client"]
        )
    if "clients" in federation.model_fields_set and federation.clients != len(allowed):
        raise SettingsError(
            [
                f"federation.clients is {federation.clients}, and {len(allowed)} members are to take "
                f"part ({names}): leave federation.clients out, name those who take part in "
                "federation.members, or let others in"
            ]
        )
    settings = federation.model_copy(update={"clients": len(allowed)})
    participants = [Participant(member.number, member.name) for member in allowed]
    return replace(experiment, federation=settings), participants


def known(record: dict[str, Any] | None) -> list[Participant] | None:
    """Return the members of a run that has begun, by the content of its ``run.json``."""
    if record is None or "members" not in record:
        return None
    return [Participant(int(own["number"]), str(own["name"])) for own in record["members"]]
