"""A comparison's budget against what costs.jsonl recorded, for every method, here and between machines."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tomli_w

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS, make_method
from fedloom.reports.comparison_data import read_cells
from fedloom.reports.comparison_page import results, write_comparison
from fedloom.runs.assembly import assemble
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import run_experiment
from fedloom.training.steps import row_tokens
from sampling import sampled

AMOUNTS = {"steps": 10, "examples": 40, "tokens": 2500}
"""Divided without rest by two trainings, by pFedMe's five steps on a batch, and by the answers of a pair."""

LABELLED = {"objective": {"name": "classification"}, "data": {"source": "builtin:labelled"}}
NEEDED = {
    "fedamole": {"adapter": {"kind": "experts", "experts": 4}},
    "fedlease": {"adapter": {"kind": "experts", "experts": 4, "router": "linear"}},
    "distillation": {**LABELLED, "public": {"rows": 8}},
    "fed_et": {**LABELLED, "public": {"rows": 8}},
    "feddm": LABELLED,
    "fedbiscuit": {"method": {"name": "fedbiscuit", "selectors": 1}},
    "hilora": {"adapter": {"rank": 3}},
    "ravan": {"adapter": {"rank": 4}},
    "split": {**LABELLED, "evaluation": {"per_client": False}},
    "fedpdpo": {"method": {"name": "fedpdpo", "schedule": "alternating"}},
}
"""Sections without which a method cannot run, or trains once only."""

TRAINS_AGAIN = ["ditto", "distillation", "fdlora", "fedavg_ft", "feddpa", "fedpdpo", "fedrep", "pfedme", "apfl", "fedala", "feddat", "fed_et", "hilora", "lora_a2", "fedlease"]  # fmt: skip
"""Methods that train several models in a round, or step several times on a batch."""


@pytest.fixture
def file(table, mixture_folder, tmp_path):
    """Write a comparison of methods with a budget; return its path."""

    def write(methods, budget, amount=None, **compare):
        base = {name: dict(own) for name, own in table.items() if name != "output"}
        base["data"]["builtin_rows"] = 30
        base["evaluation"] = {"samples": 0, "per_client": False}
        arms = {}
        for method in methods:
            arms[method] = {"method": {"name": method}, **NEEDED.get(method, {})}
            if method == "fedmoe":
                arms[method] |= {
                    "adapter": {"kind": "submixture"},
                    "model": {"path": str(mixture_folder)},
                }
        own = {"budget": budget, "amount": amount or AMOUNTS[budget], "seeds": [0]}
        base["compare"] = {**own, "scenarios": {"plain": {}}, "methods": arms, **compare}
        path = tmp_path / "budget.toml"
        path.write_text(tomli_w.dumps(base))
        return path

    return write


def spent(folder, width):
    """What each client trained in each round, over all phases: steps, answers, tokens."""
    found = {}
    for line in (Path(folder) / "costs.jsonl").read_text().splitlines():
        cost = json.loads(line)
        if cost["client"] >= 0 and cost["phase"] not in ("evaluate", "reference"):
            own = found.setdefault((cost["round"], cost["client"]), Counter())
            own.update({name: cost[name] for name in ("steps", "examples", "tokens")})
    return [
        {"steps": own["steps"], "examples": width * own["examples"], "tokens": own["tokens"]}
        for own in found.values()
        if own["steps"]
    ]


def check_spent(experiment, folder, budget):
    """Compare what was spent with the budget: the same, or of tokens beyond it by a row a step at most."""
    shares = assemble(experiment, partition_data(experiment)).local.shares.values()
    width = next(iter(shares)).tokens.width
    turns = spent(folder, width)
    clients = 1 if experiment.method.name == "centralised" else 3
    assert len(turns) == 2 * clients
    if budget == "tokens":
        method = make_method(experiment.method)
        beyond = method.repeats * max(method.trainings_of(r, 2) for r in (1, 2))
        row = max(int(row_tokens(share).max()) for share in shares)
        assert all(2500 <= turn["tokens"] < 2500 + beyond * row for turn in turns)
    else:
        assert {turn[budget] for turn in turns} == {AMOUNTS[budget]}


def cell_of(file, method, budget, folder):
    (cell,) = read_comparison(file([method], budget)).grid_runs
    table = {**cell.experiment.to_table(defaults=False), "output": {"folder": str(folder)}}
    return Experiment.from_table(table)


CASES = [(own, budget) for own in METHODS if own != "fedgrpo" for budget in AMOUNTS]


@pytest.mark.parametrize("case", [("pfedme", "steps"), *sampled(CASES, 3)])
def test_a_budget_is_what_a_client_computes(file, tmp_path, case):
    method, budget = case
    experiment = cell_of(file, method, budget, tmp_path / "run")
    shared = experiment.training.amount_per == "round"
    assert shared == (method in TRAINS_AGAIN)
    run_experiment(experiment, observer=Silent())
    check_spent(experiment, tmp_path / "run", budget)


MACHINES = [
    (method, budget)
    for method, budget in CASES
    if method != "centralised" and not METHODS[method][1].asynchronous
]


@pytest.mark.parametrize("case", sampled(MACHINES, 2))
def test_a_budget_is_what_a_client_computes_between_machines(file, loopback, tmp_path, case):
    method, budget = case
    experiment = cell_of(file, method, budget, tmp_path / "run")
    engine = loopback(3).engine(experiment)
    run_experiment(experiment, observer=Silent(), remote=engine)
    check_spent(experiment, tmp_path / "run", budget)


