"""FedBuff between machines: answers as they arrive, recorded so that a simulation repeats the bits."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import fedloom
from fedloom.errors import Interrupted, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.answer_order import order_of_answers
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import match
from fedloom.wire.envelope import ReplyHeader, RequestHeader

ROUNDS = 5


@pytest.fixture
def experiment(table, tmp_path):
    """Make an experiment of four clients, of which three are at work and two fill the buffer."""

    def make(name, **sections):
        own = {
            **table,
            "data": {"source": "builtin:instructions", "builtin_rows": 32},
            "objective": {"name": "sft"},
            "training": {**table["training"], "local_steps": 1},
            "evaluation": {"samples": 0, "per_client": False, "every": ROUNDS},
            "federation": {
                "clients": 4, "clients_per_round": 2, "rounds": ROUNDS, "seed": 3, "patience": 5.0,
            },
            "method": {"name": "fedbuff", "concurrency": 3},
            "output": {"folder": str(tmp_path / name), "verify": False},
        }  # fmt: skip
        for section, changes in sections.items():
            own[section] = {**own.get(section, {}), **changes}
        return Experiment.from_table(own)

    return make


class OneByOne:
    """Lets one answer come at a time: that of the last node that was asked, and now and then the first."""

    def __init__(self):
        self.polls = 0

    def __call__(self, due):
        joins = [one for one in due if "exchange" not in str(one.content)]
        self.polls += 1
        return joins or (due[:1] if self.polls % 4 == 0 else due[-1:])


def rounds(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def arrivals(folder):
    return [own["arrivals"]["staleness"] for own in rounds(folder)]


def adapter(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def answers(folder):
    """The SHA-256 of each answer that counted, byte for byte, with its client."""
    events = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    taken = (own for own in events if own["event"] == "accepted" and own["action"] == "train")
    return {(own["client"], own["message"]) for own in taken}


def states(folder):
    """The SHA-256 of the server's state after each round, the last where a round was run twice."""
    events = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    return {own["round"]: own["state"] for own in events if own["event"] == "round"}


def replayed(experiment, name, folder, **sections):
    result = fedloom.run(experiment(name, simulation={"replay": str(folder)}, **sections))
    assert arrivals(result.folder) == arrivals(folder)
    assert states(result.folder) == states(folder)
    assert adapter(result.folder) == adapter(folder)


@pytest.mark.full
def test_answers_count_as_they_arrive_and_a_simulation_of_the_records_has_the_same_bits(
    experiment, loopback
):
    own, federation = experiment("deployed"), loopback(4)
    mail = federation.mail(source="builtin:instructions", order=OneByOne())
    done = run_experiment(own, observer=Silent(), remote=federation.engine(own, mail))
    found = arrivals(done.folder)
    assert len(found) == ROUNDS and all(len(ages) == 2 for ages in found)
    assert max(max(ages.values()) for ages in found) > 0
    assert [own["arrivals"]["in_flight"] for own in rounds(done.folder)][:-1] == [2] * (ROUNDS - 1)
    replayed(experiment, "replayed", done.folder)


class Stop(Silent):
    """Stops a run as Ctrl-C would when the second answer of its third round has come."""

    def client_done(self, round, client, done, of):
        if (round, done) == (3, 1):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_server_that_is_stopped_goes_on_and_all_its_rounds_are_repeated(experiment, loopback):
    """A client that fails is left out, and its work is not repeated; one evaluation waits for all."""
    judged = {"evaluation": {"per_client": True}}
    own, federation = experiment("deployed", **judged), loopback(4)
    mail = federation.mail(source="builtin:instructions", order=OneByOne())
    failing(mail, federation)
    with pytest.raises(Interrupted):
        run_experiment(own, observer=Stop(), remote=federation.engine(own, mail))
    folder = Path(own.output.folder)
    assert any(folder.glob("checkpoints/round-0002/in_flight.safetensors"))
    before = len(mail.pushed)
    done = resume_run(folder, remote=federation.engine(own, mail))
    asked = [header(envelope) for _, envelope in mail.pushed[before:]]
    again = [own for own in asked if own.kind == "exchange" and own.round == 2]
    assert len(again) == 2 and all(own.action == "train" for own in again)  # in flight: asked anew
    assert any(own["rejected"] for own in rounds(folder))
    assert rounds(folder)[-1]["evaluation"]["clients"]
    replayed(experiment, "replayed", done.folder, **judged)


WIRE = {"up": ["ternary:nearest", "zstd"], "down": "int4", "keep_plain_below": 0}


class StopAgain(Silent):
    """Stops a run in the midst of each of these rounds, once."""

    def __init__(self, *rounds):
        self.rounds = list(rounds)

    def client_done(self, round, client, done, of):
        if round in self.rounds:
            self.rounds.remove(round)
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "feedback", ["classic", "ef21", pytest.param("none", marks=pytest.mark.full)]
)
def test_coded_answers_of_a_server_that_is_stopped_twice_are_repeated_with_the_same_bits(
    experiment, loopback, feedback
):
    """Clients have done what they are asked for again: they begin from what they stored before it."""
    coded = {"wire": {**WIRE, "error_feedback": feedback}}
    own, federation = experiment("deployed", **coded), loopback(4)
    mail, stop = federation.mail(source="builtin:instructions"), StopAgain(3, 4)
    failing(mail, federation)
    folder = Path(own.output.folder)
    with pytest.raises(Interrupted):
        run_experiment(own, observer=stop, remote=federation.engine(own, mail))
    with pytest.raises(Interrupted):
        resume_run(folder, observer=stop, remote=federation.engine(own, mail))
    before = len(mail.pushed)
    done = resume_run(folder, remote=federation.engine(own, mail))
    asked = [header(envelope) for _, envelope in mail.pushed[before:]]
    again = [own for own in asked if own.kind == "exchange" and own.round < 4]
    assert again and all(own.undone for own in again)  # in flight: done before, and asked for anew
    assert max(max(ages.values()) for ages in arrivals(folder)) > 0
    assert any(own["rejected"] for own in rounds(folder))
    replayed(experiment, "replayed", done.folder, **coded)
    assert answers(done.folder.with_name("replayed")) <= answers(done.folder)
    for client in range(4):
        assert match(folder, federation.home(client).path).asked


