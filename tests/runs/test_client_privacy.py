"""Client-level privacy of runs: every method, empty cohorts, kills, budgets, and what pages say."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from itertools import pairwise

import dp_accounting
import dp_accounting.rdp
import numpy as np
import pytest
import torch

from fedloom.errors import CheckpointError, PrivacyError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Membership, Presence
from fedloom.federation.selection import draw
from fedloom.methods import METHODS
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.correlation import Banded, Participation
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import PrivateMean
from fedloom.reports.run_page import write_report
from fedloom.runs import run as runs
from fedloom.runs.client_privacy import RunPrivacy, key_file, selection_of
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.storage.run_folder import RunFolder
from sampling import drawn, every

PRIVATE = {
    "unit": "client",
    "delta": 1e-2,
    "clip": 0.5,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
}
SMALL = {
    "data": {"builtin_rows": 40},
    "federation": {"clients": 4, "clients_per_round": 2, "rounds": 2},
    "training": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"samples": 0, "max_examples": 4, "client_max_examples": 2},
}
FEW = {"clients": {"newcomers": [1, 2, 3]}, "evaluation": {"per_client": True}}
"""One member, where two clients are drawn."""

ABLE = sorted(name for name, (_, kind) in METHODS.items() if kind.declares.client_privacy.holds)


@pytest.fixture
def private(experiment):
    def make(privacy=None, **sections):
        merged = {name: {**SMALL.get(name, {}), **own} for name, own in sections.items()}
        return experiment(**{**SMALL, **merged, "privacy": {**PRIVATE, **(privacy or {})}})

    return make


def start(words):
    return subprocess.Popen(
        [sys.executable, "-m", "fedloom", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Told(Silent):
    def __init__(self):
        self.lines = []

    def stage(self, text):
        self.lines.append(text)

    def warning(self, text):
        self.lines.append(text)


def read(folder, name):
    return json.loads((folder / name).read_text())


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_says_what_it_promises_and_keeps_its_key_to_itself(private, tmp_path):
    observer, folder = Told(), tmp_path / "run"
    run_experiment(private(), observer=observer)
    own = read(folder, "summary.json")["privacy"]
    assert own["epsilon"] == epsilon([Releases(1.0, 1, 2)], 1e-2, "rdp").epsilon
    assert own["unit"] == "client" and own["steps"] == 2 and own["sampling"] == 1
    assert own["accountant"].startswith("RDP, dp-accounting") and not own["seeded"]
    assert own["neighbours"] == "add or remove one" and own["drawn"] == 0.5
    assert (
        observer.lines[:2] == own["sentences"] == read(folder, "run.json")["privacy"]["sentences"]
    )
    assert any("times as long as the longest mean change" in line for line in observer.lines)
    assert not key_file(RunFolder.existing(folder)).exists()  # the run is over
    text = re.sub(r"<[^>]+>", "", write_report([folder]).read_text())
    for sentence in own["sentences"]:
        assert sentence.replace("'", "&#39;") in text and text.index(sentence[:9]) < text.index(
            "Curves"
        )
        assert sentence in (folder / "adapter" / "README.md").read_text()
    for record in lines(folder, "rounds.jsonl"):
        assert not record["train"] and not record["client_train"] and not record["details"]
    started = [line["round"] for line in lines(folder, "privacy.jsonl")[1:]]
    assert started == [1, 2]


@pytest.mark.slow
def test_noise_of_two_runs_differs_unless_it_is_seeded(private, tmp_path):
    found = {}
    for name, seeded in (("a", False), ("b", False), ("c", True), ("d", True)):
        folder = tmp_path / name
        run_experiment(
            private({"seeded": seeded}, output={"folder": str(folder)}), observer=Silent()
        )
        found[name] = weights(folder)
    assert len({found["a"], found["b"], found["c"]}) == 3 and found["c"] == found["d"]
    own = read(tmp_path / "c", "summary.json")["privacy"]
    assert "reproducible, therefore not private" in own["sentences"][0]


@pytest.mark.parametrize("name", every(7, ABLE))
def test_every_method_that_declares_it_takes_its_means_there(private, tmp_path, name):
    own = private({"clip": 1e-3}, method={"name": name}, federation={"rounds": 1})
    run_experiment(own, observer=Silent())
    entries = lines(tmp_path / "run", "privacy.jsonl")[1:]
    assert len(entries) == (0 if name == "local_only" else 1)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(ABLE)))
def test_other_methods_are_refused_with_their_reason(private, name):
    with pytest.raises(SettingsError) as told:
        private(method={"name": name})
    why = METHODS[name][1].declares.client_privacy.why
    assert any(f"method.name = {name!r} cannot: {why}" in line for line in told.value.problems)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregation": {"rule": "median"}}, "aggregation.rule = 'median' is not a sum"),
        ({"admission": {"max_change": 1.0}}, "the clip bounds every change"),
        ({"method": {"name": "local_only"}}, "judged and saved as it is"),
        ({"federation": {"replacements": 1}}, "leave out federation.replacements = 1"),
        ({"selection": {"name": "rows"}}, "leave out selection.name = 'rows'"),
        ({"privacy": {"delta": 0.5}}, "not below 1 / federation.clients"),
        ({"privacy": {"amplification": True}}, "set evaluation.per_client = false"),
        ({"privacy": {"target_epsilon": 3.0}}, "give one of privacy.noise_multiplier"),
        ({"privacy": {"clip_count_noise": 3.0}}, "give both"),
        ({"privacy": {"mechanism": "tree", "clip_quantile": 0.5}}, "leave clip_quantile out"),
        (
            {"privacy": {"min_separation": 3}},
            "every 3 rounds need 6 clients, and there are 4: give 2 at",
        ),
        (
            {"privacy": {"max_participations": 1}, "federation": {"rounds": 3}},
            "3 rounds with federation.clients_per_round = 2 need 6 participations, and 4 clients have 4",
        ),
        (
            {"privacy": {"mechanism": "banded"}, "method": {"name": "rolora"}},
            "trains another factor in the next round, where noise of earlier rounds",
        ),
        (
            {"privacy": {"mechanism": "tree"}, "method": {"name": "fedsvd"}},
            "changes the coordinates of B between rounds, where noise of earlier rounds",
        ),
        (
            {"privacy": {"mechanism": "tree", "unit": "row"}},
            "privacy.mechanism is about the rounds of",
        ),
        ({"privacy": {"max_participations": 0}}, "greater than or equal to 1"),
        (
            {"privacy": {"mechanism": "tree"}, "selection": {"name": "rows"}},
            "draws clients by how often and when each was drawn: leave out selection.name = 'rows'",
        ),
        (
            {"privacy": {"min_separation": 2}, "federation": {"replacements": 1}},
            "draws clients by how often and when each was drawn, and those who give no answer",
        ),
        (
            {"privacy": {"min_separation": 1}, **FEW},
            "every round needs 2 clients, and there are 1: draw fewer clients for a round",
        ),
        (
            {"privacy": {"max_participations": 1}, **FEW},
            "need 4 participations, and 1 clients have 1: draw fewer clients for a round",
        ),
    ],
)
def test_what_cannot_be_private_is_refused_before_anything_is_read(private, sections, words):
    privacy = sections.pop("privacy", {})
    with pytest.raises(SettingsError) as told:
        private(privacy, **sections)
    assert [line for line in told.value.problems if words in line], told.value


def test_a_budget_that_cannot_be_met_leaves_nothing_behind(private, tmp_path):
    own = private({"noise_multiplier": None, "target_epsilon": 1e-9, "delta": 1e-12})
    with pytest.raises(SettingsError, match="cannot be met"):
        run_experiment(own, observer=Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_round_for_which_nobody_is_drawn_releases_noise(private, tmp_path):
    """About one client of four is expected, so that of three cohorts one is empty with this seed."""
    own = private(federation={"clients": 4, "clients_per_round": 1, "rounds": 3, "seed": 3})
    run_experiment(own, observer=Silent())
    cohorts = [record["clients"] for record in lines(tmp_path / "run", "rounds.jsonl")[1:]]
    assert [] in cohorts, cohorts
    assert len(lines(tmp_path / "run", "privacy.jsonl")) == 4


def stopped_after(round, private, folder, monkeypatch, moment):
    """Run until a round, and stop there as a kill would: right after its noise, or after it is saved."""

    class Stop(BaseException):
        pass

    kind = runs._Run
    plain = kind._finish_round

    def finish(self, record, state):
        if record.round == round and moment == "noise":
            raise Stop
        plain(self, record, state)
        if record.round == round:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(kind, "_finish_round", finish)
        patched.setattr(kind, "_keep_last", lambda self: None)
        with pytest.raises(Stop):
            run_experiment(private, observer=Silent())
    return RunFolder.existing(folder)


@pytest.mark.parametrize("moment", every(2, ["noise", "saved"]))
def test_a_resume_spends_once_and_ends_with_the_same_bits(private, tmp_path, monkeypatch, moment):
    quiet, folder = tmp_path / "quiet", tmp_path / "stopped"
    settings = {"seeded": True, "clip_quantile": 0.5, "clip_count_noise": 2.0}
    run_experiment(private(settings, output={"folder": str(quiet)}), observer=Silent())
    own = private(settings, output={"folder": str(folder)})
    stopped_after(1, own, folder, monkeypatch, moment)
    assert len(lines(folder, "privacy.jsonl")) == 2  # spent before the round was saved
    resume_run(folder)
    assert weights(folder) == weights(quiet)
    assert lines(folder, "privacy.jsonl") == lines(quiet, "privacy.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy",
    [{}, pytest.param({"mechanism": "tree", "max_participations": 2}, marks=pytest.mark.full)],
)
def test_other_machines_give_the_bits_of_a_simulation(private, tmp_path, loopback, privacy):
    """With rounds for which nobody is drawn, and clients whose experiment holds nothing of privacy."""
    found = []
    for name, remote in (("here", False), ("there", True)):
        own = private(
            {"seeded": True, **privacy},
            federation={"clients": 3, "clients_per_round": 1, "rounds": 3, "seed": 3},
            output={"folder": str(tmp_path / name)},
        )
        engine = loopback(3).engine(own) if remote else None
        run_experiment(own, observer=Silent(), remote=engine)
        found.append((weights(tmp_path / name), lines(tmp_path / name, "privacy.jsonl")))
        cohorts = [record["clients"] for record in lines(tmp_path / name, "rounds.jsonl")[1:]]
        assert [] in cohorts if not privacy else len(set(map(tuple, cohorts))) == 3, cohorts
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_key_is_needed_while_the_run_lasts(private, tmp_path, monkeypatch):
    folder = stopped_after(1, private(), tmp_path / "run", monkeypatch, "noise")
    key = key_file(folder)
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600 and folder.path not in key.parents
    everything = b"".join(p.read_bytes() for p in folder.path.rglob("*") if p.is_file())
    assert key.read_text().encode() not in everything
    moved = key.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="start a new run"):
        resume_run(folder.path)
    moved.rename(key)
    resume_run(folder.path)
    assert len(lines(folder.path, "privacy.jsonl")) == 3 and not key.exists()
    resume_run(folder.path)  # again after its end: nothing is released


@pytest.mark.slow
def test_a_lost_ledger_stops_a_resume(private, tmp_path, monkeypatch):
    folder = stopped_after(1, private(), tmp_path / "run", monkeypatch, "saved")
    moved = (folder.path / "privacy.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(PrivacyError, match="is gone"):
        resume_run(folder.path)
    first = moved.read_text().splitlines()[0]
    (folder.path / "privacy.jsonl").write_text(f"{first}\n")
    with pytest.raises(PrivacyError, match="counts 1 releases"):
        resume_run(folder.path)
    moved.rename(folder.path / "privacy.jsonl")
    resume_run(folder.path)


@pytest.mark.slow
def test_twenty_rounds_killed_twice_cost_what_one_direct_call_says(private, tmp_path):
    """Real processes, ended by SIGKILL at moments that differ with every commit."""
    file, folder = tmp_path / "x.toml", tmp_path / "killed"
    file.write_text(
        private(
            federation={"rounds": 20},
            evaluation={"every": 20, "per_client": False},
            output={"folder": str(folder)},
        ).to_toml()
    )
    rng, kills = drawn("privacy kills"), 0
    while not (folder / "summary.json").exists():
        begun = (folder / "experiment.toml").exists()
        words = ["run", "--resume", folder] if begun else ["run", file]
        with start(words) as process:
            while kills < 2 and process.poll() is None:
                written = folder / "privacy.jsonl"
                if written.exists() and written.read_text().count("\n") > 4 * (kills + 1):
                    time.sleep(rng.uniform(0, 0.5))
                    process.kill()
                    break
                time.sleep(0.02)
            process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
    own = read(folder, "summary.json")["privacy"]
    assert kills == 2 and own["steps"] == 20
    direct = dp_accounting.rdp.RdpAccountant()
    direct.compose(dp_accounting.GaussianDpEvent(1.0), 20)
    assert own["epsilon"] == direct.get_epsilon(1e-2)


CORRELATED = {
    "privacy": {"mechanism": "banded", "min_separation": 2, "seeded": True},
    "federation": {"rounds": 4},
    "evaluation": {"every": 4, "per_client": False},
}


@pytest.mark.slow
def test_noise_that_is_correlated_over_rounds_survives_a_kill(private, tmp_path, monkeypatch):
    """The run that was killed after round 3 ends with the bits of the one that was not."""
    quiet, folder = tmp_path / "quiet", tmp_path / "stopped"
    own = {name: dict(section) for name, section in CORRELATED.items()}
    privacy = own.pop("privacy")
    run_experiment(private(privacy, **own, output={"folder": str(quiet)}), observer=Silent())
    killed = private(privacy, **own, output={"folder": str(folder)})
    stopped_after(3, killed, folder, monkeypatch, "saved")
    resume_run(folder)
    assert weights(folder) == weights(quiet)
    assert lines(folder, "privacy.jsonl") == lines(quiet, "privacy.jsonl")
    cohorts = [set(record["clients"]) for record in lines(folder, "rounds.jsonl")[1:]]
    assert cohorts[0].isdisjoint(cohorts[1]) and cohorts[2].isdisjoint(cohorts[3])
    assert [len(cohort) for cohort in cohorts] == [2] * 4
    stated = read(folder, "summary.json")["privacy"]
    assert (stated["steps"], stated["max_participations"], stated["min_separation"]) == (4, 2, 2)
    moved = Banded(Participation.of(4, 2, None), stated["bands"]).sensitivity(4)
    assert stated["sensitivity"] == moved and stated["bands"] > 1
    assert stated["epsilon"] == epsilon([Releases(1.0 / moved, 1, 1)], 1e-2, "rdp").epsilon
    assert stated["neighbours"] == "one with all its changes zero" and stated["sampling"] == 1
    assert "in at most 2 of 4 rounds, 2 or more apart" in "".join(stated["sentences"])


@pytest.mark.parametrize("away", [0.0, 0.6])
def test_a_draw_keeps_the_rounds_of_each_client_apart_and_few(private, away):
    """Whoever is there, and with a restart in the middle."""
    own: Experiment = private(
        {"mechanism": "tree", "min_separation": 4, "max_participations": 30},
        federation={"clients": 40, "clients_per_round": 8, "rounds": 120},
    )
    rng, selection, taken = np.random.default_rng(0), selection_of(own), dict[int, list[int]]()
    presence = Presence.of(dict.fromkeys(range(40), 5))
    for round in range(1, 121):
        if round == 60:
            saved = json.loads(json.dumps(selection.saved()))
            selection = selection_of(own)
            selection.restore(saved)
        there = presence.without([c for c in range(40) if rng.random() < away])
        selection.begin(round, {})
        cohort = draw(selection, there, 8, 0, round)
        assert len(cohort) == 8 if not away else len(cohort) <= 8
        for client in cohort:
            taken.setdefault(client, []).append(round)
    assert max(map(len, taken.values())) <= 30
    assert min(b - a for own in taken.values() for a, b in pairwise(own)) >= 4
    if not away:
        assert {len(own) for own in taken.values()} == {24}  # 120 * 8 / 40: the draw is even


@pytest.mark.parametrize("reachable", [12, 11, 4])
def test_a_pause_of_one_client_changes_no_draw_but_its_own(private, reachable):
    """Quarantine follows from a client's answers, which may not change who else takes part."""
    own: Experiment = private(
        {"min_separation": 2}, federation={"clients": 12, "clients_per_round": 5, "rounds": 40}
    )
    members = Membership(tuple(range(12)), rows=dict.fromkeys(range(12), 5))
    for paused in range(12):
        found = []
        for pauses in ({}, {paused: 30}):
            selection, presence, rng = selection_of(own), Presence(), np.random.default_rng(paused)
            found.append([])
            for round in range(1, 41):
                there = set(rng.permutation(12)[:reachable].tolist())
                suspended = pauses if 5 <= round <= 30 else {}
                presence = presence.begun(round, members, there, suspended)
                selection.begin(round, {})
                found[-1].append(set(draw(selection, presence, 5, 0, round)))
        plain, other = found
        assert all(
            theirs == ours - ({paused} if 5 <= round <= 30 else set())
            for round, (ours, theirs) in enumerate(zip(plain, other, strict=True), 1)
        )
        assert any(paused in cohort for cohort in plain[4:30])
    everybody = presence.begun(41, members, set(range(12)), {})
    whole = draw(selection_of(own), everybody, 5, 0, 1)
    for away in whole:  # numbers are those of clients, not of places
        others = draw(selection_of(own), everybody.without([away]), 5, 0, 1)
        assert len(others) == 5 and set(whole) - {away} < set(others)


