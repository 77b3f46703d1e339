"""Means of replies that are added as they come: the bits of means over all, whatever the order of arrival."""

import itertools

import pytest
import torch

from absent import Schedule, played
from fedloom.aggregation.means import RunningMean, weighted_mean
from fedloom.errors import PluginError
from fedloom.experiment.experiment import Experiment
from fedloom.federation import rounds
from fedloom.federation.protocol import Replies
from fedloom.federation.streaming_mean import StreamingMean
from fedloom.methods import METHODS
from fedloom.wire.messages import Answer, Exchange, Payload, Reply
from fedloom.wire.schema import NumberSpec, Schema

SUMMED = [n for n, (_, own) in METHODS.items() if own.declares.secure_aggregation.holds]


def updates(count):
    rng = torch.Generator().manual_seed(0)
    return [
        {
            "a": torch.randn(3, 5, generator=rng),
            "b": torch.randn(7, generator=rng).bfloat16(),
            "c/d": torch.randn(4, generator=rng),
        }
        for _ in range(count)
    ]


def test_by_hand():
    """Weights 1 and 3: 0.25 a + 0.75 b."""
    running = RunningMean()
    for value, weight in ((4.0, 1), (0.0, 3)):
        running.add({"x": torch.tensor([value])}, weight)
    assert running.mean()["x"].tolist() == [1.0]


@pytest.mark.parametrize("weights", [[1, 2, 4, 8], [0, 3, 0, 1], [5, 5, 5, 5]])
def test_one_by_one_is_all_at_once_bit_for_bit(weights):
    given, running = updates(4), RunningMean()
    for update, weight in zip(given, weights, strict=True):
        running.add(update, weight)
    found, right = running.mean(), weighted_mean(given, weights)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in right.items())


def test_nothing_that_weighs_has_no_mean():
    running = RunningMean()
    running.add({"x": torch.ones(1)}, 0)
    with pytest.raises(ValueError, match="no update with a weight above 0"):
        running.mean()


def test_no_order_of_arrival_moves_a_bit_and_few_wait():
    """Five clients in all 120 orders, of which client 3 fails; those wait that came before their turn."""
    given, aside = updates(5), []
    exchange = Exchange(
        "train", 1, Schema(), Schema.of(given[0], (NumberSpec("examples", 1, 99),)),
        dict.fromkeys(range(5), b""), alike=("c/",),
    )  # fmt: skip

    def put_aside(client, payload):
        aside.append(client)
        return payload

    payloads = [Payload(u, {"examples": 1.0 + c}, {"loss": c}) for c, u in enumerate(given)]
    whole = Replies([Reply(c, payloads[c]) for c in (0, 1, 2, 4)], {3: "late"})
    loss = whole.reported("loss")
    copies = Replies(
        [Reply(c, Payload(dict(given[c]), {"examples": 1.0 + c})) for c in (0, 1, 2, 4)]
    )
    alike = weighted_mean([given[c] for c in (0, 1, 2, 4)], [1] * 4)["c/d"]
    right = weighted_mean([own.payload.tensors for own in copies], [1, 2, 3, 5])
    for order in itertools.permutations(range(5)):
        aside.clear()
        streamed, light = StreamingMean(exchange, put_aside), {}
        for answer in streamed.settling(Answer(c) for c in order):
            if answer.client != 3:
                light[answer.client] = streamed.keep(answer.client, payloads[answer.client])
        assert not any(own.tensors for own in light.values())
        assert aside == [
            c for n, c in enumerate(order) if c != 3 and not {*range(c)} <= {*order[:n]}
        ]
        found = streamed.replies([Reply(c, light[c]) for c in sorted(light)], {3: "late"})
        assert found.answered == (0, 1, 2, 4) and found.missing == {3: "late"}
        means = found.total.means
        assert torch.equal(means["a"], right["a"]) and torch.equal(means["b"], right["b"])
        assert torch.equal(means["c/d"], alike) and found.reported("loss") == loss
    with pytest.raises(PluginError, match="there is no single reply"):
        list(found)


def both(table, method, monkeypatch, **sections):
    """The states after each round, with replies kept and with replies added as they come."""
    own = {
        **table,
        "data": {"source": "builtin:preferences", "builtin_rows": 40},
        "training": {**table["training"], "local_steps": 1},
        "federation": {"clients": 4, "rounds": 2, "quorum": 0.3},
        "method": {"name": method},
        **sections,
    }
    schedule = Schedule(away={2: {1}}, late={1: {2}}, backwards=True)
    found = []
    for above in (1 << 60, -1):
        monkeypatch.setattr(rounds, "STREAM_ABOVE", above)
        plays = played(Experiment.from_table(own), schedule)
        assert plays.parts.method.means_alone
        found.append(([s.digest() for s in plays.states], [r.train["loss"] for r in plays.records]))
    return found


@pytest.mark.parametrize(
    "method", ["scaffold", *(pytest.param(n, marks=pytest.mark.full) for n in SUMMED if n != "scaffold")]
)  # fmt: skip
def test_a_methods_rounds_have_the_same_bits(suited, monkeypatch, method):
    if METHODS[method][1].needs_public or method == "local_only":
        pytest.skip("no adapters travel")
    kept, streamed = both(suited(method), method, monkeypatch)
    assert kept[0] == streamed[0] and kept[1] == pytest.approx(streamed[1])


def test_rules_that_compare_updates_keep_all(table):
    for rule, alone in (("mean", True), ("median", False), ("geometric_median", False)):
        own = Experiment.from_table({**table, "aggregation": {"rule": rule}})
        method = METHODS["fedavg"][1](own.method)
        method.aggregation = own.aggregation
        assert method.means_alone == alone
