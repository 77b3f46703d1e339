"""FedBuff against synchronous FedAvg: simulated time to the same accuracy on devices of unequal speed.

    .venv/bin/python benchmarks/asynchrony.py [--target 0.8] [--seeds 0 1 2 3 4] [--write]

Sixteen clients whose devices differ tenfold in speed (log-uniform), with the built-in labelled texts and
a small Llama that was hardly trained. Eight clients are at work at a time in every configuration:

- fedavg: synchronous rounds of 8
- deadline: the same; a round waits as long as five eighths of fedavg's answers took with this seed, and
  clients that are late are left out
- fedbuff: a server update whenever 4 answers have come

Time to accuracy is the simulated end of the first round whose global held-out accuracy is at least the
target; the run then stops. Over seeds: means with 95 % intervals (Student's t, from five seeds on), and
those of the ratio to fedavg of the same seed (geometric). ``--write`` puts the table into
results/asynchrony.md.
"""

import argparse
import contextlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from fedloom.data.builtin import pretraining_texts
from fedloom.errors import Interrupted
from fedloom.experiment.experiment import Experiment
from fedloom.models.tiny import TinyRecipe, make_tiny_model
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.statistics.intervals import mean_interval

RESULT = Path(__file__).parent / "results/asynchrony.md"
CLIENTS, AT_WORK, MOST_ROUNDS = 16, 8, 80

REMARKS = (
    "Learning rate and local steps are the same for all and were not tuned. The deadline is taken from",
    "the answers of fedavg with the same seed, which a deployment would not know. The default target was",
    "chosen after a first run of fedavg with seed 0.",
)

CONFIGURATIONS = {
    "fedavg": {"method": {"name": "fedavg"}, "federation": {"clients_per_round": AT_WORK}},
    "deadline": {
        "method": {"name": "fedavg"},
        "federation": {"clients_per_round": AT_WORK, "deadline": 0.0, "quorum": 0.1},
    },
    "fedbuff": {
        "method": {"name": "fedbuff", "concurrency": AT_WORK},
        "federation": {"clients_per_round": 4},
    },
}


def make_table(model: Path, folder: Path, name: str, seed: int) -> dict:
    """Return the experiment of a configuration."""
    own = CONFIGURATIONS[name]
    federation = {"clients": CLIENTS, "rounds": MOST_ROUNDS, "seed": seed, **own["federation"]}
    return {
        "model": {"path": str(model)},
        "adapter": {"rank": 4},
        "data": {"source": "builtin:labelled", "builtin_rows": 480},
        "objective": {"name": "classification"},
        "method": own["method"],
        "federation": federation,
        "training": {
            "learning_rate": 0.01,
            "schedule": "constant",
            "batch_size": 8,
            "local_steps": 2,
            "threads": 1,
        },
        "evaluation": {"per_client": False},
        "output": {"folder": str(folder), "verify": False, "checkpoint_every": MOST_ROUNDS},
        "simulation": {
            "devices": {"flops": {"kind": "loguniform", "low": "10MFLOP", "high": "100MFLOP"}}
        },
    }


class Target(Silent):
    """Stops a run once its held-out accuracy has reached the target."""

    def __init__(self, target: float) -> None:
        """Take the target."""
        self.target = target

    def round_done(self, record) -> None:
        """Look at the round's evaluation."""
        if record.evaluation.metrics["accuracy"] >= self.target:
            raise KeyboardInterrupt


def play(table: dict, target: float) -> dict:
    """Run a configuration; return when it had reached the target, after how much work."""
    with contextlib.suppress(Interrupted):
        run_experiment(Experiment.from_table(table), observer=Target(target))
    lines = (Path(table["output"]["folder"]) / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    reached = rounds[-1]["evaluation"]["global"]["accuracy"] >= target
    ages = [age for own in rounds for age in own["simulated"]["staleness"].values()]
    return {
        "seconds": rounds[-1]["simulated"]["end"] if reached else math.inf,
        "rounds": len(rounds) - 1,
        "answers": sum(len(own["client_train"]) for own in rounds),
        "left out": sum(len(own["rejected"]) for own in rounds),
        "staleness": float(np.mean(ages)) if ages else 0.0,
        "durations": [s for own in rounds for s in own["simulated"]["clients"].values()],
    }


def shown(values: list[float], digits: int = 0) -> str:
    """Return a mean with its interval."""
    if not all(map(math.isfinite, values)):
        return "not reached by all"
    own = mean_interval(values, "seeds")
    ends = "" if own.low is None else f" ({own.low:.{digits}f} to {own.high:.{digits}f})"
    return f"{own.estimate:.{digits}f}{ends}"


def ratio(values: list[float], base: list[float]) -> str:
    """Return the geometric mean of ratios with its interval."""
    if not all(map(math.isfinite, [*values, *base])):
        return "not reached by all"
    logs = [math.log(one / other) for one, other in zip(values, base, strict=True)]
    own = mean_interval(logs, "seeds")
    ends = "" if own.low is None else f" ({math.exp(own.low):.2f} to {math.exp(own.high):.2f})"
    return f"{math.exp(own.estimate):.2f}{ends}"


def table_of(found: dict[str, list[dict]], target: float, seeds: list[int]) -> str:
    """Return the result as Markdown."""
    base = [own["seconds"] for own in found["fedavg"]]
    lines = [
        f"Simulated time to a held-out accuracy of {target:g} (`benchmarks/asynchrony.py`), seeds "
        f"{', '.join(map(str, seeds))}:",
        "16 clients with tenfold differences in speed, 8 at work at a time; means, 95 % intervals.",
        "",
        "| configuration | simulated seconds | times fedavg | server updates | answers used | left out "
        "| mean staleness |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        seconds = [own["seconds"] for own in runs]
        mean = {
            key: np.mean([own[key] for own in runs])
            for key in ("rounds", "answers", "left out", "staleness")
        }
        lines.append(
            f"| {name} | {shown(seconds)} | {ratio(seconds, base) if name != 'fedavg' else '1'} | "
            f"{mean['rounds']:.1f} | {mean['answers']:.1f} | {mean['left out']:.1f} "
            f"| {mean['staleness']:.2f} |"
        )
    return "\n".join([*lines, "", *REMARKS]) + "\n"


def main() -> None:
    """Run all configurations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict]] = {name: [] for name in CONFIGURATIONS}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        texts = pretraining_texts(np.random.default_rng(0), 200)
        make_tiny_model(
            model,
            texts,
            TinyRecipe(vocabulary=512, hidden=64, intermediate=128, layers=2, heads=4, steps=1),
        )
        for seed in given.seeds:
            for name in CONFIGURATIONS:
                table = make_table(model, Path(folder) / f"{name}-{seed}", name, seed)
                if name == "deadline":
                    earlier = found["fedavg"][-1]["durations"]
                    table["federation"]["deadline"] = float(np.quantile(earlier, 5 / AT_WORK))
                found[name].append(play(table, given.target))
                own = {k: v for k, v in found[name][-1].items() if k != "durations"}
                print(seed, name, own, flush=True)
    text = table_of(found, given.target, given.seeds)
    print(text)
    if given.write:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
