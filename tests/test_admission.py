"""Changes that are too large, and clients that keep sending what cannot be used."""

import json
import math

import pytest
import torch

import fedloom
from fedloom.admission import Admission, AdmissionSettings
from fedloom.engines.simulation import SimulationEngine
from fedloom.errors import Interrupted, RoundFailed, SettingsError
from fedloom.messages import Answer, Exchange, Payload, Schema, decode, encode
from fedloom.methods import METHODS
from fedloom.methods.base import EXAMPLES, LEARNING_RATE
from fedloom.offences import Offence
from fedloom.runner import Silent, resume_run
from fedloom.training.local import LOSS

START = {"a": torch.ones(2), "b": torch.zeros(1, 2)}
REQUEST = Schema.of(START, (LEARNING_RATE,))
REPLY = Schema.of({**START, "more": torch.zeros(1)}, (EXAMPLES,), (LOSS,))
SIZES = {0: 10, 1: 10}


def exchange(round=1):
    return Exchange.broadcast(
        "train", round, (0, 1), Payload(START, {"learning_rate": 0.1}), REQUEST, REPLY
    )


def answer(client, a=(1.0, 1.0), b=(0.0, 0.0), more=0.0):
    tensors = {"a": torch.tensor(a), "b": torch.tensor([b]), "more": torch.tensor([more])}
    return Answer(client, encode(Payload(tensors, {"examples": 10}), REPLY))


def test_a_change_that_is_too_large_is_left_out_and_what_was_not_sent_is_no_change():
    admission = Admission(AdmissionSettings(max_change=4.0))
    fits, beyond = answer(0, (4.0, 1.0), more=1e6), answer(1, (4.0, 1.0), (0.0, 4.0))
    replies, rejected = admission.accept([fits, beyond], exchange(), SIZES)
    assert [reply.client for reply in replies] == [0]
    assert rejected == {1: "it changed what it was sent by 5, admission.max_change allows 4"}
    (offence,) = admission.close(1)
    assert offence == Offence(1, "out_of_range", rejected[1], 1)


def test_or_it_is_shortened():
    admission = Admission(AdmissionSettings(max_change=2.5, on_excess="clip"))
    (reply,), rejected = admission.accept(
        [answer(0, (4.0, 1.0), (0.0, 4.0), 9.0)], exchange(), SIZES
    )
    found = reply.payload.tensors
    assert found["a"].tolist() == [2.5, 1.0] and found["b"].tolist() == [[0.0, 2.0]]
    assert found["more"].tolist() == [9.0] and reply.payload.numbers["examples"] == 10
    assert rejected == {1: "no answer"} and not admission.close(1)


def test_who_says_that_it_has_many_rows_weighs_no_more_than_is_allowed():
    sizes = {0: 10**12, 1: 10**12}
    admission = Admission(AdmissionSettings(max_examples=7, max_change=2.5, on_excess="clip"))
    answers = [answer(0), answer(1, (4.0, 1.0), (0.0, 4.0))]
    replies, rejected = admission.accept(answers, exchange(), sizes)
    assert [reply.payload.numbers["examples"] for reply in replies] == [7, 7] and not rejected
    admission = Admission(AdmissionSettings(max_examples=11))
    replies, _ = admission.accept(answers, exchange(), sizes)
    assert [reply.payload.numbers["examples"] for reply in replies] == [10, 10]


def test_missing_and_failing_clients_have_not_offended():
    admission = Admission()
    answers = [Answer(0, error="it fell over")]
    assert set(admission.accept(answers, exchange(), SIZES)[1]) == {0, 1}
    admission.accept([answer(0, (math.nan, 0.0)), Answer(1, b"???")], exchange(2), SIZES)
    assert [(o.client, o.kind, o.round) for o in admission.close(2)] == [
        (0, "not_finite", 2),
        (1, "malformed", 2),
    ]


