"""Coded bytes that are anything but what an encoder writes: one refusal of the right kind, and no memory for it."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import zstandard

from fedloom.errors import MessageError
from fedloom.wire.codecs import pipeline
from fedloom.wire.codecs.rice import encode as rice
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import Schema


def sealed(body):
    """Coded bytes with their checksum."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def refused(codec, body, shapes, kind="malformed", dtype=torch.float32):
    with pytest.raises(MessageError) as found:
        pipeline(codec).decode(np.frombuffer(sealed(body), np.uint8), shapes, dtype)
    assert found.value.kind == kind
    return str(found.value)


ONES = torch.ones(12)
INT4 = pipeline(["int4:nearest,block=8"])
GOOD = INT4.encode(["x"], [ONES])[
    :-4
]  # scales 1 / 7 up to 0.14355, 0x3e13; codes of 7, 14 + 15 * 14 = 224


def with_scale(bits, first=True):
    place = 0 if first else 1
    body = bytearray(GOOD)
    body[place], body[2 + place] = bits >> 8, bits & 255
    return bytes(body)


def test_the_bytes_that_these_tests_change_are_good():
    assert bytes([0x3E, 0x3E, 0x13, 0x13]) + bytes([224] * 6) == GOOD
    decoded = INT4.decode(np.frombuffer(sealed(GOOD), np.uint8), [(12,)], torch.float32)
    assert torch.allclose(decoded[0], ONES, rtol=0.01)


@pytest.mark.parametrize(
    ("bits", "kind", "said"),
    [
        (0x8000, "malformed", "a scale is negative or -0.0"),
        (0xBF80, "malformed", "a scale is negative or -0.0"),
        (0x7F80, "not_finite", "a scale is NaN or infinite"),
        (0x7FC0, "not_finite", "a scale is NaN or infinite"),
        (0x0001, "malformed", "a scale is subnormal"),
        (0x007F, "malformed", "a scale is subnormal"),
        (0x7F7F, "out_of_range", "a scale is 3.38953e+38, the largest is"),
        (0x0000, "malformed", "a scale is zero where a code is not"),
    ],
)
def test_scales(bits, kind, said):
    for first in (True, False):
        assert said in refused(["int4:block=8"], with_scale(bits, first), [(12,)], kind)


def test_codes():
    # -8 would be the fifteenth code and beyond: no byte of two codes is 225 or more
    assert "225, which stands for no code" in refused(
        ["int4:block=8"], GOOD[:-1] + b"\xe1", [(12,)]
    )
    assert "stands for no code" in refused(["int8:block=8"], b"\x3e\x13\xff", [(1,)])
    assert "stands for no code" in refused(["ternary:block=8"], b"\x3e\x13\xf3", [(5,)])
    # a block of zeros with a scale, and eleven numbers whose last byte holds a twelfth
    assert "every code is zero" in refused(["int4:block=8"], GOOD[:8] + bytes([112] * 2), [(12,)])
    assert "bits beyond the last code" in refused(["int4:block=8"], GOOD, [(11,)])
    assert "bits beyond the last code" in refused(["sign:block=8"], b"\x3e\x13\x08", [(3,)])
    assert "a scale is zero" in refused(["sign:block=8"], b"\0\0\x02", [(3,)])


@pytest.mark.parametrize("codec", ["int4", "bf16", "sign", "top_k:1", "int4|zstd", "zstd"])
def test_lengths(codec):
    data = pipeline(codec).encode(["x"], [ONES], lambda name: np.random.default_rng(0))
    for body in (data[:-5], data[:-4] + b"\0", data[4:-4] * 50):
        kind = (
            "oversized"
            if len(body) > pipeline(codec).most_bytes([(12,)], torch.float32) - 4
            else None
        )
        refused(codec, body, [(12,)], kind or "malformed")
    for short in range(4):
        with pytest.raises(MessageError, match="a coded buffer has"):
            pipeline(codec).decode(np.frombuffer(data[:short], np.uint8), [(12,)], torch.float32)


