"""Fed-ET: the server's larger model learns from clients that are sure; what is shown, and what is sent."""

import pytest
import torch

from fedloom.aggregation.lora import rank_of
from fedloom.errors import SettingsError
from fedloom.methods.fed_et import DISAGREEMENT, SHARE

LABELLED = {
    "data": {"source": "builtin:labelled", "builtin_rows": 60},
    "objective": {"name": "classification"},
}


@pytest.fixture
def taught(experiment):
    def make(rounds=1, **method):
        return experiment(
            **LABELLED,
            public={"rows": 12},
            federation={"rounds": rounds, "clients": 3},
            method={"name": "fed_et", "server_epochs": 1, "client_epochs": 1, **method},
        )

    return make


def test_a_larger_server_learns_from_logits_alone(taught, federate):
    seen = []

    def watch(parts):
        exchange = parts.engine.exchange
        parts.engine.exchange = lambda asked: (seen.append(asked), exchange(asked))[1]

    found = federate(taught(server_rank=6), watch)
    assert rank_of(found.adapter) == 6 and rank_of(found.parts.local.client(0, 1).initial) == 2
    names = {
        spec.name
        for asked in seen
        for schema in (asked.request_schema, asked.reply_schema)
        for spec in schema.tensors
    }
    assert names == {"values"} and [asked.action for asked in seen] == ["train", "distil"]
    assert any(not torch.equal(t, found.parts.initial[n]) for n, t in found.adapter.items())
    details = found.records[-1].details
    assert details[SHARE].keys() == {"0", "1", "2"}
    assert sum(details[SHARE].values()) == pytest.approx(1.0)
    assert 0 <= details[DISAGREEMENT] <= 1


@pytest.mark.slow
def test_those_who_disagree_count_by_the_weight_of_diversity(taught, federate):
    alone, also = (federate(taught(diversity=own)).adapter for own in (0.0, 1.0))
    assert any(not torch.equal(alone[name], also[name]) for name in alone)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "dpo"}, "data": {"source": "builtin:preferences"}}, "'fed_et' works with objective.name = sft or classification, not with 'dpo'"),
        ({**LABELLED, "method": {"name": "fed_et", "diversity": -1.0}}, "method.diversity"),
        ({**LABELLED, "adapter": {"kind": "ia3"}, "method": {"name": "fed_et", "server_rank": 4}}, "server_rank is a setting of lora"),
        ({**LABELLED, "privacy": {"secure_aggregation": True}, "evaluation": {"per_client": False}}, "text by text"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_said(experiment, sections, message):
    with pytest.raises(SettingsError) as error:
        experiment(**{"method": {"name": "fed_et"}, **sections})
    assert message in str(error.value)
