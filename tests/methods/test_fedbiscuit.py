"""FedBis and FedBiscuit: one adapter is FedAvg, groups are balanced and found, steps are damped as published."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.errors import SettingsError
from fedloom.methods.bases.client_groups import groups_of, warm_up_rounds
from fedloom.methods.bases.selectors import stepped, validation_rows
from fedloom.methods.fedbiscuit import CHOSEN
from fedloom.tensors import part_of
from linear_bench import A, B, play, target_of

OF_GROUP = {0: target_of(2, seed=6), 1: target_of(2, seed=7)}
GROUPED = {client: OF_GROUP[client // 2] for client in range(4)}


def drawn(round, client):
    """In the warm-up three of four: first more of one kind, then of the other, by which adapters differ."""
    return round > 4 or client != (3 if round < 3 else 0)


def biscuit(**sections):
    own = {"selectors": 2, "regroup_every": 3}
    given = {"rounds": 12, "target": GROUPED, "settings": own, "there": drawn}
    return play("fedbiscuit", **{**given, **sections})


@pytest.fixture(scope="module")
def found():
    return biscuit()


def adapter(state, number):
    return part_of(state.tensors, f"selector/{number:03d}")


def test_two_of_53_go_3_8_percent_of_the_way():
    start, mean = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    assert stepped(start, mean, "mean", 2, 53)["w"].item() == 1
    assert stepped(start, mean, "damped", 2, 53)["w"].item() == pytest.approx(0.03773585)


@pytest.mark.parametrize("name", ["fedbis", "fedbiscuit"])
def test_one_adapter_is_fedavg_bit_for_bit(name):
    settings = {"selectors": 1} if name == "fedbiscuit" else {}
    one = play(name, rounds=3, settings=settings)
    plain = play("fedavg", rounds=3)
    for state, other in zip(one.states, plain.states, strict=True):
        own = adapter(state, 0) if name == "fedbiscuit" else state.tensors
        assert all(torch.equal(own[n], other.tensors[n]) for n in (A, B))


def test_a_damped_step_is_a_share_of_the_mean_s():
    whole = play("fedbis", there=lambda round, client: client < 2)
    damped = play("fedbis", there=lambda round, client: client < 2, settings={"step": "damped"})
    assert torch.allclose(damped.state.tensors[B], whole.state.tensors[B] / 2)  # 2 of 4, from 0


def test_adapters_are_warmed_up_one_after_the_other(found):
    assert warm_up_rounds(0.3, 500, 5) == 150 and warm_up_rounds(0.3, 12, 2) == 4
    assert warm_up_rounds(0.3, 5, 1) == 2 and warm_up_rounds(0.0, 9, 1) == 1
    assert warm_up_rounds(0.0, 9, 3) == 3  # each of them is trained
    zero, one = (adapter(found.states[1], number)[B] for number in range(2))
    assert zero.any() and not one.any()
    assert (
        torch.equal(adapter(found.states[3], 0)[B], zero) and adapter(found.states[3], 1)[B].any()
    )


def test_a_client_is_told_its_group_s_adapter_once_there_are_groups(found):
    groups = groups_of(found.states[4])
    for number in range(1, 6):
        asked = [key for key in found.sent if key[:2] == (number, "train")]
        assert len(asked) >= 3
        for key in asked:
            told = found.sent[key][0].numbers["selector"]
            assert told == (groups[key[2]] if number == 5 else -1)


def test_clients_alike_are_a_group_and_it_has_the_better_adapter(found):
    groups = groups_of(found.state)
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert found.cohorts[-1].details["groups"] == {str(c): g for c, g in groups.items()}
    one = play("fedavg", rounds=12, target=GROUPED)
    for client in range(4):
        own, target = adapter(found.state, groups[client]), GROUPED[client]
        assert int(found.kept[client][CHOSEN][CHOSEN]) == groups[client]
        error = float((own[B] @ own[A] - target).square().sum())
        common = float((one.weight(1.0) - target).square().sum())
        assert error < common / 5


def test_all_are_asked_when_groups_are_due_and_answer_with_losses_alone(found):
    asked = [key for key in found.sent if key[1] == "score"]
    assert sorted({round for round, _, _ in asked}) == [5, 8, 11]
    assert {client for round, _, client in asked if round == 5} == {0, 1, 2, 3}
    payload = found.sent[5, "score", 0][1]
    assert not payload.tensors and payload.numbers.keys() == {"loss_0", "loss_1"}


def test_groups_are_of_one_size_whatever_clients_prefer():
    alike = biscuit(target=dict.fromkeys(range(4), OF_GROUP[0]))
    sizes = [list(groups_of(alike.state).values()).count(number) for number in range(2)]
    assert sizes == [2, 2]


def test_who_comes_late_joins_the_adapter_with_the_least_loss(found):
    late = biscuit(
        there=lambda round, client: drawn(round, client) and (client != 3 or round == 12)
    )
    groups = groups_of(late.state)
    assert groups[3] == groups[2] != groups[0]
    assert [key for key in late.sent if key[1] == "score" and key[2] == 3] == [(12, "score", 3)]


def test_who_is_away_keeps_its_group_and_moves_nothing():
    there = biscuit(there=lambda round, client: drawn(round, client) and (client or round <= 5))
    assert math.isfinite(float(adapter(there.state, 0)[B].sum()))
    assert groups_of(there.state).keys() == {0, 1, 2, 3}
    assert groups_of(there.states[4])[0] == groups_of(there.state)[0]


def test_the_global_adapter_is_that_of_most_clients_and_all_are_saved(found):
    method, state = found.method, found.state
    assert torch.equal(method.shared(state)[B], adapter(state, 0)[B])
    assert list(method.ensemble(state)) == ["selector-000", "selector-001"]
    assert torch.equal(method.ensemble(state)["selector-001"][B], adapter(state, 1)[B])


def test_a_short_run_trains_each_adapter_that_votes():
    own = {"selectors": 3, "warm_up_share": 0.0}
    short = biscuit(rounds=4, settings=own, there=lambda round, client: True)
    for number in range(3):
        assert adapter(short.states[2], number)[B].any(), number


def problems(experiment, **sections):
    with pytest.raises(SettingsError) as told:
        experiment(**sections)
    return told.value.problems


def test_too_few_rounds_for_the_warm_up_are_refused(experiment):
    own = {"name": "fedbiscuit", "selectors": 3}
    (told,) = problems(experiment, method=own, federation={"rounds": 3})
    assert told.startswith("federation.rounds = 3: method.selectors = 3") and "use 4 rounds" in told
    assert experiment(method=own, federation={"rounds": 4}).federation.rounds == 4
    assert experiment(method={**own, "selectors": 1}, federation={"rounds": 1})


@pytest.mark.parametrize("size", [{"clients": 8}, {"clients": 30, "clients_per_round": 20}])
def test_a_rule_needs_enough_clients_of_each_group(experiment, size):
    own = {"name": "fedbiscuit", "selectors": 3}
    rule = {"rule": "trimmed_mean", "bad": 1}
    sections = {"method": own, "aggregation": rule, "data": {"builtin_rows": 300}}
    (told,) = problems(experiment, **sections, federation={"rounds": 4, **size})
    assert "needs 3 clients of each of method.selectors = 3 groups" in told
    assert experiment(**sections, federation={"rounds": 4, "clients": 9})
    assert experiment(
        **sections | {"method": {**own, "selectors": 1}}, federation={"rounds": 4, **size}
    )
    geometric = {"rule": "geometric_median"}
    assert experiment(**sections | {"aggregation": geometric}, federation={"rounds": 4, **size})


def test_a_damped_step_tells_how_many_answered_so_client_privacy_refuses_it(experiment):
    private = {"unit": "client", "delta": 1e-2, "clip": 0.5, "noise_multiplier": 1.0}
    damped = {"name": "fedbis", "step": "damped"}
    (told,) = problems(experiment, method=damped, privacy=private)
    assert told.startswith('privacy.unit = "client": method.step = "damped"')
    assert experiment(method={"name": "fedbis"}, privacy=private)


@pytest.mark.parametrize(
    ("count", "share", "most", "held"),
    [(1, 0.5, 8, 0), (8, 0.05, 8, 0), (15, 0.9, 200, 0), (16, 0.05, 200, 8), (100, 0.05, 200, 8),
     (400, 0.05, 200, 20), (400, 0.9, 200, 200)],
)  # fmt: skip
def test_a_loss_that_is_told_is_of_eight_rows_or_of_all(count, share, most, held):
    client = SimpleNamespace(share=range(count), seed=0, id=3)
    rows = validation_rows(client, share, most)
    assert len(set(rows.tolist())) == len(rows) == held
    assert rows.tolist() == validation_rows(client, share, most).tolist()


def test_fewer_validation_rows_than_eight_are_no_setting(experiment):
    own = {"name": "fedbiscuit", "selectors": 1, "validation_rows": 7}
    (told,) = problems(experiment, method=own)
    assert "method.validation_rows" in told
