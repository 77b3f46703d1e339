"""Changes that are too large, and clients that keep sending what cannot be used."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch

import fedloom
from fedloom.aggregation.means import weighted_mean
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import Interrupted, OutputError, RoundFailed, SettingsError
from fedloom.federation.admission import Admission, AdmissionSettings
from fedloom.federation.violations import Violation, ViolationObserver
from fedloom.methods import METHODS
from fedloom.methods.bases.parameter_averaging import EXAMPLES, LEARNING_RATE
from fedloom.reports.run_page import write_report
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run
from fedloom.wire.envelope import ReplyHeader
from fedloom.wire.messages import Answer, Exchange, Payload, decode, encode
from fedloom.wire.schema import LOSS, Schema
from loopback import resealed
from sampling import every
from unchecked import rewritten

START = {"a": torch.ones(2), "b": torch.zeros(1, 2)}
REQUEST = Schema.of(START, (LEARNING_RATE,))
REPLY_TENSORS = {**START, "more": torch.zeros(1)}
REPLY = Schema.of(REPLY_TENSORS, (EXAMPLES,), (LOSS,))
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
    (violation,) = admission.close(1)
    assert violation == Violation(1, "out_of_range", rejected[1], 1)


def test_what_is_sent_as_a_change_is_no_change_of_what_was_sent():
    """As scaffold's c_k: 3 and 4 beside a change of 0, whatever c is; of 12 as well, 13."""
    admission = Admission(AdmissionSettings(max_change=5.0))
    asked = replace(exchange(), changes=("a",))
    far = answer(1, (3.0, 4.0), (12.0, 0.0))
    replies, rejected = admission.accept([answer(0, (3.0, 4.0)), far], asked, SIZES)
    assert [reply.client for reply in replies] == [0]
    assert rejected == {1: "it changed what it was sent by 13, admission.max_change allows 5"}


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
    assert admission.weighed == {0: (10, 7), 1: (10, 7)}
    admission.close(1)
    assert admission.weighed == {}  # the record of the round has them
    admission = Admission(AdmissionSettings(max_examples=11))
    replies, _ = admission.accept(answers, exchange(), sizes)
    assert [reply.payload.numbers["examples"] for reply in replies] == [10, 10]
    assert admission.weighed == {}


@pytest.mark.parametrize(
    ("rows", "most", "cut"),
    [
        # ten equal ones: the upper quartile is at place 27 // 4 = 6 of 0 to 9: 10 x 100
        ([100] * 9 + [2**40], 1000, {9: 2**40}),
        # two: the quartile is at place 3 // 4 = 0, the smaller one
        ([100, 2**40], 1000, {1: 2**40}),
        ([900, 100], 1000, {}),
        ([1001, 100], 1000, {0: 1001}),
        # three: at place 6 // 4 = 1, the one in the middle
        ([50, 200, 2**40], 2000, {2: 2**40}),
        # one alone weighs what it likes: there is nobody else
        ([2**40], 10 * 2**40, {}),
        # a hundred: a tenth of all counts, a claim beyond 1000 as 1000: (99 x 100 + 1000) / 10 = 1090
        ([100] * 99 + [2**40], 1090, {99: 2**40}),
        # five who hold one row and five who hold 200: the quartile is one of the latter
        ([1] * 5 + [200] * 4 + [2000], 2000, {}),
        # two liars of ten do not move it
        ([100] * 8 + [2**40] * 2, 1000, {8: 2**40, 9: 2**40}),
    ],
)
def test_what_a_client_weighs_at_most_by_hand(rows, most, cut):
    sizes = dict(enumerate(rows))
    found = Admission(rows_known=False).weight_bound(sizes)
    assert (found.examples, dict(found.cut)) == (most, cut)
    assert "admission.max_examples" in found.why
    for free in (Admission(), Admission(AdmissionSettings(max_examples="any"), rows_known=False)):
        assert free.weight_bound(sizes).examples is None and not free.weight_bound(sizes).cut
    set_to_5 = Admission(AdmissionSettings(max_examples=5)).weight_bound({0: 5, 1: 6})
    assert (set_to_5.examples, dict(set_to_5.cut)) == (5, {1: 6})


