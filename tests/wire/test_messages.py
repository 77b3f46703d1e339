"""Payloads: exact round trips, measured bytes, and everything a bad peer may send."""

import hashlib
import json
import pickle
import struct

import numpy as np
import pytest
import torch

from fedloom.errors import MessageError
from fedloom.tensors import is_finite
from fedloom.wire.messages import Exchange, Payload, decode, encode, require_finite
from fedloom.wire.schema import (
    HEADER_BYTES,
    MAX_NUMBERS,
    MAX_TENSORS,
    NumberSpec,
    Schema,
    TensorSpec,
    amount,
    fraction,
    prefixed,
    score,
)

TENSORS = {
    "b.A": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.B": torch.randn(4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "c": torch.tensor([1.5], dtype=torch.float32),
}
EXAMPLES, LOSS = NumberSpec("examples", 0, 100), amount("loss")
SCHEMA = Schema.of(TENSORS, (EXAMPLES,), (LOSS, fraction("accuracy"), score("margin")))
PAYLOAD = Payload(TENSORS, {"examples": 12}, {"loss": 0.1})


def test_round_trip_is_exact_and_keeps_order_dtype_and_numbers():
    back = decode(encode(PAYLOAD, SCHEMA), SCHEMA)
    assert list(back.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)
    assert back.numbers == {"examples": 12}
    assert back.metrics == {"loss": 0.1}


def test_a_schema_without_codecs_and_its_bytes_are_those_of_releases_before_codecs():
    specs = (
        TensorSpec("w", (2, 3), torch.float32),
        TensorSpec("half", (4,), torch.bfloat16),
        TensorSpec("ids", (3,), torch.int64),
        TensorSpec("rows", (5, 2), torch.float32, ragged=True),
    )
    schema = Schema(specs, (NumberSpec("examples", 1, 100), NumberSpec("rate")), (amount("loss"),))
    tensors = {
        "w": torch.ones(2, 3),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "ids": torch.arange(3),
        "rows": torch.zeros(2, 2),
    }
    data = encode(Payload(tensors, {"examples": 3, "rate": 0.1}, {"loss": 1.0}), schema)
    assert schema.digest == "c9a1351acb5e8e94" and schema.max_bytes == 8288
    digest = hashlib.sha256(data).hexdigest()
    assert digest == "f0d8902616472f90d74f3a9d1e320f0cbaf9d432f7c3dc5a551d03255e4ddd67"
    assert schema.to_table()["tensors"] == [
        ["w", [2, 3], "float32", False],
        ["half", [4], "bfloat16", False],
        ["ids", [3], "int64", False],
        ["rows", [5, 2], "float32", True],
    ]


def test_header_is_under_half_a_kilobyte_whatever_the_number_of_tensors():
    tensors = {f"layer.{i}.lora_A.weight": torch.zeros(8, 64) for i in range(300)}
    schema = Schema.of(tensors, (amount("learning_rate"),))
    size = len(encode(Payload(tensors, {"learning_rate": 1e-3}), schema))
    assert 0 < size - 300 * 8 * 64 * 4 < 512


def test_broadcast_encodes_once():
    exchange = Exchange.broadcast("train", 1, (0, 3, 5), PAYLOAD, SCHEMA, SCHEMA)
    assert len({id(data) for data in exchange.requests.values()}) == 1


def damaged(change):
    """The encoded payload with ``change`` applied to its parsed header."""
    data = encode(PAYLOAD, SCHEMA)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def set_number(value):
    return damaged(lambda h: h["__metadata__"].update(numbers=json.dumps([value])))


def other_schema(**changes):
    tensors = dict(TENSORS)
    tensors.update(changes)
    return encode(Payload(tensors, {"examples": 12}), Schema.of(tensors, (EXAMPLES,), (LOSS,)))


