"""The run folder: the results of ``fedloom run``, written and read in one place.

::

    experiment.toml   the resolved experiment, defaults included
    run.json          versions, seed, command, model, data, the metric and its meaning
    partition.json    rows and labels of each client
    rounds.jsonl      one line a round; the first is the evaluation before any training
    costs.jsonl       one line a round, client and phase
    privacy.jsonl     with client-level privacy, one line a release: what was spent
    samples.json      held-out prompts answered before and after
    summary.json      before, after, totals, the adapter's checksum and what was verified; at the end
    adapter/          the global adapter as a PEFT folder, with its card
    adapters/         with several of them, such as FedBiscuit's selectors, each likewise
    clients/          models of single clients that have personal parts
    checkpoints/      state that a resumed run starts from
    .lock             held by the process that writes here, with its host and since when

Files are JSON with numbers that are not finite as null. Whole files appear atomically; lines are synced
one by one, so that a killed run loses no line that it reported.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.display.untrusted_text import quoted
from fedloom.errors import OutputError, first_line
from fedloom.storage.files import lock, write_atomically

Record = dict[str, Any]
"""One JSON object; its keys are those that the runner wrote, listed in docs/run-folder.md."""

EXPERIMENT = "experiment.toml"
RUN = "run.json"
PARTITION = "partition.json"
ROUNDS = "rounds.jsonl"
COSTS = "costs.jsonl"
SAMPLES = "samples.json"
SUMMARY = "summary.json"
COMPARISON = "comparison.json"
"""In the folder of a comparison: its axes and the names of its run folders (``runs/NAME``)."""
RUNS = "runs"
RESULTS = "results.json"
EVALUATION = "evaluation.json"
"""In the folder of an evaluation with judges: everything its page shows but the answers."""
ANSWERS = "answers.jsonl"
ANSWERED = "answered.json"
"""Everything that the answers depend on: as long as it is unchanged, answers are not generated again."""
JUDGEMENTS = "judgements.jsonl"
AUDIT = "audit.json"
"""What a privacy audit of a run found: everything that its page shows."""
TRACKED = "trackers.json"
"""The ids that services of ``[output] trackers`` gave a run, by which a resumed run goes on with them."""
LOCK = ".lock"
"""The lock file of the one process that may write to a folder."""
BLOCK = 1 << 20
"""Bytes that are read at a time."""
MAKE_ROOM = "make room or choose another output.folder"
NOTICE = "SERVER-ONLY.txt"
"""In a server's own folder: says that it must not be handed out."""
_SERVERS_OWN = ".private"
"""Ending of the name of a server's own folder, beside the run folder that may be handed out."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: Where it is.
    """

    path: Path

    @classmethod
    def existing(cls, path: Path, *, server: bool = False) -> RunFolder:
        """Open the folder of an earlier run.

        Args:
            path: Where it is.
            server: Whether the server goes on with its run, or changes it, and so needs its own records:
                where these are kept apart, their folder is opened.

        Raises:
            OutputError: It is not there, is not a run folder, or is one that only the server reads.
        """
        own = own_folder_of(path)
        if server and is_servers_own(own):
            path = own
        if not path.is_dir():
            raise OutputError(f"no run folder at {path}")
        if not server:
            require_released(path)
        if not (path / EXPERIMENT).is_file():
            raise OutputError(f"{path} is not a run folder: it has no {EXPERIMENT}")
        return cls(path)

    @property
    def released(self) -> Path | None:
        """The folder of what may be handed out, where this one is the server's own; else ``None``."""
        if not is_servers_own(self.path):
            return None
        return self.path.with_name(self.path.name.removesuffix(_SERVERS_OWN))

    @property
    def is_begun(self) -> bool:
        """Whether a run was ever started here; an experiment file alone does not count."""
        return (self.path / RUN).is_file() or (self.path / LOCK).is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the only process that writes here.

        The system releases the lock when the process ends, however it ends, so none is ever left behind.

        Raises:
            OutputError: Another process writes here, or this file system has no locks.
        """
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        held = lock(self.path / LOCK, f"{socket.gethostname()}\n{since}")
        if held is None:
            raise OutputError(
                f"{self.path} is being written by {self._writer()}; wait until it has ended"
            )
        with held:
            yield
            held.truncate(0)

    def _writer(self) -> str:
        """Return who has the lock, as far as it says so."""
        try:
            process, host, since = (self.path / LOCK).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return "another process"
        return f"process {process} on {host}, since {since}"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """PEFT folder of the global adapter."""
        return self.path / "adapter"

    def named_adapter(self, name: str) -> Path:
        """PEFT folder of one of several adapters that a method saves beside the global one."""
        return self.path / "adapters" / name

    @property
    def named_adapters(self) -> list[Path]:
        """Those that there are, by name."""
        return sorted((self.path / "adapters").glob("*/"))

    def client(self, number: int) -> Path:
        """PEFT folder of a client's model, with its personal parts beside the adapter."""
        return self.path / "clients" / f"{number:04d}"

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file at once, for whom the process's mask lets read it.

        Raises:
            OutputError: The disk is full or the folder not writable.
        """
        try:
            write_atomically(self.path / name, text.encode(), mode=0o666)
        except OutputError as error:
            raise OutputError(f"{error}; {MAKE_ROOM}") from error

    def write_json(self, name: str, content: object) -> None:
        """Write a whole JSON file at once; see :meth:`write_text`."""
        self.write_text(name, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a JSONL file and sync them.

        Raises:
            OutputError: The disk is full or the folder not writable, or JSON has no form for a record.
        """
        try:
            text = "".join(json.dumps(finite(dict(r)), allow_nan=False) + "\n" for r in records)
        except TypeError as error:
            raise OutputError(
                f"cannot write {self.path / name}: {first_line(error)}; records (a method's "
                "cohort.details and notes among them) are of numbers, texts, lists and mappings: give "
                "the .tolist() of a tensor"
            ) from error

        target = self.path / name
        try:
            with target.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {target}: {error.strerror or error}; {MAKE_ROOM}"
            ) from error

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file's bytes, or ``None`` where there is no such file.

        Raises:
            OutputError: It may not be read.
        """
        path = self.path / name
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {first_line(error)}") from error

    def beginning(self, name: str, length: int) -> tuple[int, str] | None:
        """Return a file's size and the SHA-256 of its first ``length`` bytes; ``None`` without a file.

        Raises:
            OSError: It may not be read.
        """
        path, digest = self.path / name, hashlib.sha256()
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while block := file.read(min(BLOCK, length)):
                digest.update(block)
                length -= len(block)
            return os.fstat(file.fileno()).st_size, digest.hexdigest()

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, or ``None`` where there is no such file.

        Raises:
            OutputError: It is not JSON.
        """
        content = self.read_bytes(name)
        try:
            return None if content is None else json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise OutputError(f"{self.path / name} cannot be read: {error}") from error

    def read_record(self, name: str) -> Record | None:
        """Return the object in a JSON file, or ``None`` where there is no such file.

        Raises:
            OutputError: It is not JSON, or no object.
        """
        record = self.read_json(name)
        if record is None or isinstance(record, dict):
            return record
        raise OutputError(
            f"{self.path / name} is not what a run wrote, it holds {quoted(record, 60)}: put it back "
            "from a backup"
        )

    def read_text(self, name: str) -> str:
        """Return a file's text, empty where there is no such file.

        Raises:
            OutputError: It may not be read, or is not text in UTF-8.
        """
        content = self.read_bytes(name) or b""
        try:
            return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except ValueError as error:
            raise OutputError(f"{self.path / name} cannot be read: {error}") from error

    def read_lines(self, name: str) -> list[Record]:
        """Return the records of a JSONL file; a last line torn by a kill is left out.

        Raises:
            OutputError: Another line is not JSON, or a line is no object.
        """
        records: list[Record] = []
        lines = self.read_text(name).splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise OutputError(f"{self.path / name}, line {number}: {error}") from error
                continue
            if not isinstance(record, dict):
                raise OutputError(
                    f"{self.path / name}, line {number}: {quoted(record, 60)} is no record: put the "
                    "file back from a backup"
                )
            records.append(record)
        return records


