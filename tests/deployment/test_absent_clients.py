"""Every method, with clients that are absent: the same bits in one process and between machines."""

import pytest

from absent import ALL_OF_IT, CLIENTS, ROUNDS, SCHEDULES, absent_on_machines, played
from fedloom.errors import Interrupted
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import events
from fedloom.wire.envelope import RequestHeader
from loopback import builtin
from sampling import sampled

ASYNCHRONOUS = {
    name for name, (_, kind) in METHODS.items() if kind.asynchronous
}  # in an order of their own
FEDERATED = sorted(METHODS.keys() - {"centralised", *ASYNCHRONOUS})

FEDERATION = {
    "clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2, "require": 1, "patience": 0.2, "deadline": 0.2,
}  # fmt: skip


@pytest.fixture
def made(suited, tmp_path):
    """Make the experiment of a method."""

    def make(method):
        table = suited(method)
        table["federation"] = {**table["federation"], **FEDERATION}
        table["data"]["builtin_rows"] = 40
        table["training"]["local_steps"] = 1
        table["evaluation"] = {"samples": 0, "per_client": False, "every": ROUNDS}
        table["output"] = {"folder": str(tmp_path / "there")}
        return Experiment.from_table(table)

    return make


def states(folder):
    return [event["state"] for event in events(folder, "round")][1:]


@pytest.fixture
def both(made, loopback, tmp_path):
    """Play a method by a schedule in one process and between machines; compare the bits of each round."""

    def play(method, schedule):
        experiment = made(method)
        here = played(experiment, schedule)
        federation = loopback(CLIENTS)
        mail = federation.mail(source=builtin(experiment))
        absent_on_machines(mail, federation, schedule)
        run_experiment(experiment, observer=Silent(), remote=federation.engine(experiment, mail))
        assert [state.digest() for state in here.states] == states(tmp_path / "there")
        for record in here.records:
            lost = schedule.late.get(record.round, set())
            assert set(record.clients) - record.rejected.keys() == schedule.answering(record.round)
            assert record.rejected.keys() == lost

    return play


@pytest.mark.slow
def test_all_that_can_happen_at_once(both):
    both("fedamole", ALL_OF_IT)


@pytest.mark.parametrize(
    "case", sampled([(m, s) for m in FEDERATED for s in SCHEDULES], 3), ids=" ".join
)
def test_each_method_by_each_schedule(both, case):
    method, schedule = case
    both(method, SCHEDULES[schedule])


@pytest.mark.parametrize("method", sampled(sorted({*FEDERATED} - {"fedamole"}), 2))
def test_each_method_with_all_at_once(both, method):
    both(method, ALL_OF_IT)


@pytest.mark.slow
def test_a_resumed_run_remembers_who_has_come(made, loopback, tmp_path):
    """Stopped after round 2, it asks client 3 alone, which comes in round 3, for a private adapter."""

    class Stop(Silent):
        def round_done(self, record):
            if record.round == 2:
                raise KeyboardInterrupt

    experiment, schedule, federation = made("fdlora"), SCHEDULES["comes late"], loopback(CLIENTS)
    mail = federation.mail(source=builtin(experiment))
    absent_on_machines(mail, federation, schedule)
    with pytest.raises(Interrupted):
        run_experiment(experiment, observer=Stop(), remote=federation.engine(experiment, mail))
    folder = tmp_path / "there"
    resume_run(folder, observer=Silent(), remote=federation.engine(experiment, mail))
    assert states(folder) == [state.digest() for state in played(experiment, schedule).states]
    headers = [(node - 100, envelope.read(RequestHeader)) for node, envelope in mail.pushed]
    begun = [(h.round, c) for c, h in headers if h.kind == "exchange" and h.action == "start"]
    assert sorted(begun) == [(1, 0), (1, 1), (1, 2), (3, 3)]
