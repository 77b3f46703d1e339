"""Token sets in files: written part by part, read by mapping, so that neither takes the memory of all.

A file is the tokens (int32), which of them count (one byte each), the arrays with one entry a sequence or
example, a description (JSON), its length, a mark, and the SHA-256 of all before that. One that is torn,
damaged or foreign is not read.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.token_set import ARRAYS, MARGINS, TokenSet, Untokenized, join
from fedloom.storage.files import written_atomically

LENGTH, TAIL = struct.Struct("<Q8s"), 32
"""Behind the description: its length and :data:`MARK`, and the SHA-256 of all before that."""

MARK = b"fl-token"
ALIGNED = 8
CHUNK = 2**20


def write_tokens(path: Path, parts: Iterable[TokenSet]) -> None:
    """Write a token set, part by part, to a file that is there whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    with written_atomically(path) as file, tempfile.TemporaryFile(dir=path.parent) as counting:
        out, small = _Hashed(file), []
        width = 1
        for part in parts:
            width = part.width
            out.write(part.tokens.tobytes())
            counting.write(part.trained.tobytes())
            small.append(part.without_tokens())
        whole = join(small, width)
        total = out.align()
        counting.seek(0)
        shutil.copyfileobj(counting, out, CHUNK)
        count = int(whole.starts[-1])
        places = {"tokens": [0, count], "trained": [total, count]}
        for name in ARRAYS if whole.margins is None else (*ARRAYS, MARGINS):
            start = out.align()
            array = np.ascontiguousarray(getattr(whole, name))
            out.write(array.tobytes())
            places[name] = [start, array.size]
        facts = {
            "width": width,
            "largest": whole.largest,
            "places": places,
            "dropped": [asdict(one) for one in whole.dropped],
        }
        out.align()
        described = json.dumps(facts).encode()
        out.write(described)
        out.write(LENGTH.pack(len(described), MARK))
        file.write(out.digest.digest())


def read_tokens(path: Path, *, mapped: bool = False) -> TokenSet | None:
    """Return the token set of a file; ``None`` where there is no whole one.

    Args:
        path: The file.
        mapped: Whether the tokens stay in the file and are read where they are asked for.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < LENGTH.size + TAIL or not _is_whole(file, size):
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return None
    end = size - TAIL - LENGTH.size
    length, _ = LENGTH.unpack_from(content, end)
    facts = json.loads(content[end - length : end])
    arrays = dict(_arrays(content, facts["places"]))
    large = {name: arrays.pop(name) for name in ("tokens", "trained")}
    if not mapped:
        large = {name: array.copy() for name, array in large.items()}
    arrays["cut"] = arrays["cut"].reshape(-1, 2)
    return TokenSet(
        width=facts["width"],
        dropped=tuple(Untokenized(**one) for one in facts["dropped"]),
        largest=facts["largest"],
        **large,
        **{name: array.copy() for name, array in arrays.items()},  # few, and not for reading alone
    )


class _Hashed:
    """A file that is written, with the SHA-256 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def align(self) -> int:
        """Go on at a multiple of :data:`ALIGNED`; return where."""
        self.write(bytes(-self.size % ALIGNED))
        return self.size


def _is_whole(file: IO[bytes], size: int) -> bool:
    digest, left, last = hashlib.sha256(), size - TAIL, b""
    while left and (data := file.read(min(CHUNK, left))):
        digest.update(data)
        left -= len(data)
        last = (last + data)[-LENGTH.size :]
    return last.endswith(MARK) and file.read() == digest.digest()


def _arrays(content: mmap.mmap, places: dict[str, list[int]]) -> Iterator[tuple[str, NDArray[Any]]]:
    types = {"tokens": np.int32, "trained": np.bool_, "escaped": np.bool_, MARGINS: np.float64}
    for name, (start, count) in places.items():
        kind = np.dtype(types.get(name, np.int64))
        yield (
            name,
            np.frombuffer(content, kind, count, start) if count else np.zeros(0, kind),
        )
