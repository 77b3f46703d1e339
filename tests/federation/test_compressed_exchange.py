"""Compressed rounds of real clients: what is sent, what each side remembers, the same bits in any order."""

import json
from dataclasses import replace

import pytest
import torch

import fedloom
from engines.test_workers import played
from federation import Sent
from fedloom.errors import Interrupted, OutOfStepError, SettingsError
from fedloom.federation import rounds as loop
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.compression_messages import CONTROL, HELD
from fedloom.methods import METHODS
from fedloom.runs.assembly import assemble
from fedloom.runs.forget import forget_client
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run
from fedloom.security.audit_log import events
from fedloom.tensors import part_of, tensor_bytes
from fedloom.wire.messages import decode, encode
from fedloom.wire.schema import Schema
from pools import with_pool
from runs.test_run import Stop

BIASED = ["ternary:nearest", "zstd"]


def total(changes, client, name):
    return sum(own[name].double() for (_, who), own in changes.items() if who == client)


@pytest.mark.parametrize("rounds", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_what_was_sent_and_what_is_left_add_up_to_all_changes(compressed, federate, rounds):
    """Over rounds in which clients are away or their answers do not count."""
    wire = {"up": BIASED, "error_feedback": "classic", "absence_decay": 1.0, "absence_limit": 99}
    sent = Sent({round: (round % 3,) for round in range(3, rounds, 4)})
    settings = compressed(wire, federation={"rounds": rounds, "clients_per_round": 2})
    found = federate(settings, sent.watch)
    counted = {key: own for key, own in sent.changed.items() if key in sent.read}
    assert len(counted) < len(sent.changed) <= 2 * rounds
    for client in range(3):
        residual = found.parts.local.store.slots(client)["[wire] residual train"]
        for name in found.adapter:
            left = residual[name].double()
            whole = total(counted, client, name)
            assert torch.allclose(total(sent.read, client, name) + left, whole, atol=1e-5)
            assert float(left.abs().max()) > 0


@pytest.mark.parametrize(("away", "factor"), [((2,), 0.9), ((2, 3, 4), 0.0)])
def test_what_an_absent_client_lost_decays_and_is_dropped(compressed, federate, away, factor):
    """It counts 0.9 for each round without the client, and nothing after the limit of 2."""
    wire = {"up": BIASED, "error_feedback": "classic", "absence_limit": 2}
    last, sent, residuals = away[-1] + 1, Sent(), {}

    def leave_out(parts):
        sent.watch(parts)
        carried = parts.engine.exchange

        def without(asked):
            there = {c: d for c, d in asked.requests.items() if c or asked.round not in away}
            yield from carried(replace(asked, requests=there))

        parts.engine.exchange = without

    def keep(record, parts):
        residuals[record.round] = dict(parts.local.store.slots(0)["[wire] residual train"])

    federate(compressed(wire, federation={"rounds": last}), leave_out, after=keep)
    for name, change in sent.changed[last, 0].items():
        whole = change + factor * residuals[1][name]
        assert torch.allclose(sent.read[last, 0][name] + residuals[last][name], whole, atol=1e-6)


def test_server_and_clients_keep_the_same_estimates(compressed, federate):
    sent = Sent({2: (1,)})
    settings = compressed({"up": BIASED, "error_feedback": "ef21"}, federation={"rounds": 4})
    found = federate(settings, sent.watch)
    facts, tensors = found.compression.saved()
    assert facts["estimates"]["train"]["updates"] == {"0": 4, "1": 3, "2": 4}
    for client in range(3):
        own = found.parts.local.store.slots(client)["[wire] estimate train"]
        for name in found.adapter:
            assert torch.equal(own[name], tensors[f"client/{client:04d}/train/{name}"])
            assert torch.allclose(own[name], sent.read[4, client][name], atol=1e-6)


@pytest.mark.parametrize("feedback", ["classic", "ef21"])
def test_what_answers_of_alternating_halves_lose_is_kept_until_they_are_sent_again(
    compressed, federate, feedback
):
    wire = {"up": ["top_k:0.2"], "error_feedback": feedback, "absence_decay": 1.0}
    if feedback == "ef21":
        del wire["absence_decay"]
    sent, own = Sent(), {"method": {"name": "rolora"}, "federation": {"rounds": 4, "clients": 2}}
    found = federate(compressed(wire, **own), sent.watch)
    assert sent.read[1, 0].keys().isdisjoint(sent.read[2, 0]) and len(sent.read) == 8
    _, tensors = found.compression.saved()
    for client in range(2):
        slots = found.parts.local.store.slots(client)
        for name in found.adapter:
            if feedback == "ef21":
                kept = slots["[wire] estimate train"][name]
                assert torch.equal(kept, tensors[f"client/{client:04d}/train/{name}"])
                last = max(r for r, who in sent.read if who == client and name in sent.read[r, who])
                assert torch.allclose(kept, sent.read[last, client][name], atol=1e-6)
                continue
            whole, read = (
                sum(
                    c[name].double()
                    for (_, who), c in changes.items()
                    if who == client and name in c
                )
                for changes in (sent.changed, sent.read)
            )
            left = slots["[wire] residual train"][name].double()
            assert torch.allclose(read + left, whole, atol=1e-6) and float(left.abs().max()) > 0


def test_an_estimate_is_of_no_tensor_that_comes_as_it_is(compressed):
    settings = compressed({"up": BIASED, "error_feedback": "ef21"})
    server = Compression.of(settings.wire, 0, {})
    server._estimates["train"], server._updates["train"] = {0: {"w": torch.ones(8, 2)}}, {0: 1}
    change = {"w": torch.full((2, 2), 5.0), "v": torch.ones(8, 2)}
    found = server.estimated("train", 0, change, ["v"], 2)
    assert torch.equal(found["w"], change["w"]) and torch.equal(found["v"], change["v"])
    assert server._pending[0][0].keys() == {"v", "w"}


def test_an_estimate_of_another_shape_or_count_ends_nothing(compressed):
    """A client that sends other ranks, or comes back from a backup, is told to begin anew: no violation."""
    settings = compressed({"up": BIASED, "error_feedback": "ef21"})
    server = Compression.of(settings.wire, 0, {})
    server.estimated("train", 0, {"w": torch.ones(8, 2)}, ["w"], 1)
    server._estimates["train"], server._updates["train"] = {0: {"w": torch.ones(8, 2)}}, {0: 1}
    found = server.estimated("train", 0, {"w": torch.full((6, 2), 3.0)}, ["w"], 2)
    assert torch.equal(found["w"], torch.full((6, 2), 3.0))
    with pytest.raises(OutOfStepError, match="begins anew"):
        server.estimated("train", 0, {"w": torch.ones(8, 2)}, ["w"], 7)
    facts, _ = server.saved()
    assert facts["estimates"]["train"] == {"updates": {"0": 1}, "afresh": [0]}
    forgotten = Compression.of(settings.wire, 0, {})
    forgotten.restore({"estimates": {"train": {"updates": {"0": 3}, "afresh": []}}}, {})
    assert forgotten.saved()[0]["estimates"]["train"] == {"updates": {}, "afresh": [0]}


@pytest.mark.parametrize("feedback", ["classic", "ef21"])
def test_control_variates_have_no_error_feedback(compressed, federate, feedback):
    """c_k moves by what the server reads, so that what is lost is in its next change; twice, it diverges."""

    def size(own):
        settings = {"method": {"name": "scaffold"}, "federation": {"rounds": 8}}
        found = federate(compressed({"up": BIASED, **own}, **settings))
        return sum(
            float(t.square().sum()) for t in part_of(found.state.tensors, "control").values()
        )

    assert size({"error_feedback": feedback}) < 2 * size({})


def test_answers_that_are_kept_on_disk_count(compressed, federate, tmp_path, monkeypatch):
    plain = federate(compressed({"up": "int8"}))
    monkeypatch.setattr(loop, "DISK_BUFFER_ABOVE", 0)
    found = federate(compressed({"up": "int8"}), disk_buffer=tmp_path / "answers")
    assert found.state.digest() == plain.state.digest()
    assert list((tmp_path / "answers").iterdir())


def sent_bytes(records, direction):
    """Bytes of the training requests or replies of the last rounds."""
    costs = [cost for record in records[2:] for cost in record.costs if cost.phase == "train"]
    return sum(getattr(cost, direction) for cost in costs)


@pytest.mark.parametrize(
    ("codec", "times"),
    [
        ("small", 9),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in (("int8", 3), ("int4", 5))),
    ],
)
def test_bytes_fall_and_the_loss_does_not_rise(compressed, federate, once, codec, times):
    """The rank is 2, so that the header of a message is a tenth of what is coded."""
    sections = {"training": {"local_steps": 2}}
    plain = once("plain", lambda: federate(compressed({}, **sections), evaluate=True))
    found = federate(compressed({"up": codec, "down": codec}, **sections), evaluate=True)
    for direction in ("bytes_up", "bytes_down"):
        before, after = (sent_bytes(own.records, direction) for own in (plain, found))
        assert before > times * after, direction
    loss, other = (own.records[-1].evaluation.metrics["loss"] for own in (plain, found))
    assert other == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize(
    "name",
    [
        "flora",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("flexlora", "hetlora", "fedex_lora")),
    ],
)
def test_factors_of_any_rank_are_coded(compressed, federate, name):
    """Clients of two ranks; the model is nearly that without a codec."""
    own = {"method": {"name": name}, "federation": {"rounds": 3}, "adapter": {"rank": 8}}
    if name != "fedex_lora":
        own["clients"] = {"groups": {"small": {"clients": [0], "rank": 4}}}
    plain, found = (
        federate(compressed(wire, **own), evaluate=True) for wire in ({}, {"up": "int8"})
    )
    before, after = (sent_bytes(one.records, "bytes_up") for one in (plain, found))
    assert before > 3 * after
    losses = [one.records[-1].evaluation.metrics["loss"] for one in (plain, found)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert 0 < found.records[-1].train["coding_error"] < 1e-3


def rounding_at_random(name):
    """Sections with a method and codecs of both ways that draw random numbers."""
    return {"method": {"name": name}, "federation": {"rounds": 2, "clients_per_round": 2}}


def test_c_stays_the_mean_of_all_c_k(compressed, federate):
    """N c is the sum of all c_k, also where the changes of c_k are read with an error."""
    found = federate(compressed({"up": "small"}, **rounding_at_random("scaffold")))
    control = part_of(found.state.tensors, "control")
    store = found.parts.local.store
    own = [
        store.slots(client)["control"] for client in range(3) if "control" in store.slots(client)
    ]
    for name, c in control.items():
        assert torch.allclose(
            3 * c, sum(one[name] for one in own), atol=1e-4 * float(c.abs().max())
        )
        assert float(c.abs().max()) > 0


@pytest.mark.parametrize("name", ["fedavg", pytest.param("scaffold", marks=pytest.mark.slow)])
def test_workers_of_which_some_end_give_the_bits_of_one_process(compressed, name):
    wire = {"up": BIASED, "down": "int4", "error_feedback": "classic"}
    settings = compressed(wire, **rounding_at_random(name))
    alone = played(settings, assemble(settings, partition_data(settings)))
    parts, _ = with_pool(settings, seed=3, dies=[False, True, False, True])
    assert played(settings, parts) == alone


def states(folder):
    """The digest of the state after each round, by the last time that it was played."""
    return {event["round"]: event["state"] for event in events(folder, "round")}


@pytest.mark.parametrize("feedback", ["classic", pytest.param("ef21", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_bits(compressed, tmp_path, feedback):
    wire = {"up": BIASED, "down": "int4", "error_feedback": feedback}
    settings = {"federation": {"rounds": 4, "clients_per_round": 2}}
    whole = fedloom.run(compressed(wire, **settings))
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        fedloom.run(compressed(wire, **settings, output={"folder": str(broken)}), observer=Stop(5))
    resumed = resume_run(broken)
    assert states(whole.folder) == states(resumed.folder) and len(states(whole.folder)) == 5
    assert whole.metrics == resumed.metrics


def test_a_client_is_sent_what_it_lacks(compressed, federate):
    """The last change, the two last ones after a round away, the whole after an answer that did not count."""
    sent = Sent({2: (1,)})
    settings = compressed({"down": "int4"}, federation={"rounds": 4, "quorum": 0.1})
    requests = {}

    def leave_out(parts):
        sent.watch(parts)
        carried = parts.engine.exchange

        def without(asked):
            there = {c: d for c, d in asked.requests.items() if (asked.round, c) != (2, 2)}
            requests[asked.round] = asked
            yield from carried(replace(asked, requests=there))

        parts.engine.exchange = without

    found = federate(settings, leave_out)
    size = tensor_bytes(found.parts.initial)
    third = requests[3]
    assert len(third.requests[0]) < size / 3
    assert len(third.requests[1]) > size and len(third.requests[2]) > size  # neither gave an answer
    fourth = requests[4].requests
    assert fourth[0] == fourth[1] == fourth[2] and len(fourth[0]) < size / 3
    digests = {str(found.parts.local.store.slots(c)[f"{HELD}train"]) for c in range(3)}
    assert len(digests) == 1


def test_who_was_not_drawn_is_sent_the_changes_it_missed(compressed, federate):
    sent = Sent()
    settings = compressed({"down": "int4"}, federation={"rounds": 6, "clients_per_round": 1})
    found = federate(settings, sent.watch)
    asked = [sent.exchanges[round] for round in range(1, 7)]
    drawn = [next(iter(one.requests)) for one in asked]
    size = tensor_bytes(found.parts.initial)
    for round, (client, one) in enumerate(zip(drawn, asked, strict=True), 1):
        before = max((r for r in range(1, round) if drawn[r - 1] == client), default=0)
        missed = sum("missed" in spec.name for spec in one.schema_of(client).tensors)
        assert missed in (0, round - before) and (missed or len(one.requests[client]) > size)


def test_a_client_without_its_store_is_refused_once_and_then_sent_the_whole(compressed, federate):
    settings = compressed({"down": "int4"}, federation={"rounds": 4})

    def lose(record, parts):
        if record.round == 2:
            parts.local.store.stage(1, {})
            parts.local.store.finish_round()

    found = federate(settings, after=lose)
    reasons = [record.rejected for record in found.records]
    assert "does not hold the model" in reasons[2][1]
    assert not reasons[0] and not reasons[1] and not reasons[3]
    assert not found.records[2].offences


def test_a_server_that_asks_for_another_codec_is_refused(compressed, federate):
    def ask(parts):
        carried = parts.engine.exchange

        def other(asked):
            coarser = asked.reply_schema.coded(lambda spec: "int4")
            yield from carried(replace(asked, reply_schema=coarser))

        parts.engine.exchange = other

    with pytest.raises(fedloom.errors.RoundFailed, match=r"and the experiment says wire\.up"):
        federate(compressed({"up": "int8"}), ask)


def test_a_change_of_something_huge_takes_no_memory(compressed, federate):
    """In place of a tensor that is sent as a change there is its shape alone, which costs a server nothing."""

    def ask(parts):
        carried = parts.engine.exchange

        def huge(asked):
            (sent,) = {id(data): data for data in asked.requests.values()}.values()
            payload, tensors = decode(sent, asked.request_schema), {}
            for name, tensor in payload.tensors.items():
                larger = tensor.dim() == 3 and not tensor.numel()
                tensors[name] = torch.empty(0, 1 << 20, 1 << 18) if larger else tensor
            schema = replace(asked.request_schema, tensors=Schema.of(tensors).tensors)
            data = encode(replace(payload, tensors=tensors), schema)
            requests = dict.fromkeys(asked.requests, data)
            yield from carried(replace(asked, request_schema=schema, requests=requests))

        parts.engine.exchange = huge

    with pytest.raises(
        fedloom.errors.RoundFailed, match=r"is a change of \d+ numbers, and this client"
    ):
        federate(compressed({"down": "int8"}), ask)


def test_without_the_section_nothing_is_changed(experiment, federate):
    settings = experiment()
    assert Compression.of(settings.wire, 0, {}) is None
    seen = []

    def look(parts):
        carried = parts.engine.exchange

        def note(asked):
            seen.append(asked)
            yield from carried(asked)

        parts.engine.exchange = note

    found = federate(settings, look)
    assert all(asked.plain is None and not asked.schemas for asked in seen)
    assert all(CONTROL not in str(asked.request_schema) for asked in seen)
    assert not any(name.startswith("[wire]") for name in found.parts.local.store.slots(0))
    assert "wire" not in settings.to_table(defaults=False)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"wire": {"up": "int5"}}, "int5"),
        ({"wire": {"up": "int4", "error_feedback": "classic"}}, "rounds at random"),
        ({"wire": {"down": "int4", "error_feedback": "classic"}}, "loses nothing"),
        (
            {"wire": {"up": "int4"}, "method": {"name": "fedex_lora"}},
            "4.2 bits a number.*8 bits of each at least",
        ),
        (
            {"wire": {"up": ["random_k:0.25"]}, "method": {"name": "flora"}},
            "leaves numbers out.*8 bits of each",
        ),
        (
            {"wire": {"up": "int4"}, "privacy": {"unit": "client", "noise_multiplier": 1.0}},
            "the length of an answer",
        ),
        ({"wire": {"up": "int4"}, "method": {"name": "distillation"}}, "encoding of their own"),
        ({"wire": {"up": "int4"}, "privacy": {"secure_aggregation": True}}, "masked integers"),
    ],
)
def test_what_cannot_be_is_one_error(experiment, sections, text):
    with pytest.raises(SettingsError, match=text) as raised:
        experiment(**sections)
    assert sum("wire" in problem for problem in raised.value.problems) == 1


def test_every_method_says_whether_it_goes_with_it():
    for name, (_, kind) in METHODS.items():
        assert "declaration does not say" not in kind.declares.compression.why, name


@pytest.mark.slow
def test_a_client_that_is_forgotten_takes_part_in_the_next_round(compressed, tmp_path):
    """It is sent the whole and begins its estimate anew, on both sides."""
    wire = {"up": BIASED, "down": "int4", "error_feedback": "ef21"}
    folder = tmp_path / "run"
    own = compressed(wire, federation={"rounds": 4}, output={"folder": str(folder)})
    with pytest.raises(Interrupted):
        fedloom.run(own, observer=Stop(6))
    assert forget_client(folder, 1) > 0
    resume_run(folder)
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    assert all(record["clients"] == [0, 1, 2] or not record["round"] for record in records)
    assert not any(record["rejected"] for record in records)
