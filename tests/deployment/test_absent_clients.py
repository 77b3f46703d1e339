"""Every method, with clients that are absent: the same bits in one process and between machines."""

import pytest

from absent import ALL_OF_IT, CLIENTS, ROUNDS, SCHEDULES, absent_on_machines, played
from fedloom.audit import events
from fedloom.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.progress import Silent
from fedloom.runner import run_experiment
from loopback import builtin
from sampling import sampled

FEDERATED = sorted(METHODS.keys() - {"centralised"})

FEDERATION = {
    "clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2, "require": 1, "patience": 0.2, "deadline": 0.2,
}  # fmt: skip


@pytest.fixture
def both(suited, loopback, tmp_path):
    """Play a method by a schedule in one process and between machines; compare the bits of each round."""

    def play(method, schedule):
        table = suited(method)
        table["federation"] = {**table["federation"], **FEDERATION}
        table["data"]["builtin_rows"] = 40
        table["evaluation"] = {"samples": 0, "per_client": False, "every": ROUNDS}
        table["output"] = {"folder": str(tmp_path / "there")}
        experiment = Experiment.from_table(table)
        here = played(experiment, schedule)
        federation = loopback(CLIENTS)
        mail = federation.mail(source=builtin(experiment))
        absent_on_machines(mail, federation, schedule)
        run_experiment(experiment, observer=Silent(), remote=federation.engine(experiment, mail))
        there = [event["state"] for event in events(tmp_path / "there", "round")]
        assert [state.digest() for state in here.states] == there[1:]
        for record in here.records:
            lost = schedule.late.get(record.round, set())
            assert set(record.clients) - record.rejected.keys() == schedule.answering(record.round)
            assert record.rejected.keys() == lost

    return play


@pytest.mark.parametrize("method", ["fedamole", "fedex_lora"])
def test_all_that_can_happen_at_once(both, method):
    both(method, ALL_OF_IT)


@pytest.mark.parametrize(
    ("method", "schedule"),
    sampled([(method, schedule) for method in FEDERATED for schedule in SCHEDULES], 8),
)
def test_each_method_by_each_schedule(both, method, schedule):
    both(method, SCHEDULES[schedule])


@pytest.mark.parametrize("method", sampled(sorted({*FEDERATED} - {"fedamole", "fedex_lora"}), 4))
def test_each_method_with_all_at_once(both, method):
    both(method, ALL_OF_IT)
