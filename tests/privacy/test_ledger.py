"""What is spent stands on the disk before its noise is drawn, once for each release, and cannot be changed."""

import json
import math

import pytest

from fedloom.errors import PrivacyError
from fedloom.privacy.accounting import Releases
from fedloom.privacy.ledger import PrivacyLedger

FACTS = {"unit": "client", "delta": 1e-5}


def spent(path, *releases, sampling=1.0):
    ledger = PrivacyLedger(path, FACTS)
    for round, name in releases:
        ledger.spend(round, 2.0, sampling, name)
    return ledger


def test_the_same_release_is_spent_once_and_another_one_beside_it(tmp_path):
    path = tmp_path / "privacy.jsonl"
    spent(path, (1, b"a"), (2, b"a"))
    ledger = spent(
        path, (2, b"a"), (2, b"b"), (3, b"c")
    )  # a resume, another answer, the next round
    assert ledger.releases == [Releases(2.0, 1.0, 1)] * 4
    assert PrivacyLedger(path).entries == ledger.entries
    assert [entry["round"] for entry in ledger.entries] == [1, 2, 2, 3]


def test_releases_on_one_drawn_cohort_are_one_release_with_less_noise(tmp_path):
    ledger = spent(tmp_path / "l", (1, b"a"), (1, b"b"), (2, b"c"), sampling=0.1)
    z = [own.noise_multiplier for own in ledger.releases]
    assert z == pytest.approx([2 / math.sqrt(2), 2.0])
    for own, wanted in ((0.5, 0.5 / math.sqrt(2)), (0.0, 0.0)):
        ledger = PrivacyLedger(tmp_path / f"l{own}", FACTS)
        for name in (b"a", b"b"):
            ledger.spend(1, own, 0.1, name, lambda releases: None)
        assert [one.noise_multiplier for one in ledger.releases] == pytest.approx([wanted])


def test_a_line_is_written_before_the_release_is_allowed_or_not(tmp_path):
    path = tmp_path / "privacy.jsonl"
    ledger = spent(path, (1, b"a"))

    def refuse(releases):
        assert len(releases) == 2
        raise PrivacyError("too many")

    with pytest.raises(PrivacyError, match="too many"):
        ledger.spend(2, 2.0, 1.0, b"b", refuse)
    assert len(PrivacyLedger(path, FACTS).entries) == 1  # refused: neither drawn nor spent
    ledger.spend(1, 2.0, 1.0, b"a", refuse)  # the same again costs nothing


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_that_a_kill_cut_short_was_not_spent(tmp_path, cut):
    path = tmp_path / "privacy.jsonl"
    spent(path, (1, b"a"), (2, b"b"))
    path.write_bytes(path.read_bytes()[:-cut])
    ledger = spent(path, (2, b"b"))
    assert len(ledger.entries) == 2
    assert PrivacyLedger(path, FACTS).releases == ledger.releases


@pytest.mark.parametrize("change", ["value", "removed", "swapped", "text"])
def test_a_changed_ledger_is_refused(tmp_path, change):
    path = tmp_path / "privacy.jsonl"
    spent(path, (1, b"a"), (2, b"b"), (3, b"c"))
    lines = path.read_text().splitlines()
    if change == "value":
        lines[1] = json.dumps({**json.loads(lines[1]), "noise_multiplier": 200.0})
    elif change == "removed":
        del lines[1]
    elif change == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines[2] = "{}"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(PrivacyError, match="is not what was written"):
        PrivacyLedger(path, FACTS)


def test_a_checkpoint_counts_on_what_it_has_seen(tmp_path):
    path = tmp_path / "privacy.jsonl"
    ledger = spent(path, (1, b"a"), (2, b"b"))
    position = ledger.position
    ledger.spend(3, 2.0, 1.0, b"c")
    PrivacyLedger(path, FACTS).require(position)
    path.unlink()
    with pytest.raises(PrivacyError, match="counts 2 releases"):
        spent(path, (1, b"a")).require(position)


def test_a_ledger_of_another_run_is_refused(tmp_path):
    path = tmp_path / "privacy.jsonl"
    spent(path, (1, b"a"))
    with pytest.raises(PrivacyError, match="another run"):
        PrivacyLedger(path, {**FACTS, "delta": 1e-3})
