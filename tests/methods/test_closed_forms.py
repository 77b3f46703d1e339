"""Bytes and operations that methods say a round takes by hand, and the ranges of numbers in messages.

The adapter has one layer: A is 2 x 8, 64 bytes, B 5 x 2, 40 bytes, and a head has 4 numbers, 16 bytes: 120 in all.
"""

from types import SimpleNamespace

import pytest
import torch

from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort
from fedloom.methods import METHODS, fedbiscuit, feddyn, fedlease, split
from fedloom.methods.bases import parameter_averaging, rank_parts

A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "x.score.weight"
ADAPTER = {A: torch.zeros(2, 8), B: torch.zeros(5, 2), HEAD: torch.zeros(4)}


def method_of(name, **settings):
    own, kind = METHODS[name]
    method = kind(own(**settings))
    method.server = SimpleNamespace(cohort=3, seed=0)
    return method


@pytest.mark.parametrize(
    ("name", "settings", "down", "up", "more"),
    [
        ("fedavg", {}, 120, 120, {}),
        ("local_only", {}, 0, 0, {}),
        ("scaffold", {}, 240, 240, {}),  # and control variates
        ("fedptr", {}, 240, 120, {}),  # and the projection
        ("fedmap", {}, 120 + 3 * 4, 120, {}),  # and a precision a tensor
        ("fedper", {}, 104, 104, {}),  # without the head
        ("fedsa_lora", {}, 64, 64, {}),  # A
        ("ffa_lora", {}, 56, 56, {}),  # without A
        ("fedsvd", {}, 120, 56, {}),
        ("rolora", {}, 120, 56, {"up_even": 80}),  # B, then A
        ("lora_a2", {"ranks": 1}, 120, 16 + 2 + 20, {"up_even": 16 + 2 + 32}),  # and a map
        # 8 and 5 numbers of 26, of each a bit, are kept
        ("fedspallm", {}, 120, 4 * 13 + 4 + 16, {}),
        ("fedspallm", {"sparsity": 0.2}, 120, 4 * (12 + 8) + 4 + 16, {}),
        ("fedkseed", {"candidates": 8}, 32, 0, {"up_a_step": 6}),
        ("fedkseed", {"candidates": 8, "sampling": "weighted"}, 64, 0, {"up_a_step": 6}),
        ("fed_sb", {}, 16 + 16, 16 + 16, {}),  # 2 x 2
        ("ravan", {"heads": 2}, 8 + 16, 8 + 16, {}),  # two of 1 x 1
        ("random_projection", {"dimension": 10}, 40, 40, {}),
        ("random_projection", {"dimension": 99}, 120, 120, {}),
        ("flora", {}, 16, 120, {"also_down": 3 * 104}),  # three clients' factors
        ("fedex_lora", {}, 120, 120, {"also_down": 4 * 104}),  # and those of their mean
    ],
)
def test_bytes(name, settings, down, up, more):
    form = method_of(name, **settings).traffic(ADAPTER)
    found = {key: getattr(form, key) for key in ("also_down", "up_a_step", "up_even")}
    assert (form.down, form.up) == (down, up)
    assert found == {"also_down": 0, "up_a_step": 0, "up_even": 0, **more}


def test_fedspallm_gives_a_client_a_share_of_the_layers_one_at_least():
    layers = {f"{n}.{name}": tensor for n in range(5) for name, tensor in ADAPTER.items()}
    for share, given in ((0.4, 2), (0.41, 3), (0.01, 1), (1.0, 5)):
        form = method_of("fedspallm", layers=share).traffic(layers)
        assert form.up == 4 * 13 * given + 17 + 5 * 16  # 130 bits


def test_hilora_counts_the_root_s_part():
    """A third of rank 3."""
    adapter = {A: torch.zeros(3, 8), B: torch.zeros(5, 3), HEAD: torch.zeros(4)}
    form = method_of("hilora").traffic(adapter)
    assert (form.down, form.up) == (4 * 13 + 16, 4 * 13 + 16)


@pytest.mark.parametrize(
    ("name", "operations"),
    [("fedavg", 10.0), ("feddat", 26.0), ("fedkseed", 6.0), ("feddm", 3.0), ("regmean", 10.0 + 7)],
)
def test_operations_of_a_first_round(name, operations):
    """Training takes 10, a forward pass over all rows 3, over a row 1."""
    first = SimpleNamespace(
        own_rows=lambda: 10.0,
        own_forward_passes=lambda: 3.0,
        reading=lambda rows: float(len(rows)),
        seed=0,
        client=1,
        rows=7,
    )
    assert method_of(name).compute(first) == operations


@pytest.mark.parametrize(
    ("spec", "lowest", "highest"),
    [
        (split.STEP_NUMBERS[1], -1100, 1100),
        (split.OWN_LOSS_NUMBERS[1], -126, 126),
        (parameter_averaging.EXAMPLES, 1, 2**40),
        (feddyn.MEAN_ROWS, 0, 2**40),
        (fedbiscuit.INDEX, -1, 63),
        (fedlease.TRIAL, 0, 1),
        (rank_parts.PART, 0, 2),
        (rank_parts.INDEX_NUMBER, -1, 1e6),
    ],
)
def test_numbers_beyond_their_range_are_in_no_message(spec, lowest, highest):
    assert spec.holds(lowest) and spec.holds(highest)
    assert not spec.holds(lowest - 0.01) and not spec.holds(highest * (1 + 1e-9) + 1e-9)


def reply_of(name, tensors, **server):
    """What a client may reply in the first round of a method."""
    method = method_of(name)
    method.server = SimpleNamespace(**server)
    cohort = Cohort(1, (0, 1), Presence.of({0: 1, 1: 3}), 0.1)
    return next(method.round(method.initial_state(tensors), cohort)).reply_schema


def test_likelihoods_and_tokens_of_a_row_have_bounds():
    """A pair has two sequences of 10 tokens each at most; three inner products are of rank 2."""
    schema = reply_of("fedmap", ADAPTER)
    assert (schema.numbers[1].lowest, schema.numbers[1].highest) == (-1e6, 1e6)
    schema = reply_of("regmean", ADAPTER, max_length=10)
    assert (schema.numbers[1].lowest, schema.numbers[1].highest) == (1, 20)
    assert {own.shape for own in schema.tensors if own.name.startswith("products/")} == {(3,)}


def test_fedmoe_counts_the_held_experts():
    """Two of six, of 24 bytes each."""
    method = method_of("fedmoe")
    method.held = 2
    form = method.traffic({"w": torch.zeros(6, 2, 3)})
    assert (form.down, form.up) == (48, 48)


def test_fedamole_counts_the_mean_number_of_experts():
    """Half of four at a client: down 24 bytes and which of four of two layers it holds; up also embeddings
    of rank 3, one of the rows and two of experts a layer.
    """
    method = method_of("fedamole", clients_per_expert=1)
    method.server.ranks = {0: 3, 1: 3}
    method.layers, method.experts, method.rank = ("a", "b"), 4, 3
    form = method.traffic({"w": torch.zeros(6)})
    shares = 4 * 2 * 2 * method._sends_shares
    assert (form.down, form.up) == (24 + 2 * 4, 24 + 4 * 3 * 2 * (1 + 2) + shares)
