"""Selections that go by what clients tell: by hand, at their limits, with false numbers, saved and restored."""

import json
import math

import numpy as np
import pytest

from fedloom.federation.presence import Presence
from fedloom.federation.selection import SELECTIONS, draw, make_selection
from fedloom.federation.selection_contract import Observation, Told
from fedloom.randomness import generator

INFORMED = [name for name, (_, kind) in SELECTIONS.items() if kind.informed]


def made(name, **settings):
    return make_selection(SELECTIONS[name][0](**settings))


def rows_of(*rows):
    return Presence.of(dict(enumerate(rows)))


def seen(rows=10, loss=1.0, seconds=None, answered=True, trained=None):
    return Observation(answered, rows, Told(loss, abs(loss)), trained, seconds)


def asked(selection, presence, size, losses, round=1):
    """Candidates are drawn and tell their losses, then clients are drawn; both are returned."""
    rng = generator(5, "candidates", round=round)
    candidates = selection.candidates(presence, size, rng)
    told = {c: Told(losses[c], abs(losses[c])) for c in candidates if c in losses}
    selection.begin(round, told)
    return tuple(candidates), draw(selection, presence, size, 5, round)


def shares(clients, rounds, count):
    found = np.zeros(count)
    for round in range(1, rounds + 1):
        found[list(clients(round))] += 1
    return found / rounds


def test_the_candidate_with_the_largest_loss_is_drawn():
    """Losses 0.2, 0.9, 0.5 of three candidates: the second."""
    own = made("power_of_choice", candidates=3)
    losses = {0: 0.2, 1: 0.9, 2: 0.5}
    assert asked(own, rows_of(4, 4, 4), 1, losses) == ((0, 1, 2), (1,))
    assert own.reasons == {1: "a large loss"}


