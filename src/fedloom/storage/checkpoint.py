"""State between rounds on disk: atomic, checksummed, and enough to continue bit for bit.

A checkpoint is a folder ``round-0003`` that appears atomically (written under another name, synced,
renamed)::

    state.safetensors       the server's tensors
    state.json              the server's numbers, the round, presence of clients, fingerprints of the
                            experiment and the records
    client-0004.safetensors the store of client 4; linked, not copied, when unchanged
    in_flight.safetensors   requests and answers of clients still at work, in asynchronous rounds
    wire.safetensors        what clients are known to hold, where tensors are compressed
    best.safetensors        the server's tensors after the best round, where that one is kept
    manifest.json           SHA-256 of every file above

The newest two are kept, so that one stays whole if the other is damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from fedloom.errors import CheckpointError, OutputError
from fedloom.storage.files import write_atomically
from fedloom.tensors import State, Tensors, is_of_client, with_own_memory

CLIENT = "client/"
"""What names begin with, before a client's id, of tensors that are known of one client alone."""

KEPT = 2
"""Checkpoints that stay on disk."""

IN_FLIGHT, WIRE = "in_flight.safetensors", "wire.safetensors"

BEST = "best.safetensors"


def answer_name(client: int) -> str:
    """Return the name of a client's answer among what is in flight."""
    return f"answer/{client:06d}"


class SavedClients(Mapping[int, Tensors]):
    """The stores of clients in a checkpoint; each is read from its file when it is asked for.

    Attributes:
        folder: The checkpoint's.
    """

    def __init__(self, folder: Path, clients: Collection[int]) -> None:
        """Take the ids of the clients that have one."""
        self.folder, self._clients = folder, dict.fromkeys(sorted(clients))

    def __iter__(self) -> Iterator[int]:
        """Iterate over the ids, ascending."""
        return iter(self._clients)

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._clients)

    def __contains__(self, client: object) -> bool:
        """Return whether a client has a store; reads nothing."""
        return client in self._clients

    def __getitem__(self, client: int) -> Tensors:
        """Read a client's store.

        Raises:
            CheckpointError: Its file is no longer what was written.
        """
        if client not in self._clients:
            raise KeyError(client)
        file = self.folder / _client_file(client)
        try:
            return safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read any more: {error}; a run needs its checkpoints while it lasts: "
                "resume it, which says what is damaged"
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """One state between rounds.

    Attributes:
        round: Last finished round, 0 before the first.
        state: The server's state.
        clients: The store of each client.
        fingerprint: SHA-256 over everything that shapes the results of the experiment.
        records: Size and hash of the run's record files when it was saved, by file name; plain JSON.
        presence: Presence of clients in the rounds so far; plain JSON, and ``None`` where an earlier
            release saved the checkpoint.
        clock: The simulated clock; plain JSON, ``None`` where there is none.
        in_flight: Requests and answers of clients still at work, as bytes by name.
        folder: Where it was read from, ``None`` for one that was not.
        wire: What clients are known to hold; plain JSON, ``None`` where tensors are sent as they are.
        held: The tensors of that.
        best: The server's state after the best round, where that one is kept.
    """

    round: int
    state: State
    clients: Mapping[int, Tensors]
    fingerprint: str
    records: Mapping[str, Any] = field(default_factory=dict)
    presence: Mapping[str, Any] | None = None
    clock: Mapping[str, Any] | None = None
    in_flight: Tensors = field(default_factory=dict)
    folder: Path | None = None
    wire: Mapping[str, Any] | None = None
    held: Tensors = field(default_factory=dict)
    best: State | None = None


