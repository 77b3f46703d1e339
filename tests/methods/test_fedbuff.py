"""FedBuff: the order of events by hand, staleness weights, kill and resume."""

import json
import math

import pytest
import torch

import fedloom
from absent import ALL_OF_IT, SCHEDULES, Schedule, played
from fedloom.errors import Interrupted, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run
from fedloom.wire.messages import Answer


@pytest.fixture
def settings(table, tmp_path):
    """The table of an experiment whose clients take so many seconds."""

    def make(latencies, method=None, **federation):
        path = tmp_path / "trace.csv"
        rows = [f"{client},1e21,1e21,1e21,{own}" for client, own in enumerate(latencies)]
        path.write_text("\n".join(["client,flops,up,down,latency", *rows]) + "\n")
        return {
            **table,
            "data": {**table["data"], "builtin_rows": 40},
            "training": {**table["training"], "local_steps": 1},
            "federation": {"clients": len(latencies), **federation},
            "method": {"name": "fedbuff", **(method or {})},
            "simulation": {"devices": {"trace": str(path)}},
        }

    return make


def moves(found):
    """Check that each update is the weighted sum of the changes that arrived; return clients by round."""
    eta, power = found.parts.method.settings.eta, found.parts.method.settings.staleness_exponent
    replies = {(own[1], own[2]): own[4].tensors for own in found.seen if own[0] == "train"}
    state, arrived = found.parts.initial, []
    for record, after in zip(found.records, found.states, strict=True):
        ages = {c: a for c, a in record.simulated.staleness.items() if c not in record.rejected}
        assert record.train["staleness"] == pytest.approx(sum(ages.values()) / len(ages))
        for name, tensor in after.tensors.items():
            moved = sum(
                replies[record.round - age, client][name].double() * (1 + age) ** -power
                for client, age in ages.items()
            )
            expected = state[name].double() + eta * moved / len(ages)
            assert torch.allclose(tensor.double(), expected, atol=1e-6, rtol=0)
        state = after.tensors
        arrived.append(ages)
    return arrived


def test_five_arrivals_by_hand(settings):
    """Three clients of 2, 3 and 7 seconds, all at work from 0 s on; the buffer holds two changes.

    2 s: client 0 (staleness 0); 3 s: client 1 (0), update 1, both are asked anew.
    5 s: client 0 (0); 6 s: client 1 (0), update 2, both are asked anew.
    7 s: client 2, which began before update 1 (2); 8 s: client 0 (0), update 3.
    """
    own = Experiment.from_table(
        settings((2, 3, 7), {"concurrency": 3}, clients_per_round=2, rounds=3)
    )
    found = played(own, Schedule())
    assert moves(found) == [{0: 0, 1: 0}, {0: 0, 1: 0}, {0: 0, 2: 2}]
    assert [r.simulated.end for r in found.records] == pytest.approx([3, 6, 8])
    assert [r.clients for r in found.records] == [(0, 1), (0, 1), (0, 2)]
    assert [r.simulated.in_flight for r in found.records] == [1, 1, 1]
    assert found.records[2].simulated.clients == pytest.approx({0: 2, 2: 7})
    # the third update by its own numbers: (d0 + d2 / sqrt(3)) / 2
    replies = {(own[1], own[2]): own[4].tensors for own in found.seen}
    for name, tensor in found.states[2].tensors.items():
        step = (replies[3, 0][name] + replies[1, 2][name] / math.sqrt(3)) / 2
        assert torch.allclose(tensor, found.states[1].tensors[name] + step, atol=1e-6, rtol=0)
        assert torch.equal(
            found.seen[0][3].tensors[name], found.parts.initial[name]
        )  # what all were sent at 0 s


