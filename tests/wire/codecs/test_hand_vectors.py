"""Every stage on twelve numbers, with its bytes computed by hand.

Blocks are of 8, so there are two: eight numbers and four. Scales are bfloat16, one sign bit, eight of the
exponent (127 more than it) and seven of the fraction, and of both all high bytes come first.
"""

import struct
import zlib

import numpy as np
import pytest
import torch
import zstandard

from fedloom.wire.codecs import pipeline

NUMBERS = [7, -3.5, 1.75, 0, 0.5, -7, 2.5, -1.5, 0.75, -0.25, 0.1, 0]
TENSOR = torch.tensor(NUMBERS)

BF16 = [0x40E0, 0xC060, 0x3FE0, 0, 0x3F00, 0xC0E0, 0x4020, 0xBFC0, 0x3F40, 0xBE80, 0x3DCD, 0]
FP16 = [0x4700, 0xC300, 0x3F00, 0, 0x3800, 0xC700, 0x4100, 0xBE00, 0x3A00, 0xB400, 0x2E66, 0]
S7, S34 = 0x40E0, 0x3F40  # 7 = 1.75 * 2^2 and 0.75 = 1.5 * 2^-1

CODED = {
    "bf16": bytes(word >> 8 for word in BF16) + bytes(word & 255 for word in BF16),
    "fp16": bytes(word >> 8 for word in FP16) + bytes(word & 255 for word in FP16),
    # 7 / 7 = 1, 0x3f80; 0.75 / 7 = 0.1071 = 1.7143 * 2^-4, fraction 91.4 / 128, up to 92: 0x3ddc, 0.10742
    # 7 -4 2 0 0 -7 2 -2 (halves to even), 6.98 -2.33 0.93 0: 7 -2 1 0; q + 7: first + 15 second
    "int4:nearest,block=8": bytes([0x3F, 0x3D, 0x80, 0xDC])
    + bytes([14 + 15 * 3, 9 + 15 * 7, 7 + 15 * 0, 9 + 15 * 5, 14 + 15 * 5, 8 + 15 * 7]),
    # 7 / 127 = 1.7638 * 2^-5, 97.8 / 128, up to 98: 0x3d62, 0.055176; 0.75 / 127 = 1.5118 * 2^-8, 65.5 up
    # to 66: 0x3bc2, 0.0059204; 126.9 -63.4 31.7 0 9.06 -126.9 45.3 -27.2; 126.7 -42.2 16.9 0; q + 127
    "int8:nearest,block=8": bytes([0x3D, 0x3B, 0x62, 0xC2])
    + bytes([254, 64, 159, 127, 136, 0, 172, 100, 254, 85, 144, 127]),
    # 7 / 3 = 1.1667 * 2, 21.3 / 128, up to 22: 0x4016, 2.34375; 0.25: 0x3e80
    # 2.99 -1.49 0.75 0 0.21 -2.99 1.07 -0.64: 3 -1 1 0 0 -3 1 -1; 3 -1 0.4 0: 3 -1 0 0; q + 3
    "int3:nearest,block=8": bytes([0x40, 0x3E, 0x16, 0x80])
    + bytes([6 + 7 * 2, 4 + 7 * 3, 3 + 7 * 0, 4 + 7 * 2, 6 + 7 * 2, 3 + 7 * 3]),
    # 1 -0.5 0.25 0 0.07 -1 0.36 -0.21: 1 0 0 0 0 -1 0 0; 1 0 0 0; q + 1, five to a byte
    "ternary:nearest,block=8": bytes([S7 >> 8, S34 >> 8, S7 & 255, S34 & 255])
    + bytes([2 + 3 + 9 + 27 + 81, 0 + 3 + 9 + 2 * 27 + 81, 1 + 3]),
    # 1 -0.5 0.25 0 0.071 -1 0.357 -0.214; 1 -0.333 0.133 0: the nearest of the 16 levels
    "nf4:block=8": bytes([S7 >> 8, S34 >> 8, S7 & 255, S34 & 255])
    + bytes([15 + 16 * 2, 10 + 16 * 7, 8 + 16 * 0, 11 + 16 * 5, 15 + 16 * 4, 9 + 16 * 7]),
    # means 23.75 / 8 = 2.96875 = 1.484375 * 2, 62 / 128: 0x403e; 1.1 / 4 = 0.275 = 1.1 * 2^-2, 12.8 / 128,
    # nearest 13: 0x3e8d; negative are 1, 5, 7 and 9
    "sign:block=8": bytes([0x40, 0x3E, 0x3E, 0x8D]) + bytes([2 + 32 + 128, 2]),
    # 7, -3.5 and -7 at 0, 1 and 5: gaps 0, 0, 3, in unary 1 1 0001 (six bits; with p = 1 seven)
    "top_k:0.25": struct.pack("<QBB", 1, 0, 1 + 2 + 32) + struct.pack("<3f", 7, -3.5, -7),
}