def test_the_sentence_after_a_run_says_what_a_client_moves_with_repeated_rounds(private, tmp_path):
    privacy = RunPrivacy(private({"min_separation": 2}, federation={"rounds": 4}))
    start = {"a": torch.zeros(3)}

    def mean(values):
        ledger = PrivacyLedger(tmp_path / "ledger", compose=privacy.plan.compose)
        made = PrivateMean(privacy.plan, NoiseSource(bytes(32), "run"), ledger)
        made.mean(
            [{"a": torch.full((3,), value)} for value in values], start, 1, range(len(values))
        )
        return made

    mean([0.1])
    record = privacy.promise(mean([0.1, 0.2]))  # round 1 again, with one answer more
    assert privacy.promise()["sensitivity"] == pytest.approx(2**0.5)  # two of four rounds
    assert record["sensitivity"] == pytest.approx(2**0.5) and record["steps"] == 2
    record = privacy.promise(mean([0.2, 0.2]))
    assert record["sensitivity"] == pytest.approx(3**0.5)
    assert "moves all releases together by at most 1.732 clips" in record["sentences"][0]
    assert record["epsilon"] == epsilon([Releases(1.0 / 3**0.5, 1, 1)], 1e-2, "rdp").epsilon


def test_poisson_cohorts_have_the_rate_of_the_accountant(private):
    own: Experiment = private(federation={"clients": 40, "clients_per_round": 10})
    presence = Presence.of(dict.fromkeys(range(40), 5))
    away = presence.without([7])
    cohorts = [draw(selection_of(own), presence, 10, 0, round) for round in range(2000)]
    sizes = torch.tensor([len(cohort) for cohort in cohorts], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(10, abs=0.25)
    assert float(sizes.var()) == pytest.approx(7.5, rel=0.12)  # n q (1 - q)
    each = [sum(client in cohort for cohort in cohorts) for client in range(40)]
    assert min(each) > 420 and max(each) < 580  # 500 each, sqrt(2000 q (1 - q)) = 19
    assert draw(selection_of(own), away, 10, 0, 3) == tuple(c for c in cohorts[3] if c != 7)
