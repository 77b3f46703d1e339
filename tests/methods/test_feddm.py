"""FedDM: what clients send, how far the server goes, and what both learn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.errors import MessageError, SettingsError
from fedloom.methods import METHODS
from fedloom.methods.bases.distribution_matching import CLASSES, MATCHING, Edge, Matching, together
from fedloom.tensors import part_of
from fedloom.training.synthetic_inputs import SYNTHETIC_INPUTS, embeddings_of, width_of
from fedloom.wire.messages import Payload, Reply

LABELLED = {
    "data": {"source": "builtin:labelled", "builtin_rows": 60},
    "objective": {"name": "classification"},
}


@pytest.fixture
def matched(experiment):
    def make(rounds=1, steps=3, batch=8, **method):
        return experiment(
            **LABELLED,
            federation={"rounds": rounds, "clients": 2},
            training={"local_steps": steps, "learning_rate": 1e-2, "batch_size": batch},
            method={"name": "feddm", "server_steps": 6, **method},
        )

    return make


def watching(seen):
    def watch(parts):
        exchange = parts.engine.exchange

        def watched(asked):
            for answer in exchange(asked):
                found = asked.read_reply(answer.client, answer.data)
                seen.append((asked, answer.client, found))
                yield answer

        parts.engine.exchange = watched

    return watch


def test_synthetic_rows_are_sent_and_the_server_stays_within_the_radius(matched, federate):
    seen = []
    found = federate(matched(radius=0.05), watching(seen))
    moved = [(found.adapter[n] - t).square().sum() for n, t in found.parts.initial.items()]
    assert math.sqrt(sum(moved)) == pytest.approx(0.05, rel=1e-3)
    width = embeddings_of(found.parts.model).shape[1]
    for _, _, reply in seen:
        assert reply.tensors.keys() == {SYNTHETIC_INPUTS, CLASSES}
        inputs, held = reply.tensors[SYNTHETIC_INPUTS], reply.tensors[CLASSES].bool()
        assert inputs.shape == (len(held), 2, 8, width) and not inputs[~held].any()
        assert reply.metrics[MATCHING] > 0
        assert not part_of(reply.tensors, "adapter")
    asked, client, reply = seen[0]
    for bad in (torch.full_like(reply.tensors[CLASSES], 2), reply.tensors[CLASSES] * 0):
        with pytest.raises(MessageError, match="classes"):
            asked.check(client, Payload({**reply.tensors, CLASSES: bad}))


@pytest.mark.slow
def test_synthetic_rows_come_nearer_to_the_rows(matched, federate):
    """With all rows in each batch and models next to the received one, what is minimised falls."""
    seen = []
    few = {"radius": 1e-3, "input_rate": 0.05, "server_steps": 1}
    federate(matched(rounds=3, steps=8, batch=64, **few), watching(seen))
    losses = [[r.metrics[MATCHING] for _, c, r in seen if c == client] for client in (0, 1)]
    assert all(own[2] < own[1] < own[0] and own[2] < 0.5 * own[0] for own in losses), losses


def test_a_training_ends_where_it_reaches_the_edge():
    start = {"w": torch.zeros(2)}
    edge, w = Edge(start, 5.0), {"w": torch.nn.Parameter(torch.tensor([1.0, 1.0]))}
    batches = edge.until_reached(iter([["a"], ["b"], ["c"]]), 3)
    assert next(batches) == ["a"]
    edge.keep_within(w)
    assert w["w"].tolist() == [1.0, 1.0] and next(batches) == ["b"]
    with torch.no_grad():
        w["w"].copy_(torch.tensor([6.0, 8.0]))
    edge.keep_within(w)
    assert w["w"].tolist() == pytest.approx([3.0, 4.0])
    assert list(batches) == []
    assert len(list(Edge(start, 5.0).until_reached(iter([["a"]] * 9), 4))) == 4


def test_a_model_is_drawn_within_the_radius_whatever_its_size():
    """Half of a unit in a random direction is a quarter of the radius 2, half a unit, away."""
    rng = SimpleNamespace(standard_normal=lambda shape: np.full(shape, 0.5), random=lambda: 0.25)
    adapter = {"w": torch.nn.Parameter(torch.zeros(1))}
    steps = Matching(None, 1.0, adapter, 2.0)
    steps._draw({"w": torch.tensor([3.0])}, rng)
    assert adapter["w"].item() == pytest.approx(3.5)


def test_a_step_to_just_within_the_edge_stays():
    edge, w = Edge({"w": torch.zeros(2)}, 5.0), {"w": torch.nn.Parameter(torch.tensor([3.0, 3.9]))}
    edge.keep_within(w)
    assert not edge.reached and w["w"].tolist() == pytest.approx([3.0, 3.9])
    at = {"w": torch.nn.Parameter(torch.tensor([3.0, 4.0]))}
    edge.keep_within(at)
    assert edge.reached and at["w"].tolist() == [3.0, 4.0]


def test_each_client_counts_by_its_rows():
    inputs = torch.arange(24.0).view(3, 2, 2, 2)
    one, other = (torch.tensor(own, dtype=torch.uint8) for own in ([1, 0, 1], [0, 1, 0]))
    replies = [
        Reply(0, Payload({SYNTHETIC_INPUTS: inputs, CLASSES: one}, {"examples": 8})),
        Reply(4, Payload({SYNTHETIC_INPUTS: -inputs, CLASSES: other}, {"examples": 30})),
    ]
    rows = together(replies)
    assert rows.labels.tolist() == [0, 0, 2, 2, 1, 1]
    assert rows.weights.tolist() == [2.0] * 4 + [15.0] * 2
    assert torch.equal(rows.inputs[2:4], inputs[2]) and torch.equal(rows.inputs[4:], -inputs[1])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "sft"}, "data": {"source": "builtin:instructions"}}, 'use objective.name = "classification", not \'sft\''),
        ({**LABELLED, "adapter": {"kind": "full"}}, 'with "lora" or "ia3"'),
        ({**LABELLED, "admission": {"max_change": 1.0}}, "use admission.max_value"),
        ({**LABELLED, "method": {"name": "feddm", "radius": 0.0}}, "method.radius"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_said(experiment, sections, message):
    with pytest.raises(SettingsError) as error:
        experiment(**{"method": {"name": "feddm"}, **sections})
    assert message in str(error.value)


def test_first_tokens_of_rows_are_revealed_where_they_are_sent():
    settings, kind = METHODS["feddm"]
    assert kind(settings()).reveals == {"embeddings"}
    assert kind(settings(start="rows")).reveals == {"embeddings", "first_tokens"}
    assert kind(settings()).reveals == {"embeddings"}  # of one object, not of the class


def test_embeddings_are_what_the_module_returns_without_its_hooks():
    """Gemma 3 scales them inside of it; NEFTune's noise is a hook."""

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 8 * super().forward(ids)

    module = Scaled(5, 3)
    module.register_forward_hook(lambda own, given, found: found + 1)
    model = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: module))
    assert torch.equal(embeddings_of(model), 8 * module.weight.detach())
    assert not embeddings_of(model).requires_grad and width_of(model) == 3
