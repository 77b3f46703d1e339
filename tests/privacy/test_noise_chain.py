"""A tree's noise by hand, and what a chain of releases goes on from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.errors import PluginError, PrivacyError
from fedloom.privacy.client_level import ClippedSum
from fedloom.privacy.correlation import Participation, Tree
from fedloom.privacy.noise_chain import NoiseChain

TOTAL = ClippedSum.empty({"a": torch.zeros(2), "b": torch.zeros(1)}, 1.0)
WAVE = [10, 10, 30, -10]
"""Of draws 10, 20, 30, 40: nodes 10, 20, 20 + 30 and 40, each less the one of the round before."""


def begun():
    drawn = []

    def draw(round, digest, total):
        drawn.append((round, digest))
        return {name: np.full(len(own), 10 * round) for name, own in total.steps.items()}

    return NoiseChain(Tree(Participation.of(4, 1, None)), draw), drawn


def ledger(*releases):
    lines = [{"round": round, "release": own.hex()} for round, own in releases]
    return SimpleNamespace(path="the ledger", entries=lines)


HELD = [(1, b"\x01"), (2, b"\x02"), (2, b"\x09")]


def test_the_noise_of_a_tree_by_hand():
    chain, drawn = begun()
    assert list(chain.content()) == []
    for round, expected in enumerate(WAVE, 1):
        chain.require(round, TOTAL)
        found = chain.next(round, bytes([round]), TOTAL)
        assert {name: own.tolist() for name, own in found.items()} == {
            "a": [expected] * 2,
            "b": [expected],
        }
        assert list(chain.content()) == [bytes([round])]
    assert drawn == [(round, bytes([round])) for round in (1, 2, 3, 4)]


def test_after_a_kill_the_noise_of_earlier_rounds_is_drawn_again():
    chain, _ = begun()
    for round in (1, 2):
        chain.next(round, bytes([round]), TOTAL)
    saved = json.loads(json.dumps(chain.saved()))
    assert saved == {"hashes": ["01", "02"], "sizes": {"a": 2, "b": 1}}
    again, drawn = begun()
    again.restore(saved, ledger(*HELD))
    assert again.saved() == saved
    assert [again.next(round, bytes([round]), TOTAL)["b"][0] for round in (3, 4)] == WAVE[2:]
    assert drawn == [(round, bytes([round])) for round in (1, 2, 3, 4)]
    again.restore(saved, ledger(*HELD))  # once more, from the same checkpoint
    assert again.next(3, b"\x03", TOTAL)["a"].tolist() == [30, 30]
    for lines in (HELD[:1], [(2, b"\x01"), (1, b"\x02")], []):
        with pytest.raises(PrivacyError, match="the ledger: the checkpoint goes on from releases"):
            begun()[0].restore(saved, ledger(*lines))


def test_a_round_follows_the_one_before_with_the_same_tensors():
    chain, _ = begun()
    with pytest.raises(PluginError, match="the last was of round 0 with 0 numbers, this has 3"):
        chain.require(2, TOTAL)
    chain.next(1, b"\x01", TOTAL)
    chain.require(2, TOTAL)
    for round in (1, 3):
        with pytest.raises(PluginError, match=f"round {round}: .* of round 1 with 3 numbers"):
            chain.require(round, TOTAL)
    with pytest.raises(PluginError, match="with 3 numbers, this has 4"):
        chain.require(2, ClippedSum.empty({"a": torch.zeros(2), "b": torch.zeros(2)}, 1.0))
    with pytest.raises(PluginError, match="with 3 numbers, this has 3"):
        chain.require(2, ClippedSum.empty({"a": torch.zeros(2), "c": torch.zeros(1)}, 1.0))
