"""What a run's records were when a checkpoint was saved, and whether they still are.

A checkpoint and its records are one: a resumed run adds to lines that were written before, and its totals
are sums over all of them. So each checkpoint, and the summary of a run that has ended, holds the length
and the SHA-256 of every record up to then. What is beyond is of rounds that are played again; what is
missing or changed before is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.errors import CheckpointError, OutputError
from fedloom.storage.run_folder import (
    BLOCK,
    COSTS,
    EXPERIMENT,
    PARTITION,
    ROUNDS,
    RUN,
    SUMMARY,
    RunFolder,
)

GROWING = ROUNDS, COSTS
"""Records to which each round adds lines."""

WHOLE = EXPERIMENT, RUN, PARTITION
"""Records that are written before the first round, once."""

Mark = Mapping[str, Any]
"""``bytes`` and ``sha256`` of a file's beginning, or of a whole file."""


@dataclass
class Marks:
    """The marks of a run folder's records; what was read at an earlier call is not read again.

    Attributes:
        folder: The run folder.
    """

    folder: RunFolder
    _read: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def now(self) -> dict[str, Mark]:
        """Return the mark of each record that is there.

        Raises:
            OutputError: One cannot be read.
        """
        found: dict[str, Mark] = {}
        for name in (*WHOLE, *GROWING):
            path = self.folder.path / name
            length, digest = self._read.get(name, (0, None))
            digest = hashlib.sha256() if digest is None else digest
            try:
                if path.is_file():
                    length += _add(digest, path, length)
                    found[name] = {"bytes": length, "sha256": digest.hexdigest()}
                    self._read[name] = length, digest
            except OSError as error:
                raise OutputError(f"{path} cannot be read: {error.strerror}") from error
        return found


def changes(folder: RunFolder, marks: Mapping[str, Mark], *, ended: bool = False) -> list[str]:
    """Return what is missing or was changed of the records that were marked.

    Args:
        folder: The run folder.
        marks: As :meth:`Marks.now` returned them.
        ended: Whether nothing may have been added since either.
    """
    found = []
    for name, mark in marks.items():
        length, expected = int(mark["bytes"]), str(mark["sha256"])
        there = folder.beginning(name, length)
        if there is None:
            found.append(f"{name} is missing")
            continue
        size, digest = there
        if size < length:
            found.append(f"{name} has {size} of {length} bytes")
        elif digest != expected:
            found.append(f"{name} was changed (SHA-256 {digest[:12]}, it was {expected[:12]})")
        elif size > length and (ended or name in WHOLE):
            found.append(f"{name} has {size - length} bytes more than were written")
    return found


def require_unchanged(folder: RunFolder, marks: Mapping[str, Mark], round: int) -> None:
    """Check that the records still begin with what they were when a checkpoint was saved.

    The experiment is not among them: settings that shape no result may be edited, and the checkpoint
    knows the others.

    Args:
        folder: The run folder.
        marks: Those of the checkpoint.
        round: Its round.

    Raises:
        CheckpointError: A record is missing or was changed.
        OutputError: One cannot be read.
    """
    if ROUNDS not in marks:
        raise CheckpointError(
            f"the checkpoint of round {round} in {folder.path} is an earlier release's, which kept no "
            "hashes of the records: resume it with that release, or start a new run"
        )
    own = {name: mark for name, mark in marks.items() if name != EXPERIMENT}
    try:
        changed = changes(folder, own)
    except OSError as error:
        raise OutputError(f"{folder.path}: the records cannot be read: {error}") from error
    if changed:
        raise CheckpointError(
            f"the records of {folder.path} are not what they were when round {round} was saved: "
            f"{'; '.join(changed)}. Totals would be wrong: put them back from a backup, or start "
            "a new run"
        )


def cut_back(folder: RunFolder, marks: Mapping[str, Mark]) -> list[str]:
    """Cut off the lines that were added since a checkpoint; return how many of which record.

    Args:
        folder: The run folder.
        marks: Those of the checkpoint; without any, all lines are cut off.

    Raises:
        OutputError: A record cannot be read or written.
    """
    told = []
    try:
        for name in GROWING:
            length = int(marks[name]["bytes"]) if name in marks else 0
            path = folder.path / name
            if path.is_file() and path.stat().st_size > length:
                with path.open("r+b") as file:
                    file.seek(length)
                    lines = sum(1 for _ in file)
                    file.truncate(length)
                told.append(f"{lines} line{'s' * (lines != 1)} of {name}")
    except OSError as error:
        raise OutputError(f"{folder.path}: the records cannot be cut back: {error}") from error
    return told


def doubts(folder: RunFolder) -> list[str]:
    """Return why figures of a run folder are not to be relied on, for people; empty where they are.

    A run that has ended is compared with what its summary says of the records, one that has not with its
    newest checkpoint.

    Raises:
        OutputError: A record cannot be read.
    """
    summary = folder.read_record(SUMMARY)
    try:
        if summary is not None:
            found = _of_summary(folder, summary)
        else:
            newest = max(folder.checkpoints.glob("round-*/state.json"), default=None)
            known = json.loads(newest.read_text(encoding="utf-8")) if newest is not None else {}
            found = changes(folder, known.get("records", {}).get("files", {}))
        rounds = [record["round"] for record in folder.read_lines(ROUNDS)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder.path}: the records cannot be read: {error}") from error
    if rounds != list(range(len(rounds))):
        found.append(f"{ROUNDS} has the rounds {', '.join(map(str, rounds))}, in this order")
    return found


def _of_summary(folder: RunFolder, summary: Mapping[str, Any]) -> list[str]:
    if "records" not in summary:
        return ["an earlier release wrote this run, without hashes of its records"]
    found = changes(folder, summary["records"], ended=True)
    if (adapter := summary["adapter"]) is not None:
        path, digest = folder.adapter / adapter["file"], hashlib.sha256()
        if not path.is_file():
            found.append(f"adapter/{path.name} is missing")
        elif _add(digest, path, 0) and digest.hexdigest() != adapter["sha256"]:
            found.append(f"adapter/{path.name} is another than the run wrote")
    return found


def _add(digest: Any, path: Path, start: int) -> int:
    """Add a file to a hash, from a place to its end; return its bytes."""
    done = 0
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
    return done
