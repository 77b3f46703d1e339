"""What secure aggregation is made of: shares, neighbours, packed words, and integers that fit."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from fedloom.errors import MessageError
from fedloom.privacy.secure_aggregation import graph, quantisation, sharing
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
    with pytest.raises(MessageError, match="no number of the field"):
        sharing.combine({1: sharing.PRIME.to_bytes(33, "big"), 2: b"\0" * 33}, 2)
    with pytest.raises(MessageError, match="no number of the field"):
        sharing.combine({1: b"\0" * 32, 2: b"\0" * 33}, 2)
    with pytest.raises(MessageError, match="do not fit together"):
        sharing.combine({1: (2**256).to_bytes(33, "big"), 2: (2**256).to_bytes(33, "big")}, 2)


@pytest.mark.parametrize(
    ("places", "threshold"), [((0, 1), 2), ((1, 1), 2), ((1, 1, 2), 2), ((1, 2), 3), ((1, 2), 0)]
)
def test_places_that_would_give_the_secret_or_too_few_are_refused(places, threshold):
    with pytest.raises(ValueError, match="places" if threshold else "random_bytes|places"):
        sharing.split(SECRET, places, threshold, bytes(max(0, 48 * (threshold - 1))))


def test_a_secret_and_its_random_bytes_have_their_lengths():
    assert sharing.random_bytes(1) == 0 and sharing.random_bytes(4) == 3 * 48
    for secret, random in ((SECRET[1:], bytes(48)), (SECRET, bytes(47)), (SECRET, bytes(49))):
        with pytest.raises(ValueError, match="a secret has 32 bytes"):
            sharing.split(secret, (1, 2), 2, random)


def test_a_line_through_the_secret_by_hand():
    """5 + 7 x at 1, 2 and 9."""
    shares = sharing.split((5).to_bytes(32, "big"), (1, 2, 9), 2, (7).to_bytes(48, "big"))
    assert {place: int.from_bytes(own, "big") for place, own in shares.items()} == {
        1: 12,
        2: 19,
        9: 68,
    }
    assert all(len(own) == 33 for own in shares.values())


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


@pytest.mark.parametrize("clients", [51, 52, 100, 200, 500])
def test_the_degree_is_the_least_that_meets_its_bounds(clients):
    """A third drops out: a round fails with 2^-20 at most; a fifth colludes: a secret is known with 2^-40."""

    def meets(k):
        needed = (k + 1) // 2 + 1
        fails = hypergeom(clients - 1, (clients - 1) // 3, k).sf(k + 1 - needed)
        known = hypergeom(clients - 1, (clients - 1) // 5, k).sf(needed - 1)
        return clients * fails <= 2.0**-20 and clients * known <= 2.0**-40

    k = graph.degree(clients)
    assert k % 2 == 0 and meets(k) and not meets(k - 2)


def test_neighbours_on_a_ring_by_hand(monkeypatch):
    monkeypatch.setattr(graph, "degree", lambda clients: 4)
    assert graph.neighbours((7, 3, 9, 1, 8, 2), 7) == (2, 3, 8, 9)
    assert graph.neighbours((7, 3, 9, 1, 8, 2), 1) == (2, 3, 8, 9)
    assert graph.neighbours((7, 3, 9, 1, 8), 1) == (3, 7, 8, 9)
    monkeypatch.undo()
    assert [graph.degree(n) for n in (3, 50)] == [2, 49] and graph.COMPLETE == 50


def test_the_order_follows_from_all_keys():
    keys = {client: bytes([client]) * 5 for client in range(9)}
    order = graph.order_of(keys)
    assert sorted(order) == list(range(9)) and order != tuple(range(9))
    assert graph.order_of(dict(reversed(keys.items()))) == order
    assert graph.order_of({**keys, 4: b"other"}) != order


def test_a_threshold_is_more_than_half():
    assert [graph.threshold_of(n) for n in (3, 4, 5, 6)] == [2, 3, 3, 4]
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


def test_a_mask_is_the_keystream_of_the_standard():
    """RFC 8439, appendix A.1, test vector 1, as little-endian words, added modulo 2^32."""
    stream = np.frombuffer(bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28"), "<u4")
    words = np.full(4, 2**32 - 1, dtype=np.uint32)
    add_mask(words, bytes(32))
    assert words.tolist() == [(int(word) - 1) % 2**32 for word in stream]


def test_integers_of_values_by_hand():
    """Of 8 bits L is 127. Three clients' sums are up to 3 x 254 = 762, of 10 bits."""
    grid, words = Grid(8, 2.0, 3), np.zeros(5, dtype=np.uint32)
    assert (grid.half, grid.heaviest, grid.width, grid.step) == (127, 1, 10, 2 / 127)
    assert grid.put(np.array([0.0, 2.0, -2.0, 1.0, -5.0]), 3, words, None) == 1
    assert words.tolist() == [3 * 127, 3 * 254, 0, 3 * 190, 0]  # 190.5 to the even one
    assert grid.mean(words, 3).tolist() == pytest.approx([0, 2, -2, 63 / 127 * 2, -2])
    assert (quantisation.WIDEST, quantisation.LEAST_BITS, quantisation.MOST_BITS) == (32, 8, 24)
    with pytest.raises(MessageError) as told:
        grid.put(np.array([np.nan]), 1, words[:1], None)
    assert told.value.kind == "not_finite"


def test_blocks_do_not_change_integers(monkeypatch):
    grid, values = Grid(16, 1.0, 3), np.random.default_rng(0).uniform(-1, 1, 11)
    whole, parts = np.zeros(11, dtype=np.uint32), np.zeros(11, dtype=np.uint32)
    cut = grid.put(3 * values, 2, whole, np.random.default_rng(5))
    monkeypatch.setattr(quantisation, "_BLOCK", 4)
    assert grid.put(3 * values, 2, parts, np.random.default_rng(5)) == cut > 4
    assert np.array_equal(whole, parts) and whole.any()


def test_weights_by_hand():
    """Rows, or as many steps of them as there is room for: of 24 bits and 100 clients two."""
    own = Grid(8, 1.0, 3, rows=10)
    assert [own.weight(rows) for rows in (0.2, 4, 10, 99)] == [1, 4, 10, 10]
    narrow = Grid(24, 1.0, 100, rows=1000)
    assert narrow.heaviest == 2 and [narrow.weight(rows) for rows in (600, 800)] == [1, 2]
    assert Grid(24, 1.0, 256).heaviest == 1  # 256 x (2^24 - 2) is just below 2^32


def test_digits_of_a_reported_number_by_hand():
    """Of 39 bits in digits of 7; 0 is 2^38, and 2^-16 one more."""
    grid = Grid(8, 1.0, 3, 9)
    assert grid.digits == 6 and Grid(14, 1.0, 3).digits == 3
    assert grid.put_number(0.0, 3) == [3, 0, 0, 0, 0, 0, 3 * 8]
    assert grid.put_number(2.0**-16, 1) == [1, 1, 0, 0, 0, 0, 8]
    assert grid.put_number(-(2.0**30), 1) == [1, 0, 0, 0, 0, 0, 0]
    assert grid.put_number(2.0**30, 1) == [1, 127, 127, 127, 127, 127, 15]
    assert grid.put_number(None, 3) == [0] * 7
    assert grid.mean_number([4, 4, 0, 0, 0, 0, 32]) == 2.0**-16


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
