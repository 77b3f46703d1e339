"""HiLoRA: groups are found, parts are trained one after the other, and leaves stay with their clients."""

from types import SimpleNamespace

import pytest
import torch

from fedloom.errors import SettingsError
from fedloom.methods.bases.client_groups import (
    group_means,
    groups_of,
    movements,
    nearest_groups,
    numbers_of,
)
from fedloom.methods.bases.rank_parts import LEAF, PartHooks, part_of_round, rank_part
from fedloom.methods.contract.client import carried_out
from fedloom.methods.hilora import HiLoRA, HiLoRASettings
from fedloom.tensors import State, part_of
from fedloom.training.results import LocalResult
from fedloom.training.settings import ALONE, Part
from fedloom.wire.messages import Payload, Reply
from linear_bench import SIZE, A, B, Outcome, play, start, target_of

ROUNDS = 10
COMMON = target_of(1, seed=5)
OF_GROUP = {0: target_of(1, seed=6), 1: target_of(1, seed=7)}
GROUPED = {client: COMMON + OF_GROUP[client // 2] for client in range(4)}
"""Clients 0 and 1 have one target, 2 and 3 another; half of both is common."""


def hilora(**sections):
    return play("hilora", **{"rounds": ROUNDS, "rank": 6, "alpha": 6.0, "target": GROUPED, "rate": 0.2, **sections})  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Outcome:
    return hilora()


def test_the_penalty_and_its_gradient_by_hand():
    """B below is (1, 0), B is (3, 4): their overlap is 3, its square 9, and its gradient (6, 0)."""
    adapter = {A: torch.ones(3, 2), B: torch.tensor([[1.0, 3.0, 0.0], [0.0, 4.0, 0.0]])}
    hooks = PartHooks(adapter, 1, 1.0, torch.device("cpu"))
    own = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in adapter.items()}
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    hooks.before(own)
    assert own[B].grad.tolist() == [[0.0, 6.0, 0.0], [0.0, 0.0, 0.0]]
    assert hooks.flops(adapter) == 2 * 2 * 2 * 1 * 1


def test_no_overlap_is_computed_of_the_root_and_without_a_weight():
    """B of 2 rows, parts of one rank: the leaf is kept off two parts, which takes 2 x 2 x 2 x 2."""
    adapter = {A: torch.ones(3, 2), B: torch.tensor([[1.0, 3.0, 1.0], [0.0, 4.0, 2.0]])}
    found = {}
    for place, weight in ((0, 1.0), (1, 0.0), (2, 0.5)):
        hooks = PartHooks(adapter, place, weight, torch.device("cpu"))
        own = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in adapter.items()}
        for parameter in own.values():
            parameter.grad = torch.ones_like(parameter)
        hooks.before(own)
        found[place] = hooks.flops(adapter), own[B].grad.tolist(), own[A].grad[:, 0].tolist()
    assert found[0] == (0.0, [[1.0, 0.0, 0.0]] * 2, [1.0, 0.0, 0.0])
    assert found[1] == (0.0, [[0.0, 1.0, 0.0]] * 2, [0.0, 1.0, 0.0])
    # B_below^T B_own = (1, 11): its gradient is B_below of that, (34, 44)
    assert found[2] == (16.0, [[0.0, 0.0, 35.0], [0.0, 0.0, 45.0]], [0.0, 0.0, 1.0])


def moved(tensors, client, *b):
    """Movements after one more of a client, whose B of one layer began at 0."""
    before = {B: torch.zeros(len(b), 1)}
    reply = Reply(client, Payload({B: torch.tensor([[own] for own in b])}))
    return {**tensors, **movements(tensors, before, [reply])}


def test_a_movement_is_a_running_mean_of_directions():
    """0.9 of (1, 0) and 0.1 of (0, 1), of length 1 again; what did not move has none."""
    ((name, first),) = moved({}, 3, 5.0, 0.0).items()
    assert name == f"moved/{B}/000003" and first.flatten().tolist() == [1.0, 0.0]
    second = moved({name: first}, 3, 0.0, 2.0)[name].flatten().tolist()
    assert second == pytest.approx([0.9 / 0.82**0.5, 0.1 / 0.82**0.5])
    assert not moved({}, 3, 0.0, 0.0)[name].any()
    slow = moved({}, 3, 0.25, 0.0)[name].flatten().tolist()
    assert slow == [1.0, 0.0]