def test_a_changed_bit_is_seen():
    data = bytearray(sealed(GOOD))
    for place in range(len(data)):
        data[place] ^= 16
        with pytest.raises(MessageError, match="does not have its checksum"):
            INT4.decode(np.frombuffer(bytes(data), np.uint8), [(12,)], torch.float32)
        data[place] ^= 16


def test_floats_that_are_not_finite():
    for codec, words in (("bf16", 0x7F80), ("fp16", 0xFE00)):
        refused([codec], bytes([words >> 8, words & 255]), [(1,)], "not_finite")
    refused(["top_k:1"], rice([np.arange(1)]) + struct.pack("<f", np.nan), [(1,)], "not_finite")
    planes = bytes(np.array([np.inf], np.float32).tobytes())
    frames = [zstandard.compress(bytes([own])) for own in planes]
    body = b"".join(struct.pack("<Q", len(frame)) for frame in frames[:3]) + b"".join(frames)
    refused(["zstd"], body, [(1,)], "not_finite")
    assert "beyond 65504" in refused(
        ["bf16"], bytes([0x47, 0xC3, 0x80, 0x50]), [(2,)], "out_of_range", torch.float16
    )
    factors = np.full(4 * (20 + 30), 2.0**119, np.float32).tobytes()
    refused(["low_rank:4"], factors, [(20, 30)], "out_of_range")
    refused(["random_k:0.5"], b"\xff" * 8 + bytes(4), [(1,)], "out_of_range")


def head(length, parameter, rest):
    return struct.pack("<QB", length, parameter) + bytes(rest)


def test_indices():
    values, top = struct.pack("<3f", 1, 1, 1), ["top_k:0.25"]
    good = head(1, 0, [1 + 2 + 32])  # 0, 1 and 5 of 12
    pipeline(top).decode(np.frombuffer(sealed(good + values), np.uint8), [(12,)], torch.float32)
    for body, kind, said in (
        (head(1, 25, [35]), "malformed", "at most 24"),
        (head(1 << 63, 0, [35]), "oversized", "more bytes than there are"),
        (head(1, 0, [1 + 2]), "malformed", "there must be 3 indices"),
        (head(1, 0, [15]), "malformed", "there must be 3 indices"),
        (head(2, 0, [35, 0]), "malformed", "bits beyond the last index"),
        (head(2, 0, [3, 128]), "malformed", "best parameter"),
        (head(2, 2, [0b11, 0b111, 0]), "malformed", "bits beyond the last index"),
        (head(1, 1, [0b1100, 0b111]), "malformed", "bits beyond the last index"),
        (head(1, 1, [0b100, 0b1011]), "malformed", "best parameter"),
        (rice([np.array([0, 1, 12])]), "out_of_range", "beyond the end of its tensor"),
    ):
        assert said in refused(top, body + values, [(12,)], kind)


