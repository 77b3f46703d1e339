"""Advice before any training: its numbers are those of a run's first round, and it says what fits."""

import json

import pytest

import fedloom
from fedloom.accounting.network import Link
from fedloom.reports.client_rounds import turns
from fedloom.runs.cost_estimate import advise, recommend
from fedloom.runs.privacy_estimate import privacy_advice
from sampling import every

LINK = Link(10e6, 50e6, 0.03, 1e9)
CLASSIFICATION = {
    "data": {"source": "builtin:labelled", "builtin_rows": 90},
    "objective": {"name": "classification"},
    "public": {"rows": 12},
}
SFT = {
    **CLASSIFICATION,
    "data": {"source": "builtin:instructions", "builtin_rows": 60},
    "objective": {"name": "sft"},
}


@pytest.mark.parametrize("sections", [CLASSIFICATION, SFT], ids=["classification", "sft"])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"name": "distillation"},
        {"name": "split"},
        {"name": "split", "labels": "client"},
    ],
    ids=str,
)
def test_what_is_advised_is_what_a_run_does(experiment, sections, method):
    own = experiment(**sections, method=method, federation={"rounds": 1, "clients": 2})
    options = {option.framework: option for option in reversed(advise(own, LINK, 1e9))}
    result = fedloom.run(own)
    costs = [json.loads(line) for line in (result.folder / "costs.jsonl").read_text().splitlines()]
    run = json.loads((result.folder / "run.json").read_text())
    seen = turns(run, costs)
    worst = max(seen, key=lambda turn: LINK.seconds(turn.sent, turn.flops))
    option = options[run["traffic"]["framework"]]
    assert option.flops == pytest.approx(worst.flops, rel=1e-9)
    assert option.sent.exchanges == worst.sent.exchanges
    assert option.sent.down == pytest.approx(worst.sent.down, rel=0.001, abs=1024)
    assert option.sent.up == pytest.approx(worst.sent.up, rel=0.001, abs=1024)
    assert option.memory <= run["client_memory"] * 1.0001


def test_tokens_are_counted_in_the_order_of_a_run(experiment):
    """How many rows a number of tokens is depends on which come first."""
    own = experiment(
        adapter={"rank": 2},
        training={"local_tokens": 300, "batch_size": 3, "data_seed": 11},
        federation={"rounds": 1, "clients": 1},
    )
    (option,) = advise(own, LINK, 1e9)
    folder = fedloom.run(own).folder
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    flops = sum(cost["flops"] for cost in costs if cost["phase"] == "train")
    assert option.flops == pytest.approx(flops, rel=1e-9)


def test_what_does_not_fit_is_said_and_another_proposed(experiment):
    own = experiment(**CLASSIFICATION)
    generous = advise(own, LINK, 1e12)
    assert all(option.fits for option in generous)
    assert recommend(generous).startswith("Try FedLLM")
    front = min(option.memory for option in generous if option.framework == "Split-FedLLM")
    whole = min(option.memory for option in generous if option.framework == "FedLLM")
    assert front < whole
    tight = advise(own, LINK, (front + whole) / 2)
    assert {option.framework for option in tight if option.fits} == {"Split-FedLLM"}
    assert "Try Split-FedLLM" in recommend(tight) and "does not fit" in recommend(tight)
    assert recommend(advise(own, LINK, 1.0)).startswith("Nothing fits this memory")


def test_a_slow_link_speaks_against_much_traffic(experiment):
    own = experiment(**CLASSIFICATION)
    slow = advise(own, Link(1e3, 1e3, 0.001, 1e15), 1e12)
    fastest = min(slow, key=lambda option: option.seconds)
    assert fastest.framework == "KD-FedLLM"
    assert "Try KD-FedLLM" in recommend(slow) and "times as long" in recommend(slow)


def test_preferences_have_one_framework(experiment):
    assert {option.framework for option in advise(experiment(), LINK, 1e9)} == {"FedLLM"}


def test_a_framework_that_cannot_be_used_says_why(experiment):
    options = advise(experiment(**{**CLASSIFICATION, "public": {"rows": 5000}}), LINK, 1e9)
    (problem,) = [option for option in options if option.problem]
    assert problem.framework == "KD-FedLLM" and "public.rows = 5000" in problem.problem
    assert not problem.fits


ROWS = {"unit": "row", "delta": 1e-3, "noise_multiplier": 4.0, "accountant": "rdp"}
CLIENTS = {"unit": "client", "delta": 1e-2, "noise_multiplier": 2.0, "accountant": "rdp"}


@pytest.mark.parametrize("privacy", every(2, [CLIENTS, ROWS]))
def test_privacy_is_advised_as_a_run_states_it(experiment, privacy):
    own = experiment(
        privacy=privacy, federation={"clients": 3, "rounds": 2}, data={"builtin_rows": 40}
    )
    told = privacy_advice(own)
    run = json.loads((fedloom.run(own).folder / "run.json").read_text())
    assert told[: len(run["privacy"]["sentences"])] == run["privacy"]["sentences"]
    stated, numbers = run["privacy"], run["model"]["trainable"]
    units = 3 if privacy is CLIENTS else 8  # clients a round; batch_size
    once = stated["noise_multiplier"] * numbers**0.5 / units
    assert f"is {once:.3g} times as long" in told[-2]
    assert f"{once / stated['steps'] ** 0.5:.3g} times, if all" in told[-2]
    assert "expect to learn little" in told[-1] and "derived" in told[-1]


def test_privacy_that_cannot_be_is_refused_before_costs_are_counted(call, experiment, tmp_path):
    path = tmp_path / "x.toml"
    poor = {"delta": 1e-12, "noise_multiplier": None, "target_epsilon": 1e-9}
    path.write_text(experiment(privacy={**CLIENTS, **poor}).to_toml())
    code, text = call("advise", path)
    assert code == 2 and "cannot be met" in text and "Try" not in text and "Traceback" not in text
    plain = experiment(**CLASSIFICATION, privacy=ROWS)
    problems = {o.framework: o.problem for o in advise(plain, LINK, 1e12) if o.problem}
    assert problems.keys() == {"Split-FedLLM"} and "activations of rows" in problems["Split-FedLLM"]
