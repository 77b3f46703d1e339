"""The client store: tensors that each client keeps between rounds, in memory.

Tensors that clients store in a round take effect once the round is over. Until then they are pending, so
a run that is stopped in the middle of a round is saved as it was before that round, and tensors stored
with an answer that does not count can be discarded.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.tensors import Tensors

SEPARATOR = "|"
"""Between the name of a slot and that of a tensor in it; no slot's name has one."""

Slots = dict[str, Tensors]
"""Named sets of tensors, such as ``adapter`` and ``optimizer``."""


class ClientStore:
    """Slots of every client.

    Attributes:
        changed: Clients whose slots differ from the last checkpoint; the saver clears it.
    """

    def __init__(self, flat: Mapping[int, Tensors] | None = None) -> None:
        """Start empty, or from what :meth:`flat` returned earlier."""
        self.changed: set[int] = set()
        self._slots: dict[int, Slots] = {}
        self._pending: dict[int, Slots] = {}
        self._before: dict[int, Slots | None] = {}
        for client, tensors in (flat or {}).items():
            slots = self._slots.setdefault(client, {})
            for key, tensor in tensors.items():
                slot, _, name = key.partition(SEPARATOR)
                slots.setdefault(slot, {})[name] = tensor

    @classmethod
    def of(cls, client: int, slots: Slots) -> ClientStore:
        """Return a store in which one client has these slots."""
        store = cls()
        store._slots[client] = dict(slots)
        return store

    def slots(self, client: int) -> Slots:
        """Return a copy of a client's slots; the tensors in it are not to be written to."""
        return dict(self._pending.get(client, self._slots.get(client, {})))

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
        self._slots.update(self._pending)
        self.changed.update(self._pending)
        self._pending.clear()
        self._before.clear()

    def flat(self) -> dict[int, Tensors]:
        """Return every client's tensors as of the last finished round under ``slot|name``."""
        return {
            client: {
                f"{slot}{SEPARATOR}{name}": tensor
                for slot, tensors in slots.items()
                for name, tensor in tensors.items()
            }
            for client, slots in sorted(self._slots.items())
            if slots
        }
