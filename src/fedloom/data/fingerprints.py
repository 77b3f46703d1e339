"""Fingerprints of rows: how many rows parties have in common, told to somebody who cannot read them.

A row's fingerprint is HMAC-SHA256 of its normalised text under a key that all clients share and whoever
compares does not have, cut to 16 bytes, each once and in ascending order. Who holds fingerprints of
several clients without the key learns how many different rows each has and, for any choice of clients,
how many rows exactly these have, and nothing of a text, as long as no client works with it: with the
key, whether a guessed row is among them can be tested. Clients therefore give their fingerprints to the
one who compares, and to no other client. It is the form of private set intersection with a server that
works with no party (after Kamara et al. 2014, "Scaling Private Set Intersection to Billion-Element
Sets"), of which the sizes alone are shown.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom.data.examples import Example
from fedloom.data.splits import SIZE, row_keys
from fedloom.data.text_statistics import Shared, shared
from fedloom.errors import DataError, OutputError
from fedloom.storage.files import write_atomically

FORMAT = "fedloom-fingerprints-1"

KEY_BYTES = 32
"""Bytes of a key, in hexadecimal digits in its file."""

MOST_ROWS = 2**22
"""Of a file of fingerprints: 4 million, some 0.5 GB of memory while they are compared."""

LONGEST_HEAD = 1000
"""Characters of a file's first line."""


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of one party's rows.

    Attributes:
        rows: Different fingerprints.
        key_check: Tells keys apart, and nothing of a key.
    """

    rows: frozenset[bytes]
    key_check: str


def make_key(path: Path) -> None:
    """Write a new key, readable by its owner alone.

    Raises:
        OutputError: There is a file already, or it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OutputError(f"{path} is there already: give --key alone to use it") from None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")


def read_key(path: Path) -> bytes:
    """Return a key.

    Raises:
        DataError: There is none, or it is no key.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(4 * KEY_BYTES).decode("ascii").strip()
        key = bytes.fromhex(text)
    except FileNotFoundError:
        raise DataError(
            f"there is no key {path}: one client makes it with --new-key and gives it to the other "
            "clients, and to nobody else"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read as a key: {error.strerror}") from None
    except ValueError:
        raise DataError(
            f"{path} is no key: it holds something else than {2 * KEY_BYTES} hexadecimal digits; "
            "--new-key makes one"
        ) from None
    if len(key) != KEY_BYTES:
        raise DataError(
            f"{path} is no key: it holds {len(text)} characters, a key {2 * KEY_BYTES} hexadecimal "
            "digits; --new-key makes one"
        )
    return key


def fingerprints(rows: Sequence[Example], key: bytes) -> Fingerprints:
    """Return the fingerprints of rows.

    Args:
        rows: Of one party, at most :data:`MOST_ROWS` different ones.
        key: 32 bytes.

    Raises:
        DataError: There are more.
    """
    keys = np.unique(row_keys(rows)).tolist()
    if len(keys) > MOST_ROWS:
        raise DataError(
            f"there are {len(keys)} different rows, and fingerprints of at most {MOST_ROWS} are "
            "compared: name a source of fewer, such as one of its files"
        )
    found = (_cut(key, "row", own.ljust(SIZE, b"\0")) for own in keys)
    return Fingerprints(frozenset(found), _cut(key, "key", b"").hex())


def _cut(key: bytes, what: str, content: bytes) -> bytes:
    return hmac.new(key, what.encode() + b"\0" + content, hashlib.sha256).digest()[:SIZE]


def write_fingerprints(own: Fingerprints, path: Path) -> None:
    """Write fingerprints in ascending order.

    Raises:
        OutputError: They cannot be written.
    """
    head = {"format": FORMAT, "rows": len(own.rows), "key_check": own.key_check}
    content = json.dumps(head).encode() + b"\n" + b"".join(sorted(own.rows))
    write_atomically(path, content)


def read_fingerprints(path: Path) -> Fingerprints:
    """Read fingerprints of another party, of which nothing is believed.

    Raises:
        DataError: It is no such file.
    """
    try:
        most = LONGEST_HEAD + SIZE * MOST_ROWS
        if not path.is_file() or path.stat().st_size > most:
            raise DataError(
                f"{path} is no file of at most {MOST_ROWS} fingerprints: fedloom data fingerprint "
                "makes one"
            )
        with open(path, "rb") as file:
            first, content = file.readline(LONGEST_HEAD), file.read(most)
    except OSError as error:
        raise DataError(f"fingerprints {path} cannot be read: {error.strerror}") from None
    try:
        head = json.loads(first)
        count, check = head["rows"], head["key_check"]
        sound = head["format"] == FORMAT and isinstance(check, str) and isinstance(count, int)
    except (ValueError, TypeError, LookupError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path} holds no fingerprints: fedloom data fingerprint makes them")
    rows = [content[i : i + SIZE] for i in range(0, len(content), SIZE)]
    if len(content) != SIZE * count or any(a >= b for a, b in itertools.pairwise(rows)):
        raise DataError(f"{path} is damaged: it does not hold {count} fingerprints in their order")
    return Fingerprints(frozenset(rows), check)


def compare(paths: Sequence[Path]) -> Shared:
    """Return how many rows parties have in common.

    Args:
        paths: Their fingerprints, at least two.

    Raises:
        DataError: There are fewer, one is no file of fingerprints, or they are under different keys.
    """
    if len(paths) < 2:
        raise DataError("at least two files of fingerprints are compared: give one for each client")
    found = [read_fingerprints(path) for path in paths]
    for path, own in zip(paths, found, strict=True):
        if own.key_check != found[0].key_check:
            raise DataError(
                f"{path} is under another key than {paths[0]}: all clients must use one key"
            )
    return shared({party: own.rows for party, own in enumerate(found)})
