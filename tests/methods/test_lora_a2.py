"""LoRA-A2: chosen ranks alone move, what is sent is as long as it says, and the whole budget is RoLoRA."""

from dataclasses import replace

import pytest
import torch

from fedloom.errors import MessageError, SettingsError
from fedloom.methods.lora_a2 import CHANGES, CHOSEN, LoRAA2, LoRAA2Settings
from fedloom.training.settings import ALONE, Part
from linear_bench import CLIENTS, SIZE, A, B, error, play, start, target_of

SETTINGS = {"ranks": 1, "b_rate": 1.0}


def test_what_was_not_chosen_is_the_same_bits_and_the_mean_counts_who_did_not_choose_as_no_change():
    found = play("lora_a2", rounds=2, rank=4, settings=SETTINGS, rows={0: 1, 1: 3, 2: 1, 3: 1})
    begun = start(4)
    expected = {A: begun[A].double(), B: begun[B].double()}
    for number, name in ((1, B), (2, A)):
        total = torch.zeros_like(expected[name])
        for client, rows in enumerate((1, 3, 1, 1)):
            reply = found.sent[number, "train", client][1]
            (chosen,) = reply.tensors[CHOSEN].nonzero()[:, 1].tolist()
            assert len(reply.tensors[CHANGES]) == SIZE
            own = reply.tensors[CHANGES].double() * rows / 6
            if name == B:
                total[:, chosen] += own
            else:
                total[chosen] += own
        expected[name] = expected[name] + total
        state = found.states[number - 1].tensors
        assert torch.allclose(state[name].double(), expected[name], atol=1e-6)
        assert total.abs().max() > 1e-3
    never = set(range(4)) - {
        int(found.sent[1, "train", client][1].tensors[CHOSEN].nonzero()[0, 1]) for client in range(CLIENTS)
    }  # fmt: skip
    assert never and all(
        torch.equal(found.states[0].tensors[B][:, i], begun[B][:, i]) for i in never
    )


@pytest.mark.parametrize("choice", ["score", "random"])
def test_with_all_ranks_it_is_rolora(choice):
    whole = play("lora_a2", rounds=3, settings={"ranks": 2, "b_rate": 1.0, "choice": choice})
    plain = play("rolora", rounds=3)
    for name in (A, B):
        assert torch.allclose(whole.state.tensors[name], plain.state.tensors[name], atol=1e-5)


def test_ranks_at_random_need_no_second_training():
    for choice, times in (("score", 2), ("random", 1)):
        method = LoRAA2(LoRAA2Settings(choice=choice))
        assert method.trainings == method.trainings_of(1, 3) == times


def test_b_is_trained_at_its_own_rate_and_a_trial_is_half_of_a_round():
    found = play("lora_a2", rounds=2, settings={"ranks": 1, "b_rate": 3.0})
    expected = []
    for number, rate in ((1, 0.6), (2, 0.2)):
        expected += [(number, 0, "trial ", Part(0, 2), rate), (number, 0, "", Part(1, 2), rate)]
    own = [training for training in found.trainings if training[1] == 0]
    assert [(*rest, pytest.approx(rate)) for *rest, rate in own] == expected
    found = play("lora_a2", settings={"ranks": 1, "choice": "random", "b_rate": 1.0})
    assert {part for _, _, _, part, _ in found.trainings} == {ALONE}


@pytest.mark.slow
def test_one_rank_of_four_is_more_than_an_adapter_of_rank_one():
    """Inputs of the clients are disjoint; both send 8 numbers a round."""
    target = target_of(4, seed=2)
    found = {
        "score": play("lora_a2", rounds=24, rank=4, settings=SETTINGS, target=target),
        "random": play("lora_a2", rounds=24, rank=4, settings={**SETTINGS, "choice": "random"}, target=target),
        "rolora": play("rolora", rounds=24, rank=1, target=target),
    }  # fmt: skip
    errors = {name: error(own, target) for name, own in found.items()}
    assert max(errors["score"], errors["random"]) < errors["rolora"]


def test_a_reply_of_another_length_or_number_of_ranks_is_refused():
    found = play("lora_a2", rank=4, settings=SETTINGS)
    from fedloom.federation.presence import Presence
    from fedloom.federation.protocol import Cohort

    rows = dict.fromkeys(range(CLIENTS), 1)
    exchange = next(found.method.round(found.state, Cohort(2, (0,), Presence.of(rows), 0.1)))
    reply = found.sent[1, "train", 0][1]
    exchange.check(0, reply)
    for name, tensor in ((CHANGES, torch.zeros(3)), (CHOSEN, torch.ones(1, 4, dtype=torch.bool))):
        with pytest.raises(MessageError, match="1 ranks are asked for"):
            exchange.check(0, replace(reply, tensors={**reply.tensors, name: tensor}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"ranks": 5}}, r"method\.ranks = 5 is above adapter\.rank = 2"),
        ({"admission": {"max_change": 1.0}}, r"admission\.max_change: clients of method\.name"),
        ({"training": {"keep_optimizer_state": True}}, "trains another factor in the next round"),
        ({"wire": {"up": "int8"}}, "few numbers already"),
    ],
)
def test_what_it_does_not_go_with(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**{**sections, "method": {"name": "lora_a2", **sections.get("method", {})}})


def test_rounds_of_a_model_with_a_head(experiment, federate):
    """AdamW with weight decay moves no rank that was not chosen; the head is trained in every round."""
    found = federate(
        experiment(
            method={"name": "lora_a2", "ranks": 1},
            adapter={"rank": 3},
            data={"source": "builtin:labelled"},
            objective={"name": "classification"},
            training={"weight_decay": 0.5, "local_steps": 2},
            federation={"rounds": 1},
        )
    )
    initial, moved = found.parts.initial, 0
    for name, tensor in found.adapter.items():
        if ".lora_A." in name:
            assert torch.equal(tensor, initial[name])
        elif ".lora_B." in name:
            moved += int((tensor != initial[name]).any(0).sum())
        else:
            assert not torch.equal(tensor, initial[name])
    layers = sum(".lora_B." in name for name in initial)
    assert layers <= moved < 3 * layers  # one of each client's, of three a layer