def test_a_claim_of_all_the_rows_in_the_world_does_not_become_the_mean():
    """One of ten claims 2^40 rows: it weighs 10 of 19, and not all but a billionth."""
    sizes = dict.fromkeys(range(9), 10) | {9: 2**40}
    payload = Payload({n: torch.zeros_like(t) for n, t in REPLY_TENSORS.items()}, {"examples": 10})
    lie = Payload({n: torch.ones_like(t) for n, t in REPLY_TENSORS.items()}, {"examples": 2**40})
    asked = Exchange.broadcast(
        "train", 1, tuple(range(10)), Payload(START, {"learning_rate": 0.1}), REQUEST, REPLY
    )
    answers = [Answer(c, encode(lie if c == 9 else payload, REPLY)) for c in range(10)]
    admission = Admission(rows_known=False)
    replies, _ = admission.accept(answers, asked, sizes)
    weights = [reply.payload.numbers["examples"] for reply in replies]
    mean = weighted_mean([reply.payload.tensors for reply in replies], weights)
    assert weights == [10] * 9 + [100] and mean["a"][0] == pytest.approx(10 / 19)
    assert admission.weighed == {9: (2**40, 100)}


def test_between_machines_a_claim_of_2_to_the_40_rows_is_cut_unless_any_is_allowed(
    deployed, tmp_path
):
    def break_(mail, federation):
        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if node != 102:
                return envelope
            if header.joined:
                more = header.joined.model_copy(update={"rows": 2**40})
                return resealed(federation, 2, header.model_copy(update={"joined": more}), b"")
            lie = rewritten(envelope.payload, numbers=f"[{2**40}]") if header.round else b""
            return resealed(federation, 2, header, lie)

        mail.tamper = tamper

    def play(name, most=None):
        admission = {} if most is None else {"max_examples": most}
        folder = {"folder": str(tmp_path / name)}
        found = deployed(break_=break_, output=folder, admission=admission)
        (began,) = found.events("began")
        rows = sorted(began["clients"].values())
        assert rows[-1] == 2**40 and not any(r["rejected"] for r in found.rounds)
        return found, rows[1]

    found, quartile = play("default")
    assert [r["weighed"] for r in found.rounds] == [{"2": [2**40, 10 * quartile]}] * 2
    free, _ = play("any", "any")
    assert [r["weighed"] for r in free.rounds] == [{}] * 2
    assert free.states != found.states


def test_a_record_says_whose_claim_was_cut_and_a_run_says_so_when_it_begins(experiment):
    class Hearing(Silent):
        heard = []

        def stage(self, text):
            self.heard.append(text)

        def warning(self, text):
            self.heard.append(text)

    partition = {"kind": "size", "sizes": [1.0, 1.0, 8.0], "client_test_fraction": 0.0}
    own = experiment(
        admission={"max_examples": 8},
        partition=partition,
        evaluation={"per_client": False},
        data={"builtin_rows": 60},
    )
    result = fedloom.run(own, observer=Hearing())
    sizes = {
        c["client"]: c["train"]
        for c in json.loads((result.folder / "partition.json").read_text())["clients"]
    }
    cut = {str(c): [rows, 8] for c, rows in sizes.items() if rows > 8}
    assert cut and len(cut) < 3
    lines = (result.folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["weighed"] for line in lines] == [{}, cut, cut]
    told = [text for text in Hearing.heard if "weighs" in text]
    assert told[0] == "a client weighs at most 8 examples: admission.max_examples"
    assert len(told) == 1 + len(cut) and all("registered" in text for text in told[1:])
    page = write_report([result.folder]).read_text()
    assert f"Client {next(iter(cut))} claimed" in page and "and weighed as 8" in page


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
    earlier = [Violation(7, "forged", "x", round) for round in (1, 4, 9, 10)] + [
        Violation(8, "forged", "x", 4)
    ]
    admission = Admission(AdmissionSettings(offences=2, pause=3), earlier)
    paused = {round: admission.paused(round) for round in range(1, 16)}
    # the second violation, in round 4, pauses rounds 5 to 7; those of 9 and 10 pause 11 to 13
    assert [round for round, own in paused.items() if 7 in own] == [5, 6, 7, 11, 12, 13]
    assert paused[6] == {7: 7} and paused[12] == {7: 13}
    assert not any(8 in own for own in paused.values())
    assert not Admission(AdmissionSettings(pause=0, offences=2), earlier).paused(11)