DECODED = {
    "bf16": [*NUMBERS[:10], 0.10009765625, 0],
    "fp16": [*NUMBERS[:10], 0.0999755859375, 0],
    "int4:nearest,block=8": [7, -4, 2, 0, 0, -7, 2, -2] + [q * 0.107421875 for q in (7, -2, 1, 0)],
    "int8:nearest,block=8": [q * 0.05517578125 for q in (127, -63, 32, 0, 9, -127, 45, -27)]
    + [q * 0.00592041015625 for q in (127, -42, 17, 0)],
    "int3:nearest,block=8": [q * 2.34375 for q in (3, -1, 1, 0, 0, -3, 1, -1)]
    + [0.75, -0.25, 0, 0],
    "ternary:nearest,block=8": [7, 0, 0, 0, 0, -7, 0, 0, 0.75, 0, 0, 0],
    "nf4:block=8": [
        7 * v for v in (1, -0.52507305, 0.2461123, 0, 0.0795803, -1, 0.33791524, -0.18477343)
    ]
    + [0.75, 0.75 * -0.28444138, 0.75 * 0.1609302, 0],
    "sign:block=8": [s * 2.96875 for s in (1, -1, 1, 1, 1, -1, 1, -1)]
    + [s * 0.275390625 for s in (1, -1, 1, 1)],
    "top_k:0.25": [7, -3.5, 0, 0, 0, -7, 0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("text", CODED)
def test_the_bytes_are_those_by_hand(text):
    codec, expected = pipeline([text]), CODED[text]
    data = codec.encode(["x"], [TENSOR])
    assert data[:-4] == expected
    assert data[-4:] == zlib.crc32(expected).to_bytes(4, "little")
    (back,) = codec.decode(np.frombuffer(data, np.uint8), [(12,)], torch.float32)
    assert torch.allclose(back, torch.tensor(DECODED[text]), rtol=1e-6, atol=0)


def test_zstd_holds_all_first_bytes_then_all_second_ones():
    data = pipeline(["zstd"]).encode(["x"], [TENSOR])
    each = [struct.pack("<f", number) for number in NUMBERS]
    planes = bytes(own[place] for place in range(4) for own in each)
    frames, start = [], 3 * 8  # the lengths of the first three frames
    for length in (*struct.unpack("<3Q", data[:start]), len(data)):
        frames.append(data[start : min(start + length, len(data) - 4)])
        start += length
    assert b"".join(map(zstandard.ZstdDecompressor().decompress, frames)) == planes


def test_random_k_keeps_what_its_seed_says_twice_as_large():
    codec = pipeline(["random_k:0.5"])
    data = codec.encode(["x"], [TENSOR], lambda name: np.random.default_rng(3))
    seed = int(np.random.default_rng(3).integers(1 << 63))
    assert data[:8] == seed.to_bytes(8, "little")
    raw = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(6)
    drawn = [int(word) >> shift & 0xFFFFFFFF for word in raw for shift in (0, 32)]
    kept = sorted(sorted(range(12), key=lambda i: drawn[i])[:6])
    assert data[8:-4] == struct.pack("<6f", *(2 * NUMBERS[i] for i in kept))
    (back,) = codec.decode(np.frombuffer(data, np.uint8), [(3, 4)], torch.float32)
    expected = [2 * x if i in kept else 0 for i, x in enumerate(NUMBERS)]
    assert back.reshape(-1).tolist() == pytest.approx(expected)


def test_a_matrix_of_rank_one_is_sent_as_its_two_factors():
    # (1 2 2)^T (2 0 -1 2) has the direction (1 2 2) / 3, and what is left is 3 (2 0 -1 2)
    matrix = torch.outer(torch.tensor([1.0, 2, 2]), torch.tensor([2.0, 0, -1, 2]))
    data = pipeline(["low_rank:1"]).encode(["x"], [matrix])
    found = np.array(struct.unpack("<7f", data[:-4]))
    expected = np.array([1 / 3, 2 / 3, 2 / 3, 6, 0, -3, 6])
    assert np.allclose(found * np.sign(found[0]), expected, atol=1e-5)
    (back,) = pipeline(["low_rank:1"]).decode(
        np.frombuffer(data, np.uint8), [(3, 4)], torch.float32
    )
    assert torch.allclose(back, matrix, atol=1e-5)
