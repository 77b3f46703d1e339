"""Secure aggregation of real rounds: the mean is the plain one, and no message holds a client's update."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from engines.test_workers import played
from fedloom.errors import PluginError, RoundFailed, SettingsError
from fedloom.federation.protocol import Replies, SummedReplies, Total
from fedloom.federation.secure_exchange import (
    KEYS,
    MASKED,
    PROTOCOL,
    REVEALED,
    SHARES,
    SIGNATURES,
    SecureAggregation,
    elements_of,
    grid_of,
)
from fedloom.methods import METHODS
from fedloom.privacy.secure_aggregation.masks import unpacked
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.tensors import tensor_bytes
from fedloom.wire.messages import Answer, Exchange, Payload, Reply, decode, encode
from fedloom.wire.schema import NumberSpec, Schema
from pools import with_pool

SUMMED = [
    name
    for name, (_, kind) in METHODS.items()
    if kind.declares.secure_aggregation.holds and not kind.own_models
]
"""Methods that go with it."""

QUICK = ("scaffold",)


@pytest.fixture
def secure(experiment):
    """Make an experiment with four clients, summed securely or, with ``plain``, not."""

    def make(plain=False, privacy=None, **sections):
        federation = {"rounds": 1, "clients": 4, **sections.pop("federation", {})}
        own = {"secure_aggregation": not plain, **({} if plain else privacy or {})}
        return experiment(
            federation=federation,
            evaluation={"per_client": False},
            training={"local_steps": 1, **sections.pop("training", {})},
            privacy=own,
            **sections,
        )

    return make


def of(name):
    """Sections of an experiment with a method, and with what it trains on."""
    objective = {"fedpdpo": "pdpo"}.get(name, "dpo")
    steps = {"fedsa_lora": 2}.get(name, 1)  # the first moves B alone, which stays with its client
    return {
        "method": {"name": name},
        "objective": {"name": objective},
        "training": {"local_steps": steps},
    }


def distance(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SUMMED]
)
def test_the_mean_is_the_plain_one_up_to_rounding(secure, federate, name):
    """An adaptive optimizer of the server divides by what is rounded, FDLoRA trains on from it, and FedSVD's
    singular vectors lie as far apart as their values are near to each other."""
    privacy = {"sum_rounding": "nearest", "sum_bits": 20, "sum_bound": 2.0}
    found = federate(secure(privacy=privacy, **of(name)))
    plain = federate(secure(plain=True, **of(name)))
    moved = distance(plain.adapter, plain.parts.initial)
    step = 2.0 / (2**19 - 1)
    amplified = name in ("fedadagrad", "fedadam", "fedyogi", "fdlora", "fedsvd")
    assert distance(found.adapter, plain.adapter) < (moved / 10 if amplified else 2 * step) < moved
    (own,), (other,) = found.records, plain.records
    assert own.train["cut_off"] == 0
    assert own.train["loss"] == pytest.approx(other.train["loss"], abs=1e-4)
    assert not own.client_train and own.clients == other.clients == (0, 1, 2, 3)


def test_it_is_the_same_bits_with_other_keys_and_with_workers_of_which_some_end(secure):
    settings = secure()
    alone = played(settings, assemble(settings, partition_data(settings)))
    parts, _ = with_pool(
        settings, seed=3, dies=[False, True, *[False] * 8, True, *[False] * 6, True]
    )
    assert played(settings, parts) == alone


def test_a_client_that_forges_its_keys_is_left_out_and_the_others_are_summed(secure, federate):
    def break_(parts):
        carried = parts.engine.exchange

        def exchange(asked):
            for answer in carried(asked):
                if asked.action == KEYS and answer.client == 2:
                    schema = asked.reply_schema
                    (name,) = (own := decode(answer.data, schema)).tensors
                    own.tensors[name][-1] ^= 1  # of the signature
                    answer = Answer(2, encode(own, schema))
                yield answer

        parts.engine.exchange = exchange

    found = federate(secure(), break_=break_)
    (record,) = found.records
    assert record.rejected.keys() == {2}
    assert "the keys of client 2 are not signed by it" in record.rejected[2]


def dropping(action, clients):
    """Have clients not answer an action."""

    def break_(parts):
        carried = parts.engine.exchange

        def exchange(asked):
            for answer in carried(asked):
                away = asked.action == action and answer.client in clients
                yield Answer(answer.client, error="it went away") if away else answer

        parts.engine.exchange = exchange

    return break_


SLOW = [pytest.param(action, marks=pytest.mark.slow) for action in (KEYS, SHARES, SIGNATURES)]


@pytest.mark.parametrize("action", ["train", REVEALED, *SLOW])
def test_a_client_that_drops_out_at_any_stage_is_borne(secure, federate, once, action):
    """Its update counts if it was masked and sent: afterwards others take its mask off."""
    nearest = {"sum_rounding": "nearest"}
    found = federate(secure(privacy=nearest), dropping(action, {2}))
    counts = action in (SIGNATURES, REVEALED)
    away = set() if counts else {2}
    plain = once(len(away), lambda: federate(secure(plain=True), dropping("train", away)))
    assert distance(found.adapter, plain.adapter) < 3e-5
    (record,) = found.records
    assert record.rejected == ({} if counts else {2: "it went away"})


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ("train", "masked answers"),
        pytest.param(KEYS, "sent their keys", marks=pytest.mark.slow),
        pytest.param(REVEALED, "shares of client", marks=pytest.mark.slow),
    ],
)
def test_too_few_that_are_left_end_the_run_with_the_reason(secure, federate, action, what):
    with pytest.raises(RoundFailed, match=f"round 1: secure aggregation: .*{what}"):
        federate(secure(), dropping(action, {1, 2}))


def test_another_model_for_one_client_makes_a_sum_that_is_noise_and_is_not_used(secure, federate):
    def break_(parts):
        carried = parts.engine.exchange

        def exchange(asked):
            if asked.action == "train":
                payload = decode(asked.requests[2], asked.request_schema)
                next(iter(payload.tensors.values())).add_(1e-3)
                other = encode(payload, asked.request_schema)
                asked = replace(asked, requests={**asked.requests, 2: other})
            yield from carried(asked)

        parts.engine.exchange = exchange

    with pytest.raises(RoundFailed, match="round 1: secure aggregation: no updates have this sum"):
        federate(secure(), break_)


def listening(heard, of_training):
    """Keep all that the server is sent, and what clients return before it is masked."""

    def break_(parts):
        carried, masked = parts.engine.exchange, parts.engine.secure.masked

        def exchange(asked):
            for answer in carried(asked):
                heard.append((asked, answer))
                yield answer

        def mask(asked, client, reply):
            of_training[client] = reply
            return masked(asked, client, reply)

        parts.engine.exchange, parts.engine.secure.masked = exchange, mask

    return break_


def test_no_message_to_the_server_holds_an_update_a_weight_or_a_metric(secure, federate):
    heard, replies = [], {}
    federate(secure(adapter={"rank": 16}), listening(heard, replies))
    assert {asked.action for asked, _ in heard} == {*PROTOCOL, "train"} and len(replies) == 4
    masked = []
    for asked, answer in heard:
        payload = decode(answer.data, asked.reply_schema)
        assert not payload.numbers and not payload.metrics
        for reply in replies.values():
            for tensor in reply.tensors.values():
                assert tensor.numpy().tobytes()[:64] not in answer.data
        if asked.action == "train":
            masked.append(payload.tensors[MASKED].numpy())
    masking = next(asked.masking for asked, _ in heard if asked.action == "train")
    count, width = elements_of(masking), grid_of(masking).width
    words = [unpacked(data, count, width) & 0xFF for data in masked]
    assert chisquare(np.bincount(np.concatenate(words), minlength=256)).pvalue > 1e-4
    same = np.mean(words[0] == words[1])
    assert width > 16 and abs(same - 1 / 256) < 5 * (1 / 256 / count) ** 0.5


def test_a_client_sends_at_most_a_tenth_more_bytes(secure, federate):
    found = federate(secure(adapter={"rank": 16}))
    costs = {cost.phase: cost for cost in found.costs(1) if cost.exchanges}
    plain = tensor_bytes(found.adapter)
    assert costs.keys() == {*PROTOCOL, "train"}
    assert 0.5 * plain < sum(cost.bytes_up for cost in costs.values()) <= 1.1 * plain
    assert plain < sum(cost.bytes_down for cost in costs.values()) <= 1.1 * plain


def test_what_is_not_finite_stays_with_the_client(secure, federate):
    def break_(parts):
        engine = parts.engine
        trained = engine.handlers["train"]

        def diverged(client, payload):
            reply = yield from trained(client, payload)
            if client.id == 1:
                next(iter(reply.tensors.values())).view(-1)[3] = float("nan")
            return reply

        engine.handlers["train"] = diverged

    found = federate(secure(), break_)
    (record,) = found.records
    assert "NaN or infinity: it is not masked" in record.rejected[1]
    assert all(torch.isfinite(tensor).all() for tensor in found.adapter.values())


def test_numbers_beyond_the_bound_are_cut_and_counted(secure, federate):
    found = federate(secure(privacy={"sum_bound": 1e-5}))
    assert found.records[0].train["cut_off"] > 0.5
    assert distance(found.adapter, found.parts.initial) <= 1e-5 * (1 + 1e-3)


def test_a_heavy_client_weighs_by_its_rows(secure, federate):
    sizes = {"partition": {"kind": "size", "sizes": [8, 8, 8, 24]}}
    privacy = {"sum_rounding": "nearest", "sum_bits": 20}
    found = federate(secure(privacy=privacy, **sizes))
    plain = federate(secure(plain=True, **sizes))
    assert distance(found.adapter, plain.adapter) < 3e-6


def asking(**changes):
    tensors = {"w": torch.zeros(2)}
    asked = Exchange.broadcast("ask", 1, (0, 1, 2), Payload(), Schema(), Schema.of(tensors))
    return replace(asked, **changes)


@pytest.mark.parametrize(
    ("exchange", "why"),
    [
        (asking(reply_schema=Schema.of({"n": torch.zeros(2, dtype=torch.int64)})), "whole numbers"),
        (asking(reply_schema=Schema(numbers=(NumberSpec("norm"),))), r"\['norm'\], of each client"),
        (asking(check=lambda client, payload: None), "checks each reply by itself"),
        (asking(requests={0: b"a", 1: b"b", 2: b"a"}), "does not send all clients the same"),
    ],
)
def test_an_exchange_that_cannot_be_summed_is_refused(exchange, why):
    server = SecureAggregation("run", 16, 1.0, stochastic=False)
    with pytest.raises(PluginError, match=why):
        next(server.stages(exchange, 0, {0: 1, 1: 1, 2: 1}, None, {}))


def test_replies_have_the_mean_that_their_sum_has():
    tensors = [{"a/w": torch.tensor([1.0, 2.0]), "b/w": torch.tensor([4.0])}, {"a/w": torch.zeros(2), "b/w": torch.zeros(1)}]  # fmt: skip
    rows = [3, 1]
    made = [Reply(c, Payload(t, {"examples": n})) for c, (t, n) in enumerate(zip(tensors, rows, strict=True))]  # fmt: skip
    means = {"a/w": torch.tensor([0.75, 1.5]), "b/w": torch.tensor([2.0])}
    summed = SummedReplies(Total((0, 1), means, ("b/",), {}, 0.0), {2: "late"})
    singly = Replies(made, {2: "late"})
    for part, by in (("a", "rows"), ("b", "clients")):
        found = [own.mean(part, by) for own in (summed, singly)]
        assert torch.equal(found[0]["w"], found[1]["w"])
    assert summed.answered == singly.answered == (0, 1) and summed.missing == singly.missing
    for look in (list, len, lambda own: own[0]):
        with pytest.raises(PluginError, match="there is no single reply"):
            look(summed)
    with pytest.raises(PluginError, match="the mean of 'b/w' by rows is not known"):
        summed.mean("b")


REFUSED = {
    "method": ({"method": {"name": "flora"}}, "method.name = 'flora' does not go with it: the server"),
    "own models": ({"method": {"name": "local_only"}}, "no model but each client's own"),
    "rule": ({"aggregation": {"rule": "median"}}, "aggregation.rule = 'median' compares single updates"),
    "norms": ({"admission": {"max_change": 1.0}}, "admission.max_change bounds single updates"),
    "scores": ({"evaluation": {}}, "evaluation.per_client = true sends each client's own scores"),
    "unseen": ({"clients": {"newcomers": [3]}}, "clients.newcomers are judged one by one"),
    "two": ({"federation": {"clients": 4, "clients_per_round": 2}}, "a round has 2 clients"),
    "replaced": ({"federation": {"clients": 4, "replacements": 1}}, "cannot join a sum that has begun"),
    "devices": ({"simulation": {"devices": {}}}, "does not time its stages"),
    "bits": ({"privacy": {"secure_aggregation": True, "sum_bits": 24}, "federation": {"clients": 20}}, "privacy.sum_bits = 24 leaves no room in 32 bits for the weights of 20"),
    "unit": ({"privacy": {"secure_aggregation": True, "unit": "client", "delta": 1e-3, "noise_multiplier": 1.0}}, "the server clips updates, and so has to see each"),
}  # fmt: skip
"""What does not go with it, and a word of why."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_it_is_refused_by_name(experiment, case):
    sections, why = REFUSED[case]
    base = {
        "federation": {"clients": 4},
        "evaluation": {"per_client": False},
        "privacy": {"secure_aggregation": True},
    }
    assert experiment(**base).privacy.secure_aggregation
    with pytest.raises(SettingsError) as refused:
        experiment(**{**base, **sections})
    assert any(why in problem for problem in refused.value.problems)
    assert len(refused.value.problems) == 1 or case == "unseen"


def test_every_method_that_looks_at_single_replies_says_so(experiment):
    for name, (_, kind) in METHODS.items():
        if not kind.declares.secure_aggregation.holds:
            assert kind.declares.secure_aggregation.why, name


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_bits(secure):
    one = secure(federation={"rounds": 2})
    whole = run_experiment(one, observer=Silent())
    weights = (whole.adapter_path / "adapter_model.safetensors").read_bytes()
    again = resume_run(whole.folder, from_round=1)
    assert (again.adapter_path / "adapter_model.safetensors").read_bytes() == weights
    lines = (whole.folder / "rounds.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["train"]["cut_off"] == 0