def frame(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


def declaring(size, window=None):
    """A header of zstd that declares a size of eight bytes, and maybe a window; then a block of a zero, repeated."""
    head = bytes([0xE0]) if window is None else bytes([0xC0, window])
    return (
        b"\x28\xb5\x2f\xfd" + head + struct.pack("<Q", size) + bytes([0x03 | 0x80, 0x3F, 0x00, 0])
    )


def streamed(content):
    own = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return own.compress(content) + own.flush()


SIZE = 1 << 20  # numbers of a tensor that a bomb is sent for
ZEROS = bytes(SIZE)
PLANES = frame(ZEROS)  # of lossless float32 there are four

BOMBS = {
    "declares 64 GiB": (lambda: declaring(1 << 36), "oversized"),
    "declares less": (lambda: frame(ZEROS[1:]), "malformed"),
    "holds more than it declares": (
        lambda: declaring(SIZE) + frame(bytes(64 << 20))[13:],
        "malformed",
    ),
    "holds less than it declares": (lambda: declaring(SIZE), "malformed"),
    "64 MiB of zeros": (lambda: frame(bytes(64 << 20)), "oversized"),
    "does not declare": (lambda: streamed(ZEROS), "malformed"),
    "two frames": (lambda: frame(ZEROS) * 2, "malformed"),
    "a frame and a byte": (lambda: frame(ZEROS) + b"\0", "malformed"),
    "a frame to be skipped": (lambda: b"\x50\x2a\x4d\x18\4\0\0\0abcd", "malformed"),
    "a frame to be skipped behind": (lambda: PLANES + b"\x50\x2a\x4d\x18\4\0\0\0abcd", "malformed"),
    "a window of 1 GiB": (lambda: declaring(SIZE, window=20 << 3), "oversized"),
    "a checksum": (lambda: frame(ZEROS, write_checksum=True), "malformed"),
    "nothing": (lambda: b"", "malformed"),
    "zlib": (lambda: zlib.compress(ZEROS), "malformed"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_frame_that_is_not_one_of_the_size_of_the_schema_takes_no_memory(bomb):
    make, kind = BOMBS[bomb]
    last = make()
    body = struct.pack("<3Q", *[len(PLANES)] * 3) + PLANES * 3 + last
    refused_in_little_memory("zstd", body, [(SIZE,)], kind)


def refused_in_little_memory(codec, body, shapes, kind):
    most = sum(4 * int(np.prod(shape)) for shape in shapes)
    tracemalloc.start()
    try:
        refused(codec, body, shapes, kind)
        assert tracemalloc.get_traced_memory()[1] < 2 * most
    finally:
        tracemalloc.stop()


OTHER_BOMBS = {
    "indices without end": (
        "top_k:0.001",
        head(131_000, 0, bytes(131_000)) + bytes(4 * 1049),
        "oversized",
    ),
    "indices of another tensor": ("top_k:0.001", rice([np.arange(1049) * 10**6]), "oversized"),
    "every bit an index": ("top_k:0.001", head(600, 0, b"\xff" * 600), "malformed"),
    "lengths of sections": (
        "int4|zstd",
        struct.pack("<2Q", 1 << 62, 1 << 62) + PLANES,
        "malformed",
    ),
    "a code that stands for nothing": (
        "int4:nearest",
        b"\x3f" * (SIZE // 64) + b"\x80" * (SIZE // 64) + b"\xff" * (SIZE // 2),
        "malformed",
    ),
    "a scale of zero for ones": (
        "sign:block=64",
        bytes(2 * SIZE // 64) + b"\xff" * (SIZE // 8),
        "malformed",
    ),
    "infinite numbers": ("bf16", b"\x7f" * SIZE + b"\x80" * SIZE, "not_finite"),
    "factors that overflow": (
        "low_rank:4",
        np.full(4 * 2048, 2.0**119, np.float32).tobytes(),
        "out_of_range",
    ),
}


@pytest.mark.parametrize("bomb", OTHER_BOMBS)
def test_a_bomb_of_every_other_coder_takes_less_than_twice_the_memory_of_the_tensor(bomb):
    codec, body, kind = OTHER_BOMBS[bomb]
    refused_in_little_memory(codec, body, [(1024, 1024)], kind)


def test_a_buffer_that_is_absent_or_no_bytes_or_for_other_codecs():
    schema = Schema.of({"x": ONES}).coded(lambda spec: "int4:nearest")
    data = encode(Payload({"x": ONES}), schema)
    assert b'"c0"' in data
    for old, new in ((b'"c0"', b'"c1"'), (b'"U8"', b'"I8"'), (b'"shape":[12]', b'"shape":[3,4]')):
        if old in data:
            length = int.from_bytes(data[:8], "little")
            text = data[8 : 8 + length].replace(old, new).rstrip()
            text += b" " * (-len(text) % 8)
            changed = len(text).to_bytes(8, "little") + text + data[8 + length :]
            with pytest.raises(MessageError, match="in one buffer of bytes"):
                decode(changed, schema)
    other = Schema.of({"x": ONES}).coded(lambda spec: "int8:nearest")
    with pytest.raises(MessageError, match="another schema"):
        decode(data, other)
