"""Secure aggregation between machines: the bits of one process, drop-outs, and what a client refuses."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.error_report import LINES
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.policy_enforcement import permitted
from fedloom.deployment.secure_sums import SecureSums
from fedloom.engines.flower.records import from_records
from fedloom.errors import PolicyError, RoundFailed, SettingsError, SumRefused
from fedloom.experiment.experiment import Experiment
from fedloom.federation.secure_exchange import (
    KEYS,
    MASKED,
    PROTOCOL,
    REVEALED,
    SHARES,
    SIGNATURES,
)
from fedloom.methods import METHODS
from fedloom.privacy.secure_aggregation.protocol_messages import ids
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.keys import make_key, read_key
from fedloom.security.signing_keys import certificate, fingerprint
from fedloom.wire.envelope import Envelope, Peer, ReplyHeader, RequestHeader, SigningKey, seal
from fedloom.wire.messages import Answer, Payload, decode, encode
from fedloom.wire.schema import Schema
from loopback import ADAPTERS, Outcome, client_file, of, resealed
from sampling import sampled

STAGES = (KEYS, SHARES, "train", SIGNATURES, REVEALED)

SUMMED = [
    name
    for name, (_, kind) in METHODS.items()
    if kind.declares.secure_aggregation.holds and not kind.own_models
]

STRANGER = f"SHA256:{'A' * 43}"


def prints(federation):
    """Fingerprint of each client's key."""
    keys = [(federation.folder / f"{n}.pub").read_text().strip() for n in range(federation.clients)]
    return [fingerprint(line) for line in keys]


class Site:
    """A coordinator and clients whose files name each other's keys."""

    def __init__(
        self, table, loopback, folder, clients=4, rounds=1, privacy=None, policies=None, **sections
    ):
        folder.mkdir(exist_ok=True)
        waits = {"patience": 1.0, "deadline": 60.0, **sections.pop("federation", {})}
        training = {"local_steps": 1, **sections.pop("training", {})}
        self.table = {
            **table,
            **sections,
            "federation": {"rounds": rounds, "clients": clients, **waits},
            "training": {**table["training"], **training},
            "evaluation": {"per_client": False, "samples": 0, "max_examples": 4},
            "privacy": {"secure_aggregation": True, **(privacy or {})},
            "output": {"folder": str(folder / "there"), "verify": False},
        }
        self.experiment = Experiment.from_table(self.table)
        self.federation = loopback(clients)
        known, files = prints(self.federation), {}
        for number in range(clients):
            own = {
                "secure_aggregation": True,
                "peers": known[:number] + known[number + 1 :],
                **(policies or {}).get(number, {}),
            }
            files[number] = client_file(
                folder / f"c{number}.toml",
                models=self.federation.models,
                policy={"privacy": {name: value for name, value in own.items() if value}},
            )
        self.files = files
        self.mail = self.federation.mail(own=files)

    def restart(self, number):
        """Kill a client and start it again."""
        worker = self.federation.worker(number, self.files[number])
        self.mail.workers[100 + number] = worker
        return worker

    def at(self, action, do, round=1):
        """Do something just before a client is asked for a stage, once for each client."""
        answer = self.mail._reply
        self.mail._reply = lambda node, message: (
            do(node - 100)
            if (header := self.header(message)).action == action and header.round == round
            else None,
            answer(node, message),
        )[1]

    @staticmethod
    def header(message):
        return from_records(message.content).read(RequestHeader)

    def run(self, **options):
        engine = self.federation.engine(self.experiment, self.mail, **options)
        result = run_experiment(self.experiment, observer=Silent(), remote=engine)
        return Outcome(result.folder, engine, self.mail, self.federation)

    def again(self, sent, client=0, **changes):
        """Send a client a message that it was sent before, changed; return the header of its reply."""
        changes = {"number": sent.read(RequestHeader).number + 1000, **changes}
        header = sent.read(RequestHeader).model_copy(update={**changes, "payload": ""})
        payload = changes.pop("content", sent.payload)
        packed = self.mail.workers[100 + client].answer(seal(header, payload).pack(), streamed=True)
        envelope = Envelope.unpack(packed)
        assert not envelope.payload
        return envelope.read(ReplyHeader)

    def asked(self, number):
        """Return the header of a message by its number."""
        headers = (own.read(RequestHeader) for _, own in reversed(self.mail.pushed))
        return next(own for own in headers if own.number == number)

    def sent(self, client, action, round=1):
        """Return what a client was sent for a stage."""
        for node, envelope in self.mail.pushed:
            header = envelope.read(RequestHeader)
            if (node, header.action, header.round) == (100 + client, action, round):
                return envelope
        raise AssertionError(f"client {client} was never asked to {action}")