@pytest.mark.slow
def test_between_machines_the_budget_holds_where_clients_train_twice(file, loopback, tmp_path):
    experiment = cell_of(file, "ditto", "examples", tmp_path / "run")
    run_experiment(experiment, observer=Silent(), remote=loopback(3).engine(experiment))
    check_spent(experiment, tmp_path / "run", "examples")


@pytest.mark.parametrize(
    ("method", "budget", "amount", "message"),
    [
        (
            "pfedme", "steps", 4,
            "optimizer steps: 4 a client and round is too little for method.name = 'pfedme', which makes 5 "
            "optimizer steps on each batch: give 5 at least (training.local_steps, or compare.amount)",
        ),
        (
            "pfedme", "steps", 12,
            "optimizer steps: 12 a client and round do not part into batches for method.name = 'pfedme', "
            "which makes 5 optimizer steps on each batch: give 10 or 15 (training.local_steps, or "
            "compare.amount)",
        ),
        (
            "pfedme", "examples", 9,
            "examples: 9 a client and round is too little for method.name = 'pfedme', which makes 5 "
            "optimizer steps on each batch: give 10 at least (training.local_examples, or "
            "compare.amount)",
        ),
        (
            "ditto", "steps", 1,
            "optimizer steps: 1 a client and round is too little for method.name = 'ditto', which makes 2 "
            "trainings in a round: give 2 at least (training.local_steps, or compare.amount)",
        ),
    ],
)  # fmt: skip
def test_too_small_a_budget_is_refused_with_the_least_that_works(
    file, method, budget, amount, message
):
    with pytest.raises(SettingsError) as caught:
        read_comparison(file([method], budget, amount))
    assert list(caught.value.problems) == [f"configuration plain-{method}: {message}"]


def test_too_few_tokens_are_refused_with_the_least_that_works(file, tmp_path):
    (cell,) = read_comparison(file(["pfedme"], "tokens", 60)).grid_runs
    free = Experiment.from_table({**cell.experiment.to_table(), "training": {}})
    shares = assemble(free, partition_data(free)).local.shares
    longest, client = max((int(row_tokens(share).max()), c) for c, share in shares.items())
    with pytest.raises(SettingsError) as caught:
        compare(read_comparison(file(["fedavg", "pfedme"], "tokens", 60)), tmp_path / "out")
    assert list(caught.value.problems) == [
        "tokens: 60 a client and round is too little for method.name = 'pfedme': it makes 5 optimizer steps "
        f"on a row in a round, and client {client} has one of {longest} tokens: give {5 * longest} at "
        "least (training.local_tokens, or compare.amount)"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_other_reading_counts_each_model_and_each_batch_once(file, tmp_path):
    """Four steps of each model: FedAvg makes 4, Ditto 8, pFedMe 4 of w and 20 of theta."""
    comparison = read_comparison(file(["fedavg", "ditto", "pfedme"], "steps", 4, per_model=True))
    assert {cell.experiment.training.amount_per for cell in comparison.grid_runs} == {"model"}
    folder = compare(comparison, tmp_path / "out", workers=1)
    found = {row["method"]: row["steps"] for row in results(*read_cells(folder))["did"]}
    assert {name: row["mean"] for name, row in found.items()} == {
        "fedavg": 4, "ditto": 8, "pfedme": 20
    }  # fmt: skip
    page = write_comparison(folder).read_text()
    assert (
        "Of each model that it trains, a client does 4 optimizer steps a round in every configuration; methods "
        "that train several, or step several times on a batch, compute more." in page
    )
    assert "optimizer steps from 4 (plain, fedavg) to 20 (plain, pfedme)" in page


@pytest.mark.slow
def test_the_page_says_what_was_spent_and_what_is_equal(file, tmp_path):
    folder = compare(
        read_comparison(
            file(["fedavg", "ditto"], "steps", 4, scenarios={}, objectives={"dpo": {}})
        ),
        tmp_path / "out", workers=1,
    )  # fmt: skip
    rows = results(*read_cells(folder))["did"]
    assert [(row["method"], row["steps"]["mean"]) for row in rows] == [("fedavg", 4), ("ditto", 4)]
    assert all(row["flops"]["mean"] > 0 for row in rows)
    page = write_comparison(folder).read_text()
    assert (
        "Every client computes 4 optimizer steps a round in every configuration, in all of its trainings together."
        in page
    )
    assert "Equal in all configurations: optimizer steps" in page


@pytest.mark.parametrize("amount", [{"local_tokens": 60}, {"local_examples": 8}])
def test_pfedme_always_ends_its_inner_steps(experiment, federate, amount):
    """Each of these ends within the five steps on the first batch: the shared adapter moves all the same."""
    found = federate(experiment(method={"name": "pfedme"}, training=amount))
    assert any(not found.adapter[n].equal(t) for n, t in found.parts.initial.items())
    assert {cost.steps for client in range(3) for cost in found.costs(client)} <= {0, 5}


def test_an_amount_of_the_round_must_be_one_that_can_be_shared(experiment):
    with pytest.raises(SettingsError) as caught:
        experiment(training={"amount_per": "round", "local_epochs": 2})
    assert list(caught.value.problems) == [
        'training.amount_per = "round" shares local_steps, local_examples or local_tokens: give one'
    ]
