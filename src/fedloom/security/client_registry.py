"""The client registry: the members of a federation with their keys, names, numbers and states.

One TOML file in the server's folder is authoritative; the tables of Flower and the gateway are derived
from it. Every change is made under a lock and takes effect in a running server within a second.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, Field

from fedloom.errors import IdentityError, OutputError, SettingsError, first_line
from fedloom.security.keys import public_key, public_pem
from fedloom.settings.schema import Settings, parse
from fedloom.settings.suggestions import did_you_mean
from fedloom.settings.toml import read_toml, write_toml
from fedloom.storage.files import lock, write_atomically

FILE, FORMER = "members.toml", "clients.toml"
"""The file, and that of earlier releases, which is read where the former is missing."""

NAME = r"^[^\W_]([\w.@-]{0,62}[\w])?$"
"""Form of a member's name: letters, digits and, inside, ``. _ - @``; at most 64 characters."""


def _sound_name(name: str) -> str:
    if not re.match(NAME, name):
        raise ValueError(
            "a member's name has letters, digits and . _ - @ within, at most 64 characters in all"
        )
    return name


State = Literal["allowed", "revoked", "withdrawn"]
"""States of a member: allowed; revoked; withdrawn (revoked, and its contributions are to be removed)."""


class Member(Settings):
    """A member of the federation."""

    number: int = Field(ge=0)
    """Number of the member; it stays the same until the member is removed."""
    name: Annotated[str, AfterValidator(_sound_name)]
    key: str
    """Public key as one line in OpenSSH format."""
    state: State = "allowed"
    since: str = ""
    """When the state was set (ISO 8601, UTC)."""


class Members:
    """The registry in a TOML file; every method that changes it rereads it under a lock."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one.

        Raises:
            SettingsError: It is not TOML.
            IdentityError: It is malformed, or two members have the same number, name or key.
        """
        self.path = path
        self.members: tuple[Member, ...] = _read(path)
        self._by_number = {member.number: member for member in self.members}

    @property
    def allowed(self) -> list[Member]:
        """The allowed members, by number."""
        return [member for member in self.members if member.state == "allowed"]

    def named(self, name: str) -> Member:
        """Return the member with a name.

        Raises:
            IdentityError: There is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        names = [member.name for member in self.members]
        hint, known = did_you_mean(name, names), ", ".join(names) or "nobody"
        raise IdentityError(f"no member has the name {name!r}; {hint}there are: {known}")

    def numbered(self, number: int) -> Member | None:
        """Return the member with a number, if there is one."""
        return self._by_number.get(number)

    def is_allowed(self, number: int) -> bool:
        """Return whether the member with a number is allowed."""
        member = self._by_number.get(number)
        return member is not None and member.state == "allowed"

    def key(self, number: int) -> ec.EllipticCurvePublicKey | None:
        """Return a member's public key, if it is allowed."""
        return public_key(self._by_number[number].key) if self.is_allowed(number) else None

    def allow(self, name: str, public: str) -> int:
        """Allow a member, or allow it again with the key that it had; return its number.

        Raises:
            IdentityError: The name or the key belongs to another member, or the key is of another kind.
            OutputError: The file cannot be written.
        """
        return self.allow_all([(name, public)])[0]

    def allow_all(self, entries: Iterable[tuple[str, str]]) -> list[int]:
        """Allow members, all or none; return their numbers.

        Args:
            entries: Name and public key of each.

        Raises:
            IdentityError: As of :meth:`allow`.
            OutputError: The file cannot be written.
        """
        numbers = []
        with self._changing() as members:
            for name, public in entries:
                numbers.append(_allow(members, name, _line(public)))
        return numbers

    def revoke(self, name: str) -> Member:
        """Revoke a member; its name and number stay reserved for it.

        Raises:
            IdentityError: There is no member with that name.
            OutputError: The file cannot be written.
        """
        return self._change(name, state="revoked")

    def withdraw(self, name: str) -> Member:
        """Revoke a member, as :meth:`revoke`, because it withdraws its contributions.

        Raises:
            IdentityError: There is no member with that name.
            OutputError: The file cannot be written.
        """
        return self._change(name, state="withdrawn")

    def rename(self, name: str, new: str) -> Member:
        """Rename a member.

        Raises:
            IdentityError: There is no member with that name, or the new name is invalid or another
                member's.
            OutputError: The file cannot be written.
        """
        return self._change(name, name=new)

    def rotate(self, name: str, public: str) -> Member:
        """Replace a member's key; the earlier key is refused from then on.

        Raises:
            IdentityError: There is no member with that name, or the key is invalid or another member's.
            OutputError: The file cannot be written.
        """
        return self._change(name, key=_line(public))

    def remove(self, name: str) -> Member:
        """Remove a revoked member: its name, key and number become free.

        Raises:
            IdentityError: There is no member with that name, or it is allowed.
            OutputError: The file cannot be written.
        """
        with self._changing() as members:
            member = self.named(name)
            if member.state == "allowed":
                raise IdentityError(
                    f"{name} is allowed; revoke it first: `fedloom members revoke {name}`"
                )
            del members[member.number]
        return member

    def _change(self, name: str, /, **changes: str) -> Member:
        with self._changing() as members:
            member = self.named(name)
            if "state" in changes:
                changes["since"] = _now()
            changed, problems = parse(Member, {**member.model_dump(), **changes}, "member")
            if changed is None:
                raise IdentityError("; ".join(problems))
            members[member.number] = changed
        return changed

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[int, Member]]:
        """Yield the members by number, to be changed; they are written if they are valid."""
        held = lock(self.path.with_name(f".{self.path.name}.lock"))
        if held is None:
            raise OutputError(f"another command is changing {self.path}; try again")
        with held:
            self._take(_read(self.path))
            members = dict(self._by_number)
            yield members
            changed = tuple(members[number] for number in sorted(members))
            _require_distinct(changed)
            if changed != self.members or not self.path.exists():
                table = {"member": [member.model_dump() for member in changed]}
                write_atomically(self.path, write_toml(table).encode())
                self._take(changed)

    def _take(self, members: tuple[Member, ...]) -> None:
        self.members = members
        self._by_number = {member.number: member for member in members}