def test_the_nearest_group_is_that_of_the_least_mean_distance_and_of_equal_ones_the_first():
    tensors = {}
    for client, b in {
        0: (1.0, 0.0),
        1: (1.0, 0.1),
        2: (0.0, 1.0),
        8: (1.0, 0.2),
        9: (1.0, 1.0),
    }.items():
        tensors = moved(tensors, client, *b)
    assert nearest_groups(tensors, {0: 0, 1: 0, 2: 1}, [8]) == {8: 0}
    tensors = moved(tensors, 5, 2.0, 0.0)  # as client 0
    assert nearest_groups(tensors, {0: 4, 5: 3}, [9]) == {9: 3}
    assert groups_of(State({}, numbers_of({5: 2, 3: 0}))) == {3: 0, 5: 2}


def test_clients_without_a_group_have_a_mean_of_their_own():
    """Products 1 and 4 by 1 and 3 rows: 3.25."""
    own = {k: {A: torch.full((1, 1), k), B: torch.full((1, 1), k)} for k in (1.0, 2.0, 3.0)}
    replies = [
        Reply(client, Payload(own[k], {"examples": rows}))
        for client, k, rows in ((0, 1.0, 1), (1, 2.0, 3), (2, 3.0, 5))
    ]
    found = group_means(replies, {2: 0})
    products = {group: float((one[B] @ one[A]).item()) for group, one in found.items()}
    assert products == {-1: pytest.approx(3.25), 0: pytest.approx(9.0)}


def parts_of(rounds, **shares):
    settings = HiLoRASettings(**shares)
    return [
        part_of_round(settings.root_share, settings.group_share, number, rounds)
        for number in range(1, rounds + 1)
    ]


def test_the_last_round_is_the_leaves_and_of_three_each_part_has_one():
    assert parts_of(2) == [0, 2] and parts_of(3) == [0, 1, 2]
    assert parts_of(4, root_share=0.3, group_share=0.65) == [0, 1, 1, 2]
    assert parts_of(10, root_share=0.3, group_share=0.65) == [0] * 3 + [1] * 6 + [2]
    for root in range(5, 95, 10):
        for rounds in range(3, 30):
            found = parts_of(rounds, root_share=root / 100, group_share=(99 - root) / 100)
            assert sorted(found) == found and set(found) == {0, 1, 2}


def test_two_groups_are_found_and_each_part_is_trained_in_its_rounds(found):
    assert parts_of(10) == [0] * 3 + [1] * 4 + [2] * 3
    assert groups_of(found.state) == {0: 0, 1: 0, 2: 1, 3: 1}
    assert found.cohorts[-1].details["groups"] == {"0": 0, "1": 0, "2": 1, "3": 1}
    root = [part_of(state.tensors, "root") for state in found.states]
    assert not torch.equal(root[1][B], root[2][B])
    assert all(torch.equal(root[2][name], own[name]) for own in root[3:] for name in own)
    group = [part_of(state.tensors, "group/001") for state in found.states]
    assert not group[2] and all(torch.equal(group[6][n], own[n]) for own in group[7:] for n in own)
    columns = root[-1][B]
    assert torch.allclose(columns.T @ columns, torch.eye(2), atol=1e-5)
    for number in (8, 9, 10):  # nothing of a leaf is sent
        assert all(not found.sent[number, "train", client][1].tensors for client in range(4))


def test_a_leaf_is_its_clients_own_and_what_is_served_fits_it_best(found):
    def served(client, parts):
        root, own = part_of(found.state.tensors, "root"), found.kept[client][LEAF]
        group = part_of(found.state.tensors, f"group/{int(own['group']):03d}")
        whole = [root, group, own][:parts]
        return sum(part[B] @ part[A] for part in whole)

    for client in range(4):
        errors = [float((served(client, n) - GROUPED[client]).square().sum()) for n in (1, 2, 3)]
        assert errors[0] > 2 * errors[1] > 2 * errors[2]
    leaves = [found.kept[client][LEAF][B] for client in range(4)]
    assert all(bool(own.any()) for own in leaves)


def test_clients_alike_stay_one_group():
    alike = hilora(target=dict.fromkeys(range(4), COMMON), rounds=5)
    assert set(groups_of(alike.state).values()) == {0}


def test_who_comes_late_joins_the_nearest_group(found):
    late = hilora(there=lambda round, client: client != 3 or round > 5)
    assert 3 not in groups_of(late.states[4]) and groups_of(late.state) == groups_of(found.state)
    assert [key for key in late.sent if key[1] == "probe"] == [(6, "probe", 3)]
    assert set(late.sent[6, "probe", 3][1].tensors) == {B}


