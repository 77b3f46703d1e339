"""Packed bytes against safetensors itself, both ways; what strangers send is in ``test_messages.py``."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedloom.errors import MessageError
from fedloom.wire.packing import DTYPES, METADATA, Buffer, buffers_of, content, header_of, pack


def tensor(dtype, *shape):
    raw = np.random.default_rng(0).integers(0, 2, (*shape, dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def packed(tensors, metadata=None):
    buffers = {n: Buffer(t.dtype, tuple(t.shape), [t]) for n, t in tensors.items()}
    return pack(buffers, metadata or {})


def unpacked(data):
    header, start = header_of(data, len(data))
    own = buffers_of(header, len(data) - start)
    return {name: content(data, start, buffer) for name, buffer in own.items()}, header[METADATA]


def same(left, right):
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(
            left[n].reshape(-1).view(torch.uint8), right[n].reshape(-1).view(torch.uint8)
        )
        for n in left
    )


MIXED = {str(dtype): tensor(dtype, 3, 5) for dtype in DTYPES} | {"none": torch.empty(0, 4)}


def test_safetensors_reads_what_is_packed():
    assert same(load(packed(MIXED)), MIXED)


def test_what_safetensors_writes_is_read():
    tensors, metadata = unpacked(save(MIXED, {"of": "löss"}))
    assert same(tensors, MIXED) and metadata == {"of": "löss"}


def test_a_payload_of_one_dtype_is_what_safetensors_writes():
    one = {"b": torch.randn(7), "a": torch.randn(2, 2)}
    assert packed(one, {"only": "ünd"}) == save(one, {"only": "ünd"})


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_parts_lie_one_after_the_other_however_they_are_strided(small, monkeypatch):
    monkeypatch.setattr("fedloom.wire.packing.SMALL", small)
    wide = torch.arange(12.0).view(3, 4)
    data = pack({"x": Buffer(torch.float32, (24,), [wide.T, wide, torch.empty(0)])}, {})
    assert unpacked(data)[0]["x"].tolist() == [*wide.T.flatten().tolist(), *range(12)]


def test_what_is_read_is_a_copy():
    data = packed({"x": torch.zeros(4)})
    unpacked(data)[0]["x"].fill_(1.0)
    assert unpacked(data)[0]["x"].tolist() == [0.0] * 4


def test_equal_buffers_are_equal_bytes_in_any_order():
    other = dict(reversed(MIXED.items()))
    assert packed(MIXED, {"a": "1", "b": "2"}) == packed(other, {"b": "2", "a": "1"})


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


BAD = {
    "no table": {"x": [0, 8]},
    "a dtype nobody knows": {"x": entry(dtype="F31")},
    "a dtype that is none": {"x": entry(dtype=["F32"])},
    "a shape that is none": {"x": entry(shape=2)},
    "a negative shape": {"x": entry(shape=[-1, -2])},
    "a shape of truths": {"x": entry(shape=[True, 2])},
    "another size": {"x": entry(shape=[3])},
    "three ends": {"x": entry(data_offsets=[0, 4, 8])},
    "backwards": {"x": entry(shape=[0], data_offsets=[8, 0])},
    "beyond the end": {"x": entry(shape=[3], data_offsets=[0, 12])},
    "a gap before": {"x": entry(shape=[1], data_offsets=[4, 8])},
    "a gap behind": {"x": entry(shape=[1], data_offsets=[0, 4])},
    "an overlap": {"x": entry(), "y": entry()},
    "nothing": {},
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD.keys())
def test_buffers_that_are_not_what_safetensors_writes_are_refused(header):
    with pytest.raises(MessageError, match="payload"):
        buffers_of(header, 8)
    text = json.dumps(header).encode()
    with pytest.raises(Exception, match=r"(?i)header|metadata|json|invalid"):
        load(len(text).to_bytes(8, "little") + text + b"\0" * 8)


def test_a_word_that_nobody_asked_for_is_refused():
    with pytest.raises(MessageError, match="buffer 'x' not in the form of safetensors"):
        buffers_of({"x": entry(more=1)}, 8)


def test_a_dtype_that_cannot_travel_is_named():
    with pytest.raises(MessageError, match=r"torch\.complex64, which cannot be sent"):
        packed({"x": torch.zeros(1, dtype=torch.complex64)})