@pytest.fixture
def site(table, loopback, tmp_path):
    return lambda folder="", **options: Site(table, loopback, tmp_path / folder, **options)


def away(gone):
    """Have clients of a simulation, given by exchange, not answer one, stages of sums aside."""

    def break_(parts):
        carried = parts.engine.exchange

        def exchange(asked):
            for answer in carried(asked):
                left = asked.action not in PROTOCOL and answer.client in gone(asked)
                yield Answer(answer.client, error="it went away") if left else answer

        parts.engine.exchange = exchange

    return break_


def simulated(federate, found, without=()):
    """The state after the rounds of a simulation in which some clients never answer."""
    return federate(found.experiment, away(lambda asked: set(without))).state.digest()


def test_the_bits_are_those_of_a_simulation_and_only_masked_numbers_travel(site, federate):
    found = site(clients=3)
    outcome = found.run()
    assert outcome.states[-1:] == [simulated(federate, found)]
    actions = [
        envelope.read(RequestHeader).action for node, envelope in found.mail.pushed if node == 100
    ]
    assert actions[1:6] == list(STAGES)
    answers = []
    for node, envelope in found.mail.pulled:
        header = envelope.read(ReplyHeader)
        assert header.error is None
        if header.round and header.work and header.work[-1].phase == "train":
            asked = found.sent(node - 100, "train").read(RequestHeader)
            schema = Schema.from_table(asked.reply)
            assert [spec.name for spec in schema.tensors] == [MASKED] and not schema.numbers
            answers.append(decode(envelope.payload, schema).tensors[MASKED].numpy().tobytes())
    assert len(answers) == len(set(answers)) == 3
    assert not (found.federation.home(0).path / "peers.toml").exists()
    bytes_down = {
        c["phase"]: c["bytes_down"] for c in outcome.lines("costs.jsonl") if not c["client"]
    }
    keys, train = found.sent(0, KEYS), found.sent(0, "train")
    peers = keys.read(RequestHeader).summed.peers
    assert len(peers) == 3
    assert bytes_down[KEYS] == len(keys.payload) + sum(len(own.model_dump_json()) for own in peers)
    shares = train.read(RequestHeader).summed.shares
    assert bytes_down["train"] == len(train.payload) + len(shares) and len(shares) > 200
    page = (outcome.folder / "run.json").read_text()
    assert "each client's own file says whose keys" in page


@pytest.mark.slow
@pytest.mark.parametrize("action", STAGES)
def test_a_client_killed_before_a_stage_has_dropped_out_there(site, federate, action):
    """Its successor has no keys of the sum; what it had sent before counts, and the sum is right."""
    found = site()
    found.at(action, lambda number: found.restart(number) if number == 2 else None)
    if action == KEYS:  # the successor can begin a sum
        found.at(SHARES, lambda number: found.restart(number) if number == 2 else None)
    outcome = found.run()
    counts = action in (SIGNATURES, REVEALED)
    assert outcome.states[-1:] == [simulated(federate, found, () if counts else (2,))]
    (record,) = outcome.rounds
    said = of(record, 2)
    assert said is None if counts else "takes part in no sum of this run and round" in said


@pytest.mark.slow
def test_the_deadline_of_a_round_holds_for_each_stage(site, federate):
    found = site(federation={"deadline": 3.0})
    found.mail.tamper = silent(found, 2, SIGNATURES)
    outcome = found.run()
    assert outcome.states[-1:] == [simulated(federate, found)]
    found = site(federation={"deadline": 3.0}, folder="other")
    found.mail.tamper = silent(found, 2, SHARES)
    outcome = found.run()
    assert outcome.states[-1:] == [simulated(federate, found, (2,))]
    assert of(outcome.rounds[0], 2) == "no answer within 3 seconds"


def silent(found, client, action):
    """Have a client's answer to a stage be lost."""

    def tamper(node, envelope):
        number = envelope.read(ReplyHeader).number
        asked = found.asked(number)
        return None if (node, asked.action) == (100 + client, action) else envelope

    return tamper