def test_a_buffer_for_all_is_a_synchronous_round_with_equal_weights(settings):
    table = {
        **settings((2, 3, 7), rounds=2),
        "data": {"source": "builtin:preferences", "builtin_rows": 45},
    }
    found = played(Experiment.from_table(table), Schedule())
    assert moves(found) == [{0: 0, 1: 0, 2: 0}] * 2
    assert [r.simulated.end for r in found.records] == pytest.approx([7, 14])
    plain = played(Experiment.from_table({**table, "method": {"name": "fedavg"}}), Schedule())
    assert len({len(s) for s in found.parts.local.shares.values()}) == 1  # so weights are alike
    for one, two in zip(found.states, plain.states, strict=True):
        for name, tensor in one.tensors.items():
            assert torch.allclose(tensor, two.tensors[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        ALL_OF_IT,
        *(pytest.param(own, marks=pytest.mark.slow, id=n) for n, own in SCHEDULES.items()),
    ],
)
def test_changes_of_who_answered_alone_are_added(settings, schedule):
    table = settings((2, 3, 4, 7), {"eta": 0.5}, clients_per_round=2, rounds=4, quorum=0.2)
    found = played(Experiment.from_table(table), schedule)
    for number, ages in enumerate(moves(found), 1):
        for client, age in ages.items():
            assert client not in schedule.missing(number - age)
            assert client not in schedule.late.get(number - age, set())


class Stop(Silent):
    """Stops a run as Ctrl-C would, after a round is written or in the midst of the next."""

    def __init__(self, round, *, midst):
        self.round, self.midst = round, midst

    def client_done(self, round, client, done, of):
        if self.midst and round == self.round + 1:
            raise KeyboardInterrupt

    def round_done(self, record):
        if not self.midst and record.round == self.round:
            raise KeyboardInterrupt


def lines(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "rounds.jsonl").read_text().splitlines()
    ]


def test_killed_and_resumed_with_work_in_flight_ends_with_the_same_bits(settings, tmp_path):
    table = settings((2, 3, 7, 11), {"concurrency": 3}, clients_per_round=1, rounds=5)
    table["objective"] = {"name": "sft"}
    table["data"] = {"source": "builtin:instructions", "builtin_rows": 40}
    table["evaluation"] = {**table["evaluation"], "per_client": False, "every": 5}

    def made(name):
        return Experiment.from_table(
            {**table, "output": {"folder": str(tmp_path / name), "verify": False}}
        )

    whole = fedloom.run(made("whole"))
    with pytest.raises(Interrupted):
        fedloom.run(made("broken"), observer=Stop(2, midst=False))
    assert any((tmp_path / "broken/checkpoints").glob("*/in_flight.safetensors"))
    with pytest.raises(Interrupted):
        resume_run(tmp_path / "broken", observer=Stop(3, midst=True))
    again = resume_run(tmp_path / "broken")
    assert lines(again.folder) == lines(whole.folder)
    assert any(max(r["simulated"]["staleness"].values(), default=0) for r in lines(again.folder))
    one, two = (
        (own.folder / "adapter/adapter_model.safetensors").read_bytes() for own in (whole, again)
    )
    assert one == two


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"method": {"concurrency": 9}},
            "method.concurrency = 9 is above the 8 clients that train",
        ),
        (
            {"federation": {"replacements": 1}},
            "federation.replacements: method.name = 'fedbuff' asks",
        ),
        (
            {"federation": {"extra": 1, "clients_per_round": 2}, "simulation": {"devices": {}}},
            "federation.extra: method.name = 'fedbuff' asks",
        ),
        (
            {"training": {"keep_optimizer_state": True}},
            "training.keep_optimizer_state: method.name",
        ),
        ({"aggregation": {"rule": "median"}}, "puts updates together in a way of its own"),
    ],
)
def test_what_it_does_not_go_with(sections, words):
    sections = {**sections, "method": {"name": "fedbuff", **sections.get("method", {})}}
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(sections)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]


WIRE = {"up": ["ternary:nearest", "zstd"], "down": "int4", "keep_plain_below": 0}


@pytest.mark.parametrize("feedback", ["classic", pytest.param("ef21", marks=pytest.mark.slow)])
def test_with_codecs_a_run_that_is_killed_with_work_in_flight_ends_with_the_same_bits(
    settings, tmp_path, feedback
):
    table = settings((2, 3, 7, 11), {"concurrency": 3}, clients_per_round=1, rounds=5)
    table["objective"] = {"name": "sft"}
    table["data"] = {"source": "builtin:instructions", "builtin_rows": 40}
    table["evaluation"] = {**table["evaluation"], "per_client": False, "every": 5}
    table["wire"] = {**WIRE, "error_feedback": feedback}

    def made(name):
        return Experiment.from_table(
            {**table, "output": {"folder": str(tmp_path / name), "verify": False}}
        )

    whole = fedloom.run(made("whole"))
    with pytest.raises(Interrupted):
        fedloom.run(made("broken"), observer=Stop(2, midst=False))
    again = resume_run(tmp_path / "broken")
    assert lines(again.folder) == lines(whole.folder)
    assert any(max(r["simulated"]["staleness"].values(), default=0) for r in lines(again.folder))


