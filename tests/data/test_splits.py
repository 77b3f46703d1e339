"""What is held out: by prompt or group, in the same order for everybody, and nothing on both sides."""

import hashlib

import numpy as np
import pytest

from fedloom.data.examples import Feedback, Instruction, Labelled, Preference, unpair
from fedloom.data.splits import (
    NOT_JUDGED,
    SAME_PROMPT,
    SAME_ROW,
    Limit,
    group_key,
    keyed,
    limit_of,
    normalised,
    prompt_text,
    row_text,
    split,
)
from fedloom.errors import DataError


def asks(prompts, **columns):
    return [
        Instruction(i + 1, prompt, f"answer {i}", {name: own[i] for name, own in columns.items()})
        for i, prompt in enumerate(prompts)
    ]


def prompts_of(rows, positions):
    return {rows[i].prompt for i in positions}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("How  do\tI?\n", "how do i?"),
        ("HOW DO I?", "how do i?"),
        ("\uff28\uff4f\uff57 do I\uff1f", "how do i?"),  # full width
        ("straße", "strasse"),
        ("\ufb01ne", "fine"),  # a ligature
        ("no\u00a0break", "no break"),
        ("\ud800", "\ud800"),  # half of a pair, as JSON may hold
    ],
)
def test_texts_are_compared_without_case_width_and_white_space(text, same):
    assert normalised(text) == same
    assert group_key(Labelled(1, text, "a")) == group_key(Labelled(2, same, "b"))


def test_what_a_conversation_asks_is_what_its_users_and_assistants_say():
    def said(*messages):
        return tuple({"role": role, "content": content} for role, content in messages)

    one = Instruction(1, said(("system", "Be kind."), ("user", "Why?")), "Because.")
    other = Instruction(2, said(("developer", "Be brief."), ("user", " why?")), "So.")
    assert prompt_text(one) == prompt_text(other) == "why?"
    more = said(("user", "Why?"), ("assistant", "So."), ("user", "Why?"))
    assert prompt_text(Instruction(3, more, "x")) == "why? so. why?"
    assert group_key(one) == group_key(Preference(4, "WHY?", "a", "b"))


def test_where_nothing_is_asked_the_whole_row_is_the_prompt():
    alone = said = ({"role": "system", "content": "Be kind."},)
    assert prompt_text(Instruction(1, "", "Once upon")) == "\nonce upon"
    assert prompt_text(Instruction(1, alone, "Once")) != prompt_text(Instruction(1, said, "Twice"))
    assert row_text(Preference(1, "A", "B", "C")) == "a\nb\nc"


def test_the_order_is_that_of_a_keyed_hash_of_the_group():
    key = group_key(Labelled(1, "text", "a"))
    plain = hashlib.blake2b(b"text", digest_size=16, person=b"prompt").digest()
    assert key == plain
    mac = hashlib.blake2b(plain, digest_size=8, key=(7).to_bytes(8, "big")).digest()
    assert keyed(key, 7) == (mac, plain) != keyed(key, 8)


@pytest.mark.parametrize(
    ("count", "fraction", "most", "rows"),
    [(4, 0.5, 9, 0), (5, 0.1, 9, 1), (20, 0.1, 9, 2), (100, 0.1, 9, 9), (10, 0.99, 99, 9), (9, 0, 9, 0)],
)  # fmt: skip
def test_how_many_a_client_may_hold_out(count, fraction, most, rows):
    assert limit_of(count, fraction, most) == Limit(rows, most)


@pytest.mark.parametrize(("count", "kept"), [(4, 0), (5, 1), (20, 2), (100, 10)])
def test_a_client_keeps_a_share_for_its_own_evaluation(count, kept):
    rows = asks([f"p{i}" for i in range(count)])
    found = split({3: rows}, {3: limit_of(count, 0.1, 99)}, 1)
    assert len(found.held_out[3]) == kept
    assert sorted([*found.trained[3], *found.held_out[3]]) == list(range(count))


def test_a_group_that_does_not_fit_is_passed_over():
    rows = asks(["big"] * 6 + ["one", "two", "three", "four"])
    for order in range(40):
        found = split({0: rows}, {0: Limit(2, 9)}, order)
        first = sorted(["one", "two", "three", "four"], key=lambda p: place(p, order))[:2]
        assert prompts_of(rows, found.held_out[0]) == set(first)


def place(prompt, order):
    return keyed(group_key(Labelled(0, prompt, "")), order)


def test_where_nothing_fits_the_smallest_group_of_at_most_half_the_rows():
    rows = asks(["a"] * 6 + ["b"] * 4 + ["c"] * 5)
    found = split({0: rows}, {0: Limit(2, 9)}, 1)
    assert found.held_out[0] == [6, 7, 8, 9] and not found.by_row


