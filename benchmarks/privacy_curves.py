"""Held-out preference accuracy against epsilon, for DPO and KTO, and what KTO loses by z0 = 0.

    .venv/bin/python benchmarks/privacy_curves.py [--parts builtin-10 builtin-100 hh-100 builtin-1000]
        [--seeds 0 1 2] [--hh helpful-base.jsonl.gz --model FOLDER] [--workers 2] [--work FOLDER]
        [--write] [--list]

A part is a source and a number of clients:

- builtin-10: ten clients and two rounds, to see in minutes that all of it works
- builtin-100: built-in pairs, 100 clients, rows are hidden (``privacy.unit = "row"``), model "tiny"
- hh-100: pairs of HH-RLHF, 100 clients, rows are hidden, the model of ``--model``; of a row the 64 tokens
  around the beginning of the answer
- builtin-1000: as builtin-100 with 1,000 clients, of which each is hidden (``privacy.unit = "client"``)

Of each, DPO and KTO run with epsilon none (no clipping, no noise), 8 and 1, and KTO also with the
constant z0 = 0 that row-level privacy needs but without privacy: what that loses is the cost of
decoupling. Noise is drawn from the seed, so that the runs repeat; epsilon is that of the whole run,
delta 1e-5.

Each run is a line of WORK/privacy_curves.jsonl as soon as it is over, and is not made again: the
benchmark can be stopped and started. ``--write`` puts all lines that there are into
results/privacy_curves.md. The last three parts are 60 runs. Several rows of a client are read in a pass
(``privacy.units_per_pass``), and clients without privacy of rows in lockstep (``simulation.cohort``).
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev

import torch

from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.statistics.intervals import student

RESULT = Path(__file__).parent / "results/privacy_curves.md"
LINES = "privacy_curves.jsonl"
DELTA = 1e-5
EPSILONS = (None, 8.0, 1.0)
RATES = {"dpo": 3e-3, "kto": 3e-3}

PARTS = {
    "builtin-10": {"clients": 10, "unit": "row", "rounds": 2, "each": 5, "rows": 600},
    "builtin-100": {"clients": 100, "unit": "row", "rounds": 5, "each": 10, "rows": 3000},
    "hh-100": {"clients": 100, "unit": "row", "rounds": 5, "each": 10, "rows": 3000},
    "builtin-1000": {"clients": 1000, "unit": "client", "rounds": 5, "each": 100, "rows": 6000},
}
"""Clients, what is hidden, rounds, clients expected in a round, and rows."""

Key = tuple[str, str, float | None, bool, int]
"""Part, objective, epsilon, whether z0 is 0, and seed."""


def keys(parts: list[str], seeds: list[int]) -> Iterator[Key]:
    """Yield the runs of these parts, seed by seed, those without privacy before those with it."""
    for part in (own for own in PARTS if own in parts):
        decoupled = [True] if PARTS[part]["unit"] == "row" else []
        for seed in seeds:
            for objective in ("dpo", "kto"):
                for epsilon in EPSILONS:
                    yield part, objective, epsilon, False, seed
                    for z0_is_0 in decoupled if (objective, epsilon) == ("kto", None) else []:
                        yield part, "kto", None, z0_is_0, seed


def make_experiment(key: Key, folder: Path, model: str, hh: str) -> Experiment:
    """Return the experiment of one run."""
    part, objective, epsilon, decoupled, seed = key
    own = PARTS[part]
    built_in = part.startswith("builtin")
    table: dict[str, dict[str, object]] = {
        "model": {"path": "tiny" if built_in else model},
        "data": {
            "source": "builtin:preferences" if built_in else hh, "kind": "preference",
            "test_fraction": 0.1,
            **({"builtin_rows": own["rows"]} if built_in else {"max_length": 64}),
        },
        "partition": {"kind": "iid", "client_test_fraction": 0.0},
        "objective": {"name": objective, **({"z0": 0.0} if decoupled else {})},
        "federation": {
            "clients": own["clients"], "clients_per_round": own["each"], "rounds": own["rounds"],
            "seed": seed,
        },
        "training": {"learning_rate": RATES[objective], "batch_size": 8, "local_steps": 4},
        "evaluation": {
            "samples": 0, "per_client": False, "max_examples": 300, "every": own["rounds"],
        },
        "simulation": {"cohort": "auto"},
        "output": {"folder": str(folder), "verify": False},
    }  # fmt: skip
    if epsilon is not None:
        table["privacy"] = {
            "unit": own["unit"], "delta": DELTA, "target_epsilon": epsilon, "seeded": True,
            "clip": 0.1, **({"units_per_pass": 8} if own["unit"] == "row" else {}),
        }  # fmt: skip
    return Experiment.from_table(table)


def run_one(key: Key, model: str, hh: str) -> dict[str, object]:
    """Run an experiment and return its line."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(key, Path(folder) / "run", model, hh)
        result = run_experiment(experiment, observer=Silent())
        summary = json.loads((result.folder / "summary.json").read_text())
    stated = summary.get("privacy") or {}
    return {
        "key": list(key),
        "accuracy": result.metrics["preference_accuracy"],
        "epsilon": stated.get("epsilon"),
        "noise_multiplier": stated.get("noise_multiplier"),
        "seconds": time.process_time() - began,
    }


