"""What a comparison's page says of a configuration, of two configurations and of what clients spent, on hand values."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from fedloom.accounting.costs import REPEATED, Cost
from fedloom.reports.comparison_data import GridRun
from fedloom.reports.paired import _paired, paired_tables, rows_in
from fedloom.reports.sections.outcomes import arm, means_by_objective
from fedloom.reports.spent import budget_words, comparison_words, spent_rows

RESOURCES = {"steps": 4, "examples": 8, "tokens": 16, "flops": 32, "seconds": 64}


def cell(
    seed, value, *, objective="dpo", method="fedavg", higher_is_better=True, scale=1, rows=None
):
    totals = {name: scale * amount for name, amount in RESOURCES.items()}
    totals |= {"bytes_up": 10 * scale, "bytes_down": 5 * scale, "peak_memory": 100 * scale}
    summary = {
        "before": value / 2,
        "after": value,
        "after_metrics": {"accuracy": value, "loss": 10 * value},
        "totals": totals,
    }
    metric = {"name": "accuracy", "higher_is_better": higher_is_better}
    data = {"kind": "preference", "global_held_out": 10}
    run = SimpleNamespace(
        run={"metric": metric, "data": data},
        metric="accuracy",
        summary=summary,
        evaluated=[],
        costs=[],
        rounds=[],
    )
    return GridRun(objective, method, seed, run)


@pytest.fixture(autouse=True)
def without_rows(monkeypatch):
    """Intervals over rows have hand values of their own."""
    from fedloom.reports import paired
    from fedloom.reports.sections import outcomes
    from fedloom.statistics.intervals import Interval

    none = Interval(None, None, None, 0, "rows")
    monkeypatch.setattr(outcomes, "over_rows", lambda runs, values: none)
    monkeypatch.setattr(paired, "difference_over_rows", lambda pairs, gap: none)


def test_an_arm_by_hand():
    found = arm([cell(0, 0.5), cell(1, 0.6, scale=3), cell(2, 1.0, scale=2)])
    assert found["runs"] == 3 and found["mean"] == pytest.approx(0.7)
    assert found["before"] == pytest.approx(0.35)
    assert (found["lowest"], found["highest"]) == (0.5, 1.0)
    assert found["metrics"] == pytest.approx({"accuracy": 0.7, "loss": 7.0})
    assert found["sent"] == 30  # 15, 45 and 30, both ways
    assert {name: found[name] for name in RESOURCES} == {n: 2 * v for n, v in RESOURCES.items()}
    assert found["peak_memory"] == 300


@pytest.mark.parametrize(("higher_is_better", "wins"), [(True, 2), (False, 1)])
def test_a_difference_is_the_mean_over_seeds_of_the_mean_over_methods(higher_is_better, wins):
    """Seed 0: 0.1 and 0.3; seed 1: -0.2 alone; seed 2: 0: the mean of 0.2, -0.2 and 0 is 0."""
    gaps = [(0, "fedavg", 0.1), (0, "ditto", 0.3), (1, "fedavg", -0.2), (2, "fedavg", 0.0)]
    options = {"higher_is_better": higher_is_better}
    blocks = [
        (
            cell(seed, 0.5, method=method, **options),
            cell(seed, 0.5 + gap, objective="kto", method=method, **options),
        )
        for seed, method, gap in gaps
    ]
    found = _paired(blocks)
    assert (found["units"], found["runs"], found["ties"]) == (3, 4, 1)
    assert found["difference"] == pytest.approx(0, abs=1e-12) and found["right_wins"] == wins
    assert _paired(blocks[:2])["difference"] == pytest.approx(0.2)
    assert _paired(blocks[:3])["difference"] == pytest.approx(0)


def pairs(record, cells):
    found = rows_in(paired_tables(record, cells))
    return [
        (
            r["left"],
            r["right"],
            r.get("objective", r.get("method")),
            round(r["difference"], 9),
            r["runs"],
        )
        for r in found
    ]


def test_where_methods_alone_differ_they_are_paired():
    cells = [cell(s, v) for s, v in ((0, 0.5), (1, 0.6))]
    cells += [cell(s, v, method="ditto") for s, v in ((0, 0.9), (1, 0.8), (2, 0.1))]
    record = {"objectives": ["dpo"], "methods": ["fedavg", "ditto"]}
    assert pairs(record, cells) == [  # (0.4 + 0.2) / 2; seed 2 has no counterpart
        ("fedavg", "ditto", None, 0.3, 2),
        ("fedavg", "ditto", "dpo", 0.3, 2),
    ]
    (table,) = paired_tables(record, cells)
    assert (table["of"], table["within"]) == ("methods", "objective")


def test_where_both_differ_either_is_paired_over_the_other():
    """dpo 0.5 and 0.6 (ditto), kto 0.7 and 0.9: kto - dpo .2 and .3; ditto - fedavg .1 and .2."""
    values = {("dpo", "fedavg"): 0.5, ("dpo", "ditto"): 0.6}
    values |= {("kto", "fedavg"): 0.7, ("kto", "ditto"): 0.9}
    cells = [cell(0, value, objective=o, method=m) for (o, m), value in values.items()]
    record = {"objectives": ["dpo", "kto"], "methods": ["fedavg", "ditto"]}
    objectives = [("dpo", "kto", None, 0.25, 2), ("dpo", "kto", "fedavg", 0.2, 1), ("dpo", "kto", "ditto", 0.3, 1)]  # fmt: skip
    methods = [("fedavg", "ditto", None, 0.15, 2), ("fedavg", "ditto", "dpo", 0.1, 1), ("fedavg", "ditto", "kto", 0.2, 1)]  # fmt: skip
    assert pairs(record, cells) == objectives + methods
    assert (
        pairs({**record, "kind": "scenarios"}, cells) == methods
    )  # a scenario is no configuration


def test_runs_judged_by_other_metrics_or_on_other_rows_are_not_paired():
    record = {"kind": "scenarios", "objectives": ["a", "b"], "methods": ["fedavg", "ditto"]}
    cells = [cell(0, 0.5, objective=o, method=m) for o in "ab" for m in record["methods"]]
    for own in cells[2:]:
        own.run.metric = "loss"
    assert pairs(record, cells) == [("fedavg", "ditto", "a", 0, 1), ("fedavg", "ditto", "b", 0, 1)]
    cells[1].summary["judged_on"] = "clients"
    cells[0].summary["judged_on"] = "global"
    assert [row[2] for row in pairs(record, cells)] == [None, "b"]


def test_p_values_of_a_table_are_adjusted_for_their_number(monkeypatch):
    """Holm: .01 and .04 of two tests become .02 and .04; the means and the single rows are apart."""
    from fedloom.reports import paired
    from fedloom.statistics.intervals import Interval

    chances = iter([0.01, 0.04, 0.03, 0.5])
    monkeypatch.setattr(
        paired,
        "difference_over_rows",
        lambda pairs, gap: Interval(gap, -1, 1, 9, "rows", p=next(chances)),
    )
    methods = ["fedavg", "ditto", "fedper"]
    cells = [cell(0, 0.5, method=method) for method in methods[:2]] + [
        cell(1, 0.5, method="fedper")
    ]
    cells += [cell(1, 0.5, method="ditto")]
    (table,) = paired_tables({"objectives": ["dpo"], "methods": methods}, cells)
    overall, single = table["parts"]
    assert [row["models"]["p_adjusted"] for row in overall["rows"]] == [0.02, 0.04]
    assert [row["models"]["p_adjusted"] for row in single["rows"]] == [0.06, 0.5]
    assert overall["tests"] == {"models": 2, "seeds": 0}


def test_an_objectives_mean_is_over_seeds_of_the_means_over_methods():
    """Seed 0: (0.2 + 0.6) / 2, seed 1: 0.8 alone: 0.6, which the mean of the three runs is not."""
    cells = [cell(0, 0.2), cell(0, 0.6, method="ditto"), cell(1, 0.8)]
    (found,) = means_by_objective({"objectives": ["dpo"]}, cells)
    assert found["mean"] == pytest.approx(0.6) and found["runs"] == 3
    assert found["seeds"]["units"] == 2


def run(costs, kind="preference"):
    return SimpleNamespace(costs=[asdict(cost) for cost in costs], run={"data": {"kind": kind}})


def test_what_clients_spent_in_a_round_by_hand():
    """Two turns: 2 + 1 steps, and 5; a pair is two answers; what is not training is left out."""
    costs = [
        Cost(1, 0, "train", steps=2, examples=4, tokens=10, flops=100.0),
        Cost(1, 0, "train", steps=1, examples=2, tokens=6, flops=20.0),
        Cost(1, 1, "train", steps=5, examples=8, tokens=40, flops=300.0),
        Cost(2, 1, "aggregate", flops=7.0),  # no step: no turn
        Cost(1, 0, "reference", flops=1e6),
        Cost(0, 0, "train", steps=9),
        Cost(1, 0, "evaluate", flops=1e6),
        Cost(1, 0, REPEATED, flops=1e6),
    ]
    (row,) = spent_rows([("dpo", "fedavg", [run(costs)]), ("dpo", "none", [run([])])])
    assert (row["objective"], row["method"]) == ("dpo", "fedavg")
    assert row["steps"] == {"lowest": 3, "mean": 4, "highest": 5}
    assert row["examples"] == {"lowest": 12, "mean": 14, "highest": 16}
    assert row["tokens"] == {"lowest": 16, "mean": 28, "highest": 40}
    assert row["flops"] == {"lowest": 120, "mean": 210, "highest": 300}
    (single,) = spent_rows([("sft", "fedavg", [run(costs, "instruction")])])
    assert single["examples"] == {"lowest": 6, "mean": 7, "highest": 8}


def test_arms_that_differ_are_named_with_their_figures():
    def row(method, flops):
        alike = {"lowest": 3, "mean": 4.0, "highest": 5}
        own = {"steps": alike, "examples": alike, "tokens": alike}
        return {"objective": "dpo", "method": method, **own, "flops": {"mean": flops}}

    words = comparison_words([row("fedavg", 2e9), row("ditto", 4e9)])
    assert words == (
        "Equal in all configurations: optimizer steps, examples, tokens. Not equal: compute from 2 GFLOP (dpo, "
        "fedavg) to 4 GFLOP (dpo, ditto)."
    )
    assert "Not" not in comparison_words([row("fedavg", 1000.0), row("ditto", 1001.0)])
    assert "Not" in comparison_words([row("fedavg", 1000.0), row("ditto", 1002.0)])
    assert budget_words({"budget": "steps", "amount": 1200}) == (
        "Of each model that it trains, a client does 1\u202f200 optimizer steps a round in every configuration; "
        "methods that train several, or step several times on a batch, compute more."
    )