@pytest.fixture
def spoiled(monkeypatch):
    """Client 1 answers with NaN in every round, and is told when it was asked."""
    asked = []
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "train" or client != 1:
            return found
        asked.append(exchange.round)
        payload = decode(found.data, exchange.reply_schema)
        next(iter(payload.tensors.values()))[0] = math.nan
        return Answer(client, encode(payload, exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "answer", answer)
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
    (violation,) = records[2]["offences"]
    assert (violation["client"], violation["kind"], violation["count"]) == (1, "not_finite", 1)
    assert records[2]["clients"] == [0, 1, 2] and records[3]["offences"] == []
    assert records[3]["clients"] == [0, 2] and records[3]["paused"] == {"1": 5}
    assert records[6]["clients"] == [0, 1, 2] and records[6]["paused"] == {}
    told = [text for text in Hearing.heard if "quarantine" in text]
    assert told == [
        "client 1 is in quarantine until round 5: violations in 2 rounds (admission.offences)",
        "client 1 is in quarantine until round 10: violations in 2 rounds (admission.offences)",
    ]


@pytest.mark.slow
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
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        return Answer(client, b"x") if exchange.action == "train" else found

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    with pytest.raises(RoundFailed, match="0 of 3 clients gave a usable answer"):
        fedloom.run(experiment(**SETTINGS))


@pytest.mark.parametrize(
    "name",
    every(
        3,
        sorted(
            METHODS.keys()
            - {
                "distillation",
                "fed_et",
                "fedgrpo",
                "feddm",
                "split",
                "fedamole",
                "fedmoe",
                "fedkseed",
                "centralised",
            }
            - {"lora_a2", "fednova", "fedspallm"}
            - {"distillation", "split", "fedamole", "fedlease", "fedmoe", "fedkseed", "centralised"}
            - {"lora_a2", "fednova"}
        ),
    ),
)
def test_no_honest_client_is_over_a_generous_bound(experiment, federate, name):
    own = experiment(method={"name": name}, admission={"max_change": 100.0})
    assert not any(record.rejected for record in federate(own).records)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"admission": {"on_excess": "clip"}}, "the norm to clip to"),
        (
            {"admission": {"max_change": 1.0}, "method": {"name": "split", "cut": 1}},
            "do not travel",
        ),
        ({"admission": {"max_change": -1.0}}, "max_change"),
        *(
            (
                {"admission": {"max_examples": value}},
                'must be a whole number of at least 1, or "any"',
            )
            for value in (0, -3, "all", True, 2.5)
        ),
    ],
)
def test_settings_that_make_no_sense(experiment, sections, words):
    with pytest.raises(SettingsError, match=words) as caught:
        experiment(**sections)
    assert sum("admission" in problem for problem in caught.value.problems) == 1


