"""Robust means by hand, under attack, and with values that are not finite."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from fedloom.accounting.cores import available_cores
from fedloom.aggregation.means import weighted_mean
from fedloom.aggregation.robust import (
    clipped_mean,
    coordinate_median,
    cut_change,
    finite_ones,
    geometric_median,
    krum,
    multi_krum,
    trimmed_mean,
)
from fedloom.wire.messages import Payload, StoredTensors, encode
from fedloom.wire.schema import Schema


def updates(*rows):
    return [{"a": torch.tensor(row[:1]), "b": torch.tensor([row[1:]])} for row in rows]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()]).tolist()


def test_median_by_hand():
    three = updates((1.0, 9.0), (2.0, -5.0), (7.0, 0.0))
    assert flat(coordinate_median(three)) == [2.0, 0.0]
    assert flat(coordinate_median(three[:2])) == [1.5, 2.0]


def test_trimmed_mean_by_hand():
    five = updates((1.0, 0.0), (2.0, 0.0), (3.0, 1.0), (100.0, 2.0), (-50.0, 9.0))
    assert flat(trimmed_mean(five, 1)) == [2.0, 1.0]
    assert flat(trimmed_mean(five, 0)) == pytest.approx(flat(weighted_mean(five, [1.0] * 5)))
    with pytest.raises(ValueError, match="5 of 5 updates are finite; it needs 7"):
        trimmed_mean(five, 3)


def test_krum_by_hand():
    # f = 1, n = 5: the two nearest others of each; 1.0 has squares 0.01 + 0.04, the least
    five = updates((0.8, 0.0), (1.0, 0.0), (1.1, 0.0), (1.5, 0.0), (9.0, 0.0))
    assert flat(krum(five, 1)) == pytest.approx([1.0, 0.0])
    assert flat(multi_krum(five, 1)) == pytest.approx([(0.8 + 1.0 + 1.1 + 1.5) / 4, 0.0])
    with pytest.raises(ValueError, match="it needs 7"):
        krum(five, 2)


def test_geometric_median_is_the_median_in_one_dimension_and_fermats_point_in_two():
    line = [{"x": torch.tensor([v])} for v in (0.0, 1.0, 2.0, 10.0, 100.0)]
    assert flat(geometric_median(line, [1.0] * 5)) == pytest.approx([2.0], abs=1e-3)
    # of an equilateral triangle it is the centre; of an obtuse angle above 120 degrees its corner
    root = math.sqrt(3)
    triangle = updates((0.0, 0.0), (2.0, 0.0), (1.0, root))
    assert flat(geometric_median(triangle, [1.0] * 3)) == pytest.approx([1.0, root / 3], abs=1e-4)
    obtuse = updates((0.0, 0.0), (4.0, 0.1), (-4.0, 0.1))
    assert flat(geometric_median(obtuse, [1.0] * 3)) == pytest.approx([0.0, 0.0], abs=1e-2)
    heavy = geometric_median(triangle, [1.0, 1.0, 5.0])  # more than all others together
    assert flat(heavy) == pytest.approx([1.0, root], abs=1e-3)


def test_clipped_mean_by_hand():
    start = {"a": torch.tensor([1.0]), "b": torch.tensor([[1.0]])}
    two = updates((1.0, 1.5), (4.0, 5.0))  # changes of norm 0.5 and 5
    assert flat(cut_change(two[1], start, 1.0)) == pytest.approx([1.6, 1.8])
    assert flat(clipped_mean(two, [1.0, 3.0], start, 1.0)) == pytest.approx([1.45, 1.725])
    assert flat(clipped_mean(two, [1.0, 1.0], start, 9.0)) == pytest.approx([2.5, 3.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipped_mean_is_the_mean_of_updates_that_are_cut(dtype):
    rng = np.random.default_rng(2)
    start, weights = {"w": torch.tensor(rng.normal(size=50))}, [1.0, 5.0, 2.0, 3.0]
    own = [{"w": start["w"] + torch.tensor(rng.normal(size=50))} for _ in weights]
    own[1]["w"] *= 1e6  # from far out
    cut = weighted_mean([cut_change(update, start, 6.5) for update in own], weights)["w"]
    given = [{"w": update["w"].to(dtype)} for update in own]
    found = clipped_mean(given, weights, {"w": start["w"].to(dtype)}, 6.5)["w"]
    assert found.dtype == dtype
    error = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert torch.allclose(found.double(), cut, rtol=0, atol=error)
    whole = clipped_mean(given, weights, {"w": start["w"].to(dtype)}, 1e9)["w"]
    assert torch.equal(whole, weighted_mean(given, weights)["w"])


def test_clipped_mean_of_updates_on_disk_reads_one_tensor_of_one_at_a_time(tmp_path):
    size, rng = 100_000, np.random.default_rng(3)
    own, stored = [], []
    for number in range(16):
        change = rng.normal(size=(4, size)).astype(np.float32)
        own.append({f"{i}": torch.from_numpy(row) * (number + 1) for i, row in enumerate(change)})
        schema, path = Schema.of(own[-1]), tmp_path / f"{number}"
        path.write_bytes(encode(Payload(own[-1]), schema))
        stored.append(StoredTensors(path, schema))
    start = {f"{i}": torch.zeros(size) for i in range(4)}
    norm = float(torch.cat(list(own[8].values())).norm())  # half of them are cut
    weights = [float(number) for number in range(1, 17)]
    tracemalloc.start()
    try:
        found = clipped_mean(stored, weights, start, norm)
        held = tracemalloc.get_traced_memory()[1]  # what is read; not what torch holds
    finally:
        tracemalloc.stop()
    in_memory = clipped_mean(own, weights, start, norm)
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in found.items())
    assert held < (2 * available_cores() + 2) * 4 * size


RULES = {
    "median": coordinate_median,
    "trimmed mean": lambda own: trimmed_mean(own, 3),
    "krum": lambda own: krum(own, 3),
    "multi-krum": lambda own: multi_krum(own, 3),
    "geometric median": lambda own: geometric_median(own, [1.0] * len(own)),
    "clipped mean": lambda own: clipped_mean(own, [1.0] * len(own), {"w": torch.zeros(20)}, 10.0),
}

ATTACKS = {
    "nan": lambda honest: torch.full((20,), math.nan),
    "inf": lambda honest: torch.full((20,), math.inf),
    "one nan": lambda honest: torch.where(torch.arange(20) == 3, math.nan, honest),
    "1e30": lambda honest: torch.full((20,), 1e30),
    "sign flip": lambda honest: -10 * honest,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_three_of_ten_do_not_move_it_far(rule, attack):
    rng = np.random.default_rng(0)
    honest = [torch.tensor(1 + 0.1 * rng.normal(size=20)).float() for _ in range(7)]
    bad = [ATTACKS[attack](own) for own in honest[:3]]
    found = RULES[rule]([{"w": own} for own in (*bad, *honest)])["w"]
    assert found.isfinite().all() and found.dtype == torch.float32
    error = float((found - torch.stack(honest).mean(0)).norm()) / math.sqrt(20)
    unbounded = rule == "clipped mean" and attack in ("1e30", "sign flip")
    assert error < (1.0 if unbounded else 0.2)


@pytest.mark.parametrize("rule", RULES)
def test_without_bad_ones_it_is_near_the_mean_and_blind_to_order(rule):
    rng = np.random.default_rng(1)
    honest = [{"w": torch.tensor(1 + 0.1 * rng.normal(size=20))} for _ in range(10)]
    found, turned = RULES[rule](honest)["w"], RULES[rule](honest[::-1])["w"]
    assert torch.allclose(found, turned, atol=1e-6)
    assert float((found - weighted_mean(honest, [1.0] * 10)["w"]).norm()) < 0.6


@pytest.mark.parametrize("rule", RULES)
def test_nothing_finite_is_refused(rule):
    with pytest.raises(ValueError, match="finite"):
        RULES[rule]([{"w": torch.full((20,), math.nan)}] * 9)


def test_finite_ones():
    own = [{"a": torch.ones(2)}, {"a": torch.tensor([1.0, math.inf])}, {"a": torch.zeros(1)}]
    assert finite_ones(own) == [0, 2]


def test_a_change_that_is_just_as_long_as_it_may_be_is_left_as_it_is():
    start = {"a": torch.tensor([1.0, 1.0])}
    update = {"a": torch.tensor([4.0, 5.0])}
    assert torch.equal(cut_change(update, start, 5.0)["a"], update["a"])
    assert cut_change(update, start, 2.5)["a"].tolist() == [2.5, 3.0]


def test_one_that_is_not_finite_is_one_of_those_that_may_be_bad():
    """Of six with f = 2: five are left, of which one may be bad, and the least and the largest go."""
    own = updates((1.0, 0.0), (2.0, 0.0), (6.0, 1.0), (100.0, 2.0), (-50.0, 9.0), (math.nan, 0.0))
    assert flat(trimmed_mean(own, 2)) == [3.0, 1.0]
    assert flat(coordinate_median(own[:1])) == [1.0, 0.0]
    with pytest.raises(ValueError, match="1 finite updates with weights"):
        geometric_median(own[:1], [0.0])
