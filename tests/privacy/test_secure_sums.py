"""What secure aggregation is made of: shares, neighbours, packed words, and integers that fit."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from fedloom.errors import MessageError
from fedloom.privacy.secure_aggregation import graph, sharing
from fedloom.privacy.secure_aggregation.masks import add_mask, packed, packed_bytes, unpacked
from fedloom.privacy.secure_aggregation.quantisation import Grid

SECRET = hashlib.sha256(b"a secret").digest()


def test_the_field_has_a_prime_number_of_elements():
    """Miller and Rabin's test with 40 bases, and none of the numbers between it and 2^256 passes it."""

    def is_prime(number):
        power, odd = 0, number - 1
        while odd % 2 == 0:
            power, odd = power + 1, odd // 2
        for base in range(2, 42):
            seen = [pow(base, odd << i, number) for i in range(power)]
            if seen[0] != 1 and number - 1 not in seen:
                return False
        return True

    assert is_prime(sharing.PRIME)
    assert not any(is_prime(number) for number in range(2**256 + 1, sharing.PRIME, 2))


@pytest.mark.parametrize(("holders", "threshold"), [(3, 2), (5, 3), (5, 5), (4, 1)])
def test_any_shares_up_to_the_threshold_give_the_secret(holders, threshold):
    random = hashlib.shake_256(b"random").digest(sharing.random_bytes(threshold))
    shares = sharing.split(SECRET, range(1, holders + 1), threshold, random)
    for chosen in itertools.combinations(shares, threshold):
        assert sharing.combine({place: shares[place] for place in chosen}, threshold) == SECRET
    with pytest.raises(MessageError, match=f"{threshold} are needed"):
        sharing.combine(dict(list(shares.items())[: threshold - 1]), threshold)


def test_fewer_shares_fit_every_secret():
    """For each of other secrets there is a polynomial with the same t - 1 shares: they say nothing."""
    random = hashlib.shake_256(b"random").digest(sharing.random_bytes(3))
    shares = sharing.split(SECRET, (1, 2, 3), 3, random)
    known = {place: shares[place] for place in (1, 2)}
    found = {
        sharing.combine({**known, 3: third.to_bytes(33, "big")}, 3) for third in range(1, 2000, 97)
    }
    assert len(found) == len(range(1, 2000, 97))


def test_shares_out_of_the_field_are_refused():
    with pytest.raises(MessageError, match="no number of the field"):
        sharing.combine({1: b"\xff" * 33, 2: b"\0" * 33}, 2)
    with pytest.raises(ValueError, match="places"):
        sharing.split(SECRET, (0, 1), 2, bytes(48))


