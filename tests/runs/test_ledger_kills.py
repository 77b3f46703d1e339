"""Ledgers of real runs that are killed at random moments, beside an account of every noise that was drawn.

Each process of a run notes the hash of each noise it draws, and of what it is for, in a file of the test's
own. No kill loses a line of it, so that it says what was really released: the ledger must hold all of it,
each noise once, however often it was drawn again. In some processes a sum differs by a step of its
grid, as after rounding in another order: such a release is another one. Where clients add the noise, a
release is a sum without its masks, and a sum that is asked again has fresh noise; one that was on the
disk before the kill is not asked again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dp_accounting
import dp_accounting.rdp
import pytest

from fedloom.privacy.correlation import Banded, Participation
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.row_ledger import RowLedger
from noted_noise import SERVER, releases
from sampling import drawn, tries

PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from fedloom.privacy import client_level
from fedloom.privacy.distributed_noise import NoiseShares
from fedloom.training import row_privacy
from noted_noise import note_into

note_into(sys.argv[2])
if int(sys.argv[3]):
    whole, add = row_privacy.ClippedSum.whole, client_level.ClippedSum.add
    rounded = NoiseShares.rounded

    def nearly(self):
        found = whole(self)
        found[0] += self.clip * 2.0**-row_privacy.GRID
        return found

    def adding(self, update):
        add(self, update)
        next(iter(self.steps.values()))[0] += 1

    def otherwise(self, change, rng):
        found = rounded(self, change, rng)
        found[0] -= 1
        return found

    row_privacy.ClippedSum.whole, client_level.ClippedSum.add = nearly, adding
    NoiseShares.rounded = otherwise
sys.argv[1:] = sys.argv[4:]
from fedloom.commands.main import main
main()
"""

UNITS = {
    "client": {"unit": "client", "delta": 1e-2, "clip": 0.5},
    "row": {"unit": "row", "delta": 1e-3},
    "banded": {"unit": "client", "delta": 1e-2, "clip": 0.5, "mechanism": "banded", "bands": 3},
    "distributed": {
        "unit": "client",
        "delta": 1e-2,
        "clip": 0.5,
        "noise": "distributed",
        "secure_aggregation": True,
    },
}
TESTS = Path(__file__).parents[1]


def started(noted, differs, words):
    own = [TESTS, noted, int(differs), *words]
    command = [sys.executable, "-c", PROCESS, *map(str, own)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def counted(folder, unit):
    """The releases that the ledgers hold, by client (-1: the server)."""
    if unit != "row":
        path = folder / "privacy.jsonl"
        return {-1: len(PrivacyLedger(path).entries) if path.exists() else 0}
    return {int(own.stem): len(RowLedger(own)) for own in (folder / "privacy").glob("*.txt")}


def drawn_by(noted, unit):
    """How many different noises each party drew on sums; that of clients is released with a sum."""
    found = {}
    whole = {own.rpartition("|")[0] for own in releases(noted)}
    for release in whole:
        party = int(release.split("|")[2])
        if unit != "distributed" or party == SERVER:
            found[party] = found.get(party, 0) + 1
    return found


def cost(unit, own, folder, rounds):
    """epsilon at a client by dp-accounting alone."""
    direct, steps = dp_accounting.rdp.RdpAccountant(), own["steps"]
    event = dp_accounting.GaussianDpEvent(1.0)
    if unit == "row":
        event = dp_accounting.PoissonSampledDpEvent(own["sampling"], event)
    elif unit == "banded":  # one release of all rounds
        held = [entry["round"] for entry in PrivacyLedger(folder / "privacy.jsonl").entries]
        moved = Banded(Participation.of(rounds, 1, None), 3).total(held)
        event, steps = dp_accounting.GaussianDpEvent(1.0 / moved), 1
    elif unit == "distributed":  # of three clients all are left, and the noise of two is relied on
        (least,) = {
            own["noise_multiplier"] for own in PrivacyLedger(folder / "privacy.jsonl").entries
        }
        assert least == pytest.approx(1.0)
        event = dp_accounting.GaussianDpEvent(least)
    direct.compose(event, steps)
    return direct


@pytest.mark.parametrize(
    "unit", ["client", "row", "distributed", pytest.param("banded", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("kills", tries(2, 20))
def test_killed_at_random_moments_it_never_counts_too_little_nor_twice(
    experiment, tmp_path, unit, kills
):
    file, folder, noted = tmp_path / "x.toml", tmp_path / "killed", tmp_path / "noted"
    rounds = 2 * kills
    own = experiment(
        data={"builtin_rows": 40},
        federation={"clients": 3 if unit == "distributed" else 2, "rounds": rounds},
        training={"local_steps": 2, "batch_size": 4},
        evaluation={"samples": 0, "max_examples": 2, "every": rounds, "per_client": False},
        privacy={"noise_multiplier": 1.0, "accountant": "rdp", **UNITS[unit]},
        output={"folder": str(folder)},
    )
    file.write_text(own.to_toml())
    rng, done, differing = drawn("ledgers", unit, kills), 0, 0
    while not (folder / "summary.json").exists():
        before = noted.read_text().count("\n") if noted.exists() else 0
        words = ["run", "--resume", folder] if before else ["run", file]
        differs = done > 0 and rng.random() < 0.5
        with started(noted, differs, words) as process:
            more = rng.randrange(
                1, 5
            )  # noises that are drawn first: a process takes seconds to begin
            while done < kills and process.poll() is None:
                if noted.exists() and noted.read_text().count("\n") >= before + more:
                    time.sleep(rng.expovariate(20))
                    process.kill()
                    break
                time.sleep(0.005)
            process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        killed = process.returncode == -signal.SIGKILL
        done, differing = done + killed, differing + differs
        held, real = counted(folder, unit), drawn_by(noted, unit)
        assert all(held[party] >= count for party, count in real.items()), "counted too little"
        assert (
            sum(held.values()) <= sum(real.values()) + done
        )  # what was written down, not drawn yet
    assert done == kills
    if not differing and unit != "distributed":  # a sum that is asked again is another
        assert held == real
    stated = json.loads((folder / "summary.json").read_text())["privacy"]
    costs = [stated] if unit != "row" else stated["clients"].values()
    assert [own["steps"] for own in costs] == [held[party] for party in sorted(held)]
    for own in costs:
        assert own["epsilon"] == cost(unit, own, folder, rounds).get_epsilon(stated["delta"])
