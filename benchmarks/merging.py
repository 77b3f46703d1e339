"""Adapters of sites that trained alone, merged by each rule, against federated and pooled training.

    .venv/bin/python benchmarks/merging.py [--seeds 0 1 2] [--write]

Three sites with unlike built-in preferences (Dirichlet over domains) and the tiny model. All train by the
same number of optimizer steps at each site: alone (local_only), federated in one round and in several
(fedavg), and pooled (all rows in one place, as many steps as the sites make together). The
sites' adapters are merged with no round at all, weighted by rows. Scores are of 120 global held-out
rows, means over seeds with 95 % intervals (Student's t, from five seeds on). ``--write`` puts the table
into results/merging.md.
"""

import argparse
import tempfile
from pathlib import Path

from fedloom.aggregation.merging import Merging
from fedloom.experiment.experiment import Experiment
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.merge import merge_adapters
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.statistics.intervals import mean_interval

RESULT = Path(__file__).parent / "results/merging.md"
SITES, ROUNDS, STEPS = 3, 4, 8

REMARKS = (
    "Nothing was tuned: one learning rate (0.005) for all, the rules' default densities. A scale of 3 is",
    "the sum of the changes of three sites, 1 their mean. rank_error is what cutting merged products to",
    "rank 8 loses of their norm.",
)

RULES = {
    "mean of products": Merging("task_arithmetic", space="product"),
    "sum of products": Merging("task_arithmetic", scale=3.0, space="product"),
    "mean of factors": Merging("task_arithmetic"),
    "TIES, density 0.2": Merging("ties", space="product"),
    "TIES, density 0.2, scale 3": Merging("ties", scale=3.0, space="product"),
    "DARE, density 0.8": Merging("dare", space="product"),
    "KnOTS, density 0.2": Merging("knots"),
    "KnOTS, density 0.2, scale 3": Merging("knots", scale=3.0),
}

TRAINED = {
    "federated, one round": ("fedavg", 1, STEPS * ROUNDS),
    "federated, four rounds": ("fedavg", ROUNDS, STEPS),
    "pooled": ("centralised", ROUNDS, STEPS * SITES),
}
"""Method, rounds, and steps of a client in a round."""


def make_experiment(folder: Path, seed: int, method: str, rounds: int, steps: int) -> Experiment:
    """Return the experiment of one way to train."""
    return Experiment.from_table(
        {
            "model": {"path": "tiny"},
            "data": {"source": "builtin:preferences", "builtin_rows": 600},
            "partition": {
                "kind": "dirichlet", "column": "domain", "alpha": 0.3, "minimum": 40,
                "client_test_fraction": 0.0,
            },
            "method": {"name": method},
            "federation": {"clients": SITES, "rounds": rounds, "seed": seed},
            "training": {"learning_rate": 5e-3, "batch_size": 8, "local_steps": steps},
            "evaluation": {"samples": 0, "per_client": False, "max_examples": 200, "every": rounds},
            "output": {"folder": str(folder), "verify": False},
        }
    )  # fmt: skip


def scored(experiment: Experiment, adapter: Path) -> tuple[float, float]:
    """Return accuracy and loss on the global held-out rows."""
    found = evaluate_adapter(experiment, adapter)
    return found.metrics["preference_accuracy"], found.metrics["loss"]


def one_seed(folder: Path, seed: int) -> dict[str, tuple[float, float, float | None]]:
    """Return accuracy, loss and rank_error by configuration."""
    found = {}
    alone = make_experiment(folder / "alone", seed, "local_only", ROUNDS, STEPS)
    run_experiment(alone, observer=Silent())
    sites = [folder / "alone" / "clients" / f"{site:04d}" for site in range(SITES)]
    each = [scored(alone, site) for site in sites]
    found["alone, mean of the sites"] = (
        *(sum(own) / SITES for own in zip(*each, strict=True)),
        None,
    )
    found["alone, best site"] = (max(own[0] for own in each), min(own[1] for own in each), None)
    for name, rule in RULES.items():
        target = folder / f"merged-{len(found)}"
        merged = merge_adapters(sites, target, rule, seed=seed)
        found[name] = (*scored(alone, target), merged.rank_error)
    for name, (method, rounds, steps) in TRAINED.items():
        target = folder / f"trained-{len(found)}"
        run_experiment(make_experiment(target, seed, method, rounds, steps), observer=Silent())
        found[name] = (*scored(alone, target / "adapter"), None)
    return found


def rows_of(found: list[dict[str, tuple[float, float, float | None]]]) -> list[str]:
    """Return the lines of a table."""
    rounds = {name: own[1] for name, own in TRAINED.items()}
    lines = [
        "| configuration | rounds | accuracy | 95 % over seeds | loss | rank_error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in found[0]:
        own = [seed[name] for seed in found]
        accuracy = [one for one, _, _ in own]
        over = mean_interval(accuracy, "seeds", (0.0, 1.0))
        ends = "-" if over.low is None else f"{over.low:.3f} to {over.high:.3f}"
        lost = [error for _, _, error in own if error is not None]
        cells = (
            name,
            str(rounds.get(name, 0)),
            f"{sum(accuracy) / len(own):.3f}",
            ends,
            f"{sum(loss for _, loss, _ in own) / len(own):.3f}",
            f"{sum(lost) / len(lost):.3f}" if lost else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table, seed by seed, and write it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true")
    given, found = parser.parse_args(), []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(one_seed(Path(folder), seed))
        lines = rows_of(found)
        print("\n".join(lines), flush=True)
        if given.write:
            seeds = ", ".join(map(str, given.seeds[: len(found)]))
            head = f"`benchmarks/merging.py`, seeds {seeds}. {' '.join(REMARKS)}"
            RESULT.write_text("\n".join(["# Merged sites", "", head, "", *lines, ""]))


if __name__ == "__main__":
    main()
