"""What each client keeps between rounds, in memory; a checkpoint writes it to disk."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.messages import Tensors

Slots = dict[str, Tensors]
"""Named sets of tensors, such as ``adapter`` and ``optimizer``."""


class ClientStore:
    """Slots of every client, and which clients changed since the last checkpoint."""

    def __init__(self, flat: Mapping[int, Tensors] | None = None) -> None:
        """Start empty, or from what :meth:`flat` returned earlier."""
        self.changed: set[int] = set()
        self._slots: dict[int, Slots] = {}
        for client, tensors in (flat or {}).items():
            slots = self._slots.setdefault(client, {})
            for key, tensor in tensors.items():
                slot, _, name = key.partition("|")
                slots.setdefault(slot, {})[name] = tensor

    def slots(self, client: int) -> Slots:
        """Return a copy of a client's slots; the tensors in it are not to be written to."""
        return dict(self._slots.get(client, {}))

    def commit(self, client: int, slots: Slots) -> None:
        """Replace a client's slots, if they differ from what it had."""
        previous = self._slots.get(client, {})
        if slots.keys() != previous.keys() or any(slots[k] is not previous[k] for k in slots):
            self._slots[client] = dict(slots)
            self.changed.add(client)

    def flat(self) -> dict[int, Tensors]:
        """Return every client's tensors under ``slot|name``."""
        return {
            client: {
                f"{slot}|{name}": t
                for slot, tensors in slots.items()
                for name, t in tensors.items()
            }
            for client, slots in sorted(self._slots.items())
            if slots
        }