def test_as_many_candidates_as_places_is_sampling_by_rows():
    """The first of rows 1, 2 and 5 is drawn in 1/8, 2/8 and 5/8 of rounds; its loss does not matter."""
    own, presence = made("power_of_choice", candidates=1), rows_of(1, 2, 5)
    found = shares(lambda r: asked(own, presence, 1, {0: 9.0, 1: 1, 2: 0}, r)[1], 2000, 3)
    for share, expected in zip(found, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    alike = made("power_of_choice", candidates=1, by="clients")
    found = shares(lambda r: asked(alike, presence, 1, {}, r)[1], 2000, 3)
    assert np.abs(found - 1 / 3).max() < 4 * math.sqrt(2 / 9 / 2000)


def test_with_all_clients_as_candidates_it_is_greedy():
    own, presence = made("power_of_choice", candidates=9), rows_of(*[3] * 5)
    losses = {0: 3.0, 1: 1.0, 2: 5.0, 3: 2.0, 4: 4.0}
    for round in range(1, 20):
        assert asked(own, presence, 2, losses, round)[1] == (2, 4)


def test_a_candidate_that_tells_nothing_comes_last_and_others_fill_up():
    own, presence = made("power_of_choice", candidates=3), rows_of(*[3] * 3)
    assert asked(own, presence, 2, {0: 1.0, 2: 0.1})[1] == (0, 2)
    few = made("power_of_choice", candidates=2)
    candidates, _ = asked(few, rows_of(*[3] * 6), 1, dict.fromkeys(range(6), 1.0))
    others = rows_of(*[3] * 6).without(candidates)
    replaced = draw(few, others, 1, 5, 1, "replacement")
    assert len(replaced) == 1 and {few.reasons[c] for c in replaced} == {"in place of a candidate"}


def test_without_an_exchange_the_last_losses_count_and_new_clients_come_first():
    own = made("power_of_choice", losses="training", candidates=4)
    assert own.asks is None
    presence = rows_of(*[3] * 4)
    trained = {c: Observation(True, 3, None, loss) for c, loss in ((0, 0.3), (1, 0.9), (2, 0.5))}
    own.observe(1, trained)
    own.begin(2, {})
    assert draw(own, presence, 1, 5, 2) == (3,)  # never seen: infinite
    assert draw(own, presence, 2, 5, 2) == (1, 3)


def test_a_false_loss_is_worth_no_more_than_some_times_the_median():
    """1e9 among losses of 1 to 12 counts as 10 times their median, which 12 times one is above."""
    own, presence = made("power_of_choice", candidates=4, largest=1.0), rows_of(*[3] * 4)
    losses = {0: 1e9, 1: 3.0, 2: 3.0, 3: 1.0}
    found = shares(lambda r: asked(own, presence, 1, losses, r)[1], 600, 4)
    assert found[3] == 0 and np.abs(found[:3] - 1 / 3).max() < 4 * math.sqrt(2 / 9 / 600)


def known(name, losses, rows=10, seconds=None, **settings):
    """A selection that has seen each client once, in round 1."""
    own = made(name, **settings)
    own.begin(1, {})
    own.observe(
        1,
        {
            c: seen(rows, loss, None if seconds is None else seconds[c])
            for c, loss in enumerate(losses)
        },
    )
    own.begin(2, {})
    return own


def test_exploration_is_by_rows_and_equal_clients_are_drawn_alike():
    own, presence = made("oort", explore=1, explore_decay=1), rows_of(1, 2, 5)
    own.begin(1, {})
    found = shares(lambda r: draw(own, presence, 1, 5, r), 2000, 3)
    for share, expected in zip(found, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    assert set(own.reasons.values()) == {"tried out"}
    alike = known("oort", [2.0] * 4, seconds=[3.0] * 4, explore=0, explore_least=0)
    found = shares(lambda r: draw(alike, rows_of(*[10] * 4), 1, 5, r), 1200, 4)
    assert np.abs(found - 1 / 4).max() < 4 * math.sqrt(3 / 16 / 1200)
    assert set(alike.reasons.values()) == {"its score"}


def test_scores_by_hand():
    """Utilities 4, 6, 10 in round 2: normalised, with sqrt(0.1 ln 2 / 1); the third is twice too slow."""
    own = known("oort", [4.0, 6.0, 10.0], 1, seconds=[1.0, 2.0, 4.0], percentile=50)
    bonus = math.sqrt(0.1 * math.log(2))
    expected = [0.00066622 + bonus, 0.33377748 + bonus, (1 + bonus) / 4]
    assert own.scores([0, 1, 2]) == pytest.approx(expected, abs=1e-7)
    without = known("oort", [4.0, 6.0, 10.0], 1, seconds=[1.0, 2.0, 4.0], speed=False)
    assert without.scores([2]) == pytest.approx([1 + bonus])


def test_the_share_of_new_clients_falls_and_places_are_filled():
    """0.9 x 0.95^t: in round 1 0.855 of 10 places leave 1 to known clients, in the end 0.2 leave 8."""
    presence = rows_of(*[4] * 40)
    own = known("oort", [1.0] * 15, 4)
    for round, again in ((2, 1), (40, 8)):
        own.begin(round, {})
        drawn = draw(own, presence, 10, 5, round)
        assert sum(client < 15 for client in drawn) == again
    everybody = known("oort", [1.0] * 6, 4)
    assert len(draw(everybody, rows_of(*[4] * 6), 5, 5, 2)) == 5  # nobody is new
    assert draw(everybody, rows_of(*[4] * 6), 6, 5, 2) == tuple(
        range(6)
    )  # no place is out of range


def test_an_answer_that_never_came_changes_the_time_alone():
    own = known("oort", [2.0, 3.0], seconds=[1.0, 1.0])
    before = own.known[0]
    own.observe(2, {0: Observation(False, 10, Told(9.0, 9.0), None, 60.0)})
    assert own.known[0].seconds == 60 and own.known[0].loss == before.loss
    assert (own.known[0].last, own.known[0].count) == (1, 1)


def test_the_pacer_waits_for_slower_clients_once_the_utility_stalls():
    own = made("oort", pace_rounds=2, percentile=50)
    for round in range(1, 5):
        own.begin(round, {})
        own.reasons = {0: "its score"}
        own.observe(round, {0: seen(loss=2.0)})
    assert own.gained == [20.0] * 4 and own.percentile == 55


def test_the_bandit_tries_all_then_takes_the_best():
    own, presence = made("flash"), rows_of(*[10] * 6)
    drawn = []
    for round in (1, 2):
        own.begin(round, {})
        chosen = draw(own, presence, 3, 5, round)
        drawn += chosen
        own.observe(round, {c: seen(loss=2.0, trained=1.0 if c < 3 else 2.0) for c in chosen})
    assert sorted(drawn) == list(range(6))  # each once before any twice
    for round in range(3, 30):
        own.begin(round, {})
        chosen = draw(own, presence, 3, 5, round)
        own.observe(round, {c: seen(loss=2.0, trained=1.0 if c < 3 else 2.0) for c in chosen})
    assert own.known[0].drop == 0.5 and own.known[3].drop == 0
    assert sum(own.known[c].count for c in range(3)) > 1.5 * sum(
        own.known[c].count for c in range(3, 6)
    )


def test_a_bandit_that_knows_nothing_draws_alike():
    own = known("flash", [1.0] * 4, width=0)
    assert not own.bandit.vector.any()
    found = shares(lambda r: draw(own, rows_of(*[10] * 4), 1, 5, r), 1200, 4)
    assert np.abs(found - 1 / 4).max() < 4 * math.sqrt(3 / 16 / 1200)


def test_contexts_are_between_minus_one_and_one_whatever_is_told():
    own = known("flash", [1e9, 2.0, 1.0], seconds=[1e6, 1.0, 2.0])
    found = np.array(own.contexts(own.known))
    assert found.shape == (3, 6) and np.isfinite(found).all() and np.abs(found).max() <= 1
    assert found[1, 1] == pytest.approx(0.1)  # 2 of 10 x the median of 2


def several_rounds(name, presence, rounds, restored_after=0):
    """A selection after some rounds with clients of several losses and speeds, and whom it drew."""
    own, drawn = made(name), []
    for round in range(1, rounds + 1):
        _, chosen = asked(own, presence, 2, {c: 1.0 + c for c in range(8)}, round)
        drawn.append(chosen)
        own.observe(round, {c: seen(10, 1.0 + c, 1.0 + c % 3, c != 5, 0.5 + c) for c in chosen})
        if round == restored_after:
            saved = json.loads(json.dumps(own.saved()))
            own = made(name)
            own.restore(saved)
    return own.saved(), drawn


@pytest.mark.parametrize("name", INFORMED)
def test_what_is_saved_is_all_that_later_draws_depend_on(name):
    presence = rows_of(*range(3, 11))
    saved, drawn = several_rounds(name, presence, 8)
    whole, again = several_rounds(name, presence, 8, restored_after=3)
    assert drawn == again and whole == saved


@pytest.mark.parametrize("name", INFORMED)
@pytest.mark.parametrize("loss", [0.0, 1e9, 1.0, -1e9])
def test_losses_that_are_all_alike_or_at_the_end_of_their_range_draw_whom_they_must(name, loss):
    own, presence = made(name), rows_of(*[4] * 5)
    for round in range(1, 8):
        _, chosen = asked(own, presence, 2, dict.fromkeys(range(5), loss), round)
        assert len(chosen) == 2
        own.observe(round, {c: seen(4, loss, 1.0, trained=loss) for c in chosen})
    json.dumps(own.saved(), allow_nan=False)


def test_clients_that_never_answer_take_places_of_new_ones_once():
    own, presence = made("flash", losses="training"), rows_of(*[10] * 6)
    often = dict.fromkeys(range(6), 0)
    for round in range(1, 31):
        own.begin(round, {})
        drawn = draw(own, presence, 2, 5, round)
        often = {client: count + (client in drawn) for client, count in often.items()}
        told = 1.0 + 1.0 / round
        own.observe(
            round, {c: Observation(c > 1, 10, None, told if c > 1 else None, None) for c in drawn}
        )
    assert own.known.keys() == set(range(6))
    assert often[0] + often[1] <= 2 + 30, often  # at most one of them in a round, after the first


def test_who_leaves_its_loss_out_comes_last():
    own, presence = made("power_of_choice", losses="training", candidates=4), rows_of(*[10] * 4)
    for round in (1, 2):
        own.begin(round, {})
        told = {c: Observation(True, 10, None, None if c == 3 else 1.0 + c, None) for c in range(4)}
        own.observe(round, told)
    own.begin(3, {})
    assert draw(own, presence, 3, 5, 3) == (0, 1, 2)


@pytest.mark.parametrize("false", [-1e9, 1e9])
def test_a_false_loss_or_time_leaves_the_others_apart(false):
    own = made("flash", losses="training")
    own.observe(1, {c: seen(loss=1.0 + c, trained=1.0 + c, seconds=1.0 + c) for c in range(4)})
    own.observe(1, {4: seen(loss=false, trained=false, seconds=1e6)})
    own.begin(2, {})
    contexts = own.contexts({c: own.known[c] for c in range(4)})
    for place in (1, 4):  # loss and time
        assert min(np.diff([context[place] for context in contexts])) > 0.02