@pytest.mark.slow
@pytest.mark.parametrize("method", sampled(sorted(SUMMED), 2))
def test_a_method_gives_the_bits_of_a_simulation_also_when_an_answer_is_lost(
    site, federate, method
):
    """What a client has stored with an answer that does not count is discarded."""
    found = site(
        rounds=2,
        method={"name": method},
        adapter={"rank": 2, **ADAPTERS.get(method, {})},
        objective={"name": {"fedpdpo": "pdpo"}.get(method, "dpo")},
        training={"local_steps": 2},
    )
    actions = []

    def tamper(node, envelope):
        asked = found.asked(envelope.read(ReplyHeader).number)
        lost = node == 102 and asked.round == 1 and asked.summed and asked.action not in PROTOCOL
        actions.append(asked.action)
        return "its answer was lost" if lost else envelope

    found.mail.tamper = tamper
    outcome = found.run()
    here = federate(found.experiment, away(lambda asked: {2} if asked.round == 1 else ()))
    assert outcome.states[-1:] == [here.state.digest()] and KEYS in actions


@pytest.mark.slow
def test_rows_that_are_hidden_are_summed_too(site, federate):
    """The profile "regulated"; with noise from the seed it has the bits of a simulation."""
    privacy = {"profile": "regulated", "noise_multiplier": 1.0, "seeded": True, "accountant": "rdp"}
    found = site(clients=3, privacy=privacy)
    outcome = found.run()
    assert outcome.states[-1:] == [simulated(federate, found)]
    said = " ".join((outcome.folder / name).read_text() for name in ("run.json", "summary.json"))
    assert "the server sees sums of the updates" in said


@pytest.mark.slow
def test_too_few_that_are_left_lose_the_round_with_the_reason(site):
    found = site(clients=3)
    found.at("train", lambda number: found.restart(number) if number == 2 else None)
    with pytest.raises(RoundFailed, match=r"round 1: secure aggregation: 2 .*masked answers"):
        found.run()


@pytest.mark.slow
def test_a_server_that_is_killed_and_resumed_gives_the_same_bits(site, federate):
    """In the middle of a sum: clients keep what they had, and have other keys in the sum that is made again."""
    found = site(rounds=2)
    whole = simulated(federate, found)

    def dies(number):
        raise KeyboardInterrupt

    found.at(SIGNATURES, dies, round=2)
    with pytest.raises(BaseException, match="resume"):
        found.run()
    del found.mail._reply
    folder = Path(found.experiment.output.folder)
    before = found.sent(0, KEYS, round=2)
    engine = found.federation.engine(found.experiment, found.mail)
    resume_run(folder, observer=Silent(), remote=engine)
    states = Outcome(folder, engine, found.mail, found.federation).states
    assert states[-1] == whole
    reply = found.again(before)
    assert reply.error == "the run has been resumed since this was sent"


def test_a_client_refuses_what_would_show_its_update(site):
    found = site(clients=3)
    found.run()
    refused = "secure aggregation: this client takes part in no sum of this run and round"
    for action in (SHARES, "train", SIGNATURES, REVEALED):  # the sum has ended, with its keys
        assert found.again(found.sent(0, action)).error == refused
    reply = found.again(found.sent(0, KEYS), number=5001)
    assert reply.error.endswith("asks for a sum again that this client has ended")
    train = found.sent(0, "train")
    reply = found.again(train, number=5002, summed=None)
    assert "asks for this client's answer by itself" in reply.error and not reply.payload
    summed = train.read(RequestHeader).summed
    reply = found.again(
        train, number=5003, summed=summed.model_copy(update={"clients": 1 << 19, "bits": 24})
    )
    assert reply.error == f"policy.max_clients: {LINES['policy.max_clients']}"
    keys = found.sent(0, KEYS).read(RequestHeader).summed
    listed = keys.model_copy(update={"peers": [*keys.peers, keys.peers[0]]})
    reply = found.again(found.sent(0, KEYS), number=5006, summed=listed)
    assert "lists the keys of 4 clients for a sum of 3" in reply.error
    many = summed.model_copy(update={"clients": 9999, "bits": 24})
    assert "do not fit 32 bits" in found.again(train, number=5004, summed=many).error
    other = found.again(found.sent(0, REVEALED), number=5005, run="f" * 32)
    assert other.error is not None and not other.payload


