"""Data files opened: regular files alone, gzip unpacked as it is read, within bounds, and as text.

Nothing here knows what a row is. Bounds are on what a row and an unpacked file may take, never on the
size of a file: one of many gigabytes is read as a stream.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedloom.accounting.quantities import human_count
from fedloom.display.untrusted_text import named
from fedloom.errors import DataError

LONGEST_ROW = 16 * 2**20
"""Characters of the longest row (bytes of a Parquet row): 16 Mi."""

DEEPEST = 100
"""Brackets within brackets; messages with parts are 5 deep."""

UNPACKED, RATIO = 16 * 2**20, 100
"""Bytes that a compressed file may unpack to whatever its size, and how many times its size beyond that.
Text packs to a third or a tenth, rows that say nearly the same to a fiftieth; gzip reaches 1032."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

BEGINNINGS = {
    b"PAR1": "is a Parquet file; name it .parquet",
    b"PK\x03\x04": "is a ZIP archive (or a spreadsheet); unpack it, or save it as CSV",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed with xz; unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it, or compress it with gzip",
    b"\xff\xfe\x00\x00": "is UTF-32 text, and rows are read as UTF-8; convert it with iconv",
    b"\x00\x00\xfe\xff": "is UTF-32 text, and rows are read as UTF-8; convert it with iconv",
    b"\xff\xfe": "is UTF-16 text, and rows are read as UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text, and rows are read as UTF-8: iconv -f UTF-16 -t UTF-8",
}
"""First bytes of files that are no text in UTF-8, and what to do about each."""


class UnreadableError(Exception):
    """A file that is not what it claims; the text goes on after the file's name."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yield a data file to be read as bytes, unpacked if it is gzip.

    Raises:
        DataError: It is not there.
        UnreadableError: It is not a regular file, may not be read, or is not what its name says.
    """
    with _regular(path) as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        if file.peek(2)[:2] != b"\x1f\x8b":  # type: ignore[attr-defined]
            raise UnreadableError(
                "is not compressed with gzip, whatever its name says; name it without .gz"
            )
        yield cast(BinaryIO, io.BufferedReader(_Unpacked(file), 2**17))


def text_of(file: BinaryIO, newline: str | None) -> io.TextIOWrapper:
    r"""Return a file's bytes as text, where a byte that is not UTF-8 stands as :func:`not_utf8` finds it.

    Args:
        file: As :func:`opened` yields it, at its beginning.
        newline: ``None`` where ``\n``, ``\r\n`` and ``\r`` all end a line, ``""`` to have them kept.

    Raises:
        UnreadableError: Its first bytes are those of something else.
    """
    require_text(file)
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)


def require_text(file: BinaryIO) -> None:
    """Refuse a file whose first bytes are those of something else than text in UTF-8."""
    first = file.peek(8)[:8]  # type: ignore[attr-defined]
    if first[:2] == b"\x1f\x8b":
        inside = isinstance(getattr(file, "raw", None), _Unpacked)
        raise UnreadableError(
            "is compressed with gzip twice; unpack it once"
            if inside
            else "is compressed with gzip, and its name does not say so; add .gz to it"
        )
    for beginning, what in BEGINNINGS.items():
        if first.startswith(beginning):
            raise UnreadableError(what)


def not_utf8(text: str) -> str | None:
    """Return what to say of a text that was not UTF-8, or ``None`` where it was."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return (
            f"not UTF-8 (byte 0x{byte:02x} after {human_count(error.start)} characters); save "
            "the file as UTF-8"
        )
    return None


def _regular(path: Path) -> BinaryIO:
    """Open a regular file; what only looks like one is not even waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL in its name
        raise UnreadableError(f"is not a name of a file: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise DataError(f"data file not found: {named(path)}{_hint(path)}") from None
        raise UnreadableError(_why_not(error)) from None
    kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode))
    if kind is None:
        return os.fdopen(descriptor, "rb", 2**17)
    os.close(descriptor)
    raise UnreadableError(f"is {kind}, not a file; {_instead(path, kind)}")


def _instead(path: Path, kind: str) -> str:
    if kind == "a folder":
        return f"name the files in it, such as {named(path)}/*.jsonl"
    return "write its rows to a file and name that"


def _why_not(error: OSError) -> str:
    """Return why something that is there cannot be opened."""
    if error.errno == errno.ENXIO:
        return "is a socket or a device, not a file; write its rows to a file and name that"
    if error.errno == errno.ELOOP:
        return "is a symbolic link that leads back to itself; name the file"
    if error.errno == errno.EACCES:
        return "may not be read by this user; change its permissions, or copy it"
    return f"cannot be read: {error.strerror}"


def _hint(path: Path) -> str:
    """Return what to look at where there is no file: a broken link, the nearest name, the folder."""
    folder = path.parent
    if path.is_symlink():
        return f"; it is a symbolic link to {named(os.readlink(path))}, which is not there"
    if not folder.is_dir():
        return f"; there is no folder {named(folder)}"
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {named(folder / near[0])}?" if near else ""


class _Unpacked(io.RawIOBase):
    """Unpacked bytes of a gzip file, no more of them than its size explains."""

    def __init__(self, file: BinaryIO) -> None:
        self._packed, self._unpacked, self._count = file, gzip.GzipFile(fileobj=file), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._unpacked.read(len(buffer))
        except EOFError:
            raise UnreadableError(
                "ends in the middle of its gzip data: it was cut off, or is still written; copy it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UnreadableError(f"holds damaged gzip data ({error}); copy it again") from None
        self._count += len(found)
        if self._count > UNPACKED and self._count > RATIO * self._packed.tell():
            raise UnreadableError(
                f"unpacks to more than {RATIO} times its size, as no rows do; unpack it and look at it"
            )
        buffer[: len(found)] = found
        return len(found)