def made(
    missing: list[Key], model: str, hh: str, workers: int
) -> Iterator[tuple[Key, dict[str, object]]]:
    """Yield the line of each run as soon as it is over; of one worker in this process."""
    if workers == 1:
        for key in missing:
            yield key, run_one(key, model, hh)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        running = {pool.submit(run_one, key, model, hh): key for key in missing}
        for one in as_completed(running):
            yield running[one], one.result()


def known(path: Path) -> dict[Key, dict[str, object]]:
    """Return the lines that there are; one that was cut off is left out."""
    found: dict[Key, dict[str, object]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        part, objective, epsilon, decoupled, seed = record["key"]
        found[part, objective, epsilon, decoupled, seed] = record
    return found


def interval(values: list[float]) -> str:
    """Return a mean with its 95 % interval by Student's t, of two seeds or more."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = student(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def table_of(lines: dict[Key, dict[str, object]]) -> list[str]:
    """Return the table of accuracies, and what decoupling costs."""
    found = [
        "| part | objective | epsilon | z0 | seeds | accuracy | noise multiplier |",
        "| --- " * 7 + "|",
    ]
    groups: dict[tuple[str, str, float | None, bool], dict[int, float]] = {}
    noise: dict[tuple[str, str, float | None, bool], object] = {}
    for (part, objective, epsilon, decoupled, seed), own in sorted(lines.items(), key=str):
        groups.setdefault((part, objective, epsilon, decoupled), {})[seed] = float(
            str(own["accuracy"])
        )
        noise[part, objective, epsilon, decoupled] = own["noise_multiplier"]
    for key, accuracies in groups.items():
        part, objective, epsilon, decoupled = key
        z = noise[key]
        fixed = decoupled or (epsilon is not None and PARTS[part]["unit"] == "row")
        z0 = "-" if objective == "dpo" else "0" if fixed else "estimated"
        found.append(
            f"| {part} | {objective} | {'none' if epsilon is None else f'{epsilon:g}'} | {z0} | "
            f"{len(accuracies)} | {interval([*accuracies.values()])} | "
            f"{'-' if z is None else f'{float(str(z)):.2f}'} |"
        )
    return [*found, "", *losses(groups)]


def losses(groups: dict[tuple[str, str, float | None, bool], dict[int, float]]) -> list[str]:
    """Return what privacy costs, and z0 = 0 without privacy: differences of runs with one seed."""
    found = []
    for (part, objective, epsilon, decoupled), accuracies in groups.items():
        plain = groups.get((part, objective, None, False), {})
        both = sorted(accuracies.keys() & plain.keys())
        if both and (decoupled or epsilon is not None):
            changed = "z0 = 0 and no privacy" if decoupled else f"epsilon {epsilon:g}"
            lost = interval([plain[seed] - accuracies[seed] for seed in both])
            seeds = f"{len(both)} seed" + "s" * (len(both) > 1)
            found.append(f"- {part}: {objective.upper()} with {changed} loses {lost} ({seeds}).")
    return found


def main() -> None:
    """Run what is missing, print the table and write it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=["builtin-10"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hh", default="", help="JSONL of HH-RLHF, for hh-100")
    parser.add_argument("--model", default="tiny", help="of hh-100")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    given = parser.parse_args()
    if "hh-100" in given.parts and not given.hh and not given.list:
        parser.error("hh-100 needs --hh FILE (and --model FOLDER)")
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / LINES
    lines = known(path)
    missing = [key for key in keys(given.parts, given.seeds) if key not in lines]
    print(f"{len(missing)} runs are missing, {len(lines)} are in {path}", flush=True)
    for key, line in made([] if given.list else missing, given.model, given.hh, given.workers):
        lines[key] = line
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    text = "\n".join(table_of(lines))
    print(text)
    if given.write:
        seconds = sum(float(str(own["seconds"])) for own in lines.values())
        head = (
            f"`benchmarks/privacy_curves.py`; {seconds:.0f} s of one core in all. Intervals: 95 %, "
            "Student's t over seeds. Parts that are not here have not been run."
        )
        RESULT.write_text(f"# Accuracy against epsilon\n\n{head}\n\n{text}\n")


if __name__ == "__main__":
    main()
