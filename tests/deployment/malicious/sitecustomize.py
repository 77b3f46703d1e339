"""Put before a client's modules, this makes it a bad one: it trains well and sends NaN, properly signed."""

import struct

import fedloom.wire.envelope as envelope

honest = envelope.seal


def seal(header, payload=b"", sign=None):
    """Seal as always, but with NaN as the last number of what was trained."""
    if isinstance(header, envelope.ReplyHeader) and len(payload) > 1000:
        payload = payload[:-4] + struct.pack("<f", float("nan"))
        header = header.model_copy(update={"payload": ""})
    return honest(header, payload, sign)


envelope.seal = seal
