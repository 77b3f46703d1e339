"""Clients that add the noise on their own machines: bits, drop-out, and what each insists on by itself."""

from pathlib import Path

import pytest

from deployment.test_secure_sums import Site
from fedloom.errors import SumRefused
from fedloom.experiment.experiment import Experiment
from fedloom.federation.secure_exchange import KEYS, SHARES, SIGNATURES
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.wire.envelope import RequestHeader
from fedloom.wire.messages import AddedNoise
from loopback import Outcome, of

pytestmark = pytest.mark.slow

SHARED = {
    "unit": "client",
    "noise": "distributed",
    "delta": 1e-2,
    "clip": 0.5,
    "noise_multiplier": 1.0,
}
DEMANDED = {"require": "client", "distributed_noise": True}


@pytest.fixture
def site(table, loopback, tmp_path):
    def make(folder="", seeded=False, demanded=False, privacy=None, **options):
        own = {**SHARED, "seeded": seeded, **(privacy or {})}
        policies = dict.fromkeys(range(4), DEMANDED) if demanded else None
        return Site(table, loopback, tmp_path / folder, privacy=own, policies=policies, **options)

    return make


def simulated(found, tmp_path):
    """The states after each round of a simulation of the same experiment."""
    table = {**found.table, "output": {"folder": str(tmp_path / "here"), "verify": False}}
    result = run_experiment(Experiment.from_table(table), observer=Silent())
    return Outcome(result.folder, None, None, None)


def spent(outcome):
    return [line["noise_multiplier"] for line in outcome.lines("privacy.jsonl")[1:]]


def test_seeded_noise_has_the_bits_of_a_simulation(site, tmp_path):
    found = site(seeded=True, privacy={"noise_multiplier": None, "target_epsilon": 4.0})
    there, here = found.run(), simulated(found, tmp_path)
    assert there.states[-1:] == here.states[-1:]
    ledgers = [(own.folder / "privacy.jsonl").read_bytes() for own in (there, here)]
    assert ledgers[0] == ledgers[1]


def test_clients_that_demand_it_add_noise_of_their_own_machines(site, tmp_path):
    found = site(clients=3, demanded=True)
    there, here = found.run(), simulated(found, tmp_path)
    assert there.states[-1:] != here.states[-1:]
    assert spent(there) == spent(here) == pytest.approx([1.0])  # of 3 all must be left
    promise = epsilon([Releases(1.0, 1, 1)], 1e-2, "rdp").epsilon
    first = there.lines("privacy.jsonl")[0]
    assert (first["asked"], first["least"], first["relied_on"]) == (3, 3, 2)
    said = (there.folder / "run.json").read_text()
    assert f"{promise:.4g}, 0.01) allows" in said
    for number in range(3):
        runs = found.federation.home(number).path / "runs"
        (counted,) = runs.rglob("noisy_sums.txt")
        assert counted.read_text() == "1 1 0\n"


@pytest.mark.parametrize("action", [SHARES, "train", SIGNATURES])
def test_a_client_that_is_killed_leaves_a_sum_with_noise_enough(site, action):
    found = site(demanded=True)
    found.at(action, lambda number: found.restart(number) if number == 2 else None)
    outcome = found.run()
    left = 4 if action == SIGNATURES else 3
    assert spent(outcome) == pytest.approx([((left - 1) / 2) ** 0.5])
    (record,) = outcome.rounds
    assert (of(record, 2) is None) == (left == 4)


def test_a_client_takes_part_in_twice_as_many_sums_as_there_are_rounds(site):
    found = site(clients=3, demanded=True)
    found.run()
    worker = found.mail.workers[100]
    sums = worker.run.sums
    header = found.sent(0, "train").read(RequestHeader)
    masking = sums.masking(header)
    other = header.model_copy(update={"round": 2, "payload": "b" * 64})
    sums.require_first_sum(other, masking, begun=True)
    third = header.model_copy(update={"round": 3, "payload": "c" * 64})
    with pytest.raises(SumRefused, match="noise to 2 sums of this run, which has 1 rounds"):
        sums.require_first_sum(third, masking, begun=True)
    assert masking.noise == AddedNoise(
        1.0, 0.5, 1
    )  # by the experiment: the header says nothing of it


def test_a_server_that_is_killed_after_a_sum_releases_nothing_again(site, tmp_path):
    """In round 2 before the signatures: nothing was released, and the sum that is made again counts once."""
    found = site(rounds=2, seeded=True)
    whole = simulated(found, tmp_path)

    def dies(number):
        raise KeyboardInterrupt

    found.at(SIGNATURES, dies, round=2)
    with pytest.raises(BaseException, match="resume"):
        found.run()
    del found.mail._reply
    folder = Path(found.experiment.output.folder)
    assert len((folder / "privacy.jsonl").read_text().splitlines()) == 2
    engine = found.federation.engine(found.experiment, found.mail)
    resume_run(folder, observer=Silent(), remote=engine)
    outcome = Outcome(folder, engine, found.mail, found.federation)
    assert outcome.states[-1] == whole.states[-1]
    assert outcome.lines("privacy.jsonl") == whole.lines("privacy.jsonl")
    assert found.sent(0, KEYS, round=2)
