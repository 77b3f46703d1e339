"""Tokens read from clients' updates: by rank, tokens of a step, local steps, optimizer and noise.

    python benchmarks/privacy_audit.py MODEL ROWS.csv [--out benchmarks/results/privacy_audit.md]

MODEL is a pretrained causal model, ROWS a CSV with the columns text and category (Banking77). Two
clients train by SFT for four rounds, on a row a step; what they send is attacked as ``fedloom audit
privacy`` does. Shares are of the distinct tokens that a client trained on in a round, means over clients
and rounds 2 to 4 (in round 1 B = 0 hides A's gradient), of the view that tells most: dA of one
projection or of all together, dB, or the weights themselves. Noise of differential privacy is added to
what was sent: its standard deviation is z times the norm of the tensor.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch
import transformers

from fedloom.evaluation.privacy_audit.span import recover_tokens
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.privacy_audit.interception import frequencies
from fedloom.runs.privacy_audit.tokens import PlantedRun
from fedloom.runs.run import run_experiment

ROUNDS = 4
RATES = {"sgd": 0.5, "adamw": 1e-3}


def audited(model: str, rows: str, **given: object) -> PlantedRun:
    """Run four rounds with these settings; return what was intercepted."""
    rank, optimizer = given["rank"], str(given["optimizer"])
    whole = rank == "full"
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment.from_table(
            {
                "model": {"path": model},
                "data": {
                    "source": rows, "kind": "instruction", "max_rows": 400,
                    "columns": {"prompt": "text", "completion": "category"},
                    "max_length": given["length"], "test_fraction": 0.02,
                },
                "objective": {"name": "sft"},
                "adapter": {"kind": "full", "layers": [0]} if whole else {"rank": rank, "alpha": 16.0},
                "federation": {"rounds": ROUNDS, "clients": 2},
                "training": {
                    "optimizer": optimizer, "batch_size": 1, "local_steps": given["steps"],
                    "learning_rate": RATES[optimizer] * (0.1 if whole and optimizer == "sgd" else 1),
                },
                "evaluation": {"every": ROUNDS, "samples": 0, "max_examples": 1, "per_client": False},
                "output": {"folder": f"{folder}/run", "verify": False},
            }
        )  # fmt: skip
        run = PlantedRun(experiment, 0)
        run_experiment(experiment, observer=Silent(), auditor=run)
    return run


def shares(run: PlantedRun, noise: float = 0.0, *, first: bool = False) -> dict[str, float]:
    """Return what the best view tells of a round, and what a guess does; ``first`` of round 1 alone."""
    assert run.parts is not None and run.engine is not None
    common = frequencies(run.parts.local.shares)
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    rng = torch.Generator().manual_seed(0)
    for update in run.engine.updates:
        if (update.round == 1) != first:
            continue
        own = run.parts.local.resources[update.client]
        for view in run.views_of(own.model):
            for title, change, candidates, rounding in run.changes(update, view):
                change = change.double()
                drawn = torch.randn(change.shape, generator=rng, dtype=torch.float64)
                change = change + noise * change.norm() * drawn
                one = recover_tokens(
                    change, candidates, sorted(update.tokens), common[update.client],
                    rounding=rounding,
                )  # fmt: skip
                line = one.share, one.guessed_share, one.auc or 0.0, one.tokens, one.from_rank
                found.setdefault(title, []).append(tuple(map(float, line)))
    means = {
        title: [fmean(column) for column in zip(*own, strict=True)] for title, own in found.items()
    }
    best = max(means, key=lambda title: means[title][0])
    names = ("share", "guess", "auc", "tokens", "from_rank")
    of_a = max((own[0] for t, own in means.items() if t[1].startswith("dA")), default=float("nan"))
    of_b = max((own[0] for t, own in means.items() if t[1].startswith("dB")), default=float("nan"))
    return {**dict(zip(names, means[best], strict=True)), "dA": of_a, "dB": of_b}


HEAD = (
    "| rank | row, tokens at most | optimizer | local steps | noise z | round | distinct tokens | "
    "recovered | of dA | of dB | guess by frequency | AUC | number from the rank |\n"
    + "| --- " * 13
    + "|"
)


def line(given: dict[str, object], noise: float, round: str, own: dict[str, float]) -> str:
    a, b = (f"{own[n]:.2f}" if own[n] == own[n] else "-" for n in ("dA", "dB"))
    return (
        f"| {given['rank']} | {given['length']} | {given['optimizer']} | {given['steps']} | {noise:g} | "
        f"{round} | {own['tokens']:.1f} | **{own['share']:.2f}** | {a} | {b} | {own['guess']:.2f} | "
        f"{own['auc']:.3f} | {own['from_rank']:.0%} |"
    )


def settings() -> list[dict[str, object]]:
    """Return what is tried: rank and length at one step of SGD, then local steps, then AdamW."""
    one = [
        {"rank": rank, "length": length, "optimizer": "sgd", "steps": 1}
        for length in (12, 24, 48)
        for rank in (4, 8, 16, 64, "full")
    ]
    several = [
        {"rank": rank, "length": 12, "optimizer": "sgd", "steps": steps}
        for rank in (8, 64, "full")
        for steps in (4, 16)
    ]
    adam = [
        {"rank": rank, "length": 12, "optimizer": "adamw", "steps": steps}
        for rank in (8, 64, "full")
        for steps in (1, 4, 16)
    ]
    return [*one, *several, *adam]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began, lines = time.process_time(), [HEAD]
    for given in settings():
        run = audited(asked.model, asked.rows, **given)
        noises = (0.0, 0.01, 0.03, 0.1, 1.0) if given["rank"] in (64, "full") else (0.0,)
        plain = given["steps"] == 1 and given["optimizer"] == "sgd"
        if plain and given["length"] == 12:
            lines.append(line(given, 0.0, "1", shares(run, first=True)))
        for noise in noises if plain and given["length"] == 24 else (0.0,):
            lines.append(line(given, noise, "2 to 4", shares(run, noise)))
        print(lines[-1], flush=True)
    name = Path(asked.model).name
    text = (
        f"# Tokens read from updates\n\n{name}, {Path(asked.rows).name}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.process_time() - began:.0f} s of one core. What "
        "each column is: the docstring of `benchmarks/privacy_audit.py`.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
