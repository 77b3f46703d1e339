"""Runs in which clients add the noise themselves: what is summed, counted, kept over a kill, and refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import PrivacyError, RoundFailed, SettingsError
from fedloom.federation import noisy_sums, secure_exchange
from fedloom.federation.secure_exchange import (
    KEYS,
    MASKED,
    PROTOCOL,
    REVEALED,
    SHARES,
    SIGNATURES,
)
from fedloom.federation.selection import Separated
from fedloom.methods import METHODS
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.distributed_mean import DistributedMean
from fedloom.runs.client_privacy import SUMS, key_file
from fedloom.runs.observers import Silent
from fedloom.runs.privacy_estimate import privacy_advice
from fedloom.runs.run import resume_run, run_experiment
from fedloom.storage.run_folder import RunFolder
from fedloom.wire.messages import Answer, decode
from runs.test_client_privacy import Told, lines, read, stopped_after, weights
from sampling import every

SHARED = {
    "unit": "client",
    "noise": "distributed",
    "secure_aggregation": True,
    "delta": 1e-2,
    "clip": 0.5,
    "noise_multiplier": 1.0,
}
SMALL = {
    "data": {"builtin_rows": 40},
    "federation": {"clients": 4, "rounds": 2},
    "training": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"samples": 0, "max_examples": 4, "per_client": False},
}
ABLE = [
    name
    for name, (_, kind) in METHODS.items()
    if kind.declares.client_privacy.holds
    and kind.declares.secure_aggregation.holds
    and not kind.own_models
]


@pytest.fixture
def shared(experiment):
    def make(privacy=None, **sections):
        merged = {name: {**SMALL.get(name, {}), **own} for name, own in sections.items()}
        return experiment(**{**SMALL, **merged, "privacy": {**SHARED, **(privacy or {})}})

    return make


@pytest.fixture
def sums(monkeypatch):
    """What each sum was of, and what it said without masks."""
    found, plain = [], noisy_sums.noisy_means

    def noted(shares, words, *more):
        found.append((shares, shares.sums(words[1:])))
        return plain(shares, words, *more)

    monkeypatch.setattr(secure_exchange, "noisy_means", noted)
    return found


@pytest.fixture
def dropping(monkeypatch):
    """Have clients not answer an action."""

    def begin(action, clients):
        carried = SimulationEngine.exchange

        def exchange(self, asked):
            for answer in carried(self, asked):
                away = asked.action == action and answer.client in clients
                yield Answer(answer.client, error="it went away") if away else answer

        monkeypatch.setattr(SimulationEngine, "exchange", exchange)

    return begin


def spent(folder):
    return [line["noise_multiplier"] for line in lines(folder, "privacy.jsonl")[1:]]


def test_a_run_states_what_is_left_at_worst_and_counts_what_was_there(shared, sums, tmp_path):
    observer, folder = Told(), tmp_path / "run"
    run_experiment(shared(), observer=observer)
    before, after = read(folder, "run.json")["privacy"], read(folder, "summary.json")["privacy"]
    assert before["epsilon"] == epsilon([Releases(1.0, 1, 2)], 1e-2, "rdp").epsilon
    more = math.sqrt(3 / 2)  # the noise of 3 of 4 clients, and 2 of the 3 that are left at least
    assert spent(folder) == pytest.approx([more, more])
    assert after["epsilon"] == pytest.approx(epsilon([Releases(more, 1, 2)], 1e-2, "rdp").epsilon)
    assert after["epsilon"] < before["epsilon"] and before["accountant"].startswith("RDP")
    assert [after[name] for name in ("asked", "least", "colluding", "relied_on")] == [4, 3, 1, 2]
    assert before["neighbours"] == "one with all its changes zero" and before["steps"] == 2
    told = observer.lines[0]
    assert told == before["sentences"][0]
    assert "the coordinator among them, with the noise of up to 1 client learns of any one" in told
    assert "(that of 2 is counted on: of 4 that are asked 3 are left at least)" in told
    assert not any("sees each client's update" in line for line in before["not_covered"])
    assert not key_file(RunFolder.existing(folder)).exists() and not (folder / SUMS).exists()
    for record in lines(folder, "rounds.jsonl"):
        assert not record["train"] and not record["client_train"]
    assert [len(numbers) for _, numbers in sums] == [sums[0][0].numbers] * 2
    numbers = sums[0][0].numbers
    assert before["noise_to_signal"] == pytest.approx(math.sqrt(4 / 2) * math.sqrt(numbers) / 4)


LATER = [pytest.param(action, marks=pytest.mark.slow) for action in (KEYS, SHARES, SIGNATURES)]


@pytest.mark.parametrize(
    "action", ["train", pytest.param(REVEALED, marks=pytest.mark.slow), *LATER]
)
def test_whoever_drops_out_the_sum_has_the_noise_of_those_in_it(
    shared, sums, dropping, tmp_path, action
):
    """So much noise that changes vanish beside it: a normal distribution of the stated deviation."""
    dropping(action, {2})
    run_experiment(shared({"noise_multiplier": 30.0}, federation={"rounds": 1}), observer=Silent())
    ((own, found),) = sums
    left = 4 if action in (SIGNATURES, REVEALED) else 3
    deviation = 30 * own.norm * math.sqrt(left / 2)
    assert found.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(found)))
    assert kstest(found / deviation, "norm").pvalue > 1e-3
    assert spent(tmp_path / "run") == pytest.approx([30 * math.sqrt((left - 1) / 2)])


@pytest.mark.slow
def test_two_runs_have_other_noise_and_seeded_ones_the_same(shared, sums, tmp_path):
    for name, seeded in (("a", False), ("b", False), ("c", True), ("d", True)):
        own = {"seeded": seeded, "noise_multiplier": 5.0}
        output = {"folder": str(tmp_path / name)}
        run_experiment(shared(own, federation={"rounds": 1}, output=output), observer=Silent())
    first, second, third, fourth = (found for _, found in sums)
    for one, other in ((first, second), (first, third)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))
    assert np.array_equal(third, fourth)
    assert "reproducible, therefore not private" in read(tmp_path / "c", "run.json")["privacy"][
        "sentences"
    ][0]  # fmt: skip


@pytest.mark.slow
def test_workers_give_the_bits_of_one_process(shared, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        output = {"folder": str(tmp_path / name)}
        run_experiment(shared({"seeded": True}, output=output), observer=Silent(), workers=workers)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    ledgers = [(tmp_path / name / "privacy.jsonl").read_bytes() for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_too_few_that_are_left_release_nothing_and_spend_nothing(shared, dropping, tmp_path):
    dropping("train", {1, 2})
    with pytest.raises(RoundFailed, match="2 clients sent their masked answers, 3 must"):
        run_experiment(shared(), observer=Silent())
    assert spent(tmp_path / "run") == []


@pytest.mark.slow
def test_a_client_insists_on_as_many_as_its_share_is_reckoned_with(shared, monkeypatch):
    """A server that says 200 are summed would have each of 4 add a fiftieth of the noise."""
    plain = secure_exchange.SecureAggregation._masking_of
    monkeypatch.setattr(
        secure_exchange.SecureAggregation,
        "_masking_of",
        lambda self, *asked: replace(plain(self, *asked), clients=200),
    )
    observer = Told()
    with pytest.raises(RoundFailed, match="0 clients sent their shares, 3 must"):
        run_experiment(shared(), observer=observer)
    assert (
        sum("a sum of 4 clients is refused: 101 are the fewest" in t for t in observer.lines) == 4
    )


@pytest.mark.slow
def test_a_client_adds_no_smaller_share_than_the_sum_began_with(shared, monkeypatch):
    """A server that says 4 are summed at first, and 200 when the noise is reckoned."""
    plain = secure_exchange._answers

    def more(*asked):
        found = plain(*asked)
        return replace(found, masking=replace(found.masking, clients=200))

    monkeypatch.setattr(secure_exchange, "_answers", more)
    observer = Told()
    with pytest.raises(RoundFailed, match="0 clients sent their masked answers, 3 must"):
        run_experiment(shared(), observer=observer)
    said = "a sum of 200 clients, where 3 at least were to be left when it began"
    assert sum(said in line for line in observer.lines) == 4


@pytest.mark.slow
def test_a_client_that_took_part_too_often_ends_the_run_before_its_sum_is_read(
    shared, tmp_path, monkeypatch
):
    """A selection that goes round the bounds: nothing is spent, and the masks stay on."""
    own = shared(
        {"min_separation": 2, "noise_multiplier": 2.0},
        federation={"clients": 6, "clients_per_round": 3, "rounds": 2},
    )
    monkeypatch.setattr(Separated, "draw", lambda self, *asked: [0, 1, 2])
    with pytest.raises(PrivacyError, match=r"round 2: clients .* would take part more often"):
        run_experiment(own, observer=Silent())
    assert len(spent(tmp_path / "run")) == 1


@pytest.mark.slow
def test_nothing_travels_but_noisy_words(shared, monkeypatch):
    heard, carried = [], SimulationEngine.exchange

    def exchange(self, asked):
        for answer in carried(self, asked):
            heard.append((asked, decode(answer.data, asked.reply_schema)))
            yield answer

    monkeypatch.setattr(SimulationEngine, "exchange", exchange)
    run_experiment(shared(federation={"rounds": 1}), observer=Silent())
    assert {asked.action for asked, _ in heard} == {*PROTOCOL, "train"}
    for asked, payload in heard:
        assert not payload.numbers and not payload.metrics
        if asked.action == "train":
            shares = noisy_sums.shares_of(asked.masking)
            assert payload.tensors.keys() == {MASKED}
            assert secure_exchange.elements_of(asked.masking) == 1 + shares.numbers


@pytest.mark.slow
def test_what_is_not_finite_is_summed_as_nothing(shared, sums, monkeypatch):
    """A client whose training diverged is in the sum: that it is not would tell of its rows."""
    plain = noisy_sums._flat

    def diverged(tensors, origins):
        found = plain(tensors, origins)
        found[7] = math.nan
        return found

    monkeypatch.setattr(noisy_sums, "_flat", diverged)
    run_experiment(shared({"noise_multiplier": 0.0}, federation={"rounds": 1}), observer=Silent())
    ((_, found),) = sums
    assert not found.any()


@pytest.mark.slow
def test_without_noise_the_sum_is_of_clipped_changes_over_the_expected_number(
    shared, sums, dropping, tmp_path
):
    dropping("train", {0})
    run_experiment(
        shared({"noise_multiplier": 0.0, "clip": 1e-3}, federation={"rounds": 1}),
        observer=Silent(),
    )
    ((own, found),) = sums
    assert 0.5 * own.half < np.linalg.norm(found) <= 3 * own.norm  # all are longer than the clip
    summary = read(tmp_path / "run", "summary.json")["privacy"]
    assert summary["epsilon"] is None and "nothing is promised" in summary["sentences"][0]
    change = own.change(found, 4.0)
    assert np.linalg.norm(change) == pytest.approx(np.linalg.norm(found) * 1e-3 / own.half / 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", every(5, ABLE))
def test_every_method_that_goes_with_both_has_one_release_a_round(shared, sums, tmp_path, name):
    sections = {
        "method": {"name": name},
        "objective": {"name": "pdpo" if name == "fedpdpo" else "dpo"},
    }
    run_experiment(shared(federation={"rounds": 1}, **sections), observer=Silent())
    assert len(spent(tmp_path / "run")) == 1 == sum(shares.numbers > 0 for shares, _ in sums)


@pytest.mark.parametrize("moment", every(1, ["noise", "saved"]))
def test_a_round_that_is_repeated_after_a_kill_releases_nothing_again(
    shared, sums, tmp_path, monkeypatch, moment
):
    """Clients work again, and their masks stay on: the sum is that of before, and is spent once."""
    folder = stopped_after(1, shared(), tmp_path / "run", monkeypatch, moment)
    assert len(sums) == 1 == len(spent(folder.path))
    assert len(list((folder.path / SUMS).glob("*"))) == (moment == "noise")
    states, plain = [], DistributedMean.summed

    def noted(self, means, *more):
        states.append(means)
        return plain(self, means, *more)

    monkeypatch.setattr(DistributedMean, "summed", noted)
    kept = {path.name: path.read_bytes() for path in (folder.path / SUMS).glob("*")}
    resume_run(folder.path)
    assert len(sums) == 2 == len(spent(folder.path)) and not (folder.path / SUMS).exists()
    assert len(states) == (2 if moment == "noise" else 1)
    if moment == "noise":
        (content,) = kept.values()
        for tensor in states[0].values():
            assert tensor.numpy().tobytes() in content


@pytest.mark.slow
def test_seeded_runs_that_are_stopped_end_with_the_same_bits(shared, tmp_path, monkeypatch):
    quiet, folder = tmp_path / "quiet", tmp_path / "stopped"
    run_experiment(shared({"seeded": True}, output={"folder": str(quiet)}), observer=Silent())
    own = shared({"seeded": True}, output={"folder": str(folder)})
    stopped_after(1, own, folder, monkeypatch, "noise")
    resume_run(folder)
    assert weights(folder) == weights(quiet)
    assert lines(folder, "privacy.jsonl") == lines(quiet, "privacy.jsonl")


@pytest.mark.slow
def test_a_sum_that_is_lost_is_another_release_and_stops_a_run_at_its_budget(
    shared, dropping, tmp_path, monkeypatch
):
    """With one client less in each round the sums have just the noise that the budget was solved for."""
    dropping("train", {3})
    settings = {"noise_multiplier": None, "target_epsilon": 4.0}
    folder = stopped_after(1, shared(settings), tmp_path / "run", monkeypatch, "noise")
    (kept,) = (folder.path / SUMS).glob("*")
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(PrivacyError, match=r"privacy\.target_epsilon is 4"):
        resume_run(folder.path)
    assert len(spent(folder.path)) == 2  # round 1 twice
    own = RunFolder.existing(folder.path)
    assert json.loads((own.path / "rounds.jsonl").read_text().splitlines()[-1])["round"] == 1


@pytest.mark.slow
def test_rounds_of_a_client_may_be_bounded(shared, tmp_path):
    own = shared(
        {"min_separation": 2, "noise_multiplier": 2.0},
        federation={"clients": 6, "clients_per_round": 3, "rounds": 2},
    )
    run_experiment(own, observer=Silent())
    record = read(tmp_path / "run", "summary.json")["privacy"]
    assert record["max_participations"] == 1 and record["sensitivity"] == 1.0
    one = epsilon([Releases(2.0, 1, 1)], 1e-2, "rdp").epsilon
    assert record["epsilon"] == pytest.approx(one, rel=1e-9)
    cohorts = [set(line["clients"]) for line in lines(tmp_path / "run", "rounds.jsonl")[1:]]
    assert not cohorts[0] & cohorts[1] and len(cohorts[0]) == 3


@pytest.mark.slow
def test_advice_is_as_a_run_states_it(shared):
    said = privacy_advice(shared())
    assert "the coordinator among them, with the noise of up to 1 client" in said[0]
    assert any(line.startswith("Noise and signal") for line in said)


@pytest.mark.parametrize(
    ("privacy", "sections", "words"),
    [
        ({"secure_aggregation": False}, {}, "which hides nothing by itself: it needs"),
        ({"unit": "row"}, {}, 'with "row" clients add the noise in their own steps'),
        (
            {"mechanism": "tree"},
            {},
            'privacy.mechanism = "tree" takes noise of earlier rounds back',
        ),
        ({"mechanism": "banded"}, {}, "nobody knows that of all clients"),
        ({"clip_quantile": 0.5, "clip_count_noise": 2.0}, {}, "a sum of its own without noise"),
        ({"accountant": "pld"}, {}, "bounded by Renyi divergence alone"),
        ({"amplification": True}, {}, "knows whose they are"),
        ({"sum_bound": 2.0}, {}, "leave privacy.sum_bound = 2 out"),
        ({"colluding": 3}, {}, "of 4 clients a round 3 may be all that are left"),
        ({}, {"federation": {"replacements": 1}}, "draws as many clients for each sum, all alike"),
        ({}, {"selection": {"name": "rows"}}, "leave out selection.name = 'rows'"),
        ({}, {"method": {"name": "scaffold"}}, "method.name = 'scaffold' cannot"),
        ({}, {"aggregation": {"rule": "median"}}, "is not a sum"),
        ({}, {"federation": {"clients": 2}}, "3"),
        ({"noise": "local"}, {}, "noise"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_read(
    shared, privacy, sections, words
):
    with pytest.raises(SettingsError) as told:
        shared(privacy, **sections)
    assert [line for line in told.value.problems if words in line], told.value


def test_noise_that_does_not_fit_is_refused_before_anything_is_trained(shared, tmp_path):
    with pytest.raises(SettingsError, match=r"privacy\.sum_bits = 24: .* 32 are the most"):
        run_experiment(shared({"sum_bits": 24, "noise_multiplier": 500.0}), observer=Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_kept_sum_is_of_its_own_work_and_round_alone(tmp_path):
    from fedloom.privacy.ledger import PrivacyLedger
    from privacy.test_private_mean import plan

    own = plan(noise_multiplier=1.0, noise="distributed", secure_aggregation=True)
    mean = DistributedMean(own, PrivacyLedger(tmp_path / "l"), tmp_path / SUMS, seeded=False)
    means = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}
    mean.keep(2, b"work" * 8, means, (3, 1, 2))
    found, clients = mean.kept(2, b"work" * 8)
    assert clients == (1, 2, 3) and all(torch.equal(found[name], means[name]) for name in means)
    assert mean.kept(1, b"work" * 8) is None and mean.kept(2, b"else" * 8) is None
    assert mean.kept(2, b"work" * 4 + b"else" * 4) is None
    mean.forget(1)
    assert mean.kept(2, b"work" * 8) is not None
    mean.forget(2)
    assert mean.kept(2, b"work" * 8) is None and not (tmp_path / SUMS).exists()