def test_a_report_from_outside_of_answers_counts_like_any_other():
    told, noted = [], []

    class Hearing(ViolationObserver):
        def record(self, violation):
            told.append(violation)

    admission = Admission(
        AdmissionSettings(offences=2, pause=3),
        run="r",
        watch=Hearing(),
        audit=lambda event, **facts: noted.append((event, facts)),
    )
    for round in (1, 2):
        threads = [
            threading.Thread(target=admission.report, args=(1, "forbidden", f"Control\n{n}"))
            for n in range(300)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        admission.report(0, "oversized", "x" * 999)
        assert admission.paused(round + 1) == {}  # of a round under way
        records = admission.close(round)
        assert [(o.client, o.kind, o.count, o.round) for o in records] == [
            (0, "oversized", 1, round), (1, "forbidden", 300, round),
        ]  # fmt: skip
        assert all(len(o.reason) <= 200 and o.reason.isprintable() for o in records)
    assert admission.paused(3) == {0: 5, 1: 5}
    assert len(told) == 602 and {o.run for o in told} == {"r"}
    assert len(noted) == 102 and noted[-1][0] == "offence"  # 100 of client 1, and no more for now
    assert Admission(AdmissionSettings(offences=2, pause=3), records).paused(3) == {}


def test_a_full_disk_is_not_the_business_of_who_reports():
    def full(event, **facts):
        raise OutputError("full")

    admission = Admission(audit=full)
    admission.report(1, "forged", "x")
    assert [(o.client, o.kind) for o in admission.close(1)] == [(1, "forged")]


def test_what_comes_between_two_rounds_is_of_the_next():
    admission = Admission()
    admission.close(1)
    admission.report(1, "forged", "x")
    assert [o.round for o in admission.close(2)] == [2] and admission.close(3) == ()


def test_reasons_are_one_line_of_bounded_length():
    admission, noted = Admission(), []
    answers = [
        Answer(0, error="a\n\x1b[2J" * 5000),
        Answer(1, error="x" * 9999, violation="forged"),
    ]
    _, rejected = admission.accept(
        answers, exchange(), SIZES, audit=lambda event, **facts: noted.append((event, facts))
    )
    assert all(len(why) <= 500 and why.isprintable() for why in rejected.values())
    absent = {facts["client"]: facts for event, facts in noted if event == "absent"}
    assert absent[1]["kind"] == "forged" and "kind" not in absent[0]
    (violation,) = admission.close(1)
    assert (violation.client, violation.kind, len(violation.reason)) == (1, "forged", 500)
    assert len(violation.to_record()["reason"]) == 200


ASKS_ALL = {"method": {"name": "fedavg_ft"}, "federation": {"clients": 3, "rounds": 4}}


def test_who_is_in_quarantine_is_asked_nothing_by_anybody(experiment, spoiled, monkeypatch):
    """Neither by a method that asks all clients there are, nor for an evaluation."""
    asked, plain = [], SimulationEngine.exchange

    def exchange(self, exchange):
        asked.append((exchange.action, exchange.round, tuple(exchange.requests)))
        return plain(self, exchange)

    monkeypatch.setattr(SimulationEngine, "exchange", exchange)
    own = experiment(**ASKS_ALL, admission={"offences": 2, "pause": 10})
    fedloom.run(own)
    assert ("tune", 4, (0, 2)) in asked and ("train", 2, (0, 1, 2)) in asked
    assert [clients for action, round, clients in asked if action == "evaluate"] == [
        (0, 1, 2), (0, 1, 2), (0, 1, 2), (0, 2), (0, 2),
    ]  # fmt: skip


def test_an_offence_in_an_evaluation_counts(experiment, monkeypatch):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action == "evaluate" and client == 2:
            metrics = json.dumps({"preference_accuracy": 3e299})
            return Answer(client, rewritten(found.data, metrics=metrics))
        return found

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    result = fedloom.run(
        experiment(federation={"rounds": 5}, admission={"offences": 2, "pause": 2})
    )
    lines = (result.folder / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    kinds = [[(o["client"], o["kind"]) for o in record["offences"]] for record in records]
    assert kinds == [[(2, "out_of_range")]] * 2 + [[]] * 2 + [[(2, "out_of_range")]] * 2
    assert [sorted(r["evaluation"]["clients"]["each"]) for r in records] == [["0", "1"]] * 6
    assert all(r["evaluation"]["clients"]["mean"]["preference_accuracy"] <= 1 for r in records)


@pytest.fixture
def all_offend(monkeypatch):
    """All clients claim an accuracy that is none in the evaluation of round 1."""
    plain, trained = SimulationEngine.answer, []

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action == "train":
            trained.append(exchange.round)
        if exchange.action == "evaluate" and exchange.round == 1:
            metrics = json.dumps({"preference_accuracy": 3e299})
            return Answer(client, rewritten(found.data, metrics=metrics))
        return found

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    return trained


@pytest.mark.slow
def test_rounds_in_which_all_are_in_quarantine_pass_and_the_run_goes_on(
    experiment, all_offend, tmp_path
):
    class Hearing(Silent):
        heard = []

        def warning(self, text):
            self.heard.append(text)

    settings = {
        "federation": {"rounds": 5},
        "admission": {"offences": 1, "pause": 2},
        "wire": {"up": "int8", "down": "int8", "keep_plain_below": 0},
    }
    result = fedloom.run(experiment(**settings), observer=Hearing())
    assert all_offend == [1] * 3 + [4] * 3 + [5] * 3
    records = [json.loads(n) for n in (result.folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["clients"] for r in records[2:4]] == [[], []]
    assert [r["paused"] for r in records[2:4]] == [dict.fromkeys("012", 3)] * 2
    losses = [r["evaluation"]["global"] for r in records]
    assert losses[1] == losses[2] == losses[3] != losses[4]
    told = [text for text in Hearing.heard if "nobody is asked" in text]
    assert told == [
        f"round {n}: all clients are in quarantine: nobody is asked before round 4" for n in (2, 3)
    ]
    page = write_report([result.folder]).read_text()
    assert "quarantine" in page
    resume_run(result.folder, from_round=4)  # the presence of empty rounds is in checkpoints


@pytest.mark.slow
def test_a_run_whose_clients_are_all_in_quarantine_for_long_ends_with_the_reason(
    experiment, all_offend
):
    settings = {"federation": {"rounds": 30}, "admission": {"offences": 1, "pause": 11}}
    with pytest.raises(
        RoundFailed, match=r"round 2: all clients .* more than 10 rounds.*\[0, 1, 2\]"
    ):
        fedloom.run(experiment(**settings))
    assert all_offend == [1] * 3


def test_a_value_that_cannot_be_meant_is_refused():
    admission = Admission(AdmissionSettings(max_value=10.0))
    _, rejected = admission.accept([answer(0, (4.0, -11.0))], exchange(), SIZES)
    assert rejected[0] == "tensor a holds 11, admission.max_value allows 10"
