"""What holds for all methods that share LoRA's factors, on a linear layer: gauge, scale, identity, ranks."""

import pytest
import torch

from fedloom.aggregation.lora import averaging_error
from fedloom.errors import ModelError
from linear_bench import SIZE, A, B, error, start, target_of
from linear_bench import play as play_rounds

FAMILY = (
    "fedavg", "ffa_lora", "fedsvd", "rolora", "fedrot_lora", "fedmomentum", "flora", "fedex_lora", "flexlora",
    "hetlora", "lora_a2",
)  # fmt: skip
SETTINGS = {"lora_a2": {"ranks": 1, "b_rate": 1.0}}
BEYOND_RANK = ("fedmomentum", "flora", "fedex_lora")
"""Methods that add to the backbone what the factors do not hold."""


NEW_COORDINATES = ("fedsvd", "fedmomentum", "flexlora", "flora")
"""Methods whose next factors are made of the products."""


def play(name, **sections):
    return play_rounds(name, **{"settings": SETTINGS.get(name), **sections})


def orthogonal(client, rank=2):
    torch.manual_seed(50 + client)
    return torch.linalg.qr(torch.randn(rank, rank))[0]


def in_other_coordinates(client, tensors):
    turn = orthogonal(client)
    return {A: turn.T @ tensors[A], B: tensors[B] @ turn}


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "flexlora", "fedmomentum"])
def test_clients_may_use_any_coordinates_where_products_are_averaged(name):
    plain = play(name).weight(1.0)
    assert torch.allclose(play(name, turned=in_other_coordinates).weight(1.0), plain, atol=1e-5)


def from_the_second_round_on():
    """Other coordinates in answers after a client's first one, in which FedRot-LoRA turns nothing."""
    answered = set()

    def turned(client, tensors):
        if client in answered:
            return in_other_coordinates(client, tensors)
        answered.add(client)
        return tensors

    return turned


def test_fedavg_loses_by_other_coordinates_and_fedrot_undoes_them():
    apart = {}
    for name in ("fedavg", "fedrot_lora"):
        found = play(name, rounds=2, turned=from_the_second_round_on()).weight(1.0)
        apart[name] = float((found - play(name, rounds=2).weight(1.0)).norm())
    assert apart["fedavg"] > 0.1 and apart["fedrot_lora"] < 1e-5


@pytest.mark.parametrize("name", [own for own in FAMILY if own not in ("hetlora", "lora_a2")])
def test_alpha_twice_as_large_is_b_twice_as_large(name):
    """y = s B A x: with half of s, twice B and four times its rate, all products s B A are the same."""
    first = start(2)
    first[B] = 0.3 * torch.ones(SIZE, 2)
    rounds = 1 if name in NEW_COORDINATES else 2  # which have norms of their own
    common = {"rounds": rounds, "rate": 0.05, "steps": 3}
    whole = play(name, **common, adapter=first, alpha=4.0).weight(2.0)
    doubled = {A: first[A], B: 2 * first[B]}
    half = play(name, **common, adapter=doubled, alpha=2.0, rates={B: 4.0})
    assert torch.allclose(half.weight(1.0), whole, atol=1e-5)


@pytest.mark.parametrize("name", [own for own in FAMILY if own != "flora"])
def test_rounds_without_training_leave_the_model_as_it_is(name):
    begun = start(2)
    begun[B] = torch.randn(SIZE, 2)
    plain = begun[B] @ begun[A]
    found = play(name, rounds=3, adapter=begun, steps=0)
    for state in found.states:
        assert torch.allclose(found.weight(1.0, state), plain, atol=1e-5)


def test_flora_without_training_adds_nothing():
    assert not play("flora", rounds=3, steps=0).weight(1.0).any()


