"""Contributions of a member to runs, and the round from which a run must be repeated without it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.deployment.folders import ServerFolder
from fedloom.errors import OutputError
from fedloom.security.audit_log import events
from fedloom.security.client_registry import Member, Members
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Work:
    """A member's contributions to a run.

    Attributes:
        folder: The run folder.
        client: The member's number in the run.
        rounds: Rounds with an accepted answer of the member.
        adapter: SHA-256 of the resulting adapter; ``None`` where there is none yet.
        checkpoint: The last saved round without its contributions; ``None`` where there is none.
        others: Names of the run's other allowed members.
        started: Folders of runs that started from its adapters, or from those of such a run.
    """

    folder: Path
    client: int
    rounds: Sequence[int]
    adapter: str | None
    checkpoint: int | None
    others: tuple[str, ...]
    started: tuple[Path, ...] = ()

    @property
    def anew(self) -> Path:
        """Folder of the repeated run, where no saved round is without the member."""
        return self.folder.with_name(f"{self.folder.name}-without-client-{self.client}")

    @property
    def assignments(self) -> list[str]:
        """Assignments of the repeated run, where no saved round is without the member."""
        return [
            f"federation.members={json.dumps(self.others)}",
            f"federation.clients={len(self.others)}",
            f"output.folder={self.anew}",
        ]

    @property
    def command(self) -> str:
        """Command that repeats the run without the member."""
        words = ["--resume", str(self.folder), "--from-round", str(self.checkpoint)]
        if self.checkpoint is None:
            words = [str(self.folder / names.EXPERIMENT)]
            words += [word for text in self.assignments for word in ("--set", text)]
        return shlex.join(["fedloom", "run", *words, "--engine", "flower"])

    def text(self) -> str:
        """Return a description of it."""
        first, last, count = self.rounds[0], self.rounds[-1], len(self.rounds)
        where = f"round {first}" if count == 1 else f"{count} rounds, {first} to {last}"
        adapter = f", and in its adapter (SHA-256 {self.adapter[:12]})" if self.adapter else ""
        how = (
            f"round {self.checkpoint} is saved and has nothing of it"
            if self.checkpoint is not None
            else "no saved round is without it, so the run starts again with the others"
        )
        text = f"{self.folder}: in {where}{adapter}; {how}:\n  {self.command}"
        if self.started:
            later = ", ".join(map(str, self.started))
            text += f"\n  started from it, and to be started again from what is without it: {later}"
        return text


def works_of(server_folder: ServerFolder, member: Member) -> list[Work]:
    """Return a member's contributions to runs of this server whose folders exist.

    Raises:
        OutputError: A run folder is damaged.
    """
    folders = dict.fromkeys(event["folder"] for event in events(server_folder.path, "run_folder"))
    found = (_work(Path(folder), member, server_folder.members()) for folder in folders)
    records = {Path(folder): _record(Path(folder)) for folder in folders}
    return [
        replace(work, started=tuple(_started(work.folder, records)))
        for work in found
        if work is not None
    ]


def _record(path: Path) -> dict[str, Any]:
    if not path.is_dir():  # it was moved or deleted
        return {}
    return RunFolder(path).read_record(names.RUN) or {}


def _started(path: Path, records: Mapping[Path, Mapping[str, Any]]) -> Iterator[Path]:
    """Yield the runs that started from a run, directly or indirectly, in the order of their start."""
    ids = {records[path].get("id")} - {None}
    for folder, record in records.items():
        if (record.get("start") or {}).get("run") in ids:
            ids.add(record.get("id"))
            yield folder


def _work(path: Path, member: Member, members: Members) -> Work | None:
    try:
        folder = RunFolder.existing(path)
    except OutputError:  # it was moved or deleted
        return None
    record: dict[str, Any] = folder.read_record(names.RUN) or {}
    clients = [own["client"] for own in record.get("members", []) if own["number"] == member.number]
    if not clients:
        return None
    rounds = [
        line["round"]
        for line in folder.read_lines(names.ROUNDS)
        if clients[0] in line["clients"]
        and clients[0] not in {refused["client"] for refused in line["rejected"]}
    ]
    if not rounds:
        return None
    saved = [int(own.name.removeprefix("round-")) for own in folder.checkpoints.glob("round-*")]
    before = [round for round in saved if round < rounds[0]]
    summary: dict[str, Any] = folder.read_record(names.SUMMARY) or {}
    adapter = (summary.get("adapter") or {}).get("sha256")
    numbers = [own["number"] for own in record["members"] if own["number"] != member.number]
    others = [members.numbered(number) for number in numbers if members.is_allowed(number)]
    left = tuple(own.name for own in others if own is not None)
    return Work(path, clients[0], rounds, adapter, max(before, default=None), left)
