"""FedPDPO: what stays, what travels, and what it is equal to."""

import hashlib
import math

import pytest
import torch

from fedloom.errors import DataError, SettingsError
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.models.heads import is_own

OPPOSED = {
    "data": {"source": "builtin:opposed", "builtin_rows": 80},
    "partition": {"kind": "column", "column": "side", "client_test_fraction": 0.2},
    "federation": {"clients": 4, "rounds": 2},
}


@pytest.fixture
def personal(experiment):
    def make(method=None, objective=None, **sections):
        return experiment(
            method={"name": "fedpdpo", "bottleneck": 6, **(method or {})},
            objective=objective or {"name": "pdpo"},
            **{**OPPOSED, **sections},
        )

    return make


def watched(parts, seen):
    """Keep the bytes of every request and reply."""
    carry = parts.engine.exchange

    def exchange(exchange):
        seen.extend(("down", data) for data in exchange.requests.values())
        for answer in carry(exchange):
            assert answer.error is None
            seen.append(("up", answer.data))
            yield answer

    parts.engine.exchange = exchange


@pytest.mark.slow
def test_payloads_are_as_long_as_those_of_fedavg_with_the_same_lora(personal, experiment, federate):
    """Requests to the byte; replies without the text of their metrics, whose digits differ."""
    parts = federate(personal()).parts
    own = parts.method.traffic(parts.initial)
    plain = experiment(method={"name": "fedavg"}, objective={"name": "dpo"}, **OPPOSED)
    other = federate(plain).parts
    assert own == other.method.traffic(other.initial)
    same = personal({}, {"name": "dpo"})
    lengths = []
    for one in (same, plain):
        seen = []
        federate(one, lambda parts, seen=seen: watched(parts, seen), evaluate=True)
        requests = [len(data) for way, data in seen if way == "down"]
        replies = [len(d) - int.from_bytes(d[:8], "little") for way, d in seen if way == "up"]
        assert max(replies) > max(requests) / 2  # the adapter is in both
        lengths.append((requests, replies))
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_nothing_personal_is_in_any_payload(personal, federate, schedule):
    """Neither a tensor's bytes, nor its name, nor a hash of either, at the start or at any later time."""
    seen, own = [], []
    found = federate(
        personal({"schedule": schedule}), lambda parts: watched(parts, seen), evaluate=True
    )
    for client in range(4):
        own += list(found.parts.engine.store.slots(client)[PERSONAL].items())
    own += [(n, t) for n, t in found.parts.initial.items() if is_own(n)]
    assert len({name for name, _ in own}) == 6  # four of the bottleneck, the head, the reward head
    traffic = b"".join(data for _, data in seen)
    assert len(seen) == 2 * 4 * (2 + 3)  # requests and replies: two rounds, three evaluations
    for name, tensor in own:
        data = tensor.contiguous().numpy().tobytes()
        if tensor.count_nonzero() > 1:
            assert data not in traffic, name
        assert name.encode() not in traffic and name.removeprefix("own.").encode() not in traffic
        for secret in (data, name.encode()):
            digest = hashlib.sha256(secret)
            assert digest.digest() not in traffic and digest.hexdigest().encode() not in traffic


def test_at_the_start_the_loss_is_ln_2(personal, federate):
    one_step = personal(
        training={"local_steps": 1, "batch_size": 64}, federation={"clients": 4, "rounds": 1}
    )
    losses = [m["loss"] for m in federate(one_step).records[0].client_train.values()]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6)


def test_without_parts_and_gamma_it_is_fedavg_of_dpo_bit_for_bit(personal, experiment, federate):
    """The reward head is there and reads 0; its gradient is 0, so it stays there."""
    bare = federate(
        personal({"bottleneck": 0, "head_mode": "none"}, {"name": "pdpo", "gamma": 0.0})
    )
    plain = federate(experiment(method={"name": "fedavg"}, objective={"name": "dpo"}, **OPPOSED))
    assert bare.state.tensors.keys() == plain.state.tensors.keys()
    for name, tensor in plain.state.tensors.items():
        assert torch.equal(bare.state.tensors[name], tensor)


def test_with_all_parts_frozen_and_gamma_0_it_is_fedavg_of_dpo_bit_for_bit(
    personal, experiment, federate
):
    def freeze(parts):
        def fit(client, rate):
            own = [name for name in client.model.parameters if is_own(name)]
            return client.training_steps(rate, frozen=own)

        parts.method.fit = fit

    frozen = federate(personal({}, {"name": "pdpo", "gamma": 0.0}), freeze)
    plain = federate(experiment(method={"name": "fedavg"}, objective={"name": "dpo"}, **OPPOSED))
    for name, tensor in plain.state.tensors.items():
        assert torch.equal(frozen.state.tensors[name], tensor)


def test_alternating_trains_either_part_with_the_other_frozen(personal, federate):
    seen = []

    def watch(parts):
        client = parts.engine.client

        def watching(number, round, link=None):
            found = client(number, round, link)
            steps = found.training_steps

            def noted(rate, **options):
                before = found.model.read()
                result = yield from steps(rate, **options)
                after = found.model.read()
                changed = {n for n in before if not torch.equal(before[n], after[n])}
                seen.append({is_own(name) for name in changed})
                return result

            found.training_steps = noted
            return found

        parts.engine.client = watching

    found = federate(personal({"schedule": "alternating"}), watch)
    assert seen == [{True}, {False}] * 8
    joint = federate(personal())
    steps = [sum(c.steps for c in f.records[0].costs) for f in (found, joint)]
    assert steps[0] == 2 * steps[1]


def test_each_client_is_judged_by_its_own_parts(personal, federate):
    found = federate(personal(), evaluate=True)
    start, *_, last = (record.evaluation.clients for record in found.records)
    assert {m["preference_accuracy"] for m in start.values()} == {0.5}
    assert {"implicit_accuracy", "explicit_accuracy"} <= last[0].keys()
    assert len({m["loss"] for m in last.values()}) == 4


@pytest.mark.parametrize("objective", ["dpo", "kto", "sft", "pkto"])
def test_other_objectives_may_be_personal_too(personal, federate, objective):
    source = {"sft": "builtin:instructions"}.get(objective, "builtin:opposed")
    partition = {} if objective == "sft" else OPPOSED["partition"]
    one = personal(
        objective={"name": objective}, data={"source": source, "builtin_rows": 80},
        partition=partition, federation={"clients": 2, "rounds": 1},
    )  # fmt: skip
    found = federate(one, evaluate=True)
    reward = "own.reward.weight" in found.parts.initial
    assert reward == (objective == "pkto")
    assert found.parts.engine.store.slots(0)[PERSONAL]


def test_a_classifier_has_no_such_heads(personal):
    with pytest.raises(SettingsError, match=r"fedpdpo.* heads over a vocabulary"):
        personal(objective={"name": "classification"}, data={"source": "builtin:labelled"})


def test_a_client_that_cannot_hold_rows_out_is_named_before_training(personal, federate):
    few = personal(
        partition={"kind": "size", "sizes": [20.0, 20.0, 20.0, 1.0], "column": None},
        data={"source": "builtin:opposed", "builtin_rows": 60},
    )
    with pytest.raises(DataError, match=r"client 3 \(1 rows\) would have no held-out row"):
        federate(few)