class CachedMembers:
    """The registry as last read without a fault: a fault in the file changes nothing.

    Attributes:
        fault: What is wrong with the file, as of the last reading; empty where nothing is.
    """

    def __init__(
        self,
        read: Callable[[], Members],
        note: Callable[[str], object],
        stamp: Callable[[], object] | None = None,
    ) -> None:
        """Read with ``read``; report each fault in the file to ``note`` once.

        Args:
            read: Reads the registry.
            note: Called with the reason where it could not be read.
            stamp: Returns another value once the file has changed; without it, the file is read each
                time.
        """
        self._read, self._note, self._stamp = read, note, stamp
        self._known: Members | None = None
        self._seen: object = None
        self.fault = ""

    def __call__(self) -> Members:
        """Return it.

        Raises:
            SettingsError: The registry could never be read.
            IdentityError: As before.
        """
        seen = self._stamp() if self._stamp is not None else None
        if self._known is not None and seen is not None and seen == self._seen:
            return self._known
        try:
            self._known, fault = self._read(), ""
        except (IdentityError, SettingsError) as error:
            if self._known is None:
                raise
            fault = str(error)
            if fault != self.fault:
                self._note(fault)
        self.fault, self._seen = fault, seen
        return self._known


def stamp_of(path: Path) -> object:
    """Return a value that changes when the file changes, or ``None`` where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def keys_in(folder: Path) -> list[tuple[str, str]]:
    """Return name and key of each file ``NAME.pub`` in a folder, in the order of the names.

    Raises:
        OutputError: A file cannot be read, or there is none.
    """
    paths = sorted(folder.glob("*.pub"))
    if not paths:
        raise OutputError(f"there is no public key, NAME.pub, in {folder}")
    return [(path.stem, read_public(path)) for path in paths]


def read_public(path: Path) -> str:
    """Return what a file of a public key holds.

    Raises:
        OutputError: It cannot be read.
        IdentityError: It is not a public key.
    """
    try:
        text = path.read_text()
        public_key(text.strip())
        return text
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {first_line(error)}") from None


def _allow(members: dict[int, Member], name: str, key: str) -> int:
    for member in members.values():
        if member.key == key and member.name == name:
            if member.state != "allowed":
                again = {"state": "allowed", "since": _now()}
                members[member.number] = member.model_copy(update=again)
            return member.number
        if member.name == name:
            raise IdentityError(
                f"{name} is member {member.number} with another key; give it this one with "
                f"`fedloom members rotate {name} FILE.pub`"
            )
    number = next(free for free in range(len(members) + 1) if free not in members)
    table = {"number": number, "name": name, "key": key, "since": _now()}
    new, problems = parse(Member, table, "member")
    if new is None:
        raise IdentityError("; ".join(problems))
    members[number] = new
    return number


def _read(path: Path) -> tuple[Member, ...]:
    """Return the members that a file names, by number; an earlier release's where there is none."""
    if not path.exists():
        former = path.with_name(FORMER)
        return _of_former(former) if former != path and former.exists() else ()
    found = []
    for row in _rows(path, "member"):
        member, problems = parse(Member, row, "member")
        if member is None:
            raise IdentityError(f"{path}: {'; '.join(problems)}")
        found.append(member)
    members = tuple(sorted(found, key=lambda member: member.number))
    _require_distinct(members, f"{path}: ")
    return members


def _of_former(path: Path) -> tuple[Member, ...]:
    """Return the members of a list in the form of earlier releases, numbered by position."""
    found = []
    for number, row in enumerate(_rows(path, "client")):
        revoked = row.get("revoked", False)
        table = {"number": number, "name": row.get("name"), "key": row.get("key")}
        member, problems = parse(Member, table, "client")
        if member is None:
            raise IdentityError(f"{path}: {'; '.join(problems)}")
        found.append(member.model_copy(update={"state": "revoked"}) if revoked else member)
    return tuple(found)


def _rows(path: Path, name: str) -> Sequence[dict[str, Any]]:
    rows: Any = read_toml(path).get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise IdentityError(f"{path}: must hold tables, [[{name}]] with name and key")
    return rows


def _require_distinct(members: Sequence[Member], where: str = "") -> None:
    for what in ("number", "name", "key"):
        seen: dict[Any, Member] = {}
        for member in members:
            other = seen.setdefault(getattr(member, what), member)
            if other is not member:
                raise IdentityError(
                    f"{where}{member.name} and {other.name} have the same {what}; each has one of its own"
                )


def _line(public: str) -> str:
    """Return a public key as written in the file."""
    line = " ".join(public.split()[:2])
    public_pem(line)
    return line


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
