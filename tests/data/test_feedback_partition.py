"""KTOO and KTOR: rows are conserved, sizes stay, and spreading really breaks pairs."""

from collections import Counter

import numpy as np
import pytest

from fedloom.data.examples import Feedback, Preference
from fedloom.data.feedback_partition import partition_feedback


def pairs(start, count):
    return [Preference(i, f"p{i}", f"good{i}", f"bad{i}") for i in range(start, start + count)]


HELD = {0: pairs(0, 10), 1: pairs(10, 30), 2: pairs(40, 60), 5: pairs(100, 1)}


def every(rows):
    return Counter((r.row, r.completion, r.desirable) for own in rows.values() for r in own)


def test_together_each_client_holds_both_answers_of_its_pairs():
    deal = partition_feedback(HELD, None)
    assert {client: len(rows) for client, rows in deal.rows.items()} == {0: 20, 1: 60, 2: 120, 5: 2}
    assert [(r.row, r.desirable) for r in deal.rows[5]] == [(100, True), (100, False)]
    assert (deal.pairs, deal.intact_share) == (101, 1.0)


def test_spread_conserves_every_row_and_every_size_and_breaks_pairs():
    together = partition_feedback(HELD, None)
    deal = partition_feedback(HELD, np.random.default_rng(0))
    assert every(deal.rows) == every(together.rows) and max(every(deal.rows).values()) == 1
    sizes = {client: len(rows) for client, rows in together.rows.items()}
    assert {client: len(rows) for client, rows in deal.rows.items()} == sizes
    # 20, 60, 120 and 2 of 202 rows: (20 19 + 60 59 + 120 119 + 2) / (202 201)
    assert deal.expected_intact_share == pytest.approx(18202 / 40602)
    assert deal.intact_share == pytest.approx(deal.expected_intact_share, abs=0.12)


def test_over_many_deals_the_share_of_whole_pairs_is_the_expected_one():
    shares = [partition_feedback(HELD, np.random.default_rng(s)).intact_share for s in range(200)]
    assert np.mean(shares) == pytest.approx(18202 / 40602, abs=0.01)


def test_the_seed_decides_the_deal():
    one, same, other = (partition_feedback(HELD, np.random.default_rng(s)).rows for s in (1, 1, 2))
    assert one == same and one != other


def test_single_answers_among_pairs_are_dealt_too_and_are_no_pairs():
    held = {0: [*pairs(0, 2), Feedback(7, "p", "alone", True)], 1: pairs(2, 1)}
    deal = partition_feedback(held, None)
    assert len(deal.rows[0]) == 5 and deal.pairs == 3 and deal.intact_share == 1.0


def test_no_rows():
    deal = partition_feedback({0: []}, np.random.default_rng(0))
    assert (deal.pairs, deal.intact_share, deal.expected_intact_share) == (0, 0.0, 0.0)