def own_folder_of(path: Path) -> Path:
    """Return where a server's own records are, given the run folder that may be handed out, or them."""
    path = path if path.name else path.resolve()
    return path if is_servers_own(path) else path.with_name(path.name + _SERVERS_OWN)


def is_servers_own(path: Path) -> bool:
    """Return whether a folder holds a server's own records, which name the clients of rounds."""
    return (path / NOTICE).is_file()


def require_released(path: Path) -> None:
    """Check that a folder, or that of a file, is not one that only the server reads.

    Raises:
        OutputError: It is one, or what may be handed out of its run is not written yet.
    """
    folder = path if path.is_dir() else path.parent
    if is_servers_own(folder):
        released = folder.with_name(folder.name.removesuffix(_SERVERS_OWN))
        raise OutputError(
            f"{folder} names the clients of each round, which nothing shows (privacy.amplification): "
            f"give {released}, where what may be handed out is written when the run is over"
        )
    if not (folder / EXPERIMENT).is_file() and is_servers_own(own_folder_of(folder)):
        raise OutputError(
            f"{folder} is written when its run is over (privacy.amplification): wait for it, or go on "
            f"with fedloom run --resume {folder}"
        )


def is_comparison(folder: Path) -> bool:
    """Return whether ``folder`` is that of a comparison."""
    return (folder / COMPARISON).is_file()


def versions_of(run: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that a run was started with, including fedloom's.

    Args:
        run: The content of ``run.json``.
    """
    return {"fedloom": run["fedloom"], **run["versions"]}


def other_versions(run: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Return, as text, the versions that differ from those that a run was started with.

    Args:
        run: The content of ``run.json``.
        now: By package; ``python`` and ``machine`` too.
    """
    before = versions_of(run)
    return [
        f"{name} {now.get(name, 'none')} (it was {before[name]})"
        for name in before
        if now.get(name) != before[name]
    ]


@dataclass(frozen=True)
class Snapshot(RunFolder):
    """A run folder of which each file is read once: the content checked is the content shown.

    A run under way adds lines while its page is made, and a large record takes long to read.
    """

    _bytes: dict[str, bytes | None] = field(default_factory=dict, repr=False, compare=False)
    _lines: dict[str, list[Record]] = field(default_factory=dict, repr=False, compare=False)

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file's bytes as they were when it was first asked for."""
        if name not in self._bytes:
            self._bytes[name] = super().read_bytes(name)
        return self._bytes[name]

    def beginning(self, name: str, length: int) -> tuple[int, str] | None:
        """Return the same of these bytes."""
        content = self.read_bytes(name)
        if content is None:
            return None
        return len(content), hashlib.sha256(memoryview(content)[:length]).hexdigest()

    def read_lines(self, name: str) -> list[Record]:
        """Return the records of these bytes, one list for all who ask; nobody may change it."""
        if name not in self._lines:
            self._lines[name] = super().read_lines(name)
        return self._lines[name]


def finite(value: Any) -> Any:
    """Return ``value`` with numbers that are not finite as ``None``, as JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
