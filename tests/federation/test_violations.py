"""One kind of record for what clients get wrong, and one rule for what follows from it."""

import pytest

from fedloom.federation.violations import KINDS, Violation, of_rounds, one_line, quarantined


def test_the_kinds_are_a_closed_set():
    assert KINDS == (
        "forged", "replayed", "malformed", "oversized",
        "out_of_range", "not_finite", "too_many_names", "forbidden",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand\x1b[31m red", "two lines and [31m red"),
        ("\u202eright to left\u2066", "right to left"),
        ("x" * 201, "x" * 197 + "..."),
        ("x" * 200, "x" * 200),
        ("\ud800", ""),
        ("a" + " " * 10_000 + "b", "a"),
    ],
)
def test_a_strangers_words_are_one_line_of_bounded_length(text, shown):
    assert one_line(text) == shown
    assert len(one_line(text)) <= 200 and one_line(text).isprintable()


def test_the_record_of_a_round_has_room_for_one_of_each_client_and_kind():
    violation = Violation(3, "forged", "x\n" * 500, 7, "r" * 32, 12)
    record = violation.to_record()
    assert record == {"client": 3, "kind": "forged", "reason": record["reason"], "count": 12}
    assert len(record["reason"]) == 200
    (back,) = of_rounds([{"round": 7, "rejected": [], "offences": [record]}])
    assert back == Violation(3, "forged", record["reason"], 7, None, 12)


def test_records_of_before_there_were_kinds_are_read():
    old = {
        "round": 4,
        "rejected": [
            {"client": 1, "reason": "tensor a holds NaN or infinity", "offence": True},
            {"client": 2, "reason": "it failed", "offence": False},
            {"client": 5, "reason": "older still"},
        ],
    }
    assert of_rounds([old]) == [Violation(1, "malformed", "tensor a holds NaN or infinity", 4)]


def test_quarantine_by_hand():
    offended = {7: [10, 1, 4, 9, 4], 8: [4]}
    found = {r: quarantined(offended, r, limit=2, pause=3) for r in range(1, 16)}
    # the second round with a violation, 4, pauses 5 to 7; those of 9 and 10 pause 11 to 13
    assert [r for r, own in found.items() if 7 in own] == [5, 6, 7, 11, 12, 13]
    assert found[6] == {7: 7} and found[12] == {7: 13}
    assert not any(8 in own for own in found.values())
    assert not any(quarantined(offended, r, limit=2, pause=0) for r in range(1, 16))


def test_who_goes_on_in_quarantine_stays_there():
    """Reports from outside of answers come in quarantine too."""
    offended = {1: range(1, 30)}
    found = [r for r in range(1, 31) if quarantined(offended, r, limit=3, pause=4)]
    # 3 pauses 4 to 7; of 4, 5, 6 the last pauses 7 to 10, and so on: from 4 on there is no gap
    assert found == list(range(4, 31))
