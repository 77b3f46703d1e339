"""Backups: everything of a server that cannot be recreated, in one file, and its restoration.

A backup is a tar archive, compressed: the client registry, the authority and the server's certificate
with their keys, settings, logs, and on request the run folders. Flower's own files are derived from these
and are not included. With a passphrase the archive is a file of age (age-encryption.org), which ``age
--decrypt`` reads as well.

A backup is untrusted input: every file must match the manifest in name, kind, size and hash, and the
folder appears only when all of it has been checked.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from os.path import samestat
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyrage
from pydantic import Field

from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.violations import FILE as VIOLATIONS
from fedloom.errors import (
    ConnectionFailed,
    FedloomError,
    IdentityError,
    OutputError,
    SettingsError,
    first_line,
)
from fedloom.security.audit_log import FILE as AUDIT
from fedloom.security.audit_log import AuditLog, closed_files, events, verify
from fedloom.security.certificates import CA, CA_KEY, CERTIFICATE, KEY, hosts_of
from fedloom.security.client_registry import FILE as MEMBERS
from fedloom.settings.schema import Settings, parse
from fedloom.storage.files import lock_owner, written_atomically

MANIFEST = "manifest.json"
SETTINGS = "settings.toml"
RUNS = "runs"

FILES = (MEMBERS, CA, CA_KEY, CERTIFICATE, KEY, SETTINGS, AUDIT, VIOLATIONS)
"""Files of the server's folder that are backed up."""

NEEDED = (MEMBERS, CA, CERTIFICATE, KEY)
"""Files that every server's folder has."""

AGE = b"age-encryption.org/"
"""First bytes of an encrypted backup."""

LONGEST = 16 << 20
"""Bytes of the longest manifest, for a hundred thousand files."""

FORM = 1
"""Format version of backups; earlier versions can be read."""


class File(Settings):
    """A file of a backup."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Settings):
    """What a backup holds."""

    form: int
    version: str
    """Version of the package that wrote it."""
    time: float
    """Time of the backup in seconds since 1970."""
    files: dict[str, File]
    runs: dict[str, str] = {}
    """Original path of each run folder, by its name in ``runs``."""


@dataclass(frozen=True)
class Restored:
    """Result of a restoration.

    Attributes:
        members: Number of allowed members.
        hosts: Hosts in the server's certificate.
        time: When the backup was made, in seconds since 1970.
        runs: Run folders.
    """

    members: int
    hosts: list[str]
    time: float
    runs: list[Path]


def back_up(
    server_folder: ServerFolder, target: Path, *, runs: bool = False, passphrase: str | None = None
) -> Manifest:
    """Write a backup of a server's folder, whether or not the server runs; return what it holds.

    Args:
        server_folder: The folder.
        target: File to write, readable by its owner alone.
        runs: Whether the server's run folders are included.
        passphrase: Passphrase for encryption; ``None`` for none.

    Raises:
        OutputError: A file cannot be read or written, or ``target`` exists.
        SettingsError: The folder is not a server's.
    """
    missing = [name for name in NEEDED if not (server_folder.path / name).is_file()]
    if missing:
        raise SettingsError(
            [f"{server_folder.path} is not a server's folder: {', '.join(missing)} missing"],
            "the command",
        )
    if target.exists():
        raise OutputError(f"{target} is there already; choose another name")
    closed, lines = _log(server_folder.path / AUDIT)
    paths = [
        server_folder.path / name
        for name in FILES
        if name != AUDIT and (server_folder.path / name).is_file()
    ]
    contents: list[tuple[str, Path | bytes]] = [(path.name, path) for path in [*closed, *paths]]
    if lines:
        contents.append((AUDIT, lines))
    folders = dict(_run_folders(server_folder)) if runs else {}
    for name, folder in folders.items():
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        contents += [
            (f"{RUNS}/{name}/{path.relative_to(folder).as_posix()}", path) for path in files
        ]
    known = {name: str(folder) for name, folder in folders.items()}
    with written_atomically(target) as file:
        if passphrase is None:
            return _write(file, contents, known)
        plain = io.BytesIO()
        manifest = _write(plain, contents, known)
        file.write(pyrage.passphrase.encrypt(plain.getvalue(), passphrase))
    return manifest


def _run_folders(server_folder: ServerFolder) -> Iterator[tuple[str, Path]]:
    """Yield the existing run folders of a server, each with a unique name."""
    found = dict.fromkeys(
        Path(event["folder"]) for event in events(server_folder.path, "run_folder")
    )
    taken: set[str] = set()
    for folder in found:
        if folder.is_dir():
            name, number = folder.name, 2
            while name in taken:
                name, number = f"{folder.name}-{number}", number + 1
            taken.add(name)
            yield name, folder


def _log(path: Path) -> tuple[list[Path], bytes]:
    """Return the closed files of a log and the complete lines of the open one, as of one point in time.

    The open file may be closed while it is read; files closed later are left out.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:  # the next file does not exist yet
        return closed_files(path), b""
    with file:
        own = os.fstat(file.fileno())
        earlier = takewhile(lambda other: not samestat(other.stat(), own), closed_files(path))
        closed, content = list(earlier), file.read()
    return closed, content[: content.rfind(b"\n") + 1]


