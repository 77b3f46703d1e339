"""Clients of the LoRA family come late, answer late, go and come back: what is put together is of who answered."""

import pytest
import torch

from absent import ALL_OF_IT, CLIENTS, ROUNDS, SCHEDULES, Schedule, played
from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.client_groups import groups_of
from fedloom.methods.bases.packed_factors import FACTORS

SETTINGS = {
    "rolora": {},
    "fedrot_lora": {},
    "lora_a2": {"ranks": 1},
    "ravan": {},
    "fedmomentum": {},
    "fedsvd": {},
    "hetlora": {"pruning": 0.5, "penalty": 1.0},
    "hilora": {"root_share": 0.5, "group_share": 0.25},
}
RANKS = {"ravan": 4, "hilora": 3, "hetlora": 4}
QUICK = "rolora"


@pytest.fixture
def play(table):
    def run(name, schedule):
        table["method"] = {"name": name, **SETTINGS[name]}
        table["adapter"] = {"rank": RANKS.get(name, 2)}
        table["training"] |= {"local_steps": 1, "batch_size": 4}
        table["federation"] = {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2}
        table["data"] |= {"builtin_rows": 40}
        return played(Experiment.from_table(table), schedule)

    return run


def mean_of(replies, name):
    whole = sum(reply.numbers["examples"] for _, reply in replies.values())
    return sum(
        r.numbers["examples"] / whole * r.tensors[name].double() for _, r in replies.values()
    )


@pytest.mark.parametrize(
    "name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]
)
def test_what_is_put_together_is_of_who_answered(play, name):
    found = play(name, ALL_OF_IT)
    for number, state in enumerate(found.states, 1):
        replies = found.of("train", number)
        assert replies.keys() == ALL_OF_IT.answering(number)
        assert all(
            bool(t.isfinite().all()) for t in state.tensors.values() if t.is_floating_point()
        )
        if name in ("rolora", "fedrot_lora", "ravan"):
            for tensor in next(iter(replies.values()))[1].tensors:
                expected = mean_of(replies, tensor)
                assert torch.allclose(state.tensors[tensor].double(), expected, atol=1e-6)
        if name == "hetlora":  # who was away keeps the rank that the server has of it
            ranks = found.records[number - 1].details["ranks"]
            for client, (_, reply) in replies.items():
                left = client in ALL_OF_IT.gone(number)
                assert left or len(reply.tensors[FACTORS]) == ranks[str(client)]
    if name == "hilora":
        assert groups_of(found.states[-1]).keys() >= {0, 1, 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedmomentum", "lora_a2", "hilora"])
def test_answers_in_the_opposite_order_are_the_same_bits(play, name):
    plain = play(name, Schedule(away={2: {0}}))
    turned = play(name, SCHEDULES["backwards"])
    assert [s.digest() for s in plain.states] == [s.digest() for s in turned.states]
