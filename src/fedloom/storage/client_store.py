"""The client store: tensors that each client keeps between rounds.

In memory are those of clients that took part lately; those of all others stay in the files of the last
checkpoint and are read when their client takes part again. So memory depends on who takes part in a round
and not on how many clients there are.

Tensors that clients store in a round take effect once the round is over. Until then they are pending, so
a run that is stopped in the middle of a round is saved as it was before that round, and tensors stored
with an answer that does not count can be discarded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from fedloom.tensors import Tensors, tensor_bytes

SEPARATOR = "|"
"""Between the name of a slot and that of a tensor in it; no slot's name has one."""

RECENT = 64 << 20
"""Bytes of tensors that are also in a checkpoint and stay in memory."""

Slots = dict[str, Tensors]
"""Named sets of tensors, such as ``adapter`` and ``optimizer``."""


class ClientStore:
    """Slots of every client.

    Attributes:
        changed: Clients whose slots differ from the last checkpoint.
    """

    def __init__(self, flat: Mapping[int, Tensors] | None = None, *, recent: int = RECENT) -> None:
        """Start empty, or from what :meth:`flat` returned earlier.

        Args:
            flat: Each client's tensors, of which one is asked for when it is needed.
            recent: Bytes of tensors in memory that are also in ``flat``, at most, but for one client's.
        """
        self.changed: set[int] = set()
        self.recent = recent
        self._saved: Mapping[int, Tensors] = flat if flat is not None else {}
        self._read: OrderedDict[int, Slots] = OrderedDict()
        self._bytes = 0
        self._slots: dict[int, Slots] = {}
        self._pending: dict[int, Slots] = {}
        self._before: dict[int, Slots | None] = {}

    @classmethod
    def of(cls, slots: Mapping[int, Slots]) -> ClientStore:
        """Return a store in which clients have these slots."""
        store = cls()
        store._slots |= {client: dict(own) for client, own in slots.items()}
        return store

    def slots(self, client: int) -> Slots:
        """Return a copy of a client's slots; the tensors in it are not to be written to."""
        return dict(self._pending[client] if client in self._pending else self._finished(client))

    def __contains__(self, client: int) -> bool:
        """Return whether a client has any tensors; reads nothing."""
        own = self._pending.get(client, self._slots.get(client))
        return client in self._saved if own is None else bool(own)

    def stage(self, client: int, slots: Slots) -> None:
        """Replace a client's slots if they differ; the change is pending until the round ends."""
        previous = self.slots(client)
        if slots.keys() != previous.keys() or any(slots[k] is not previous[k] for k in slots):
            self._before.setdefault(client, self._pending.get(client))
            self._pending[client] = dict(slots)

    def begin_exchange(self) -> None:
        """Mark the state that :meth:`discard` returns to."""
        self._before.clear()

    def discard(self, client: int) -> None:
        """Discard what a client has stored since :meth:`begin_exchange`."""
        if client in self._before:
            before = self._before.pop(client)
            self._pending.pop(client)
            if before is not None:
                self._pending[client] = before

    def finish_round(self) -> None:
        """Let all pending changes take effect."""
        for client in self._pending:
            self._forget(client)
        self._slots.update(self._pending)
        self.changed.update(self._pending)
        self._pending.clear()
        self._before.clear()

    def saved(self, flat: Mapping[int, Tensors]) -> None:
        """Take note that all of :meth:`flat` is in a checkpoint, from which it can be read."""
        self._saved = flat
        for client, slots in self._slots.items():
            self._remember(client, slots)
        self._slots.clear()
        self.changed.clear()

    def flat(self) -> Mapping[int, Tensors]:
        """Return every client's tensors as of the last finished round under ``slot|name``.

        They are put together, or read, when they are asked for.
        """
        return _Flat(self)

    def _finished(self, client: int) -> Slots:
        """Return a client's slots as of the last finished round."""
        if client in self._slots:
            return self._slots[client]
        if client in self._read:
            self._read.move_to_end(client)
            return self._read[client]
        slots: Slots = {}
        for key, tensor in self._saved.get(client, {}).items():
            slot, _, name = key.partition(SEPARATOR)
            slots.setdefault(slot, {})[name] = tensor
        self._remember(client, slots)
        return slots

    def _remember(self, client: int, slots: Slots) -> None:
        """Keep what is in a checkpoint too; let go of what was used longest ago."""
        self._forget(client)
        if slots:
            self._read[client] = slots
            self._bytes += _bytes(slots)
        while self._bytes > self.recent and len(self._read) > 1:
            self._forget(next(iter(self._read)))

    def _forget(self, client: int) -> None:
        self._bytes -= _bytes(self._read.pop(client, {}))


class _Flat(Mapping[int, Tensors]):
    """What :meth:`ClientStore.flat` returns."""

    def __init__(self, store: ClientStore) -> None:
        self._store = store

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients())

    def __len__(self) -> int:
        return len(self._clients())

    def __getitem__(self, client: int) -> Tensors:
        slots = self._store._finished(client)
        if not slots:
            raise KeyError(client)
        return {
            f"{slot}{SEPARATOR}{name}": tensor
            for slot, tensors in slots.items()
            for name, tensor in tensors.items()
        }

    def _clients(self) -> list[int]:
        new = self._store._slots
        kept = (client for client in self._store._saved if client not in new)
        return sorted([*kept, *(client for client, slots in new.items() if slots)])


def _bytes(slots: Slots) -> int:
    return sum(map(tensor_bytes, slots.values()))
