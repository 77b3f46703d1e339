"""Log-probs of rows under a reference model, kept in memory and on disk.

A reference does not change over rounds, and clients, configurations of a comparison, resumed runs and
later ones have rows and references in common. What is kept is one forward pass: its key is a SHA-256
over all that its bits follow from: the weights themselves, precision, device, threads and version of
torch, and the tokens of the pass. So an entry is what would be computed again, bit for bit, or it is not
found. A file holds the passes under one model; one that is damaged counts for what is whole of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.data.batch import Sequences
from fedloom.errors import OutputError
from fedloom.models.adapters import AdapterModel
from fedloom.storage.cache import make_room
from fedloom.storage.files import write_atomically
from fedloom.tensors import Tensors

MOST_BYTES = 256 * 1024 * 1024
"""Of all files together; those that were written to longest ago go first."""

LARGEST_MODEL = 4 * 1024**3
"""Bytes of weights, beyond which hashing them would take about as long as computing with them."""

HEAD, TAIL = struct.Struct("<32sI"), 8
"""Of an entry: key and number of log-probs before them, bytes of their checksum behind them."""


class ReferenceCache:
    """Log-probs of forward passes under reference models."""

    def __init__(self, folder: Path | None, most: int = MOST_BYTES) -> None:
        """Keep files in ``folder``, ``most`` bytes at most; in memory alone where there is none."""
        self.folder, self.most = folder, most
        self._held: dict[str, dict[bytes, bytes]] = {}
        self._weights: WeakKeyDictionary[nn.Module, bytes] = WeakKeyDictionary()

    def model(self, model: AdapterModel, start: Tensors | None) -> str | None:
        """Return the name of a reference model; ``None`` of one that is too large, or empty.

        Args:
            model: Holds anything.
            start: What the reference has for an adapter and own parts, ``None`` for neither.
        """
        weights = [*model.model.parameters(), *model.model.buffers()]
        if model.device.type == "meta" or sum(w.nbytes for w in weights) > LARGEST_MODEL:
            return None
        if model.model not in self._weights:
            own = {id(parameter) for parameter in model.parameters.values()}
            with model.reference():  # what is trained in place is as it was loaded
                kept = ((n, t) for n, t in _tensors(model.model) if id(t) not in own)
                self._weights[model.model] = _digest(kept)
        config = model.model.config
        facts = (
            torch.__version__,
            torch.get_num_threads(),
            model.device.type,
            model.autocast,
            getattr(config, "_attn_implementation", None),
            type(model).__name__,
            repr(config),
            start is None,
        )
        whole = hashlib.sha256(repr(facts).encode())
        whole.update(self._weights[model.model])
        whole.update(_digest(sorted((start or {}).items())))
        return whole.hexdigest()

    def logps(self, model: str, sequences: Sequences, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``(sequences,)`` float32 log-probs of a pass, computed where they are not kept.

        Args:
            model: The reference's name.
            sequences: What is read.
            compute: Works them out.
        """
        held = self._of(model)
        reading = sequences.reading
        parts = [reading.input_ids, reading.attention_mask, reading.sources]
        parts += [own for own in (reading.branches, sequences.completion_mask) if own is not None]
        key = _digest((str(place), part) for place, part in enumerate(parts))
        if key not in held:
            held[key] = compute().float().cpu().numpy().tobytes()
            self._append(model, key, held[key])
        return torch.from_numpy(np.frombuffer(held[key], np.float32).copy())

    def _of(self, model: str) -> dict[bytes, bytes]:
        if model not in self._held:
            held = sum(len(own) for passes in self._held.values() for own in passes.values())
            if held > self.most:
                self._held.clear()
            self._held[model] = self._read(model)
        return self._held[model]

    def _read(self, model: str) -> dict[bytes, bytes]:
        if self.folder is None:
            return {}
        try:
            data = (self.folder / model).read_bytes()
        except OSError:
            return {}
        found, whole = _entries(data)
        if whole < len(data):  # what is appended behind a torn entry could not be read
            with contextlib.suppress(OutputError):
                write_atomically(self.folder / model, data[:whole])
        return found

    def _append(self, model: str, key: bytes, logps: bytes) -> None:
        entry = HEAD.pack(key, len(logps) // 4) + logps
        entry += hashlib.sha256(entry).digest()[:TAIL]
        if self.folder is None or len(entry) > self.most:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self.folder / model).open("ab") as file:
                file.write(entry)
            make_room(self.folder, self.most, self.folder / model)
        except OSError:
            return  # a cache that cannot be written costs time, nothing else


@cache
def reference_cache(folder: Path) -> ReferenceCache:
    """Return this process's cache of a folder."""
    return ReferenceCache(folder)


def _entries(data: bytes) -> tuple[dict[bytes, bytes], int]:
    """Return the entries of a file, and how many of its bytes are whole entries."""
    found: dict[bytes, bytes] = {}
    place = 0
    while len(data) - place >= HEAD.size:
        key, count = HEAD.unpack_from(data, place)
        end = place + HEAD.size + 4 * count
        if data[end : end + TAIL] != hashlib.sha256(data[place:end]).digest()[:TAIL]:
            break
        found[key] = data[place + HEAD.size : end]
        place = end + TAIL
    return found, place


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Return a SHA-256 over names, types, shapes and values."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        for part in _stored(tensor.detach()):
            own = part.cpu().contiguous().view(-1)
            whole.update(own.view(torch.uint8).numpy().tobytes() if own.numel() else b"")
    return whole.digest()


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """Return what a tensor is stored as: itself, or the tensors that a quantised one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _stored(getattr(tensor, name))