@pytest.mark.parametrize(
    "feedback", ["classic", "ef21", pytest.param("none", marks=pytest.mark.slow)]
)
def test_a_change_is_of_what_its_client_was_sent_and_what_it_lost_is_its_own(
    settings, federate, feedback
):
    """What is read and what is left add up to all changes of a client, however old its answers are."""
    table = settings((2, 3, 7), {"concurrency": 3}, clients_per_round=2, rounds=5)
    table["wire"] = {**WIRE, "error_feedback": feedback, "absence_decay": 1.0}
    changed, read, versions = {}, {}, {}

    def watch(parts):
        handler = parts.local.handlers["train"]

        def train(client, payload):
            reply = yield from handler(client, payload)
            changed.setdefault(client.id, []).append(reply.tensors)
            versions.setdefault(client.round, {})[client.id] = payload.tensors
            return reply

        parts.local.handlers = {**parts.local.handlers, "train": train}
        play = parts.method.round

        def round(state, cohort):
            steps = play(state, cohort)
            replies = yield next(steps)
            for reply in replies:
                own = {name: tensor.clone() for name, tensor in reply.payload.tensors.items()}
                read.setdefault(reply.client, []).append(own)
            with pytest.raises(StopIteration) as stop:
                steps.send(replies)
            return stop.value.value

        parts.method.round = round

    found = federate(Experiment.from_table(table), watch)
    assert any(max(own.simulated.staleness.values()) for own in found.records)
    assert not any(own.rejected for own in found.records)
    for sent in versions.values():  # all of a round hold the same model, whichever they held before
        first, *others = sent.values()
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    slots = {c: found.parts.local.store.slots(c) for c in range(3)}
    for client, own in read.items():
        arrived = changed[client][: len(own)]
        in_flight = changed[client][len(own) :]
        for name in found.adapter:
            if feedback == "classic" and not in_flight:
                left = slots[client]["[wire] residual train"][name].double()
                total = sum(one[name].double() for one in own) + left
                whole = sum(one[name].double() for one in arrived)
                assert torch.allclose(total, whole, atol=1e-6)
            if feedback == "ef21" and not in_flight:
                assert torch.allclose(own[-1][name], slots[client]["[wire] estimate train"][name])
    facts, _ = found.compression.saved()
    held = facts["held"]["train"]
    for client, age in found.records[-1].simulated.staleness.items():
        assert held["clients"][str(client)] == held["version"] - age


def test_what_a_client_lost_before_an_answer_that_did_not_count_is_dropped(settings, federate):
    """Its store was put aside when it worked; it begins anew, and no residual is applied twice."""
    table = settings((2, 3, 7), {"concurrency": 3}, clients_per_round=2, rounds=4, quorum=0.1)
    table["wire"] = {**WIRE, "error_feedback": "classic"}
    fresh = {}

    def watch(parts):
        carried = parts.engine.exchange

        def exchange(asked):
            for answer in carried(asked):
                refused = asked.round == 1 and answer.client == 2
                yield Answer(answer.client, error="its disk is full") if refused else answer

        parts.engine.exchange = exchange

    def keep(record, parts):
        fresh[record.round] = record

    found = federate(Experiment.from_table(table), watch, after=keep)
    refused = [r.round for r in found.records if 2 in r.rejected]
    assert refused == [3]
    assert found.compression.saved()[0]["estimates"]["train"]["afresh"] == [2]
    assert found.compression.saved()[0]["held"]["train"]["clients"]["2"] == -1


def test_codecs_that_change_by_round_are_refused(settings):
    for wire in ({"budget": "1MB"}, {"up": "auto"}):
        table = {**settings((2, 3), clients_per_round=1), "wire": wire}
        with pytest.raises(SettingsError, match="answers to requests of earlier rounds"):
            Experiment.from_table(table)
