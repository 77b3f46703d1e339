"""An envelope as the content of a Flower message. No torch here: the thin client reads this too."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedloom.envelope import Envelope
from fedloom.errors import MessageError

STYPE = "fedloom.safetensors"
"""What Flower is told an encoded payload is, which to it is one opaque array."""


def to_records(envelope: Envelope) -> RecordDict:
    """Return an envelope as what a message of Flower holds: the payload is one opaque array."""
    header: dict[str, Any] = {"header": envelope.header, "signature": envelope.signature}
    shape = (len(envelope.payload),)
    payload = Array(dtype="uint8", shape=shape, stype=STYPE, data=envelope.payload)
    return RecordDict(
        {"header": ConfigRecord(header), "payload": ArrayRecord({"payload": payload})}
    )


def from_records(content: RecordDict) -> Envelope:
    """Return what :func:`to_records` was given.

    Raises:
        MessageError: It was no envelope.
    """
    try:
        header, payload = content["header"], content["payload"]
        assert isinstance(header, ConfigRecord) and isinstance(payload, ArrayRecord)
        parts = (header["header"], payload["payload"].data, header["signature"])
        assert all(isinstance(part, bytes) for part in parts)
    except (KeyError, AssertionError, AttributeError):
        raise MessageError("the message holds no envelope of fedloom") from None
    return Envelope(*parts)  # type: ignore[arg-type]
