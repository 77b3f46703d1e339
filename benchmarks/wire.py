"""Bytes and final loss of FedAvg with each preset of ``[wire]``, on built-in preferences.

    python benchmarks/wire.py [--rounds 8] [--seeds 1] > benchmarks/results/wire.md

Real rounds of a tiny transformer with LoRA of rank 16; a client makes ten AdamW steps in each.
Bytes are those of encoded payloads, headers and scales included, without evaluation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

import fedloom
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent

CODECS: dict[str, dict[str, object]] = {
    "as it is": {},
    "int8": {"up": "int8", "down": "int8"},
    "int4": {"up": "int4", "down": "int4"},
    "small, int4 down": {"up": "small", "down": "int4"},
    "small": {"up": "small", "down": "small"},
    "smallest": {"up": "smallest", "down": "small"},
    "smallest, classic": {"up": "smallest", "down": "small", "error_feedback": "classic"},
    "smallest, ef21": {"up": "smallest", "down": "small", "error_feedback": "ef21"},
    "top 10 %": {"up": ["top_k:0.1", "int4", "zstd"], "down": "int4"},
    "top 10 %, classic": {
        "up": ["top_k:0.1", "int4", "zstd"],
        "down": "int4",
        "error_feedback": "classic",
    },
}
"""``[wire]`` of each row."""


def played(
    wire: dict[str, object], folder: Path, rounds: int, seed: int, drawn: int
) -> dict[str, float]:
    """Return bytes of a client in a round, and the held-out loss after the last."""
    experiment = Experiment.from_table(
        {
            "model": {"path": "tiny"},
            "adapter": {"rank": 16},
            "data": {"source": "builtin:preferences", "builtin_rows": 300},
            "federation": {
                "rounds": rounds,
                "clients": 6,
                "clients_per_round": drawn,
                "seed": seed,
            },
            "training": {"learning_rate": 2e-3, "batch_size": 8, "local_steps": 10},
            "evaluation": {"every": rounds, "per_client": False, "samples": 0},
            "output": {"folder": str(folder), "verify": False},
            "wire": wire,
        }
    )
    result = fedloom.run(experiment, observer=Silent())
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    own = [cost for cost in costs if cost["phase"] == "train"]
    return {
        "up": fmean(cost["bytes_up"] for cost in own),
        "down": fmean(cost["bytes_down"] for cost in own),
        "loss": result.metrics["loss"],
    }


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--drawn", type=int, default=6)
    chosen = options.parse_args()
    print(f"{chosen.rounds} rounds, {chosen.drawn} of 6 clients, {chosen.seeds} seeds\n")
    print("| codecs | up, kB | fewer | down, kB | fewer | held-out loss | of plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first: dict[str, float] = {}
    for name, wire in CODECS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                played(wire, Path(folder) / str(seed), chosen.rounds, seed, chosen.drawn)
                for seed in range(chosen.seeds)
            ]
        found = {key: fmean(run[key] for run in runs) for key in runs[0]}
        first = first or found
        times = [first[key] / found[key] for key in ("up", "down")]
        print(
            f"| {name} | {found['up'] / 1e3:.1f} | {times[0]:.1f} | {found['down'] / 1e3:.1f} | "
            f"{times[1]:.1f} | {found['loss']:.4f} | {found['loss'] / first['loss']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
