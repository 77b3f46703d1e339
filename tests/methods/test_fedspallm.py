"""FedSpaLLM: what clients send of which layers, what comes of it, and what is refused."""

import pytest
import torch

from fedloom.aggregation.lora import factor_pairs
from fedloom.errors import MessageError, SettingsError
from fedloom.methods.fedspallm import KEPT, MASK, ZEROS, factor_names, packed, unpacked
from fedloom.wire.messages import Payload


@pytest.fixture
def pruned(experiment):
    def make(rounds=1, name="fedspallm", **method):
        return experiment(
            method={"name": name, **method},
            federation={"rounds": rounds, "clients": 3},
            training={"local_steps": 2},
        )

    return make


def watching(answers, asked=None):
    def watch(parts):
        exchange = parts.engine.exchange

        def watched(question):
            if asked is not None:
                asked.append(question)
            for answer in exchange(question):
                found = question.read_reply(answer.client, answer.data)
                answers[question.round, answer.client] = found.tensors
                yield answer

        parts.engine.exchange = watched

    return watch


def test_bits_are_packed_and_unpacked():
    like = {"x.lora_A.w": torch.zeros(1, 3), "x.lora_B.w": torch.zeros(5, 1), "h": torch.zeros(2)}
    masks = [torch.tensor([[1, 0, 1]]).bool(), torch.tensor([[1], [0], [0], [1], [1]]).bool()]
    sent = packed(masks)
    assert sent.tolist() == [0b10110011]
    assert [own.tolist() for own in unpacked(sent, like).values()] == [m.tolist() for m in masks]


def test_the_adapter_is_sparse_and_fewer_numbers_are_sent(pruned, federate):
    answers = {}
    found = federate(pruned(sparsity=0.5), watching(answers))
    whole = sum(found.adapter[name].numel() for name in factor_names(found.adapter))
    assert all(len(sent[KEPT]) == whole // 2 for sent in answers.values())
    zeros = sum(int((found.adapter[n] == 0).sum()) for n in factor_names(found.adapter))
    assert zeros >= whole // 2 and found.records[-1].details[ZEROS] == pytest.approx(zeros / whole)


@pytest.mark.slow
def test_without_pruning_it_is_the_mean_over_clients_alike(pruned, federate):
    answers = {}
    found = federate(pruned(sparsity=0.0, rounds=2), watching(answers))
    mean = torch.stack([answers[2, client][KEPT] for client in range(3)]).double().mean(0).float()
    names = factor_names(found.adapter)
    torch.testing.assert_close(torch.cat([found.adapter[n].flatten() for n in names]), mean)


def test_a_layer_is_averaged_over_those_who_were_given_it(pruned, federate):
    answers = {}
    found = federate(pruned(sparsity=0.25, layers=0.4), watching(answers))
    initial, given = found.parts.initial, {}
    for (_, client), sent in answers.items():
        masks = unpacked(sent[MASK], initial)
        given[client] = {name for name, mask in masks.items() if mask.any()}
        assert len(given[client]) == 2 * -(-len(factor_pairs(initial)) * 4 // 10)
    assert len({frozenset(own) for own in given.values()}) > 1
    for name in factor_names(initial):
        held = any(name in own for own in given.values())
        assert torch.equal(found.adapter[name], initial[name]) == (not held)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sent: {**sent, MASK: sent[MASK] | 255}, "its mask keeps"),
        (lambda sent: {**sent, MASK: sent[MASK] & 0}, "its mask keeps 0 numbers"),
        (lambda sent: {**sent, KEPT: sent[KEPT][:-1]}, "numbers, and its mask keeps"),
    ],
)
def test_what_does_not_fit_its_mask_is_left_out(pruned, federate, once, spoil, message):
    answers, asked = {}, []
    once("run", lambda: (federate(pruned(), watching(answers, asked)), answers, asked))
    _, answers, asked = once("run", None)
    with pytest.raises(MessageError, match=message):
        asked[0].check(1, Payload(spoil(answers[1, 1])))
    asked[0].check(1, Payload(answers[1, 1]))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "fedspallm", "sparsity": 1.0}}, "method.sparsity"),
        ({"method": {"name": "fedspallm", "layers": 0.0}}, "method.layers"),
        ({"admission": {"max_change": 1.0}}, "use admission.max_value"),
        ({"adapter": {"kind": "ia3"}}, "two factors of LoRA apart"),
        ({"aggregation": {"rule": "median"}}, "in a way of its own"),
        ({"method": {"name": "fedspallm", "layers": 0.5}, "training": {"keep_optimizer_state": True}}, "other layers trained"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_said(experiment, sections, message):
    with pytest.raises(SettingsError) as error:
        experiment(**{"method": {"name": "fedspallm"}, **sections})
    assert message in str(error.value)
