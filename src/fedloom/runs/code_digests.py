"""Python objects and plug-in classes of a run, by hash."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fedloom.errors import CheckpointError
from fedloom.experiment.experiment import SECTIONS, Experiment
from fedloom.objectives.base import Objective
from fedloom.runs.partitioning import SOURCES, own_source
from fedloom.settings.plugins import Choices, plugin_error
from fedloom.storage.run_folder import Record
from fedloom.training.memory import is_out_of_memory

Given = ParamSpec("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class MadeWith:
    """Objects that were passed to :func:`fedloom.run`.

    Attributes:
        objective: A user's own objective, or ``None``.
        data: A user's own source of examples, or ``None``.
    """

    objective: Objective | None = None
    data: object | None = None

    def __bool__(self) -> bool:
        """Whether there are any: the experiment file alone does not make the run again."""
        return self.objective is not None or self.data is not None

    @property
    def warnings(self) -> list[str]:
        """What a user should know of objects whose source cannot be read."""
        return [
            f"the source of {own['class']}, the run's {name}, cannot be read: a resumed run cannot check "
            "that it is the same; define it in a file"
            for name, own in self.to_record().items()
            if own["sha256"] is None
        ]

    def to_record(self) -> dict[str, dict[str, Any]]:
        """Return name of the class and SHA-256 of its source for each object, as plain JSON."""
        given = {"objective": self.objective, "data": self.data}
        return {name: _identity(own) for name, own in given.items() if own is not None}

    def call(self, experiment: str) -> str:
        """Return the line of Python that runs an experiment with these objects."""
        given = "".join(f", {name}={own['class']}(...)" for name, own in self.to_record().items())
        return f"fedloom.run({experiment!r}{given})"

    def require_same(self, folder: Path, run: Record | None) -> None:
        """Check that a run is resumed with the objects that it was begun with.

        Args:
            folder: The run folder.
            run: What ``run.json`` holds, ``None`` where there is none.

        Raises:
            CheckpointError: With others, with none, or with some where it had none.
        """
        if run is None:
            return
        before, now = run.get("made_with", {}), self.to_record()
        for name in ("objective", "data"):
            old, new = before.get(name), now.get(name)
            if old == new:
                continue
            if new is None:
                raise CheckpointError(
                    f"{folder} was begun from Python with {name}={old['class']}: resume it there, "
                    f"with fedloom.resume({str(folder)!r}, {name}=...)"
                )
            if old is None:
                raise CheckpointError(
                    f"{folder} was begun without {name}=; resume it without {name}={new['class']}"
                )
            raise CheckpointError(
                f"{folder} was begun with {name}={_named(old)}, this is {_named(new)}: resume it "
                "with the same, or start a new run"
            )


def plugins_record(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Return, by section, where the classes come from that an experiment names and that are not ours."""
    found = {
        section: choice.provenance(getattr(experiment, section).name)
        for section, choice in SECTIONS.items()
        if isinstance(choice, Choices)
    }
    source = own_source(experiment.data)
    found["data"] = SOURCES.provenance(source) if source is not None else None
    return {section: own.to_record() for section, own in found.items() if own is not None}


def plugin_digests(experiment: Experiment) -> dict[str, str]:
    """Return the SHA-256 of the file of each class that is not ours and that server and clients share.

    Where rows come from is each party's own affair, and who is drawn the server's.
    """
    found = plugins_record(experiment)
    apart = ("data", "selection")
    return {section: own["sha256"] for section, own in found.items() if section not in apart}


def naming_plugins(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Have a function say in one error which class of somebody else's failed, and in which line.

    The raised :class:`~fedloom.errors.PluginError` has the error as its cause. Anything else, and memory
    that does not suffice, is raised as it is.
    """

    @wraps(function)
    def named(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            told = None if is_out_of_memory(error) else plugin_error(error)
            if told is None:
                raise
            raise told from error

    return named


def require_same_plugins(folder: Path, run: Record | None, experiment: Experiment) -> None:
    """Check that a run is resumed with the classes of others that it was begun with.

    Args:
        folder: The run's.
        run: Its ``run.json``.
        experiment: Its experiment.

    Raises:
        CheckpointError: The file of one has changed since.
    """
    if run is None:
        return
    before, now = run.get("plugins", {}), plugins_record(experiment)
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section, {}), now.get(section, {})
        if old.get("sha256") != new.get("sha256"):
            named = (
                f"data.source = {experiment.data.source!r}"
                if section == "data"
                else f"{section}.name = {getattr(experiment, section).name!r}"
            )
            raise CheckpointError(
                f"{folder} was begun with another {named}: its file had SHA-256 "
                f"{old.get('sha256', '')[:12]}, {new.get('file')} has {new.get('sha256', '')[:12]}: "
                "resume it with that file, or start a new run"
            )


def _identity(own: object) -> dict[str, Any]:
    kind = type(own)
    try:
        digest = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):  # defined in a session, or by compiled code
        digest = None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "sha256": digest}


def _named(own: dict[str, Any]) -> str:
    digest = own["sha256"]
    return f"{own['class']} (SHA-256 {digest[:12]} of its source)" if digest else str(own["class"])