def save(
    folder: Path,
    checkpoint: Checkpoint,
    changed: set[int] | None = None,
    before: Path | None = None,
) -> SavedClients:
    """Write a checkpoint into ``folder`` and drop all but the newest two.

    Of the clients, only the changed ones are looked at.

    Args:
        folder: The run's ``checkpoints`` folder; made if it is not connected.
        checkpoint: What to keep.
        changed: Clients whose tensors differ from the checkpoint before; the files of the others are
            linked. ``None`` writes all.
        before: The checkpoint before (default: the newest on disk).

    Returns:
        The clients' stores as they are on disk now.

    Raises:
        OutputError: The disk is full or not writable. Earlier checkpoints stay whole.
    """
    target = folder / f"round-{checkpoint.round:04d}"
    temporary, same = (folder / f".{target.name}{end}.{os.getpid()}" for end in ("", "-before"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_files(temporary, checkpoint, before or _newest(folder), changed)
        _sync(temporary)
        if target.exists():
            target.rename(same)
        temporary.rename(target)
        _sync(folder)
        shutil.rmtree(same, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"cannot save the checkpoint {target}: {error.strerror or error}; "
            "the checkpoints before it are whole: make room or choose another output.folder"
        ) from error
    for path in _listed(folder)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return SavedClients(target, checkpoint.clients.keys())


def load(
    folder: Path, fingerprint: str, round: int | None = None, fresh: Collection[int] = ()
) -> Checkpoint:
    """Read the newest checkpoint, or that of ``round``.

    Args:
        folder: The run's ``checkpoints`` folder.
        fingerprint: What the checkpoint's fingerprint must be.
        round: A round to go back to, from 0.
        fresh: Clients that start with an empty store: their saved stores are neither checked nor read.

    Raises:
        CheckpointError: There is none; a file does not match its checksum (the whole ones that are
            left are offered); or it belongs to another experiment.
    """
    path = _chosen(folder, round)
    without = {_client_file(client) for client in fresh}
    damage = _damage(path, without)
    if damage:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({damage}); {_offer(folder, path)}{_afresh(damage)}"
        )
    facts = json.loads((path / "state.json").read_text())
    if facts["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another experiment (fingerprint "
            f"{facts['fingerprint'][:12]}, this one has {fingerprint[:12]}): the settings, the model's "
            "weights, the data or a reward model have changed since; start a new run"
        )
    listed = json.loads((path / "manifest.json").read_text()).keys() - without
    found = (re.fullmatch(r"client-(\d+)\.safetensors", name) for name in listed)
    clients = SavedClients(path, [int(own[1]) for own in found if own])
    state = _state(path / "state.safetensors", facts)
    in_flight = safetensors.torch.load_file(path / IN_FLIGHT) if IN_FLIGHT in listed else {}
    return Checkpoint(
        facts["round"],
        state,
        clients,
        fingerprint,
        facts.get("records", {}),
        facts.get("presence"),
        facts.get("clock"),
        in_flight,
        path,
        facts.get("wire"),
        safetensors.torch.load_file(path / WIRE) if WIRE in listed else {},
        _state(path / BEST, facts["best"]) if BEST in listed else None,
    )


def _state(file: Path, facts: Mapping[str, Any]) -> State:
    tensors = safetensors.torch.load_file(file)
    return State({name: tensors[name] for name in facts["order"]}, facts["numbers"])


def _facts(state: State) -> dict[str, Any]:
    return {"order": list(state.tensors), "numbers": dict(state.numbers)}


def _write_files(
    folder: Path, checkpoint: Checkpoint, previous: Path | None, changed: set[int] | None
) -> None:
    sums = {}
    before = json.loads((previous / "manifest.json").read_text()) if previous else {}
    state = checkpoint.state
    sums["state.safetensors"] = _write(
        folder / "state.safetensors",
        safetensors.torch.save(with_own_memory(state.tensors)),
    )
    facts = {
        "round": checkpoint.round,
        "fingerprint": checkpoint.fingerprint,
        **_facts(state),
        "records": checkpoint.records,
        "presence": checkpoint.presence,
        "clock": checkpoint.clock,
        "wire": checkpoint.wire,
    }
    if checkpoint.best is not None:
        facts["best"] = _facts(checkpoint.best)
        data = safetensors.torch.save(with_own_memory(checkpoint.best.tensors))
        sums[BEST] = _write(folder / BEST, data)
    sums["state.json"] = _write(folder / "state.json", json.dumps(facts).encode())
    if checkpoint.in_flight:
        data = safetensors.torch.save(checkpoint.in_flight)
        sums[IN_FLIGHT] = _write(folder / IN_FLIGHT, data)
    if checkpoint.held:
        sums[WIRE] = _write(folder / WIRE, safetensors.torch.save(with_own_memory(checkpoint.held)))
    for client in checkpoint.clients:
        name = _client_file(client)
        if previous and changed is not None and client not in changed and name in before:
            os.link(previous / name, folder / name)
            sums[name] = before[name]
        else:
            tensors = with_own_memory(checkpoint.clients[client])
            sums[name] = _write(folder / name, safetensors.torch.save(tensors))
    _write(folder / "manifest.json", json.dumps(sums).encode())


def _write(path: Path, data: bytes) -> str:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*") if re.fullmatch(r"round-\d+", path.name))


def _newest(folder: Path) -> Path | None:
    listed = _listed(folder)
    return listed[-1] if listed and not _damage(listed[-1]) else None


def _chosen(folder: Path, round: int | None) -> Path:
    listed = _listed(folder)
    if not listed:
        raise CheckpointError(f"no checkpoint in {folder}; was the run stopped before it began?")
    if round is None:
        return listed[-1]
    path = folder / f"round-{round:04d}"
    if path not in listed:
        names = ", ".join(str(_number(p)) for p in listed)
        raise CheckpointError(f"no checkpoint of round {round} in {folder}; there are: {names}")
    return path


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round-"))


def forget(folder: Path, client: int) -> int:
    """Delete from every checkpoint what is of a client alone; return from how many.

    That is its store, tensors and numbers of the server's state that are named by its id
    (``fedloom.tensors.of_clients``), what it is known to hold, and its answer in flight. Files are
    replaced before the manifest: some of them alone are damage that is found when they are read.

    Raises:
        OutputError: A file cannot be deleted or written.
    """
    try:
        return sum(_forgotten(path, client) for path in _listed(folder))
    except OSError as error:
        raise OutputError(
            f"cannot delete client {client} from {folder}: {error.strerror}"
        ) from error


def _forgotten(path: Path, client: int) -> bool:
    """Delete from a checkpoint what is of a client alone; return whether there was anything."""
    sums, opening = json.loads((path / "manifest.json").read_text()), f"{CLIENT}{client:04d}/"
    openings = {
        "state.safetensors": lambda name: is_of_client(name, client),
        BEST: lambda name: is_of_client(name, client),
        IN_FLIGHT: lambda name: name == answer_name(client),
        WIRE: lambda name: name.startswith(opening),
    }
    before = dict(sums)
    for file, of_client in openings.items():
        if file in sums:
            sums[file] = _without(path / file, of_client, sums[file])
    sums["state.json"] = _without_numbers(path / "state.json", client, sums["state.json"])
    store = sums.pop(_client_file(client), None)
    if sums == before:
        return False
    write_atomically(path / "manifest.json", json.dumps(sums).encode(), mode=0o644)
    _sync(path)
    if store is not None:
        (path / _client_file(client)).unlink(missing_ok=True)  # what is not named is not read
    return True


def _without(file: Path, of_client: Callable[[str], bool], sum: str) -> str:
    """Delete tensors by name from a file; return its SHA-256, which is ``sum`` where there are none."""
    tensors = safetensors.torch.load_file(file)
    kept = {name: own for name, own in tensors.items() if not of_client(name)}
    return sum if len(kept) == len(tensors) else _replaced(file, safetensors.torch.save(kept))


def _without_numbers(file: Path, client: int, sum: str) -> str:
    """Delete a client's names and numbers from ``state.json``; return its SHA-256."""
    facts = json.loads(file.read_text())
    found = False
    for own in (facts, facts.get("best", {"order": [], "numbers": {}})):
        order = [name for name in own["order"] if not is_of_client(name, client)]
        numbers = {n: x for n, x in own["numbers"].items() if not is_of_client(n, client)}
        found |= len(order) < len(own["order"]) or len(numbers) < len(own["numbers"])
        own |= {"order": order, "numbers": numbers}
    return _replaced(file, json.dumps(facts).encode()) if found else sum


def _replaced(file: Path, data: bytes) -> str:
    write_atomically(file, data, mode=0o644)
    return hashlib.sha256(data).hexdigest()


def _client_file(client: int) -> str:
    return f"client-{client:04d}.safetensors"


def _afresh(damage: str) -> str:
    """Return a hint for a client whose store is damaged; an empty string for other files."""
    found = re.search(r"client-(\d+)\.safetensors", damage)
    if found is None:
        return ""
    return f"; or let that client start with an empty store: add --fresh-client {int(found[1])}"


def _damage(path: Path, without: Collection[str] = ()) -> str:
    """Return what is wrong with a checkpoint's files, or an empty string."""
    try:
        sums = json.loads((path / "manifest.json").read_text())
        for name, expected in sums.items():
            if name in without:
                continue
            found = hashlib.sha256((path / name).read_bytes()).hexdigest()
            if found != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return f"{error}"
    return ""


def _offer(folder: Path, damaged: Path) -> str:
    whole = [path for path in _listed(folder) if path != damaged and not _damage(path)]
    if not whole:
        return "no other checkpoint is whole: start a new run"
    return f"the one of round {_number(whole[-1])} is whole: add --from-round {_number(whole[-1])}"