def test_one_prompt_for_all_is_divided_by_prompt_and_completion():
    rows = asks(["classify"] * 10)
    found = split({0: rows}, {0: Limit(2, 9)}, 1)
    assert len(found.held_out[0]) == 2 and len(found.trained[0]) == 8 and found.by_row == (0,)


def test_texts_of_which_each_is_there_often_are_held_out_whole_and_not_all_judged():
    rows = [Labelled(i, f"text {i % 4}", "a") for i in range(40)]
    found = split({0: rows}, {0: Limit(4, 6)}, 1, over="over a bound")
    (text,) = {rows[i].text for i in found.held_out[0]}
    assert len(found.held_out[0]) == 6 and found.dropped[0]["over a bound"] == 4
    assert len(found.trained[0]) == 30 and text not in {rows[i].text for i in found.trained[0]}
    assert not found.by_row and not found.without


def test_rows_all_alike_cannot_be_divided():
    rows = [Instruction(i, "p", "c") for i in range(10)]
    found = split({0: rows}, {0: Limit(2, 9)}, 1)
    assert found.held_out[0] == [] and len(found.trained[0]) == 10 and found.without == (0,)


def test_a_prompt_of_several_clients_is_held_out_by_all_of_them_and_no_row_is_lost():
    shared = [f"p{i}" for i in range(40)]
    rows = {client: asks(shared) for client in range(4)} | {9: asks(shared[:10])}
    limits = {client: Limit(4, 64) for client in range(4)} | {9: Limit(1, 64)}
    found = split(rows, limits, 5)
    held = [prompts_of(rows[c], found.held_out[c]) for c in rows]
    assert held[0] == held[1] == held[2] == held[3] and len(held[0]) == 5 and len(held[4]) == 1
    assert (
        held[4] < held[0]
    )  # the small client's came after the others' four: they hold out one more
    for client, own in rows.items():
        assert not prompts_of(own, found.trained[client]) & set().union(*held)
        assert len(found.trained[client]) + len(found.held_out[client]) == len(own)


def test_clients_by_themselves_choose_alike():
    """Between machines nobody knows of the others; the order of the prompts is the same for all."""
    shared = [f"p{i}" for i in range(40)]
    apart = [split({c: asks(shared)}, {c: Limit(4, 64)}, 5) for c in range(3)]
    held = {frozenset(apart[c].held_out[c]) for c in range(3)}
    assert len(held) == 1


def test_who_has_prompts_of_small_clients_alone_takes_the_one_that_costs_least():
    """Client 1 to 3 have too few rows to hold any out: what client 0 holds out they do not train on."""
    rows = {0: asks(["a"] * 2 + ["b"] * 2 + ["c"] * 3)}
    rows |= {1: asks(["a", "x", "y"]), 2: asks(["a", "b", "x"]), 3: asks(["c", "c", "y"])}
    limits = {client: limit_of(len(own), 0.3, 64) for client, own in rows.items()}
    found = split(rows, limits, 1)
    assert prompts_of(rows[0], found.held_out[0]) == {"b"}  # b costs one row, a and c two
    assert [found.dropped[c][SAME_PROMPT] for c in range(4)] == [0, 0, 1, 0]
    assert [len(found.trained[c]) for c in range(4)] == [5, 3, 2, 3]


def test_nobody_is_left_without_a_row_to_train_on():
    rows = {0: asks(["a"] * 3 + ["b"] * 3), 1: asks(["a"]), 2: asks(["b"])}
    found = split(rows, {0: Limit(1, 64), 1: Limit(0, 64), 2: Limit(0, 64)}, 1)
    assert found.trained[1] == [0] and found.trained[2] == [0]
    assert found.by_row == (0,) and len(found.held_out[0]) == 1


def test_groups_of_a_column_stay_on_one_side_and_exact_duplicates_are_left_out():
    users = ["u1"] * 4 + ["u2"] * 4 + ["u3"] * 4
    rows = [
        Instruction(i, f"p{i % 4}", f"c{i % 4}", {"user": user}) for i, user in enumerate(users)
    ]
    rows[0] = Instruction(0, "own", "own", {"user": "u1"})
    rows[4] = Instruction(4, "own 2", "own 2", {"user": "u2"})
    rows[8] = Instruction(8, "own 3", "own 3", {"user": "u3"})
    found = split({0: rows}, {0: Limit(4, 64)}, 1, "user")
    (user,) = {rows[i].columns["user"] for i in found.held_out[0]}
    assert len(found.held_out[0]) == 4
    assert len(found.trained[0]) == 2  # all others stand in the held-out group too
    assert found.dropped[0][SAME_ROW] == 6
    assert user not in {rows[i].columns["user"] for i in found.trained[0]}