def _write(
    file: IO[bytes], contents: list[tuple[str, Path | bytes]], folders: dict[str, str]
) -> Manifest:
    """Write an archive with the manifest last, as files are hashed while they are read."""
    files = {}
    with tarfile.open(fileobj=file, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, content in contents:
            with (
                io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source
            ):
                size = source.seek(0, os.SEEK_END)
                source.seek(0)
                hashing = _Hashing(source)
                archive.addfile(_entry(name, size), hashing)
                files[name] = File(size=size, sha256=hashing.digest.hexdigest())
        manifest = Manifest(
            form=FORM,
            version=importlib.metadata.version("fedloom"),
            time=time.time(),
            files=files,
            runs=folders,
        )
        text = manifest.model_dump_json().encode()
        archive.addfile(_entry(MANIFEST, len(text)), io.BytesIO(text))
    return manifest


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    return entry


class _Hashing(io.RawIOBase):
    """A file that computes its SHA-256 while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        content = self._file.read(size)
        self.digest.update(content)
        return content


def is_encrypted(source: Path) -> bool:
    """Return whether a backup is encrypted.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        with source.open("rb") as file:
            return file.read(len(AGE)) == AGE
    except OSError as error:
        raise OutputError(f"cannot read the backup {source}: {error.strerror}") from error


def restore(source: Path, server_folder: ServerFolder, passphrase: str | None = None) -> Restored:
    """Restore a server's folder from a backup; an existing folder is never changed.

    Args:
        source: The backup.
        server_folder: The folder, which must be missing or empty.
        passphrase: Of an encrypted one.

    Raises:
        OutputError: The backup is damaged, or something cannot be written.
        IdentityError: The passphrase is wrong.
        SettingsError: The folder is not empty, or the file is not a backup.
        ConnectionFailed: A server runs there.
    """
    if lock_owner(server_folder.lock) is not None:
        raise ConnectionFailed(f"a server runs in {server_folder.path}; choose another --home")
    if server_folder.path.exists() and not (
        server_folder.path.is_dir() and not any(server_folder.path.iterdir())
    ):
        raise SettingsError(
            [f"{server_folder.path} holds something already; choose a folder that is not there"],
            "the command",
        )
    staging = server_folder.path.with_name(f".{server_folder.path.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True, mode=0o700)
        manifest = _read(source, staging, passphrase)
        restored = _checked(ServerFolder(staging), manifest)
        folders = [server_folder.path / RUNS / name for name in manifest.runs]
        log = AuditLog(staging / AUDIT)
        log.record("restored", backup=manifest.time)
        for folder in folders:  # `fedloom members withdraw` reads these events
            log.record("run_folder", folder=str(folder.resolve()))
        with contextlib.suppress(FileNotFoundError):
            server_folder.path.rmdir()
        staging.rename(server_folder.path)
    except OSError as error:
        raise OutputError(
            f"cannot restore {server_folder.path}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Restored(*restored, manifest.time, folders)


def _read(source: Path, folder: Path, passphrase: str | None) -> Manifest:
    """Unpack a backup into an empty folder."""
    damaged = f"{source} is not a whole backup of a server"
    try:
        with contextlib.ExitStack() as closing:
            file: IO[bytes] = closing.enter_context(source.open("rb"))
            if is_encrypted(source):
                if passphrase is None:
                    raise IdentityError(f"{source} is encrypted: a passphrase is needed")
                file = io.BytesIO(pyrage.passphrase.decrypt(file.read(), passphrase))
            found, manifest = {}, None
            for entry, content in _entries(
                closing.enter_context(tarfile.open(fileobj=file, mode="r|gz"))
            ):
                if manifest is not None:
                    raise OutputError(f"{damaged}: there is content after the manifest")
                if entry.name == MANIFEST:
                    manifest = _manifest(content.read(LONGEST + 1), source)
                else:
                    found[entry.name] = _place(folder, entry, content)
    except pyrage.DecryptError:
        raise IdentityError(f"the passphrase does not open {source}, or it is damaged") from None
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OutputError(f"cannot read the backup {source}: {error.strerror}") from error
        raise OutputError(f"{damaged}: {error}") from None
    if manifest is None or found != manifest.files:
        raise OutputError(f"{damaged}: its files differ from its manifest")
    return manifest


def _entries(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    for entry in archive:
        content = archive.extractfile(entry) if entry.isreg() else None
        if content is None or not _is_expected(entry.name):
            raise OutputError(f"{entry.name[:80]!r} does not belong in a backup")
        yield entry, content


def _is_log(name: str) -> bool:
    return re.fullmatch(r"audit(-[0-9]{12})?\.jsonl", name) is not None


def _is_expected(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if name in (*FILES, MANIFEST) or _is_log(name):
        return True
    plain = all(part not in ("", ".", "..") and "\0" not in part for part in parts)
    return len(parts) > 2 and parts[0] == RUNS and plain and name == "/".join(parts)


def _place(folder: Path, entry: tarfile.TarInfo, content: IO[bytes]) -> File:
    path, digest = folder / entry.name, hashlib.sha256()
    if entry.size > shutil.disk_usage(folder).free:
        raise OutputError(f"{entry.name[:80]} has {entry.size} bytes, and there is no room for it")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while part := content.read(1 << 20):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return File(size=entry.size, sha256=digest.hexdigest())


def _manifest(text: bytes, source: Path) -> Manifest:
    if len(text) > LONGEST:
        raise OutputError(f"{source} has a manifest of more than {LONGEST} bytes")
    table: Any = json.loads(text)
    if isinstance(table, dict) and int(table.get("form", 0)) > FORM:
        raise SettingsError(
            [
                f"{source} was made by fedloom {table.get('version')!s:.20}: install that version, or a "
                "later one, to restore it"
            ],
            "the command",
        )
    found, problems = parse(Manifest, table, "manifest")
    if found is None:
        raise OutputError(
            f"{source} has a manifest that cannot be read: {'; '.join(problems)[:400]}"
        )
    for name in found.runs:
        if re.fullmatch(r"[^/\0]+", name) is None or name in (".", ".."):
            raise OutputError(f"{source} holds a run with the invalid name {name[:80]!r}")
    return found


def _checked(server_folder: ServerFolder, manifest: Manifest) -> tuple[int, list[str]]:
    """Return the number of allowed members of a restored folder and the hosts in its certificate."""
    for name in NEEDED:
        if name not in manifest.files:
            raise OutputError(f"the backup has no {name}")
    try:
        members, hosts = (
            len(server_folder.members().allowed),
            hosts_of(server_folder.certificate.read_text()),
        )
        if any(map(_is_log, manifest.files)):
            verify(server_folder.path)
    except (FedloomError, ValueError) as error:
        raise OutputError(f"the backup cannot be used: {error}") from None
    return members, hosts


def read_passphrase(path: Path) -> str:
    """Return the first line of a file.

    Raises:
        OutputError: It cannot be read, or the line is empty.
    """
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0].strip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read the passphrase in {path}: {first_line(error)}") from None
    if not first:
        raise OutputError(f"the first line of {path} is empty: it must be the passphrase")
    return first


def size_text(manifest: Manifest, target: Path) -> str:
    """Return the size of a backup, in words."""
    runs = f", {len(manifest.runs)} run folders" if manifest.runs else ""
    return f"{len(manifest.files)} files{runs}, {target.stat().st_size / 1e6:.1f} MB"


def restored_text(folder: Path, restored: Restored) -> str:
    """Return the text for the operator after a restoration."""
    made = datetime.datetime.fromtimestamp(restored.time, datetime.UTC)
    lines = [
        f"restored {folder} as of {made:%Y-%m-%d %H:%M} UTC: {restored.members} members are allowed, the "
        f"certificate names {', '.join(restored.hosts)}",
        "members that were revoked or withdrawn since then are allowed again: check `fedloom members "
        "list`",
        f"start it with `fedloom server start --home {folder}`, and never beside the one it comes from",
    ]
    lines += [f"run folder {path}" for path in restored.runs]
    return "\n".join(lines)
