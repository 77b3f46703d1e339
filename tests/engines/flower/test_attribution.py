"""The table of violations: what of a client's answers is one, of which kind, and what befalls an honest
client.

Each case is one exchange of three clients, in which client 1's answer is what the case says.
"""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from fedloom.errors import MessageError
from fedloom.federation.admission import Admission
from fedloom.federation.engine import RunDescription
from fedloom.federation.violations import ViolationObserver
from fedloom.methods.bases.parameter_averaging import EXAMPLES, LEARNING_RATE
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.security.keys import read_key, sign
from fedloom.training.results import reported
from fedloom.wire.envelope import Envelope, Joined, ReplyHeader, seal
from fedloom.wire.messages import Exchange, Payload, decode, encode
from fedloom.wire.schema import Schema
from loopback import resealed
from unchecked import rewritten

BAD = 1


class Told(ViolationObserver):
    def __init__(self):
        self.kinds = []

    def record(self, violation):
        self.kinds.append((violation.client, violation.kind))


class Site:
    """A run under way: each call of :meth:`asked` is one more round."""

    def __init__(self, federation, experiment, proven):
        self.federation, self.round, self.earlier = federation, 0, {}
        self.mail = federation.mail()
        self.engine = federation.engine(experiment, self.mail, proven)
        self.parts = assemble(experiment, partition_data(experiment), remote=self.engine)
        self.told = Told()
        self.admission = Admission(experiment.admission, watch=self.told)
        facts = (experiment.to_toml(), (), self.parts.model_digest, (-1,))
        self.begin(RunDescription("0" * 32, *facts, report=self.admission.report))

    def begin(self, run_description):
        self.engine.begin(run_description, self.parts.ledger)

    def asked(self, change):
        """Play a round; return client 1's violation (or ``None``) and why it is left out."""
        self.round += 1
        adapter = self.parts.initial
        exchange = Exchange.broadcast(
            "train", self.round, (0, 1, 2), Payload(adapter, {"learning_rate": 1e-3}),
            Schema.of(adapter, (LEARNING_RATE,)),
            Schema.of(adapter, (EXAMPLES,), reported(self.parts.objective)),
        )  # fmt: skip

        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            found = envelope
            if node == 100 + BAD:
                found = change(self, envelope, header)
            self.earlier[node - 100] = envelope
            return found

        self.mail.tamper, self.told.kinds = tamper, []
        answers = self.engine.exchange(exchange)
        replies, rejected = self.admission.accept(answers, exchange, self.engine.sizes())
        assert {reply.client for reply in replies} | rejected.keys() == {0, 1, 2}
        assert {0, 2} <= {reply.client for reply in replies}
        kinds = [kind for client, kind in self.told.kinds if client == BAD]
        assert len(kinds) == len(self.told.kinds) <= 1  # nobody else's
        return (kinds or [None])[0], rejected.get(BAD)


def signed(site, header, payload, by=BAD):
    return resealed(site.federation, by, header, payload)


def header_as(**changes):
    """A header with other content, and the payload as it is."""
    return lambda site, envelope, header: signed(
        site, header.model_copy(update=changes), envelope.payload
    )


def raw(text):
    """A header of any text, well signed."""

    def change(site, envelope, header):
        key = read_key(site.federation.folder / f"{BAD}.key")
        content = text(json.loads(envelope.header))
        return Envelope(content, envelope.payload, sign(key, content))

    return change


def json_as(**changes):
    return raw(lambda header: json.dumps(header | changes).encode())


def payload_as(make):
    return lambda site, envelope, header: signed(site, header, make(envelope.payload))


def filled(value):
    def make(site, envelope, header):
        schema = Schema.of(site.parts.initial, (EXAMPLES,), reported(site.parts.objective))
        payload = decode(envelope.payload, schema)
        next(iter(payload.tensors.values())).fill_(value)
        return signed(site, header, encode(payload, schema))

    return make


def numbers(**metadata):
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    return payload_as(lambda payload: rewritten(payload, **texts))


def work(**changes):
    def change(site, envelope, header):
        done = {**json.loads(envelope.header)["work"][0], **changes}
        return json_as(work=[done])(site, envelope, header)

    return change


def half_signed(site, envelope, header):
    return Envelope(envelope.header, envelope.payload, envelope.signature[:-1] + b"x")