@pytest.mark.slow
def test_a_second_list_of_survivors_is_refused_and_nothing_is_revealed(site, federate):
    """With both lists signed a server could have both secrets of a client."""
    found, said = site(), []

    def tell(number):
        if number == 0:
            content = encode(
                Payload({"message": _bytes(ids([0, 1, 2]))}),
                Schema.from_table(found.sent(0, SIGNATURES).read(RequestHeader).request),
            )
            said.append(found.again(found.sent(0, SIGNATURES), number=7001, content=content).error)

    found.at(REVEALED, tell)
    outcome = found.run()  # the others' shares suffice
    assert said == [
        "secure aggregation: a server asks to confirm where reveal is due: each stage is answered once"
    ]
    replies = [own.read(ReplyHeader) for node, own in found.mail.pulled if node == 100]
    assert "where nothing is due" in replies[5].error and not replies[5].payload
    assert outcome.states[-1:] == [simulated(federate, found)]


def _bytes(data):
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


class Peers:
    """A client that is asked which keys of others it takes."""

    def __init__(self, folder, policy):
        self.keys, self.folder = [], folder
        for number in range(4):
            make_key(folder / f"{number}.key")
            self.keys.append(read_key(folder / f"{number}.key"))
        self.lines = [" ".join((folder / f"{n}.pub").read_text().split()[:2]) for n in range(4)]
        self.prints = list(map(fingerprint, self.lines))
        own = PolicySettings.model_validate({"privacy": policy(self.prints)})
        home = ClientFolder(folder)
        self.sums = SecureSums(home, "fed:9092", self.keys[0], "a" * 32, 0, 10, own)
        self.noted = []

    def peer(self, number, run="a" * 32, owner=None, **changes):
        signing = self.keys[number if owner is None else owner]
        public, signature = certificate(signing, run, number, 10 + number)
        facts = {
            "client": number,
            "member": 10 + number,
            "key": self.lines[number],
            "signing": SigningKey(public=public.hex(), signature=signature.hex()),
        }
        return Peer(**{**facts, **changes})

    def registry(self, *peers):
        return self.sums.registry(peers, lambda **facts: self.noted.append(facts["keys"]))


def test_a_client_takes_keys_that_it_trusts_and_that_their_owners_certify(tmp_path):
    found = Peers(tmp_path, lambda known: {"peers": known[1:3]})
    three = [found.peer(n) for n in range(3)]
    registry = found.registry(*three)
    assert {c: own.hex() for c, own in registry.items()} == {
        n: three[n].signing.public for n in range(3)
    }
    for changed, why in (
        ([found.peer(2, run="b" * 32)], "client 2 is not certified by its own key for this run"),
        ([found.peer(2, owner=3)], "not certified"),
        ([found.peer(2, member=99)], "not certified"),
        ([found.peer(1)], "listed twice"),
        ([found.peer(2, key="ssh-rsa AAAA")], "the key of client 2"),
        ([], "a sum of 2 clients is refused: 3 are the fewest"),
    ):
        with pytest.raises(SumRefused, match=why):
            found.registry(*three[:2], *changed)
    with pytest.raises(SumRefused, match="lacks this one"):
        found.registry(found.peer(1), found.peer(2), found.peer(3))
    with pytest.raises(PolicyError, match=rf"name {re.escape(found.prints[3])} \(client 3"):
        found.registry(*three, found.peer(3))
    assert not found.noted and not (tmp_path / "peers.toml").exists()


def test_a_member_with_two_keys_is_refused(tmp_path):
    found = Peers(tmp_path, lambda known: {"peers": known[1:4]})
    public, signature = certificate(found.keys[2], "a" * 32, 2, 11)
    twin = SigningKey(public=public.hex(), signature=signature.hex())
    with pytest.raises(SumRefused, match="member 11 is listed twice"):
        found.registry(found.peer(0), found.peer(1), found.peer(2, member=11, signing=twin))


