"""What a round costs between machines beyond training: a server, two clients, real processes, TLS, keys.

    .venv/bin/python benchmarks/between_machines.py

The same experiment in one process, over streams, and over Flower's messages alone, with an adapter of
0.1 MB and one of 54 MB (float32, down and up for each client): the median round of five. Also the mean of
four updates of 54 MB, in 128 tensors, 42 and one, beside Flower's own, in turns.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedloom.aggregation.means import weighted_mean
from fedloom.experiment.experiment import Experiment
from machines import FEDLOOM, machines

RANKS = {"0.1 MB": 8, "54 MB": 3690}
ROUNDS = 5
NUMBERS = 13_631_488
"""Of an update: 54.5 MB in float32."""


def experiment(rank: int, streams: bool) -> Experiment:
    """Two clients who take one step on two rows a round."""
    return Experiment.from_table(
        {
            "adapter": {"rank": rank},
            "data": {"source": "builtin:instructions", "builtin_rows": 60},
            "objective": {"name": "sft"},
            "federation": {"clients": 2, "rounds": ROUNDS, "streams": streams},
            "training": {"local_steps": 1, "batch_size": 2},
            "evaluation": {"per_client": False, "every": ROUNDS, "samples": 0, "max_examples": 4},
            "output": {"checkpoint_every": ROUNDS},
        }
    )


def seconds(folder: Path) -> tuple[float, float]:
    """Return the median of a round that does not evaluate, and bytes down and up for a client."""
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    own = [c["bytes_down"] + c["bytes_up"] for c in costs if c["phase"] == "train"]
    return statistics.median(r["seconds"] for r in records[2:-1]), max(own) / 1e6


def rounds() -> None:
    """Print seconds of a round."""
    with machines(2) as own:
        own.start_all()
        for size, rank in RANKS.items():
            for name, streams in (("streams", True), ("messages", False)):
                run = own.run(experiment(rank, streams), f"{name}-{rank}")
                took, megabytes = seconds(run)
                print(
                    f"{size:8} {name:10} {took:7.2f} s a round ({megabytes:.1f} MB a client)",
                    flush=True,
                )
            path, here = own.folder / f"here-{rank}.toml", own.folder / f"here-{rank}"
            path.write_text(experiment(rank, True).to_toml())
            words = [*FEDLOOM, "run", str(path), "--quiet", "--set", f"output.folder={here}"]
            subprocess.run(words, check=True, capture_output=True)
            print(f"{size:8} {'simulation':10} {seconds(here)[0]:7.2f} s a round", flush=True)


def means(tensors: int) -> None:
    """Print milliseconds of a mean of four updates in so many tensors, ours and Flower's in turns."""
    torch.set_num_threads(1)
    updates = [{f"w{i}": torch.randn(NUMBERS // tensors) for i in range(tensors)} for _ in range(4)]
    weights = [10.0, 20.0, 30.0, 40.0]
    took: dict[str, list[float]] = {"ours": [], "flwr": []}
    for turn in range(8):
        for name in ("ours", "flwr") if turn % 2 else ("flwr", "ours"):
            fresh = [{n: t.clone() for n, t in update.items()} for update in updates]
            records = [
                RecordDict(
                    {
                        "arrays": ArrayRecord({n: Array(t.numpy()) for n, t in update.items()}),
                        "metrics": MetricRecord({"num-examples": weight}),
                    }
                )
                for update, weight in zip(fresh, weights, strict=True)
            ]
            start = time.perf_counter()
            if name == "ours":
                weighted_mean(fresh, weights, out=fresh[0])  # as a round does
            else:
                aggregate_arrayrecords(records, "num-examples")
            took[name].append(time.perf_counter() - start)
    typical = {name: statistics.median(values) * 1e3 for name, values in took.items()}
    for name, values in took.items():
        print(
            f"mean of 4 x 54.5 MB in {tensors:3}, {name}: {typical[name]:5.1f} ms, at first "
            f"{values[0] * 1e3:5.1f} ms"
        )
    print(
        f"{typical['flwr'] / typical['ours']:.1f} times, at first {took['flwr'][0] / took['ours'][0]:.1f}"
    )


if __name__ == "__main__":
    rounds()
    for tensors in (128, 42, 1):
        means(tensors)