BAD = {
    "empty": b"",
    "short": b"\x01\x02",
    "pickle": pickle.dumps({"a": 1}),
    "random": np.random.default_rng(0).bytes(400),
    "truncated": encode(PAYLOAD, SCHEMA)[:-5],
    "trailing": encode(PAYLOAD, SCHEMA) + b"x" * 7,
    "too large": encode(PAYLOAD, SCHEMA) + b"\0" * (HEADER_BYTES + 100),
    "header bomb": struct.pack("<Q", 2**62) + b"{}",
    "deep JSON": struct.pack("<Q", 6000) + b"[" * 6000,
    "wrong shape": other_schema(c=torch.zeros(2)),
    "broadcastable shape": other_schema(**{"b.A": torch.zeros(1, 3)}),
    "wrong dtype": other_schema(c=torch.zeros(1, dtype=torch.float16)),
    "extra tensor": other_schema(d=torch.zeros(1)),
    "missing number": damaged(lambda h: h["__metadata__"].pop("numbers")),
    "number NaN": set_number(float("nan")),
    "number infinite": set_number(float("inf")),
    "number text": set_number("12"),
    "number true": set_number(True),
    "number huge": set_number(10**400),
    "renamed buffer": damaged(lambda h: h.update(other=h.pop("float32"))),
    "shape lies": damaged(lambda h: h["float32"].update(shape=[70000])),
    "metrics no table": damaged(lambda h: h["__metadata__"].update(metrics="[1]")),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_payloads_are_refused_with_a_reason(data):
    with pytest.raises(MessageError, match=r"payload|number|metrics"):
        decode(data, SCHEMA)


def test_every_truncation_and_bit_flip_in_the_header_is_survived():
    data = encode(PAYLOAD, SCHEMA)
    rng = np.random.default_rng(1)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        for candidate in (bytes(flipped), data[:position]):
            try:
                back = decode(candidate, SCHEMA)
            except MessageError:
                continue
            assert {n: t.shape for n, t in back.tensors.items()} == {
                n: t.shape for n, t in TENSORS.items()
            }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named(value):
    tensors = {**TENSORS, "c": torch.tensor([value])}
    with pytest.raises(MessageError, match="tensor c holds NaN or infinity"):
        require_finite(Payload(tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 33, 70_001])
def test_one_number_that_is_not_finite_is_seen_wherever_it_stands(dtype, size):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0] = torch.finfo(dtype).max
    assert is_finite(tensor) and is_finite(tensor[:0])
    for place in {0, size // 3, size // 2, size - 1}:
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = tensor.clone()
            bad[place] = value
            assert not is_finite(bad)


def test_of_an_honest_party_metrics_that_would_be_refused_are_left_out():
    """Training diverges: what comes of it is not a violation."""
    metrics = {"loss": float("nan"), "accuracy": 1.0 + 1e-9, "margin": -3.5}
    data = encode(Payload(TENSORS, {"examples": 1}, metrics), SCHEMA)
    assert decode(data, SCHEMA).metrics == {"margin": -3.5}
    data = encode(Payload(TENSORS, {"examples": 1}, {"loss": float("inf")}), SCHEMA)
    assert decode(data, SCHEMA).metrics == {} and b"metrics" not in data


METRICS = {
    "an accuracy of 3e299": (
        {"accuracy": 3e299},
        "out_of_range",
        "accuracy is 3e+299, it must be 0 to 1",
    ),
    "an accuracy of -7": ({"accuracy": -7}, "out_of_range", "accuracy is -7, it must be 0 to 1"),
    "an accuracy of 1e301": ({"accuracy": 1e301}, "not_finite", "accuracy must be finite"),
    "just above": ({"accuracy": 1.0000001}, "out_of_range", "must be 0 to 1"),
    "a loss below 0": ({"loss": -1e-300}, "out_of_range", "loss is -1e-300, it must be 0 to 1e"),
    "a margin beyond": ({"margin": -1.1e9}, "out_of_range", "it must be -1e"),
    "NaN": ({"loss": float("nan")}, "not_finite", "loss must be finite"),
    "infinity": ({"loss": float("-inf")}, "not_finite", "loss must be finite"),
    "a whole number of 400 digits": ({"loss": 10**400}, "not_finite", "loss must be finite"),
    "a text": ({"loss": "0.1"}, "malformed", "must be a number"),
    "true": ({"accuracy": True}, "malformed", "must be a number"),
    "nothing": ({"loss": None}, "malformed", "must be a number"),
    "a list": ({"loss": [0.1]}, "malformed", "must be a number"),
    "a name of its own": ({"score": 0.5}, "malformed", "metric 'score' is not declared"),
    "a long name": ({"x" * 5000: 0.5}, "malformed", "metric 'xxx"),
    "too many": (dict.fromkeys("abcd", 0.5), "too_many_names", "holds 4 metrics, 3 are declared"),
    "64 names": ({f"m{i}": 0.5 for i in range(64)}, "too_many_names", "64 metrics"),
}


@pytest.mark.parametrize(("metrics", "kind", "words"), METRICS.values(), ids=METRICS)
def test_a_metric_that_does_not_fit_is_refused_with_the_reply(metrics, kind, words):
    data = damaged(lambda h: h["__metadata__"].update(metrics=json.dumps(metrics)))
    with pytest.raises(MessageError) as caught:
        decode(data, SCHEMA)
    assert caught.value.kind == kind and words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_metrics_may_be_absent_and_both_ends_of_a_range_belong_to_it():
    assert decode(damaged(lambda h: h["__metadata__"].pop("metrics")), SCHEMA).metrics == {}
    ends = {"accuracy": 1, "loss": 0, "margin": 1e9}
    data = damaged(lambda h: h["__metadata__"].update(metrics=json.dumps(ends)))
    assert decode(data, SCHEMA).metrics == ends


def test_metrics_where_none_are_declared_are_refused():
    schema = Schema.of(TENSORS, (EXAMPLES,))
    data = encode(Payload(TENSORS, {"examples": 1}, {"loss": 0.1}), SCHEMA)
    data = data.replace(SCHEMA.digest.encode(), schema.digest.encode())
    with pytest.raises(MessageError, match="holds 1 metrics, 0 are declared"):
        decode(data, schema)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-1, "out_of_range"),
        (101, "out_of_range"),
        (float("nan"), "not_finite"),
        (1e301, "not_finite"),
        (True, "malformed"),
        ("7", "malformed"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_at_both_ends(value, kind):
    with pytest.raises(MessageError, match="number examples") as caught:
        decode(set_number(value), SCHEMA)
    assert caught.value.kind == kind
    with pytest.raises(MessageError, match="number examples"):
        encode(Payload(TENSORS, {"examples": value}), SCHEMA)


def test_our_own_metrics_must_be_declared():
    with pytest.raises(MessageError, match=r"metrics \['score'\] are not declared: .* `reported`"):
        encode(Payload(TENSORS, {"examples": 1}, {"score": 0.5}), SCHEMA)


def test_specs_of_a_prefix_keep_their_ranges():
    assert prefixed("after.", (fraction("accuracy"),)) == (NumberSpec("after.accuracy", 0.0, 1.0),)


def test_a_schema_that_was_sent_is_the_same():
    back = Schema.from_table(json.loads(json.dumps(SCHEMA.to_table())))
    assert back == SCHEMA and back.digest == SCHEMA.digest
    wider = Schema.of(TENSORS, (NumberSpec("examples", 0, 101),), SCHEMA.metrics)
    assert wider.digest != SCHEMA.digest  # who has other ranges has another schema


def table(**changes):
    return {"tensors": [["w", [2, 3], "float32", False]], "numbers": [], "metrics": [], **changes}


TABLES = {
    "not there": {"tensors": []},
    "no list": table(tensors="w"),
    "a row too short": table(tensors=[["w", [2], "float32"]]),
    "a name that is none": table(tensors=[[7, [2], "float32", False]]),
    "a long name": table(tensors=[["w" * 513, [2], "float32", False]]),
    "a name with a line break": table(tensors=[["w\n", [2], "float32", False]]),
    "a negative size": table(tensors=[["w", [-2, -3], "float32", False]]),
    "a size that is text": table(tensors=[["w", ["2"], "float32", False]]),
    "a size that is true": table(tensors=[["w", [True], "float32", False]]),
    "nine dimensions": table(tensors=[["w", [1] * 9, "float32", False]]),
    "an attribute of torch": table(tensors=[["w", [2], "load", False]]),
    "a dtype that cannot travel": table(tensors=[["w", [2], "complex64", False]]),
    "ragged in no dimension": table(tensors=[["w", [], "float32", True]]),
    "ragged or so": table(tensors=[["w", [2], "float32", 1]]),
    "a terabyte": table(tensors=[["w", [1 << 20, 1 << 20], "uint8", False]]),
    "many small ones": table(tensors=[[f"w{i}", [1 << 35], "int8", True] for i in range(40)]),
    "too many tensors": table(tensors=[["w", [], "int8", False]] * (MAX_TENSORS + 1)),
    "twice the same": table(tensors=[["w", [], "int8", False]] * 2),
    "too many numbers": table(numbers=[[f"n{i}", 0, 1] for i in range(MAX_NUMBERS + 1)]),
    "too many metrics": table(metrics=[[f"n{i}", 0, 1] for i in range(MAX_NUMBERS + 1)]),
    "a number without a range": table(numbers=["examples"]),
    "an end that is text": table(numbers=[["n", "0", 1]]),
    "an end that is infinite": table(metrics=[["n", 0, float("inf")]]),
    "an end that is NaN": table(metrics=[["n", float("nan"), 1]]),
    "metrics as before": table(metrics=True),
}


@pytest.mark.parametrize("own", TABLES.values(), ids=TABLES)
def test_a_schema_from_a_stranger_has_bounds(own):
    with pytest.raises(MessageError, match="a schema is malformed") as caught:
        Schema.from_table(own)
    assert len(str(caught.value)) < 300


def test_a_method_that_breaks_its_own_schema_is_told():
    with pytest.raises(MessageError, match=r"lacks the tensors 'a\.B', 'b\.A', 'c' of its schema"):
        encode(Payload({}, {"examples": 1}), SCHEMA)
    renamed = {("w.c" if name == "c" else name): t for name, t in TENSORS.items()}
    with pytest.raises(MessageError, match=r"lacks the tensors 'c' of its schema, and has 'w\.c'"):
        encode(Payload(renamed, {"examples": 1}), SCHEMA)
    with pytest.raises(
        MessageError, match="has the tensors 'd', 'e', 'f' and 1 more, which its schema"
    ):
        encode(
            Payload({**TENSORS, **dict.fromkeys("defg", torch.zeros(1))}, {"examples": 1}), SCHEMA
        )
    with pytest.raises(MessageError, match="lacks the numbers 'examples'"):
        encode(Payload(TENSORS, {}), SCHEMA)
    with pytest.raises(MessageError, match="the schema asks for"):
        encode(Payload({**TENSORS, "c": torch.zeros(3)}, {"examples": 1}), SCHEMA)


RAGGED = Schema(
    (
        TensorSpec("rows", (5, 3), torch.float16, ragged=True),
        TensorSpec("ids", (4,), torch.uint16, ragged=True),
        TensorSpec("fixed", (2,), torch.float32),
    )
)


@pytest.mark.parametrize(("rows", "ids"), [(0, 0), (1, 4), (5, 2)])
def test_ragged_tensors_have_as_many_rows_as_were_sent(rows, ids):
    tensors = {
        "rows": torch.arange(rows * 3).view(rows, 3).half(),
        "ids": torch.arange(ids).to(torch.uint16),
        "fixed": torch.ones(2),
    }
    found = decode(encode(Payload(tensors), RAGGED), RAGGED).tensors
    assert list(found) == ["rows", "ids", "fixed"]
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in tensors)
    assert found["rows"].shape == (rows, 3)


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(6, 3).half(), torch.zeros(2, 4).half(), torch.zeros(2, 3), torch.zeros(6).half()],
)
def test_a_ragged_tensor_beyond_its_schema_is_refused_at_both_ends(rows):
    tensors = {"rows": rows, "ids": torch.zeros(1).to(torch.uint16), "fixed": torch.ones(2)}
    with pytest.raises(MessageError, match="tensor rows is"):
        encode(Payload(tensors), RAGGED)
    loose = Schema(
        (
            TensorSpec("rows", (9, *rows.shape[1:]), rows.dtype, ragged=True),
            TensorSpec("ids", (4,), torch.uint16, ragged=True),
            TensorSpec("fixed", (2,), torch.float32),
        )
    )
    data = encode(Payload(tensors), loose).replace(loose.digest.encode(), RAGGED.digest.encode())
    with pytest.raises(MessageError, match=r"must be torch.float16 with at most 5 rows"):
        decode(data, RAGGED)


def test_equal_payloads_are_equal_bytes():
    schema = Schema((TensorSpec("w", (2,), torch.float32),), (EXAMPLES,), (amount("löss"),))
    payload = Payload({"w": torch.ones(2)}, {"examples": 3.0}, {"löss": 0.5})
    assert len({encode(payload, schema) for _ in range(50)}) == 1
    assert decode(encode(payload, schema), schema).metrics == {"löss": 0.5}