def test_three_offences_pause_a_client_and_it_begins_anew():
    earlier = [Offence(7, "forged", "x", round) for round in (1, 4, 9, 10)] + [
        Offence(8, "forged", "x", 4)
    ]
    admission = Admission(AdmissionSettings(offences=2, pause=3), earlier)
    paused = {round: admission.paused(round) for round in range(1, 16)}
    # the second offence, in round 4, pauses rounds 5 to 7; those of 9 and 10 pause 11 to 13
    assert [round for round, own in paused.items() if 7 in own] == [5, 6, 7, 11, 12, 13]
    assert paused[6] == {7: 7} and paused[12] == {7: 13}
    assert not any(8 in own for own in paused.values())
    assert not Admission(AdmissionSettings(pause=0, offences=2), earlier).paused(11)


@pytest.fixture
def spoiled(monkeypatch):
    """Client 1 answers with NaN in every round, and is told when it was asked."""
    asked = []
    plain = SimulationEngine._answer

    def answer(self, exchange, client, data):
        found = plain(self, exchange, client, data)
        if exchange.action != "train" or client != 1:
            return found
        asked.append(exchange.round)
        payload = decode(found.data, exchange.reply_schema)
        next(iter(payload.tensors.values()))[0] = math.nan
        return Answer(client, encode(payload, exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "_answer", answer)
    return asked


SETTINGS = {
    "federation": {"clients": 3, "rounds": 8},
    "admission": {"offences": 2, "pause": 3},
    "evaluation": {"every": 8},
}


def test_a_repeat_offender_is_not_asked_for_some_rounds(experiment, spoiled, tmp_path):
    class Hearing(Silent):
        heard = []

        def warning(self, text):
            self.heard.append(text)

    result = fedloom.run(experiment(**SETTINGS), observer=Hearing())
    assert spoiled == [1, 2, 6, 7]
    lines = (result.folder / "rounds.jsonl").read_text().splitlines()
    records = {record["round"]: record for record in map(json.loads, lines)}
    (offence,) = records[2]["offences"]
    assert (offence["client"], offence["kind"], offence["count"]) == (1, "not_finite", 1)
    assert records[2]["clients"] == [0, 1, 2] and records[3]["offences"] == []
    assert records[3]["clients"] == [0, 2] and records[3]["paused"] == {"1": 5}
    assert records[6]["clients"] == [0, 1, 2] and records[6]["paused"] == {}
    told = [text for text in Hearing.heard if "quarantine" in text]
    assert told == [
        "client 1 is in quarantine until round 5: offences in 2 rounds (admission.offences)",
        "client 1 is in quarantine until round 10: offences in 2 rounds (admission.offences)",
    ]


def test_a_resumed_run_remembers_offences(experiment, spoiled, tmp_path):
    class Stop(Silent):
        def round_done(self, record):
            if record.round == 1:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fedloom.run(experiment(**SETTINGS), observer=Stop())
    resume_run(tmp_path / "run")
    assert spoiled == [1, 2, 6, 7]


def test_when_everybody_offends_the_run_stops(experiment, monkeypatch):
    plain = SimulationEngine._answer

    def answer(self, exchange, client, data):
        found = plain(self, exchange, client, data)
        return Answer(client, b"x") if exchange.action == "train" else found

    monkeypatch.setattr(SimulationEngine, "_answer", answer)
    with pytest.raises(RoundFailed, match="0 of 3 clients gave a usable answer"):
        fedloom.run(experiment(**SETTINGS))


@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - {"distillation", "split", "fedamole", "fedmoe", "centralised"})
)
def test_no_honest_client_is_over_a_generous_bound(experiment, federate, name):
    own = experiment(method={"name": name}, admission={"max_change": 100.0})
    assert not any(record.rejected for record in federate(own).records)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"admission": {"on_excess": "clip"}}, "clip to what"),
        (
            {"admission": {"max_change": 1.0}, "method": {"name": "split", "cut": 1}},
            "do not travel",
        ),
        ({"admission": {"max_change": -1.0}}, "max_change"),
    ],
)
def test_settings_that_make_no_sense(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**sections)


def test_a_value_that_cannot_be_meant_is_refused():
    admission = Admission(AdmissionSettings(max_value=10.0))
    _, rejected = admission.accept([answer(0, (4.0, -11.0))], exchange(), SIZES)
    assert rejected[0] == "tensor a holds 11, admission.max_value allows 10"
