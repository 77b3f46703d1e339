"""Comparisons whose truth is known: configurations of models with drawn accuracies, judged by drawn rows.

A row has a difficulty, and a model (a configuration at a seed) an ability: it answers a row right with probability
Phi(ability + difficulty), difficulties being standard normal. Abilities of a configuration differ over seeds.
*These models* truly differ by the mean over their seeds of Phi(ability / sqrt(2)), *the configurations* by its
expectation over seeds: for the rows that were drawn where all seeds are judged by the same, else for all.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from fedloom.randomness import generator
from fedloom.statistics.intervals import Sample, mean_interval, rows_difference, sample_interval

SHARE = (0.0, 1.0)
QUADRATURE = 16
"""Points of the expectation over seeds' abilities."""


@dataclass(frozen=True)
class GridRun:
    """One kind of comparison.

    Attributes:
        seeds: Runs of either configuration.
        rows: Held-out rows.
        accuracy: Of the left configuration, about.
        gap: By how much the right configuration is truly better, in accuracy.
        deviation: Of a configuration's ability over its seeds.
        shared: Whether all seeds are judged by the same rows.
    """

    seeds: int
    rows: int
    accuracy: float = 0.75
    gap: float = 0.0
    deviation: float = 0.1
    shared: bool = True


GRID = (
    GridRun(2, 50),
    GridRun(3, 500, 0.9),
    GridRun(5, 50, 0.95, deviation=0.02),  # most seeds tie, or differ by one row
    GridRun(5, 200, shared=False),
    GridRun(10, 200),
)
"""Five cells without a difference: 400 comparisons of each are 2,000."""

POWER = tuple(GridRun(seeds, rows, gap=0.05) for seeds in (2, 3, 5, 10) for rows in (50, 200, 500))
"""A true difference of .05."""


@dataclass(frozen=True)
class Found:
    """What became of a cell's comparisons, as shares of them.

    Attributes:
        cell: Which.
        count: How many comparisons.
        rows_missed: These models: the interval leaves out their true difference.
        rows_power: These models: the interval lies above 0.
        seeds_alarms: The configurations: the interval leaves out their true difference, or claims one where there is
            none; of all comparisons.
        seeds_covered: The configurations, of those that are estimable: the interval holds the true difference.
        seeds_power: The configurations: the interval lies above 0.
        estimable: Of the comparisons, over seeds.
        single_covered: One model: the interval of its accuracy holds the true one.
    """

    cell: GridRun
    count: int
    rows_missed: float
    rows_power: float
    seeds_alarms: float
    seeds_covered: float
    seeds_power: float
    estimable: float
    single_covered: float


def simulate(cell, count, seed=0):
    """Return what the intervals said of ``count`` comparisons of a cell."""
    rng = generator(seed, f"comparisons {cell}")
    middles = np.sqrt(2) * ndtri([cell.accuracy, cell.accuracy + cell.gap])
    drawn = rng.standard_normal((count, 2, cell.seeds))
    abilities = middles[None, :, None] + cell.deviation * drawn
    difficulty = rng.standard_normal((count, 1, 1 if cell.shared else cell.seeds, cell.rows))
    won = rng.random((count, 2, cell.seeds, cell.rows)) < ndtr(abilities[..., None] + difficulty)
    true = ndtr(abilities / np.sqrt(2))
    models = (true[:, 1] - true[:, 0]).mean(1)
    arms = _arms(cell, middles, difficulty)
    over_rows, over_seeds, single = [], [], []
    for own in won.astype(float):
        left, right = ([_judged(cell, s, own[a, s]) for s in range(cell.seeds)] for a in (0, 1))
        over_rows.append(rows_difference(left, right))
        gaps = (own[1].mean(1) - own[0].mean(1)).tolist()
        over_seeds.append(mean_interval(gaps, "seeds", (-1.0, 1.0), 1 / cell.rows))
        single.append(sample_interval(left[0][1]))
    estimable = np.array([found.low is not None for found in over_seeds])
    missed = _excluded(over_seeds, arms)
    return Found(
        cell,
        count,
        float(_excluded(over_rows, models).mean()),
        float(_above(over_rows).mean()),
        float(missed.mean()),
        float(1 - missed[estimable].mean()) if estimable.any() else float("nan"),
        float(_above(over_seeds).mean()),
        float(estimable.mean()),
        float(1 - _excluded(single, true[:, 0, 0]).mean()),
    )


def table(found):
    """Return the cells as a Markdown table."""
    lines = [
        "| seeds | rows | accuracy | difference | deviation | rows of the seeds | models: missed | configurations: missed "
        "| configurations: estimable | configurations: coverage | one model: coverage | models: power | configurations: power |",
        "| " + " | ".join(["---"] * 13) + " |",
    ]
    for own in found:
        cell = own.cell
        shares = (
            own.rows_missed,
            own.seeds_alarms,
            own.estimable,
            own.seeds_covered,
            own.single_covered,
            own.rows_power if cell.gap else float("nan"),
            own.seeds_power if cell.gap else float("nan"),
        )
        words = ["-" if np.isnan(share) else f"{100 * share:.1f} %" for share in shares]
        known = [cell.seeds, cell.rows, cell.accuracy, cell.gap, cell.deviation]
        rows = "the same" if cell.shared else "others"
        lines.append("| " + " | ".join([*map(str, known), rows, *words]) + " |")
    return "\n".join(lines)


def _judged(cell, seed, won):
    names = [str(row) if cell.shared else f"{seed} {row}" for row in range(cell.rows)]
    return names, Sample("accuracy", tuple(won.tolist()), (1.0,) * cell.rows, (), SHARE)


def _arms(cell, middles, difficulty):
    """The configurations' true differences: the expectation over seeds' abilities, on the rows that were drawn."""
    points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
    weights = weights / weights.sum()
    rows = difficulty[:, 0, 0] if cell.shared else None
    means = []
    for middle in middles:
        abilities = middle + cell.deviation * points
        if rows is None:  # rows are drawn anew with each seed: over these too
            means.append(np.full(len(difficulty), weights @ ndtr(abilities / np.sqrt(2))))
        else:
            means.append(
                sum(w * ndtr(a + rows).mean(1) for a, w in zip(abilities, weights, strict=True))
            )
    return means[1] - means[0]


def _excluded(intervals, truths):
    return np.array([i.excludes(truth) for i, truth in zip(intervals, truths, strict=True)])


def _above(intervals):
    return np.array([i.low is not None and i.low > 0 for i in intervals])


if __name__ == "__main__":
    print(table([simulate(cell, 400) for cell in (*GRID, *POWER)]))