def too_long(site, envelope, header):
    limit = Schema.of(site.parts.initial, (EXAMPLES,), reported(site.parts.objective)).max_bytes
    return signed(site, header, envelope.payload + bytes(limit))


BY_HEADER = {
    "signed by another": (lambda s, e, h: signed(s, h, e.payload, by=2), "forged"),
    "not signed": (lambda s, e, h: replace(e, signature=b""), "forged"),
    "a signature of nothing": (half_signed, "forged"),
    "another payload than signed": (lambda s, e, h: replace(e, payload=b"x"), "forged"),
    "a payload cut off": (lambda s, e, h: replace(e, payload=e.payload[:-1]), "forged"),
    "its own answer of the round before": (lambda s, e, h: s.earlier[BAD], "replayed"),
    "another's answer, well signed": (lambda s, e, h: s.earlier[0], "replayed"),
    "another run": (header_as(run="1" * 32), "replayed"),
    "another round": (header_as(round=77), "replayed"),
    "another number": (header_as(number=77), "replayed"),
    "another stretch": (header_as(began=2), "replayed"),
    "no JSON": (raw(lambda h: b"{"), "malformed"),
    "a word of its own": (json_as(weight=9), "malformed"),
    "a word of its own for the terminal": (json_as(**{"\x1b[31mX": 9}), "malformed"),
    "a number as text": (json_as(number="1"), "malformed"),
    "a header of 65 kB": (raw(lambda h: json.dumps(h).encode() + b" " * 65_536), "oversized"),
    "an error of 4001 characters": (json_as(error="x" * 4001), "oversized"),
    "17 phases of work": (json_as(work=[{}] * 17), "oversized"),
    "more operations than there are": (work(flops=1.1e24), "out_of_range"),
    "tokens of 1e300": (work(tokens=10**300), "out_of_range"),
    "seconds below 0": (work(seconds=-1), "out_of_range"),
    "endless work": (
        raw(lambda h: json.dumps(h).encode().replace(b'"flops": ', b'"flops": 1e999, "x": ')),
        "not_finite",
    ),
}  # fmt: skip
"""What is wrong around a payload: a violation where it is proven who sent it."""

BY_CONTENT = {
    "no bytes": (payload_as(lambda p: b""), "malformed"),
    "garbage": (payload_as(lambda p: b"\x80\x04garbage"), "malformed"),
    "another schema": (payload_as(lambda p: rewritten(p, schema="0" * 16)), "malformed"),
    "one byte too many": (payload_as(lambda p: p + b"x"), "malformed"),
    "more bytes than the schema allows": (too_long, "oversized"),
    "NaN": (filled(float("nan")), "not_finite"),
    "infinity": (filled(float("-inf")), "not_finite"),
    "1e30": (filled(1e30), "out_of_range"),
    "2^40 examples": (numbers(numbers=[2**40]), "out_of_range"),
    "2^41 examples": (numbers(numbers=[2**41]), "out_of_range"),
    "no example": (numbers(numbers=[0]), "out_of_range"),
    "NaN examples": (numbers(numbers=[float("nan")]), "not_finite"),
    "no number": (numbers(numbers=[]), "malformed"),
    "an accuracy of 3e299": (numbers(metrics={"reward_accuracy": 3e299}), "out_of_range"),
    "an accuracy of -7": (numbers(metrics={"reward_accuracy": -7}), "out_of_range"),
    "a loss of NaN": (numbers(metrics={"loss": float("nan")}), "not_finite"),
    "64 new names": (numbers(metrics={f"m{i}": 1.0 for i in range(64)}), "too_many_names"),
    "one new name": (numbers(metrics={"score": 1.0}), "malformed"),
}  # fmt: skip
"""What is wrong with a payload whose header is signed for the very question: always its client's."""

HONEST = {
    "all is well": (lambda s, e, h: e, None),
    "it says that it failed": (header_as(error="out of memory"), "out of memory"),
    "Flower says that it failed": (lambda s, e, h: "Node Unavailable", "Node Unavailable"),
    "its words move the cursor": (header_as(error="a\x1b[2Jb\nc" * 500), "a?[2Jb ca"),
    "no metrics": (numbers(metrics={}), None),
}  # fmt: skip
"""What befalls an honest client, and why it is left out, if it is."""


@pytest.fixture
def site(loopback, experiment):
    settings = experiment(
        training={"local_steps": 1, "batch_size": 1},
        federation={"patience": 1.0, "deadline": 0.05},
        data={"builtin_rows": 45},
        evaluation={"per_client": False},
    )
    return lambda proven: Site(loopback(3), settings, proven)