def failing(mail, federation):
    """Have the first client fail that trains what it is sent in round 4."""
    failed = []

    def tamper(node, envelope):
        if envelope.read(ReplyHeader).round == 4 and not failed:
            failed.append(node)
            return "its machine was switched off"
        return envelope

    mail.tamper = tamper


def header(envelope):
    return envelope.read(RequestHeader)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no JSON", "line 2: is no record of a round"),
        ('{"round": 1, "rejected": []}', "line 2: round 1 has no arrivals: the run was not an"),
        ('{"round": 1, "rejected": [], "arrivals": {"staleness": {"9": 0}}}', "client 9 is none of the 4"),
        ('{"round": 1, "rejected": [], "arrivals": {"staleness": {"1": 1}}}', "staleness 1 of client 1"),
        ('{"round": -1, "rejected": [], "arrivals": {"staleness": {}}}', "round = -1 is no number from 1"),
        ('{"round": 1, "rejected": [], "arrivals": {"staleness": {"1": 0}}}', "has no round 2, and federation.rounds = 5"),
    ],
)  # fmt: skip
def test_records_that_are_none_are_one_error(experiment, tmp_path, line, words):
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n' + line + "\n")
    with pytest.raises(SettingsError) as caught:
        fedloom.run(experiment("replayed", simulation={"replay": str(tmp_path)}))
    assert len(caught.value.problems) == 1 and words in str(caught.value)
    assert not (tmp_path / "replayed").exists()


def test_records_in_which_a_client_does_two_things_at_a_time_are_one_error(experiment, tmp_path):
    lines = [{"round": 0}] + [
        {"round": n, "rejected": [], "arrivals": {"staleness": {"1": n - 1}}} for n in range(1, 6)
    ]
    (tmp_path / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SettingsError, match="client 1 answers in round 2 to a request of round 1"):
        fedloom.run(experiment("replayed", simulation={"replay": str(tmp_path)}))


def test_records_of_a_client_that_does_not_train_here_are_one_error(experiment, tmp_path):
    own = experiment("replayed", simulation={"replay": str(tmp_path)})
    recorded(tmp_path, *range(1, 6))
    order = order_of_answers(own)
    with pytest.raises(
        SettingsError, match="round 1 of the records has an answer of client 1, which"
    ):
        order.arrivals(SimpleNamespace(round=1, requests={0: b""}), None, None)


STOPPED = {"per_client": False, "every": 1, "early_stopping_patience": 1}


def recorded(folder, *rounds):
    own = [{"round": n, "rejected": [], "arrivals": {"staleness": {"1": 0}}} for n in rounds]
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, own)))


def test_records_of_a_run_that_stopped_early_are_enough_for_one_that_does(experiment, tmp_path):
    own = experiment("replayed", simulation={"replay": str(tmp_path)}, evaluation=STOPPED)
    recorded(tmp_path, 1, 2)
    order = order_of_answers(own)
    assert sorted(order.recorded) == [1, 2]
    with pytest.raises(SettingsError, match="records end with round 2, and this run goes on with"):
        order.arrivals(SimpleNamespace(round=3, requests={1: b""}), None, None)
    with pytest.raises(SettingsError, match="has no round 3, and federation"):
        order_of_answers(experiment("replayed", simulation={"replay": str(tmp_path)}))


@pytest.mark.parametrize(("rounds", "missing"), [((), 1), ((1, 3), 2)])
def test_a_gap_in_records_is_one_error_also_where_runs_stop_early(
    experiment, tmp_path, rounds, missing
):
    own = experiment("replayed", simulation={"replay": str(tmp_path)}, evaluation=STOPPED)
    recorded(tmp_path, *rounds)
    with pytest.raises(SettingsError, match=f"has no round {missing}, and"):
        order_of_answers(own)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "fedavg"}}, "'fedavg' waits for all of a round"),
        ({"simulation": {"replay": "runs/x", "devices": {}}}, "both decide in which order"),
    ],
)
def test_what_a_replay_does_not_go_with(sections, words):
    own = {"method": {"name": "fedbuff"}, "simulation": {"replay": "runs/x"}, **sections}
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(own)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"simulation": {"devices": {}}}, "[simulation.devices] is about clients in this process"),
        ({"simulation": {"replay": "runs/x"}}, "simulation.replay repeats the order of other machines"),
    ],
)  # fmt: skip
def test_between_machines_these_are_refused_before_anything_is_read(
    experiment, loopback, sections, words
):
    own = experiment("refused", **sections)
    with pytest.raises(SettingsError) as caught:
        run_experiment(own, observer=Silent(), remote=loopback(4).engine(own))
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]