@pytest.mark.parametrize("name", FAMILY)
def test_only_what_goes_to_the_backbone_is_below_the_floor_of_a_rank(name):
    """A target of rank 8 under factors of rank 2; the best matrix of rank 2 errs by 0.2 of it."""
    target = target_of(SIZE, seed=1)
    values = torch.linalg.svdvals(target).square()
    floor = float(values[2:].sum() / values.sum())
    found = play(name, rounds=20, steps=10, target=target, rate=0.8)
    if name in BEYOND_RANK:
        assert error(found, target) < 0.5 * floor
    else:
        assert error(found, target) > 0.99 * floor > 0.1


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd", "rolora"])
def test_what_a_round_does_not_train_is_fixed_and_nothing_is_lost(name):
    found = play(name, rounds=4, rows={0: 1, 1: 2, 2: 1, 3: 3})
    for number in range(1, 5):
        sent = [(q.tensors, r.tensors) for (n, _, _), (q, r) in found.sent.items() if n == number]
        (up,) = {frozenset(reply) for _, reply in sent}
        assert up == {A if name == "rolora" and number % 2 == 0 else B}
        whole = [{**found.method.shared(found.states[number - 2] if number > 1 else found.method.initial_state(start(2))), **reply} for _, reply in sent]  # fmt: skip
        assert averaging_error(whole, [1.0, 2.0, 1.0, 3.0]) == pytest.approx(0.0, abs=1e-6)
    assert play("fedavg", rounds=2).cohorts[1].notes["aggregation_error"] > 0.01


def test_fedsvd_without_a_period_is_ffa_to_the_bit_and_with_one_a_is_orthonormal():
    plain = play("ffa_lora", rounds=3).state.tensors
    off = play("fedsvd", rounds=3, settings={"period": 0}).state.tensors
    assert torch.equal(plain[B], off[B])
    every = play("fedsvd", rounds=3, settings={"period": 2}).states
    assert torch.equal(every[0].tensors[A], start(2)[A])
    down = every[1].tensors[A]
    assert torch.allclose(down @ down.T, torch.eye(2), atol=1e-6)
    assert torch.equal(every[2].tensors[A], down)
    span = torch.linalg.qr(start(2)[A].T)[0]
    cosines = torch.linalg.svdvals(span.T @ down.T)
    assert torch.allclose(cosines, torch.ones(2), atol=1e-5)  # its row space is the first A's


def test_fedsvd_refuses_a_rank_above_a_layers_width():
    with pytest.raises(
        ModelError, match=r"layer x has 8 inputs and 8 outputs.*adapter\.rank to 8 at most"
    ):
        play("fedsvd", rank=9)
    assert play("fedsvd", rank=8).state.tensors[A].shape == (8, SIZE)
    assert play("fedsvd", rank=9, settings={"period": 0}).state.tensors[A].shape == (9, SIZE)


def test_rolora_reaches_what_ffa_cannot():
    """The bench of the specification: a target of rank 2, of which each client sees two directions."""
    target = target_of(2)
    errors = {
        name: error(play(name, rounds=8, steps=10, rate=0.8), target)
        for name in ("rolora", "fedrot_lora", "fedmomentum", "ffa_lora", "fedavg")
    }
    assert errors["ffa_lora"] > 0.3
    for name in ("rolora", "fedrot_lora", "fedmomentum"):
        assert errors[name] < errors["fedavg"]


def test_fedmomentum_that_keeps_nothing_is_flexlora_and_with_all_of_it_exact():
    flex = play("flexlora", rounds=1).weight(1.0)
    assert torch.allclose(
        play("fedmomentum", rounds=1, settings={"kept": 0.0}).weight(1.0), flex, atol=1e-6
    )
    found = play("fedmomentum", rounds=1, alpha=4.0)
    sent = [r.tensors for (_, action, _), (_, r) in found.sent.items() if action == "train"]
    exact = 2.0 * sum(own[B] @ own[A] for own in sent) / len(sent)
    assert torch.allclose(found.weight(2.0), exact, atol=1e-3 * float(exact.norm()))
