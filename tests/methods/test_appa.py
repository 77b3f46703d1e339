"""APPA by hand: rewards 0.9 and 0.7 at T 0.1 give groups the weights 0.11920292 and 0.88079708."""

import json

import pytest
import torch

import fedloom
from fedloom.aggregation.group_scores import group_dro
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.appa import APPA, APPASettings
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.tensors import State
from fedloom.wire.messages import Payload, Reply

ROWS = {0: 1, 1: 3, 2: 4}
VALUES = {0: 1.0, 1: 5.0, 2: -2.0}


def rounds(*rewards, **settings):
    """Play a round with each set of rewards by client (None: it reports a loss of 2 alone)."""
    method, state = (
        APPA(APPASettings(**{"most": 1.0, **settings})),
        State({"w": torch.zeros(1, dtype=torch.float64)}),
    )
    states, weights = [], []
    for number, own in enumerate(rewards, 1):
        cohort = Cohort(number, tuple(own), Presence.of(ROWS), 0.1)
        playing = method.round(state, cohort)
        next(playing)
        replies = Replies(
            Reply(client, Payload(
                {"w": torch.tensor([VALUES[client]], dtype=torch.float64)}, {"examples": ROWS[client]},
                {"loss": 2.0} if reward is None else {"loss": 0.0, "reward": reward},
            ))
            for client, reward in own.items()
        )  # fmt: skip
        with pytest.raises(StopIteration) as stop:
            playing.send(replies)
        state = stop.value.value
        states.append(state)
        weights.append([cohort.details["group_weights"][str(client)] for client in own])
    return states, weights


def test_hand_numbers():
    states, weights = rounds({0: 0.9, 1: 0.7})
    assert weights[0] == pytest.approx([0.11920292, 0.88079708], abs=1e-8)
    expected = 0.11920292 * 1.0 + 0.88079708 * 5.0
    assert states[0].tensors["w"].item() == pytest.approx(expected, abs=1e-7)
    assert states[0].numbers == {"score/000000": 0.9, "score/000001": 0.7}


def test_running_means_decide_and_belong_to_clients():
    states, weights = rounds({0: 0.9, 1: 0.5}, {1: 0.5, 2: 0.1}, {0: 0.5, 2: 0.1})
    assert states[1].numbers["score/000000"] == 0.9  # away: as it was
    assert states[2].numbers["score/000000"] == pytest.approx(0.82)  # 0.8 x 0.9 + 0.2 x 0.5
    # e^((0.1 - 0.82) / 0.1) = e^-7.2
    assert weights[2][0] == pytest.approx(2.718281828**-7.2 / (1 + 2.718281828**-7.2), rel=1e-6)


def test_within_a_group_clients_weigh_by_rows():
    states, weights = rounds({0: 0.5, 1: 0.5, 2: 0.5}, groups=[[0, 1]], combine="mean")
    # group (0, 1): (1 x 1 + 3 x 5) / 4 = 4; group 2: -2; mean 1
    assert states[0].tensors["w"].item() == pytest.approx(1.0)
    assert weights == [[0.5, 0.5, 0.5]]


def test_the_other_rules():
    assert rounds({0: 0.5, 1: 0.2, 2: 0.2}, combine="worst")[1] == [[0, 0.5, 0.5]]
    states, weights = rounds({0: 1.0, 1: 0.0}, {0: 1.0, 1: 0.0}, combine="group_dro", rate=0.5)
    logits = {k: v for k, v in states[1].numbers.items() if k.startswith("logit")}
    assert logits == {"logit/0": -0.5, "logit/1": 0.5}  # each round -0.5 x (1 - 0.5)
    assert weights[1][1] == pytest.approx(1 / (1 + 2.718281828**-1), rel=1e-6)
    # 1 / (1 + CoV) of (0.5, 0.5) is 1, of (0.5, 0.3) 0.8: alike, and not
    assert rounds({0: 0.5, 1: 0.3}, fair=0.8)[1] == [[0.5, 0.5]]
    assert rounds({0: 0.5, 1: 0.3}, fair=0.81)[1][0][1] > 0.8
    assert rounds({0: 0.9, 1: 0.1, 2: 0.8}, most=0.5)[1][0][1] == pytest.approx(0.5)
    assert rounds({0: 0.9, 1: 0.1}, most=0.01)[1] == [[0.5, 0.5]]


def test_group_dro_weighs_by_need_and_not_by_attendance():
    """All alike, so that logits stay, however often a group is there; rewards are far from 0."""
    dro = {"combine": "group_dro", "rate": 1.0}
    states, weights = rounds(
        {0: 5.0, 1: 5.0}, *[{1: 5.0, 2: 5.0}] * 4, {0: 5.0, 1: 5.0, 2: 5.0}, **dro
    )
    assert weights[-1] == pytest.approx([1 / 3] * 3)
    # round 1: -+1 x 0.5; client 2 starts at their mean, 0: scores 0 and 2 move it to -1, client 1 to 1.5
    states, _ = rounds({0: 1.0, 1: 0.0}, {1: 0.0, 2: 2.0}, **dro)
    logits = [states[1].numbers[f"logit/{i}"] for i in range(3)]
    assert logits == pytest.approx([-0.5, 1.5, -1.0])
    assert group_dro([None, 1.0], [0.0, None], 1.0, [3.0]) == [2.0, 1.0]  # without a score it stays