def test_of_a_group_above_the_most_that_are_judged_the_rest_is_dropped():
    users = ["u1"] * 6 + ["u2"] * 5
    rows = asks([f"p{i}" for i in range(11)], user=users)
    found = split({0: rows}, {0: Limit(2, 3)}, 1, "user", over="over a bound")
    assert len(found.held_out[0]) == 3 and found.dropped[0] == {"over a bound": 2, NOT_JUDGED: 0}
    assert len(found.trained[0]) == 6
    again = split({0: rows}, {0: Limit(2, 3)}, 1, "user", over="over a bound")
    assert again == found


def test_one_group_alone_cannot_be_divided():
    rows = asks([f"p{i}" for i in range(10)], user=["u"] * 10)
    found = split({0: rows}, {0: Limit(2, 64)}, 1, "user")
    assert found.without == (0,) and found.held_out[0] == [] and len(found.trained[0]) == 10


def test_an_absent_column_names_those_there_are():
    with pytest.raises(DataError) as caught:
        split({0: asks(["a"] * 5, patient=list("abcde"))}, {0: Limit(1, 9)}, 1, "patents")
    assert str(caught.value) == (
        "data.group = 'patents': row 1 has no such column; did you mean 'patient'? there are: patient"
    )


def test_single_answers_beside_a_held_out_pair_are_on_neither_side():
    pairs = [Preference(i, f"p{i}", "a", "b") for i in range(10)]
    rows = [*pairs, *(Feedback(20 + i, f"p{i}", "c", True) for i in range(10))]
    found = split({0: rows}, {0: Limit(4, 64)}, 1, only=Preference)
    held = prompts_of(rows, found.held_out[0])
    assert all(isinstance(rows[i], Preference) for i in found.held_out[0]) and len(held) == 2
    assert found.dropped[0][NOT_JUDGED] == 2
    assert not held & prompts_of(rows, found.trained[0])


def test_the_halves_of_a_pair_stay_together():
    rows = unpair([Preference(i, "p", f"a{i}", f"b{i}") for i in range(40)])
    for order in range(10):
        found = split({0: rows}, {0: limit_of(80, 0.2, 64)}, order)
        sides = [{rows[i].row for i in own[0]} for own in (found.trained, found.held_out)]
        assert not sides[0] & sides[1] and len(found.held_out[0]) == 16


def test_public_prompts_are_not_held_out():
    rows = asks([f"p{i}" for i in range(10)])
    never = {group_key(row) for row in rows[:6]}
    found = split({0: rows}, {0: Limit(4, 64)}, 1, never=never)
    assert found.held_out[0] == [6, 7, 8, 9]


def test_in_any_federation_every_row_is_somewhere_and_no_prompt_on_both_sides():
    """Clients of 1 to 30 rows with prompts that many share, drawn 300 times."""
    rng = np.random.default_rng(0)
    fell_back = 0
    for _ in range(300):
        few = int(rng.integers(1, 40))
        rows = {
            client: asks([f"p{p}" for p in rng.integers(few, size=rng.integers(1, 30))])
            for client in range(rng.integers(1, 6))
        }
        limits = {c: limit_of(len(own), rng.uniform(0, 0.6), int(rng.integers(1, 9))) for c, own in rows.items()}  # fmt: skip
        found = split(rows, limits, int(rng.integers(1 << 40)))
        held = set().union(
            *(
                prompts_of(rows[c], own)
                for c, own in found.held_out.items()
                if c not in found.by_row
            )
        )
        for client, own in rows.items():
            lost = sum(found.dropped[client].values())
            assert len(found.trained[client]) + len(found.held_out[client]) + lost == len(own)
            assert found.trained[client] and len(found.held_out[client]) <= limits[client].most
            assert not set(found.trained[client]) & set(found.held_out[client])
            assert not held & prompts_of(own, found.trained[client])
        fell_back += bool(found.by_row)
    assert fell_back  # prompts were few enough at times


def test_where_nobody_holds_rows_out_all_are_trained_on_and_a_column_is_looked_for():
    rows = {7: [Instruction(i, f"p{i % 2}", "c", {"who": "a"}) for i in range(4)], 2: []}
    none = {client: Limit(0, 64) for client in rows}
    found = split(rows, none, 1)
    assert found.trained == {7: [0, 1, 2, 3], 2: []} and found.held_out == {7: [], 2: []}
    assert not any(sum(own.values()) for own in found.dropped.values())
    assert not found.by_row and not found.without
    assert split(rows, none, 1, "who") == found
    with pytest.raises(DataError, match="no such column"):
        split(rows, none, 1, "where")