@pytest.mark.slow
def test_each_offence_has_its_kind_where_the_sender_is_proven(site):
    own = site(True)
    assert own.asked(lambda s, e, h: e) == (None, None)
    for table in (BY_HEADER, BY_CONTENT):
        found = {name: own.asked(change) for name, (change, _) in table.items()}
        assert {name: kind for name, (kind, _) in found.items()} == {
            name: kind for name, (_, kind) in table.items()
        }
        for kind, reason in found.values():
            assert reason and reason.isprintable() and len(reason) <= 500, kind


def test_where_nobody_is_proven_only_what_is_signed_for_the_question_is_an_offence(site):
    """Without TLS anybody may answer in a node's place: a forged or a replayed reply is nobody's."""
    own = site(False)
    own.asked(lambda s, e, h: e)
    for name, (change, _) in list(BY_HEADER.items())[::3]:
        kind, reason = own.asked(change)
        assert kind is None and reason, name
    for name, (change, kind) in list(BY_CONTENT.items())[::4]:
        assert own.asked(change)[0] == kind, name


@pytest.mark.parametrize("proven", [True, False])
def test_what_befalls_an_honest_client_is_no_offence(site, proven):
    own = site(proven)
    for name, (change, words) in HONEST.items():
        kind, reason = own.asked(change)
        assert kind is None, name
        assert reason is None if words is None else reason.startswith(words), name
    late = own.asked(lambda s, e, h: None)
    assert late == (None, "no answer within 0.05 seconds")


def joining(**changes):
    return Joined(rows=3, held_out=1, model="m" * 64, version=version("fedloom")).model_copy(
        update=changes
    )


JOINS = {
    "forged": lambda reply, key: replace(seal(reply), signature=b"x"),
    "replayed": lambda reply, key: seal(reply.model_copy(update={"number": 99}), sign=key),
    "malformed": lambda reply, key: Envelope(b"{}", b"", key(b"{}")),
    "oversized": lambda reply, key: Envelope(b" " * 70_000, b"", b""),
}
NO_JOINS = {
    "another version": lambda reply, key: seal(
        reply.model_copy(update={"joined": joining(version="0")}), sign=key
    ),
    "another model": lambda reply, key: seal(
        reply.model_copy(update={"joined": joining(model="x")}), sign=key
    ),
    "it failed": lambda reply, key: seal(
        reply.model_copy(update={"joined": None, "error": "no rows"}), sign=key
    ),
    "Flower's word": lambda reply, key: "Node Unavailable",
}


@pytest.mark.parametrize("proven", [True, False])
def test_a_wrong_answer_to_who_it_is_is_an_offence_of_who_owns_the_node(site, proven):
    own = site(proven)
    roster, told = own.engine.run_clients, []
    roster.report = lambda client, kind, reason: told.append((client, kind))
    key = read_key(own.federation.folder / "1.key")
    asked = own.engine._header("join", BAD)
    reply = ReplyHeader(
        run=asked.run, began=1, client=BAD, round=0, number=asked.number, joined=joining()
    )
    for kind, make in JOINS.items():
        told.clear()
        roster.register(101, make(reply, lambda text: sign(key, text)), asked)
        assert told == ([(BAD, kind)] if proven else []), kind
    for name, make in NO_JOINS.items():
        told.clear()
        roster.register(101, make(reply, lambda text: sign(key, text)), asked)
        assert told == [], name
    told.clear()
    roster.register(101, MessageError("no envelope"), asked)
    assert told == ([(BAD, "malformed")] if proven else [])


def test_costs_are_those_of_the_exchange_and_last_no_longer_than_it_did(site):
    own = site(True)
    own.parts.ledger.take()
    other = {"phase": "train", "flops": 1.0, "seconds": 1e8, "peak_memory": 0, "tokens": 1}
    other |= {"targets": 1, "examples": 1, "steps": 1}
    phases = [other, {**other, "phase": "mine"}, {**other, "phase": "<b>evaluate"}]
    assert own.asked(json_as(work=phases)) == (None, None)
    costs = [cost for cost in own.parts.ledger.take() if cost.client == BAD]
    assert {cost.phase for cost in costs} == {"train"}
    assert sum(cost.seconds for cost in costs) < 10