def test_one_liar_takes_three_quarters_at_most_and_its_scores_end_at_the_range():
    lie = {0: 0.9, 1: -1e9, 2: 0.8}
    states, weights = rounds(lie, most=APPASettings().most)
    assert weights[0] == pytest.approx([0.1, 0.75, 0.15], abs=0.06)
    assert max(weights[0]) == 0.75 and states[0].numbers["score/000001"] == -10
    states, _ = rounds(lie, lowest=0, highest=0.85)
    assert list(states[0].numbers.values()) == [0.85, 0, 0.8]


def test_losses_and_rewards_are_not_mixed_in_a_round():
    """Client 1 leaves its reward out: it has no score, not a loss on another scale."""
    states, weights = rounds({0: 0.5, 1: None, 2: 0.5})
    assert states[0].numbers == {"score/000000": 0.5, "score/000002": 0.5}
    assert weights[0] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"lowest": 1.0, "highest": 1.0}, "method.lowest = 1 is not below method.highest = 1"),
        (
            {"groups": [[0, 1], [2, 3]], "most": 0.5},
            "has the groups of a round, 2 at most, weigh alike",
        ),
        ({"most": 0.25}, "has the groups of a round, 4 at most, weigh alike"),
    ],
)
def test_settings_by_which_it_would_do_nothing_are_refused(own, told):
    table = {"method": {"name": "appa", **own}, "federation": {"clients": 4}}
    with pytest.raises(SettingsError, match=told):
        Experiment.from_table(table)
    federation = {"clients": 4, "clients_per_round": 2}
    with pytest.raises(SettingsError, match="2 at most, weigh alike"):
        Experiment.from_table({"method": {"name": "appa", "most": 0.5}, "federation": federation})
    Experiment.from_table({"method": {"name": "appa"}, "federation": federation})


def test_private_steps_report_nothing_that_it_could_weigh_by():
    table = {
        "method": {"name": "appa"},
        "federation": {"clients": 4},
        "privacy": {"unit": "row", "target_epsilon": 8.0},
        "training": {"local_steps": 1},
    }
    with pytest.raises(SettingsError, match="weights follow from losses, which private steps"):
        Experiment.from_table(table)


def test_without_rewards_losses_count_and_who_says_nothing_is_as_the_others():
    states, _ = rounds({0: None, 1: None})
    assert states[0].numbers == {"score/000000": -2.0, "score/000001": -2.0}


def test_of_alike_groups_with_equal_rows_it_is_fedavg(play):
    rows = {0: 2, 1: 2, 2: 2}
    found = play(APPA(APPASettings()), cohort=(0, 1, 2), rows=rows)  # every loss is 1
    plain = play(FedAvg(FedAvgSettings()), cohort=(0, 1, 2), rows=rows)
    for own, other in zip(found.adapters, plain.adapters, strict=True):
        assert own == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([[0, 1], [1]], "client 1 is in several"),
        ([[0], []], "a group has no client"),
        ([[0, 9]], "there is no client 9: ids go from 0 to 3"),
        ([[0, 4]], "there is no client 4: ids go from 0 to 3"),
        ([[0, -1]], "there is no client -1: ids go from 0 to 3"),
    ],
)
def test_groups_are_checked(groups, told):
    with pytest.raises(SettingsError, match=told):
        Experiment.from_table(
            {"method": {"name": "appa", "groups": groups}, "federation": {"clients": 4}}
        )


@pytest.mark.slow
def test_grpo_of_groups_with_rewards_of_their_own(experiment):
    """The group whose reward nothing earns gets all weight but e^-10 of it."""
    result = fedloom.run(
        experiment(
            method={"name": "appa", "groups": [[0, 2]], "most": 1.0},
            data={"source": "builtin:sums", "builtin_rows": 40},
            objective={"name": "grpo", "group": 3, "max_new_tokens": 4, "rewards": ["regex:."]},
            clients={"groups": {"strict": {"clients": [1], "rewards": ["regex:nothing"]}}},
            federation={"rounds": 1, "clients": 3},
            training={"local_steps": 1, "batch_size": 3},
            evaluation={"samples": 0},
        )
    )
    line = (result.folder / "rounds.jsonl").read_text().splitlines()[-1]
    weights = json.loads(line)["details"]["group_weights"]
    assert weights["0"] == weights["2"] < 0.01 < 0.98 < weights["1"]
