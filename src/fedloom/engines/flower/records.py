"""An envelope as the content of a Flower message. No torch here: clients fetch messages without it."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedloom.errors import MessageError
from fedloom.wire.envelope import Envelope

STYPE = "fedloom.safetensors"
"""Dtype name under which Flower stores an encoded payload as one opaque array."""


def to_records(envelope: Envelope) -> RecordDict:
    """Return an envelope as the content of a Flower message: the payload is one opaque array."""
    header: dict[str, Any] = {"header": envelope.header, "signature": envelope.signature}
    shape = (len(envelope.payload),)
    payload = Array(dtype="uint8", shape=shape, stype=STYPE, data=envelope.payload)
    return RecordDict(
        {"header": ConfigRecord(header), "payload": ArrayRecord({"payload": payload})}
    )


def from_records(content: RecordDict) -> Envelope:
    """Return the envelope from the content of :func:`to_records`.

    Raises:
        MessageError: It is not an envelope.
    """
    match content.get("header"), content.get("payload"):
        case ConfigRecord() as header, ArrayRecord() as payload:
            match header.get("header"), payload.get("payload"), header.get("signature"):
                case bytes() as said, Array(data=bytes() as data), bytes() as signature:
                    return Envelope(said, data, signature)
    raise MessageError("the message holds no envelope of fedloom")