@pytest.mark.parametrize("number", [3, 50, 51, 100, 200, 1000])
def test_neighbours_are_mutual_and_join_all(number):
    order = graph.order_of(
        {c: hashlib.sha256(bytes([c % 256, c // 256])).digest() for c in range(number)}
    )
    near = {client: graph.neighbours(order, client) for client in order}
    k = graph.degree(number)
    assert all(len(set(own)) == k and client not in own for client, own in near.items())
    assert all(client in near[other] for client, own in near.items() for other in own)
    assert (k == number - 1) == (number <= graph.COMPLETE)
    reached, new = {order[0]}, {order[0]}
    while new := {other for client in new for other in near[client]} - reached:
        reached |= new
    assert len(reached) == number


def test_the_degree_meets_its_bounds_by_simulation():
    """Of 200 clients of whom 30 % drop out, each has enough neighbours left, 20,000 times of 20,000."""
    k, rng = graph.degree(200), np.random.default_rng(0)
    left = k - rng.hypergeometric(60, 139, k, size=20_000)
    assert (left + 1 >= graph.threshold_of(k + 1)).all()
    assert k < 199 and graph.degree(10_000) < 400


def test_a_threshold_is_more_than_half():
    assert all(2 * graph.threshold_of(n) > n for n in range(3, 300))


@pytest.mark.parametrize("bits", range(1, 33))
def test_packed_words_come_back(bits):
    for count in (0, 1, 31, 33, 1000):
        words = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint32)
        data = packed(words, bits)
        assert len(data) == packed_bytes(count, bits)
        assert np.array_equal(unpacked(data, count, bits), words)
    assert packed_bytes(13_500_000, bits) / 4 <= 13_500_000 * bits / 32 + 32


def test_masks_cancel_at_every_length():
    for count in (1, 65_536, 70_001):
        words = np.arange(count, dtype=np.uint32)
        add_mask(words, SECRET)
        assert np.count_nonzero(words == np.arange(count)) < 5
        add_mask(words, SECRET, subtract=True)
        assert np.array_equal(words, np.arange(count))


GRIDS = [
    Grid(bits, 0.5, clients, rows)
    for bits in (8, 16, 21)
    for clients in (3, 20, 100)
    for rows in (1, 37, 100_000)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_sum_reaches_the_modulus(grid):
    """All clients at the upper bound with the largest weight, and beyond it."""
    words = np.zeros(2, dtype=np.uint32)
    weight = grid.weight(10 * grid.rows)
    assert weight == grid.heaviest >= 1
    cut = grid.put(np.array([0.5, 3.0], dtype=np.float32), weight, words, None)
    largest = int(words.max()) * grid.clients
    assert cut == 1 and largest < 2**grid.width <= 2**32
    assert largest >= 2 ** (grid.width - 1)  # and no bit is wasted
    reported = grid.put_number(1e30, weight)
    assert max(reported) * grid.clients < 2**grid.width


def test_too_many_clients_for_the_modulus_are_an_error():
    with pytest.raises(ValueError, match="do not fit 32 bits"):
        _ = Grid(24, 1.0, 600).heaviest


def test_means_come_back_to_half_a_step_and_zero_exactly():
    grid, rng = Grid(16, 1.0, 5, 40), np.random.default_rng(1)
    values, rows = rng.uniform(-1, 1, (5, 300)), [40, 1, 7, 22, 40]
    values[:, 0], values[:, 1] = 0.0, 1.0
    sums = np.zeros(300, dtype=np.uint32)
    for own, count in zip(values, rows, strict=True):
        words = np.zeros(300, dtype=np.uint32)
        assert grid.put(own, grid.weight(count), words, None) == 0
        sums += words
    found = grid.mean(sums, sum(rows))
    assert abs(found - np.average(values, axis=0, weights=rows)).max() <= grid.step / 2 * (1 + 1e-9)
    assert found[0] == 0.0 and found[1] == 1.0


def test_stochastic_rounding_keeps_the_mean_and_nearest_does_not():
    grid, value = Grid(8, 1.0, 3), 0.3 / 127
    values, words = np.full(100_000, value), np.zeros(100_000, dtype=np.uint32)
    grid.put(values, 1, words, np.random.default_rng(0))
    error = 0.5 * grid.step / math.sqrt(len(values))
    assert abs(grid.mean(words, 1).mean() - value) < 4 * error
    grid.put(values, 1, words, None)
    assert (grid.mean(words, 1) == 0.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_masked(bad):
    with pytest.raises(MessageError, match="NaN or infinity"):
        Grid(16, 1.0, 3).put(np.array([0.0, bad]), 1, np.zeros(2, dtype=np.uint32), None)


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_reported_numbers_have_their_weighted_mean(bits):
    grid = Grid(bits, 1.0, 4, 3)
    given = {1: 0.693147, 2: -1234.5678, 3: 99_999.25}
    columns = [grid.put_number(value, weight) for weight, value in given.items()]
    columns.append(grid.put_number(None, 3))
    found = grid.mean_number([sum(column) for column in zip(*columns, strict=True)])
    assert found == pytest.approx(sum(w * x for w, x in given.items()) / 6, abs=1e-5)
    assert grid.mean_number([0] * (1 + grid.digits)) is None


@pytest.mark.parametrize("bits", [8, 14, 16, 20])
def test_a_reported_number_that_is_cut_is_the_largest_and_not_the_smallest(bits):
    grid = Grid(bits, 1.0, 3)
    assert grid.mean_number(grid.put_number(1e30, 1)) == pytest.approx(2.0**22)
    assert grid.mean_number(grid.put_number(-1e30, 1)) == -(2.0**22)
