"""What codecs lose and what they take: against known numbers, their own entropy, and the mean over many draws."""

import math

import numpy as np
import pytest
import torch

from fedloom.randomness import generator
from fedloom.wire.codecs import pipeline
from fedloom.wire.codecs.rice import decode, encode
from fedloom.wire.codecs.sparse import chosen


def normals(size):
    own = np.random.default_rng(1).standard_normal(size)
    return torch.from_numpy(own.astype(np.float32))


def coded(codec, own, draw=0):
    codec = pipeline(codec)
    data = codec.encode(["x"], [own], lambda name: generator(0, name, draw, 1))
    (back,) = codec.decode(np.frombuffer(data, np.uint8), [tuple(own.shape)], own.dtype)
    return data, back


def error(back, own):
    return float(((back - own) ** 2).sum() / (own**2).sum())


# relative squared errors of numbers from N(0, 1) with exact scales; ours are rounded up to 8 bits
ERRORS = {
    "int8:nearest,block=256": 0.00005,
    "int4:nearest,block=64": 0.0116,
    "int4:stochastic,block=64": 0.0232,
    "int4:nearest,block=256": 0.0160,
    "int4:stochastic,block=256": 0.0320,
    "nf4:block=64": 0.0085,
    "ternary:nearest,block=64": 0.516,
    "ternary:stochastic,block=64": 1.086,
    "sign:block=65536": 1 - 2 / math.pi,
}


@pytest.mark.parametrize("codec", ERRORS)
def test_the_error_is_that_of_the_table(codec):
    own = normals(1 << 20)
    assert error(coded([codec], own)[1], own) == pytest.approx(ERRORS[codec], rel=0.02)


@pytest.mark.parametrize("codec", ["int8", "int4", "int3", "ternary"])
def test_the_mean_over_100_000_draws_is_the_number(codec):
    own = torch.tensor([1.0, -0.6, 0.3, 0.01, -1e-3, 0.0, 0.77, -0.25])
    draws = 100_000
    many = own.repeat(draws)
    back = coded([f"{codec}:block=8"], many)[1].view(draws, 8).double()
    deviation = back.std(0) / math.sqrt(draws)
    assert ((back.mean(0) - own.double()).abs() <= 5 * deviation + 1e-9).all()


def test_the_mean_of_random_k_over_draws_is_the_tensor():
    own = normals(100)
    draws = 1000
    codec, shapes = pipeline(["random_k:0.2"]), [(100,)] * draws
    data = codec.encode(["x"] * draws, [own] * draws, lambda name: generator(0, "codec"))
    decoded = codec.decode(np.frombuffer(data, np.uint8), shapes, own.dtype)
    backs = torch.stack(decoded).double()
    deviation = own.double().abs() * 2 / math.sqrt(draws)  # d / K - 1 = 4 times x^2 is the variance
    assert ((backs.mean(0) - own).abs() <= 5 * deviation).all()


def test_averaging_over_clients_helps_only_what_is_unbiased():
    """100 clients whose numbers are one vector and noise of the same size, with one scale each."""
    clients, size = 100, 4096
    own = normals(size * (clients + 1)).view(clients + 1, size)
    values = own[0] + own[1:]
    mean = values.mean(0)
    found = {
        rounding: sum(
            coded([f"ternary:{rounding},block={size}"], v, k)[1] for k, v in enumerate(values)
        )
        / clients
        for rounding in ("stochastic", "nearest")
    }
    assert error(found["stochastic"], mean) < 0.06
    assert error(found["nearest"], mean) > 0.3


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.05, 0.01, 0.001])
def test_indices_take_within_three_percent_of_their_entropy(share):
    size = 1_000_000
    count = int(share * size)
    indices = chosen(5, 0, size, count)
    data = encode([indices])
    entropy = (
        math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    ) / math.log(2)
    assert 1 <= len(data) * 8 / entropy < 1.03
    (back,), end = decode(np.frombuffer(data, np.uint8), [count], [size])
    assert np.array_equal(back, indices) and end == len(data)


def entropy_of(codes):
    counts = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(counts * np.log2(counts)).sum())


@pytest.mark.parametrize(
    ("stage", "base", "each"),
    [("int8", 255, 1), ("int4", 15, 2), ("int3", 7, 2), ("ternary", 3, 5)],
)
def test_zstd_takes_within_two_percent_of_the_entropy_of_codes_and_scales(stage, base, each):
    size = 1 << 19
    own = normals(size)
    raw = np.frombuffer(coded([stage], own)[0], np.uint8)[:-4]
    blocks = size // (256 if stage == "int8" else 64)
    codes = (raw[2 * blocks :, None].astype(np.int64) // base ** np.arange(each) % base).ravel()[
        :size
    ]
    bits = size * entropy_of(codes)
    bits += sum(blocks * entropy_of(raw[at * blocks : (at + 1) * blocks]) for at in (0, 1))
    assert 0.99 < len(coded([stage, "zstd"], own)[0]) * 8 / bits < 1.02


def adam_like(size):
    """Changes with the kurtosis of AdamW's of some steps, about 2."""
    rng = np.random.default_rng(2)
    own = np.clip(rng.standard_normal(size) * 0.4 + rng.choice([-1, 1], size), -2, 2)
    return torch.from_numpy((own * 1e-4).astype(np.float32))


@pytest.mark.parametrize(
    ("preset", "times"), [("int8", 4), ("int4", 8), ("small", 16), ("smallest", 30)]
)
def test_a_preset_saves_what_it_promises_on_changes_of_like_magnitudes(preset, times):
    own = adam_like(1 << 17)
    assert (own**4).mean() / (own**2).mean() ** 2 < 2
    assert own.numel() * 4 / len(coded(preset, own)[0]) > times