def test_work_is_for_one_sum_which_was_begun(tmp_path):
    sums = Peers(tmp_path, lambda known: {"peers": known[1:3]}).sums

    def ask(number, round=1, payload="p", began=(1,), begun=True):
        header = SimpleNamespace(began=began, round=round, action="train", payload=payload)
        sums.require_first_sum(header, SimpleNamespace(number=number), begun=begun)

    ask(0)
    ask(0)  # a request that came twice
    ask(1, payload="q")
    ask(1, began=(1, 2))  # after a resume
    ask(0, began=(1, 2), round=2)
    with pytest.raises(SumRefused, match="the same work in a second sum"):
        ask(1, began=(1, 2), round=2)
    with pytest.raises(SumRefused, match="takes part in no sum"):
        ask(0, round=3, begun=False)


def test_own_key_under_another_number_is_refused(tmp_path):
    """So that a server cannot make up a sum of one client."""
    found = Peers(tmp_path, lambda known: {"peers": known[1:3]})
    twin = found.peer(3, owner=0, key=found.lines[0])
    with pytest.raises(SumRefused, match="listed twice"):
        found.registry(found.peer(0), found.peer(1), twin)


def test_a_key_that_is_trusted_at_its_first_use_stays(tmp_path):
    found = Peers(tmp_path, lambda known: {"trust_first_use": True})
    three = [found.peer(n) for n in range(3)]
    assert set(found.registry(*three)) == {0, 1, 2}
    assert found.noted == [sorted(found.prints[1:3])]
    found.registry(*three)
    assert len(found.noted) == 1
    other = found.peer(2, owner=3, key=found.lines[3])
    with pytest.raises(PolicyError, match="trust_first_use: client 2 has another key than before"):
        found.registry(*three[:2], other)


@pytest.mark.slow
def test_a_client_that_does_not_trust_another_is_left_out_with_the_reason(site, federate):
    found = site(policies={3: {"peers": [STRANGER, f"SHA256:{'B' * 43}"]}})
    outcome = found.run()
    (record,) = outcome.rounds
    assert of(record, 3) == f"policy.privacy.peers: {LINES['policy.privacy.peers']}"
    assert outcome.states[-1:] == [simulated(federate, found, (3,))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signing", "why"),
    [
        (None, "knows no secure aggregation between machines: upgrade it"),
        (SigningKey(public="00" * 32, signature="00" * 64), "not certified by its own key"),
    ],
)
def test_a_client_whose_signatures_nobody_could_check_is_not_let_in(site, signing, why):
    found = site(clients=3)

    def tamper(node, envelope):
        header = envelope.read(ReplyHeader)
        if node != 101 or header.joined is None:
            return envelope
        joined = header.joined.model_copy(update={"signing": signing})
        changed = header.model_copy(update={"joined": joined})
        return resealed(found.federation, 1, changed, envelope.payload)

    found.mail.tamper = tamper
    with pytest.raises(RoundFailed, match=f"client 1.*{why}"):
        found.run()


def own_file(tmp_path, **privacy):
    path = client_file(tmp_path / "own.toml", models=["tiny"], policy={"privacy": privacy})
    return OwnFile.read(path)


def test_the_policy_decides_which_runs_are_let_in(table, tmp_path):
    plain = {**table, "model": {"path": "tiny"}, "evaluation": {"per_client": False}}
    summed = {**plain, "privacy": {"profile": "consortium"}}
    texts = [Experiment.from_table(own).to_toml() for own in (plain, summed)]
    peers = [STRANGER, f"SHA256:{'B' * 43}"]
    demanding = own_file(tmp_path, secure_aggregation=True, peers=peers)
    with pytest.raises(PolicyError, match=r"policy.privacy.secure_aggregation: .*see this client"):
        permitted(texts[0], demanding, 0, 0)
    assert permitted(texts[1], demanding, 0, 0).privacy.secure_aggregation
    with pytest.raises(PolicyError, match=r"policy.privacy.peers: it names no key"):
        permitted(texts[1], own_file(tmp_path), 0, 0)
    assert permitted(texts[1], own_file(tmp_path, trust_first_use=True), 0, 0)


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        ({"peers": ["SHA256:short"]}, "must be the fingerprint of a key"),
        ({"peers": [STRANGER]}, "names 1 other member: a sum has 3 clients"),
        ({"peers": [STRANGER, STRANGER[:-1] + "B"], "trust_first_use": True}, "not both"),
        ({"secure_aggregation": True}, "needs policy.privacy.peers"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, privacy, why):
    with pytest.raises(SettingsError, match=why):
        own_file(tmp_path, **privacy)
