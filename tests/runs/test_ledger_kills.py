"""Ledgers of real runs that are killed at random moments, beside an account of every noise that was drawn.

Each process of a run notes the hash of each noise it draws, and of what it is for, in a file of the test's
own. No kill loses a line of it, so that it says what was really released: the ledger must hold all of it,
each noise once, however often it was drawn again. In some processes a sum differs by a step of its
grid, as after rounding in another order: such a release is another one.
"""

import json
import os
import signal
import subprocess
import sys
import time

import dp_accounting
import dp_accounting.rdp
import pytest

from fedloom.privacy.correlation import Banded, Participation
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.row_ledger import RowLedger
from sampling import drawn, tries

PROCESS = """
import hashlib, os, sys
from fedloom.privacy import client_level, noise
from fedloom.training import row_privacy

NOTED, DIFFERS = sys.argv[1], int(sys.argv[2])
stream, gaussian = noise.NoiseSource.stream, noise.NoiseStream.discrete_gaussian

def named(self, purpose, round, party, digest=b""):
    found = stream(self, purpose, round, party, digest)
    found.release, found.part = f"{purpose}|{round}|{party}|{digest.hex()}", 0
    return found

def noted(self, sigma, count):
    found = gaussian(self, sigma, count)
    self.part += 1  # a tensor
    line = f"{self.release}|{self.part} {hashlib.sha256(found.tobytes()).hexdigest()}\\n"
    file = os.open(NOTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)
    return found

noise.NoiseSource.stream, noise.NoiseStream.discrete_gaussian = named, noted
if DIFFERS:
    whole, add = row_privacy.ClippedSum.whole, client_level.ClippedSum.add

    def nearly(self):
        found = whole(self)
        found[0] += self.clip * 2.0**-row_privacy.GRID
        return found

    def adding(self, update):
        add(self, update)
        next(iter(self.steps.values()))[0] += 1

    row_privacy.ClippedSum.whole, client_level.ClippedSum.add = nearly, adding
sys.argv[1:] = sys.argv[3:]
from fedloom.commands.main import main
main()
"""

UNITS = {
    "client": {"unit": "client", "delta": 1e-2, "clip": 0.5},
    "row": {"unit": "row", "delta": 1e-3},
    "banded": {"unit": "client", "delta": 1e-2, "clip": 0.5, "mechanism": "banded", "bands": 3},
}


def started(noted, differs, words):
    command = [sys.executable, "-c", PROCESS, noted, str(int(differs)), *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def releases(noted):
    """The noise of each release that was drawn; the same release must have had the same."""
    found = {}
    for line in noted.read_text().splitlines():
        release, noise = line.rsplit(" ", 1)
        assert found.setdefault(release, noise) == noise, "one release, two noises"
    assert len(set(found.values())) == len(found), "two releases, one noise"
    return found


def counted(folder, unit):
    """The releases that the ledgers hold, by client (-1: the server)."""
    if unit != "row":
        path = folder / "privacy.jsonl"
        return {-1: len(PrivacyLedger(path).entries) if path.exists() else 0}
    return {int(own.stem): len(RowLedger(own)) for own in (folder / "privacy").glob("*.txt")}


def drawn_by(noted, unit):
    """How many different noises each party drew on sums."""
    found = {}
    whole = {own.rpartition("|")[0] for own in releases(noted)} if noted.exists() else ()
    for release in whole:
        party = int(release.split("|")[2])
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
    direct.compose(event, steps)
    return direct


@pytest.mark.parametrize("unit", ["client", "row", pytest.param("banded", marks=pytest.mark.full)])
@pytest.mark.parametrize("kills", tries(2, 20))
def test_killed_at_random_moments_it_never_counts_too_little_nor_twice(
    experiment, tmp_path, unit, kills
):
    file, folder, noted = tmp_path / "x.toml", tmp_path / "killed", tmp_path / "noted"
    rounds = 2 * kills
    own = experiment(
        data={"builtin_rows": 40},
        federation={"clients": 2, "rounds": rounds},
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
    if not differing:
        assert held == real
    stated = json.loads((folder / "summary.json").read_text())["privacy"]
    costs = [stated] if unit != "row" else stated["clients"].values()
    assert [own["steps"] for own in costs] == [held[party] for party in sorted(held)]
    for own in costs:
        assert own["epsilon"] == cost(unit, own, folder, rounds).get_epsilon(stated["delta"])
