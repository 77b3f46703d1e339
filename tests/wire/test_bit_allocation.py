"""Bits dealt within a budget: bounds that hold, the water level by hand, the best of all ways by search."""

import itertools

import numpy as np
import pytest
import torch

from fedloom.randomness import generator
from fedloom.wire.bit_allocation import Allocation, ladder, most_bits, most_sent
from fedloom.wire.codecs import pipeline
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import Schema, TensorSpec, amount

LEVELS = {"ternary": 1, "int3": 3, "int4": 7, "int8": 127}


def of(sizes, *, returned=False):
    """An allocation over matrices of 64 rows."""
    specs = tuple(TensorSpec(f"t{i}", (64, n), torch.float32) for i, n in enumerate(sizes))
    plain = Schema(specs, (amount("examples"),), (amount("loss"),))
    return Allocation(
        specs, ladder(returned=returned), lambda dealt: plain.coded(lambda s: dealt[s.name])
    )


def rng(name):
    return generator(0, name)


@pytest.mark.parametrize("numbers", [8, 1000, 50_000])
@pytest.mark.parametrize("kind", ["uniform", "normal", "codes", "one in a hundred"])
def test_no_message_is_longer_than_its_bound(numbers, kind):
    """Whole numbers up to m at random are the codes that take the most."""
    drawn = np.random.default_rng(3)
    for name, most in LEVELS.items():
        values = {
            "uniform": drawn.uniform(-1, 1, (4, numbers)),
            "normal": drawn.standard_normal((4, numbers)),
            "codes": drawn.integers(-most, most + 1, (4, numbers)),
            "one in a hundred": (drawn.random((4, numbers)) < 0.01) * 1.0,
        }[kind]
        tensors = {"w": torch.from_numpy(values.astype(np.float32))}
        schema = Schema.of(tensors, (amount("examples"),), (amount("loss"),))
        schema = schema.coded(lambda spec, name=name: f"{name}|zstd")
        data = encode(Payload(tensors, {"examples": 1e9}, {"loss": 1 / 3}), schema, rng)
        assert len(data) <= most_sent(schema) <= schema.max_bytes
    assert len(data) > 0.9 * most_sent(schema) or numbers < 50_000 or kind == "one in a hundred"


def test_bits_of_codes_by_hand():
    """Five of three values, 3^5 = 243, in a byte are 8 bits of codes for 5 numbers: 1.6, and a scale of 16
    bits for 64. Two of seven values are 49 symbols, of 5 or 6 bits: 5.69 / 2, and one percent."""
    assert most_bits(str(pipeline("ternary|zstd"))) == pytest.approx(1.6 + 0.25, rel=0.01)
    longest = (15 * 5 + 34 * 6) / 49 / 2
    assert most_bits(str(pipeline("int3|zstd"))) == pytest.approx(1.01 * longest + 0.25, rel=0.01)
    assert most_bits(str(pipeline("int4|zstd"))) == pytest.approx(4 + 0.25, rel=0.01)
    assert most_bits("nothing") < 1e-4


@pytest.mark.parametrize("returned", [False, True])
def test_each_further_bit_is_worth_less(returned):
    """Otherwise steps taken by their worth would not be the least error."""
    codecs = ladder(returned=returned)
    bits = [most_bits(codec) for codec, _ in codecs]
    worth = [
        (codecs[i][1] - codecs[i + 1][1]) / (bits[i + 1] - bits[i]) for i in range(len(codecs) - 1)
    ]
    assert worth == sorted(worth, reverse=True) and worth[-1] > 0
    assert all(pipeline(codec).unbiased != returned for codec, _ in codecs)


def test_errors_are_those_of_changes_of_alike_magnitudes():
    """A normal number of 0.4 beside -1 or 1, cut off at 2, as in the table of docs/codecs.md."""
    drawn = np.random.default_rng(2)
    own = drawn.standard_normal((64, 4096)) * 0.4 + drawn.choice([-1, 1], (64, 4096))
    tensors = {"w": torch.from_numpy(np.clip(own, -2, 2).astype(np.float32) * 1e-4)}
    for returned in (False, True):
        for codec, error in ladder(returned=returned):
            schema = Schema.of(tensors).coded(lambda spec, codec=codec: codec)
            back = decode(encode(Payload(tensors), schema, rng), schema).tensors["w"]
            lost = float((back - tensors["w"]).square().sum() / tensors["w"].square().sum())
            assert lost == pytest.approx(error, rel=0.03), codec


def lost(allocation, dealt, squares):
    """The squared error that a deal is expected to have."""
    error = dict(allocation.codecs)
    return sum(squares[s.name] * s.elements * error[dealt[s.name]] for s in allocation.specs)


@pytest.mark.parametrize("returned", [False, True])
def test_no_other_deal_within_the_bytes_loses_less(returned):
    """Of three tensors all ways are tried. What a deal takes is the budget of a step that just fits."""
    allocation = of((400, 300, 500), returned=returned)
    squares = {"t0": 1.0, "t1": 30.0, "t2": 0.01}
    names = [spec.name for spec in allocation.specs]
    for budget in (30_000, 50_000, 70_000):
        dealt = allocation.dealt(budget, squares)
        taken = most_sent(allocation.make(dealt))
        assert taken <= budget
        for codecs in itertools.product([codec for codec, _ in allocation.codecs], repeat=3):
            other = dict(zip(names, codecs, strict=True))
            if most_sent(allocation.make(other)) <= taken:
                assert lost(allocation, other, squares) >= 0.98 * lost(allocation, dealt, squares)


def test_a_tensor_of_no_known_change_counts_as_the_largest():
    allocation = of((64, 64, 64), returned=True)
    budget = allocation.least + 2000
    for known in (1e-4, 1e4):
        assert allocation.dealt(budget, {"t0": known}) == allocation.dealt(budget, {})
    known = {"t0": 1e-4, "t1": 1e-2}
    assert allocation.dealt(budget, known) == allocation.dealt(budget, known | {"t2": 1e-2})


def test_tensors_below_the_water_level_get_nothing():
    """Of variances 100, 100, 1e-4 a budget for the first two leaves the third without a byte."""
    allocation = of((400, 400, 400), returned=True)
    squares = {"t0": 100.0, "t1": 100.0, "t2": 1e-4}
    dealt = allocation.dealt(2 * 64 * 400 * 4 // 8, squares)
    assert dealt["t2"] == "nothing" and "nothing" not in (dealt["t0"], dealt["t1"])
    changed = {"t0": 1e-4, "t1": 100.0, "t2": 100.0}
    assert allocation.dealt(2 * 64 * 400 * 4 // 8, changed)["t0"] == "nothing"


def test_the_smallest_budget_is_the_strongest_codec_of_all_or_room_for_any_one():
    plain, returned = of((4000, 3000)), of((4000, 3000), returned=True)
    assert plain.least == most_sent(plain.make(dict.fromkeys(("t0", "t1"), plain.codecs[0][0])))
    assert plain.least == pytest.approx(1.85 / 8 * 64 * 7000, rel=0.02)
    assert returned.least == pytest.approx(1.85 / 8 * 64 * 4000, rel=0.02)
    assert set(plain.dealt(plain.least, {}).values()) == {plain.codecs[0][0]}
    assert set(plain.dealt(10**9, {}).values()) == {plain.codecs[-1][0]}
