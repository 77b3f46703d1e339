"""Payloads as a dishonest party would make them: of the right schema, with numbers and metrics of any kind."""

import json

from fedloom.wire.messages import METADATA, Payload, encode
from fedloom.wire.packing import header_of


def encode_anything(payload, schema):
    """Encode a payload whose numbers and metrics nobody checks."""
    named = {spec.name: spec.lowest for spec in schema.numbers}
    data = encode(Payload(payload.tensors, named), schema)
    numbers = [payload.numbers[spec.name] for spec in schema.numbers]
    return rewritten(data, numbers=json.dumps(numbers), metrics=json.dumps(dict(payload.metrics)))


def rewritten(data, **metadata):
    """Return a payload with other metadata."""
    header, start = header_of(data, len(data))
    header[METADATA] |= metadata
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]
