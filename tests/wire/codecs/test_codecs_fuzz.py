"""Damaged messages of every codec: a MessageError or tensors that fit; never more memory, never other numbers unseen.

A message is damaged at one of three depths: anywhere, where the checksum finds it; in the coded buffer with
a checksum that fits; and in the bytes before the entropy stage, which is then applied to them.
"""

import json
import math
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from fedloom.errors import MessageError
from fedloom.tensors import largest_value
from fedloom.wire.codecs import pipeline
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import HEADER_BYTES, Schema
from sampling import drawn, tries

CODECS = [
    "bf16",
    "fp16|zstd",
    "int8",
    "int8|zstd",
    "int4:block=16",
    "int4|zstd",
    "int3|zstd",
    "ternary:block=8",
    "small",
    "nf4",
    "sign:block=16",
    "sign|zstd",
    "top_k:0.2",
    "top_k:0.2|int4|zstd",
    "top_k:0.01|bf16",
    "random_k:0.3",
    "random_k:0.3|int8|zstd",
    "low_rank:1",
    "low_rank:2|int4|zstd",
    "zstd",
]

TENSORS = {
    "a": torch.randn(5, 13, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(70, generator=torch.Generator().manual_seed(1)) * 1e-4,
    "c": torch.zeros(9),
    "d": torch.randn(12, 12, generator=torch.Generator().manual_seed(2)),
}


class Sound:
    """A sound message of one codec, and what damages it."""

    def __init__(self, text):
        self.codec = pipeline(text)
        self.schema = Schema.of(TENSORS).coded(lambda spec: text)
        self.data = encode(
            Payload(TENSORS), self.schema, lambda name: np.random.default_rng(len(name))
        )
        self.tensors = decode(self.data, self.schema).tensors
        self.start = 8 + int.from_bytes(self.data[:8], "little")
        self.body = self.data[self.start : -4]
        shapes = [tuple(t.shape) for t in TENSORS.values()]
        self.sections = self.codec.sections(shapes, torch.float32)
        own, reduction = np.frombuffer(self.body, np.uint8), self.codec.reduction
        head = 0 if reduction is None else reduction.start(own, shapes)[1]
        self.head, self.raw = self.body[:head], self.codec._values_of(own[head:], self.sections)
        self.one_way = (
            reduction is None
        )  # factors and seeds are not the only ones of what they give

    def message(self, body):
        """A message with another coded buffer, and a checksum and header that fit it."""
        body += zlib.crc32(body).to_bytes(4, "little")
        header = json.loads(self.data[8 : self.start])
        header["c0"] |= {"shape": [len(body)], "data_offsets": [0, len(body)]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body

    def damaged(self, rng):
        match rng.integers(3):
            case 0:
                return mutated(self.data, rng), "anywhere"
            case 1:
                return self.message(mutated(self.body, rng)), "coded"
        raw = np.frombuffer(mutated(self.raw.tobytes(), rng), np.uint8)
        sections = [*self.sections[:-1], max(0, len(raw) - sum(self.sections[:-1]))]
        if len(raw) < sum(sections):
            raw = np.pad(raw, (0, sum(sections) - len(raw)))
        return self.message(self.head + self.codec._coded(raw, sections)), "raw"


def mutated(data, rng):
    """Bytes of which some are changed, cut out, put in or doubled."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1))
        match rng.integers(10):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = rng.bytes(int(rng.integers(1, 20)))
            case 2:
                del data[at : at + int(rng.integers(1, 9))]
            case 3:
                data += data[at:]
            case 4 | 5 if at < len(data):
                data[at] = (0, 1, 127, 128, 255)[rng.integers(5)]
            case _ if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def check(sound, data, depth):
    """Return whether a damaged message was let in."""
    try:
        found = decode(data, sound.schema).tensors
    except MessageError:
        return False
    assert list(found) == list(TENSORS)
    for name, own in TENSORS.items():
        assert found[name].shape == own.shape and found[name].dtype == own.dtype
        assert math.isfinite(largest_value(found[name]))
    same = all(
        found[name].numpy().tobytes() == own.numpy().tobytes()
        for name, own in sound.tensors.items()
    )
    assert depth != "anywhere" or same
    if depth == "raw" and same and sound.one_way:
        assert data == sound.message(sound.body)
    return True


def fuzzed(count, rng):
    """Check so many damaged messages; return how many were let in at each depth."""
    sounds, let_in = [Sound(text) for text in CODECS], {}
    tracemalloc.start()
    try:
        for turn in range(count):
            sound = sounds[turn % len(sounds)]
            data, depth = sound.damaged(rng)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            let_in[depth] = let_in.get(depth, 0) + check(sound, data, depth)
            grown = tracemalloc.get_traced_memory()[1] - before
            assert grown < 2 * HEADER_BYTES + 8 * sound.schema.plain.max_bytes
    finally:
        tracemalloc.stop()
    return let_in


def test_a_sound_message_is_let_in():
    for text in CODECS:
        sound = Sound(text)
        assert (
            check(sound, sound.data, "anywhere")
            and sound.message(sound.body)[-40:] == sound.data[-40:]
        )


def test_damaged_messages_are_refused_or_fit():
    let_in = fuzzed(2000, np.random.default_rng(0))
    assert (
        let_in["raw"] > 20
    )  # changed codes are other numbers: the decoders behind the checksum are reached


@pytest.mark.parametrize("count", tries(10_000, 100_000))
def test_a_hundred_thousand_damaged_messages(count):
    fuzzed(count, np.random.default_rng(drawn("codecs").getrandbits(32)))
