"""What the configurations of a comparison really spent, per client and round, from their runs' costs.

A budget is a promise about one of these figures; the others differ, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from fedloom.accounting.quantities import human_count, human_flops, human_number
from fedloom.reports.client_rounds import client_costs
from fedloom.reports.run_data import Run
from fedloom.storage.run_folder import Record

BUDGETS = {"steps": "optimizer steps", "examples": "examples", "tokens": "tokens"}
"""What a budget can be of, in words."""

SPENT = {**BUDGETS, "flops": "compute"}
"""What is shown, in words."""

ALIKE = 1e-3
"""Relative difference below which two configurations are said to have spent equally much."""


def spent_rows(arms: Iterable[tuple[str, str, Sequence[Run]]]) -> list[Record]:
    """Return what clients spent in a round in which they trained: lowest, mean and highest.

    Args:
        arms: Name of the objective or scenario, name of the method, and the runs of each configuration.

    Returns:
        One row a configuration, with :data:`SPENT` (optimizer steps, answers, tokens without padding,
        FLOPs) of everything that a client computed in a round but evaluation and reference log-probs.
    """
    rows = []
    for objective, method, runs in arms:
        turns = [turn for run in runs for turn in _turns(run)]
        if turns:
            figures = {what: _range([turn[what] for turn in turns]) for what in SPENT}
            rows.append({"objective": objective, "method": method, **figures})
    return rows


def budget_words(record: Record) -> str:
    """Return what was held equal, as a sentence."""
    budget = record["budget"]
    if budget == "as_set":
        return "Each configuration does what its own settings say: the budget is not equal."
    amount = f"{human_count(record['amount'])} {BUDGETS[budget]}"
    if record.get("per_model", True):  # comparisons of earlier versions counted so
        return (
            f"Of each model that it trains, a client does {amount} a round in every configuration; "
            "methods that train several, or step several times on a batch, compute more."
        )
    return (
        f"Every client computes {amount} a round in every configuration, in all of its trainings "
        "together."
    )


def comparison_words(rows: Sequence[Record]) -> str:
    """Return in which of these figures the configurations are equal, as a sentence or two."""
    equal, unequal = [], []
    for what, words in SPENT.items():
        ordered = sorted(rows, key=lambda row, what=what: row[what]["mean"])  # type: ignore[misc]
        low, high = ordered[0], ordered[-1]
        if high[what]["mean"] - low[what]["mean"] <= ALIKE * high[what]["mean"]:
            equal.append(words)
        else:
            unequal.append(
                f"{words} from {_shown(low, what)} ({_name(low)}) to {_shown(high, what)} "
                f"({_name(high)})"
            )
    found = [f"Equal in all configurations: {', '.join(equal)}."] if equal else []
    return " ".join([*found, *([f"Not equal: {'; '.join(unequal)}."] if unequal else [])])


def _turns(run: Run) -> list[dict[str, float]]:
    """Return each client's figures of each round in which it trained."""
    width = 2 if _has_pairs(run) else 1
    found: dict[tuple[int, int], dict[str, float]] = {}
    for cost in client_costs(run.costs):
        if cost["phase"] == "reference" or not cost["round"]:
            continue
        own = found.setdefault((cost["round"], cost["client"]), dict.fromkeys(SPENT, 0.0))
        for what in SPENT:
            own[what] += (cost[what] or 0) * (width if what == "examples" else 1)
    return [turn for turn in found.values() if turn["steps"]]


def _has_pairs(run: Run) -> bool:
    """Return whether an example of the run is a pair of answers."""
    data = run.run["data"]
    return data["kind"] == "preference" and data.get("feedback") is None


def _range(values: list[float]) -> Record:
    return {"lowest": min(values), "mean": fmean(values), "highest": max(values)}


def _shown(row: Record, what: str) -> str:
    mean = row[what]["mean"]
    return human_flops(mean) if what == "flops" else human_number(mean)


def _name(row: Record) -> str:
    return f"{row['objective']}, {row['method']}"