def test_a_trial_is_planned_once_in_a_run_and_shares_its_rounds_amount():
    method = HiLoRA(HiLoRASettings())
    for rounds in (1, 2, 7):
        planned = [method.trainings_of(number, rounds) for number in range(1, rounds + 1)]
        assert sum(planned) == rounds + (rounds > 1) and max(planned) == min(2, rounds)
    parts = []

    def fit(client, payload, part, share, purpose):
        yield from ()
        parts.append(share)
        return LocalResult(2, 1, 0, 0, {})

    method._fit = fit
    whole = start(3)
    client = SimpleNamespace(
        session={}, store={}, share=[0], model=SimpleNamespace(read=lambda: whole)
    )
    train, probe = (method.handlers()[name] for name in ("train", "probe"))
    request = SimpleNamespace(numbers={"part": 1.0, "group": 0.0})
    for handler in (train, probe, train):
        carried_out(handler(client, request))
    assert parts == [ALONE, Part(0, 2), Part(1, 2)]


def test_who_was_not_drawn_since_there_are_groups_is_served_without_one():
    away = hilora(there=lambda round, client: client != 3 or round <= 3)
    assert groups_of(away.state)[3] == 1 and int(away.kept[3][LEAF]["group"]) == -1
    assert "judged without" in HiLoRA.declares.absence.away


def test_other_ids_change_no_tensor(found):
    ids = {10: 1, 11: 1, 20: 1, 21: 1}
    target = dict(zip(ids, GROUPED.values(), strict=True))
    other = hilora(rows=ids, target=target, ranks=dict.fromkeys(ids, 6))
    assert torch.equal(
        part_of(other.state.tensors, "root")[B], part_of(found.state.tensors, "root")[B]
    )
    assert groups_of(other.state) == {10: 0, 11: 0, 20: 1, 21: 1}


def test_without_training_the_model_stays():
    still = hilora(steps=0)
    for state in still.states:
        assert not still.weight(1.0, state).any()
    assert set(groups_of(still.state).values()) == {0}


def test_a_rank_that_3_does_not_divide_is_larger_at_the_root():
    whole = {**start(8), B: torch.arange(8.0).expand(SIZE, 8)}
    parts = [rank_part(whole, place) for place in range(3)]
    assert [part[B][0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert torch.equal(torch.cat([part[A] for part in parts]), whole[A])


def test_a_rank_of_8_is_trained():
    found = hilora(rank=8, alpha=8.0)
    assert set(groups_of(found.state).values()) == {0, 1}
    assert [len(part_of(found.state.tensors, name)[A]) for name in ("root", "group/000")] == [4, 2]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {"rank": 2}}, r"adapter\.rank = 2 is that of three parts: set it to 3 or more"),
        ({"method": {"root_share": 0.5, "group_share": 0.5}}, "leave no round for the clients' leaves"),
        ({"federation": {"rounds": 1}}, r"federation\.rounds = 1 leaves no round .*: set it to 3 or more"),
        ({"training": {"keep_optimizer_state": True}}, "trains other parts in later rounds"),
        ({"adapter": {"start": "somewhere"}}, "its adapter has parts that a start has not"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**{**sections, "method": {"name": "hilora", **sections.get("method", {})}})


@pytest.mark.slow
def test_parts_of_a_model_with_a_head(experiment, federate):
    found = federate(
        experiment(
            method={"name": "hilora"},
            data={"source": "builtin:labelled"},
            objective={"name": "classification"},
            training={"weight_decay": 0.5, "local_steps": 2},
            federation={"rounds": 4},
        ),
        evaluate=True,
    )
    assert isinstance(found.parts.method, HiLoRA) and HiLoRASettings().penalty == 0.1
    assert not found.records[-1].rejected
    initial, root = found.parts.initial, part_of(found.state.tensors, "root")
    for name, tensor in rank_part(found.adapter, 0).items():
        assert torch.equal(tensor, root[name])
    for place in (1, 2):
        for name, tensor in rank_part(found.adapter, place).items():
            assert torch.equal(tensor, rank_part(initial, place)[name])
    kept = [found.parts.engine.store.slots(client)[LEAF] for client in range(3)]
    heads = [n for n in kept[0] if ".lora_" not in n and n != "group"]
    assert heads and all(not torch.equal(kept[0][n], kept[1][n]) for n in heads)
    assert start(3)[A].shape == (3, SIZE)
