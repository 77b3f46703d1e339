"""Bytes from strangers: whatever they are, decoding gives a payload that fits or a MessageError."""

import json
import resource

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom.errors import MessageError
from fedloom.wire.messages import Payload, decode, encode, require_finite
from fedloom.wire.schema import NumberSpec, Schema, TensorSpec, amount
from sampling import drawn, tries

SCHEMA = Schema(
    (
        TensorSpec("w", (2, 3), torch.float32),
        TensorSpec("half", (4,), torch.bfloat16),
        TensorSpec("ids", (3,), torch.int64),
        TensorSpec("rows", (5, 2), torch.float32, ragged=True),
    ),
    (NumberSpec("examples", 1, 100), NumberSpec("rate")),
    (amount("loss"),),
)
SOUND = encode(
    Payload(
        {
            "w": torch.ones(2, 3),
            "half": torch.ones(4, dtype=torch.bfloat16),
            "ids": torch.arange(3),
            "rows": torch.zeros(2, 2),
        },
        {"examples": 3, "rate": 0.1},
        {"loss": 1.0},
    ),
    SCHEMA,
)
HEADER = int.from_bytes(SOUND[:8], "little")
KNOWN = json.loads(SOUND[8 : 8 + HEADER])
BODY = SOUND[8 + HEADER :]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def damaged(draw):
    """A sound payload with some bytes changed, cut off, doubled or put in."""
    data = bytearray(SOUND)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "length", "repeat"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "length":
                data[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
            case "repeat":
                data += data[at:]
    return bytes(data)


@st.composite
def forged(draw):
    """A header of the right form with values of all kinds in it, over a body of any length."""
    header = json.loads(json.dumps(KNOWN))
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from([*header, "__metadata__", "another"]))
        entry = header.get(part)
        field = draw(st.sampled_from([*(entry if isinstance(entry, dict) else ["x"]), "numbers"]))
        if draw(st.booleans()) and isinstance(entry, dict):
            entry[field] = draw(JSON | st.just(json.dumps(draw(JSON))))
        else:
            header[part] = draw(JSON)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = draw(st.sampled_from([len(BODY), len(BODY) + 8, 0, 10**4]))
    return len(text).to_bytes(8, "little") + text + (BODY * (length // len(BODY) + 1))[:length]


STRANGE = st.binary(max_size=400) | damaged() | forged()


def check(data):
    try:
        payload = decode(data, SCHEMA)
        require_finite(payload)
    except MessageError:
        return
    for spec in SCHEMA.tensors:
        tensor = payload.tensors[spec.name]
        assert tensor.dtype == spec.dtype and tensor.shape[1:] == spec.shape[1:]
        assert len(tensor) == spec.shape[0] or (spec.ragged and len(tensor) < spec.shape[0])
    assert list(payload.numbers) == ["examples", "rate"] and set(payload.metrics) <= {"loss"}
    numbers = [*payload.numbers.values(), *payload.metrics.values()]
    assert all(isinstance(value, int | float) and abs(value) <= 1e300 for value in numbers)


def test_a_sound_payload_is_let_in():
    assert decode(SOUND, SCHEMA).numbers == {"examples": 3, "rate": 0.1}


def around(data, seed, count):
    """Payloads near one that hypothesis made: some bytes changed, or the end cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        near = bytearray(data)
        for at in rng.integers(0, len(near), size=rng.integers(1, 4)):
            near[at] = rng.integers(256)
        yield bytes(near[: rng.integers(len(near) + 1)] if rng.random() < 0.2 else near)


def fuzzed(examples, each, start=0):
    """Check so many payloads that hypothesis makes, and with each so many near it."""

    def own(data, seed):
        check(data)
        for near in around(data or SOUND, seed, each - 1):
            check(near)

    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    check_all = chosen(given(data=STRANGE, seed=st.integers(0, 2**32 - 1))(own))
    hypothesis.seed(start)(check_all)()


def test_strange_bytes_are_refused_or_fit():
    fuzzed(150, 10)


@pytest.mark.parametrize("examples", tries(400, 4000))
def test_a_hundred_thousand_strange_payloads_and_no_more_memory(examples):
    fuzzed(500, 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzzed(examples, 25, drawn("payloads").getrandbits(32))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kilobytes, most of them hypothesis's own record of what it tried
