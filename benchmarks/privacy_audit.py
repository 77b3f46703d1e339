"""Tokens and rows read from clients' updates: by rank, tokens of a step, local steps, optimizer, noise.

    python benchmarks/privacy_audit.py MODEL ROWS.csv [--parts sgd adamw protections] [--out RESULTS.md]

MODEL is a pretrained causal model, ROWS a CSV with the columns text and category (Banking77). Two
clients train by SFT for four rounds, on a row a step; what they send is attacked as ``fedloom audit
privacy`` does. Shares are of the distinct tokens that a client trained on in a round, means over clients
and rounds 2 to 4 (in round 1 B = 0 hides A's gradient), of the view that tells most: dA of one
projection or of all together, dB, or the weights themselves; of one step of AdamW the gradient that is
read back from it. Rows are those of which all tokens but the last were put together in order. Noise of
differential privacy is added to what was sent: its standard deviation is z times the norm of the tensor.

The part ``protections`` is the whole audit of four clients, with canaries, without protection and with
each: what was found stands beside the epsilon that the run states.
"""

import argparse
import csv
import os
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from fedloom.evaluation.privacy_audit.span import recover_tokens
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.privacy_audit.audit import audit_experiment
from fedloom.runs.privacy_audit.interception import frequencies
from fedloom.runs.privacy_audit.rows import rows_record
from fedloom.runs.privacy_audit.tokens import PlantedRun
from fedloom.runs.run import run_experiment
from fedloom.storage.run_folder import AUDIT

ROUNDS = 4
RATES = {"sgd": 0.5, "adamw": 1e-3}
ROWS = 400
"""That are drawn of the file beforehand: with privacy of rows a run may not draw them."""


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
                "adapter": {"kind": "full", "layers": [0, 1]}
                if whole
                else {"rank": rank, "alpha": 16.0},
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


def whole_rows(run: PlantedRun) -> str:
    """Return the share of rows that were put together, and their ROUGE-L, over rounds 2 to 4."""
    found = rows_record(run, {"made": True})
    own = [line for line in found.get("updates", ()) if line["round"] > 1]
    if not own:
        return "- | -"
    rouge = [line["rougeL"] for line in own if line["rougeL"] is not None]
    share = fmean(line["share"] for line in own)
    return f"{share:.2f} | {f'{fmean(rouge):.2f}' if rouge else '-'}"


HEAD = (
    "| rank | row, tokens at most | optimizer | local steps | noise z | round | distinct tokens | "
    "recovered | of dA | of dB | guess by frequency | AUC | number from the rank | rows | ROUGE-L |\n"
    + "| --- " * 15
    + "|"
)


def line(
    given: dict[str, object], noise: float, round: str, own: dict[str, float], rows: str = "- | -"
) -> str:
    a, b = (f"{own[n]:.2f}" if own[n] == own[n] else "-" for n in ("dA", "dB"))
    return (
        f"| {given['rank']} | {given['length']} | {given['optimizer']} | {given['steps']} | {noise:g} | "
        f"{round} | {own['tokens']:.1f} | **{own['share']:.2f}** | {a} | {b} | {own['guess']:.2f} | "
        f"{own['auc']:.3f} | {own['from_rank']:.0%} | {rows} |"
    )


def sgd_settings() -> list[dict[str, object]]:
    """Return what is tried of SGD: rank and length at one step, then local steps."""
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
    return [*one, *several]


def adamw_settings() -> list[dict[str, object]]:
    """Return what is tried of AdamW: length at one step, then local steps."""
    return [
        {"rank": rank, "length": length, "optimizer": "adamw", "steps": steps}
        for length, steps in ((12, 1), (24, 1), (48, 1), (12, 4), (12, 16))
        for rank in (8, 64, "full")
    ]


PROTECTIONS: dict[str, dict[str, object]] = {
    "none": {},
    "secure aggregation": {"secure_aggregation": True},
    "clipping of rows, no noise": {"unit": "row", "noise_multiplier": 0.0},
    "row-level, z = 1": {"unit": "row", "noise_multiplier": 1.0},
    "clipping of clients, no noise": {"unit": "client", "noise_multiplier": 0.0},
    "client-level, z = 1": {"unit": "client", "noise_multiplier": 1.0},
}


def protected(model: str, rows: str, privacy: dict[str, object]) -> dict[str, Any]:
    """Audit four clients with a section [privacy]; return the record."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "rows.csv"
        with open(rows, newline="") as source, few.open("w", newline="") as target:
            head, *lines = csv.reader(source)
            csv.writer(target).writerows([head, *random.Random(0).sample(lines, ROWS)])
        experiment = Experiment.from_table(
            {
                "model": {"path": model},
                "data": {
                    "source": str(few), "kind": "instruction", "max_length": 24,
                    "columns": {"prompt": "text", "completion": "category"}, "test_fraction": 0.02,
                },
                "objective": {"name": "sft"},
                "adapter": {"rank": 64, "alpha": 16.0},
                "federation": {"rounds": ROUNDS, "clients": 4},
                "training": {
                    "optimizer": "sgd", "batch_size": 1, "local_steps": 1,
                    "learning_rate": RATES["sgd"],
                },
                "privacy": {"delta": 1e-5, "seeded": True, **privacy} if "unit" in privacy else privacy,
                "evaluation": {"every": ROUNDS, "samples": 0, "max_examples": 1, "per_client": False},
                "output": {"folder": f"{folder}/run", "verify": False},
            }
        )  # fmt: skip
        run = audit_experiment(experiment, rounds=None, canaries=60, observer=Silent())
        return run.read_json(AUDIT) or {}


PROTECTED_HEAD = (
    "| protection | tokens recovered | guess | tokens leak | rows recovered | ROUGE-L | membership AUC | "
    "epsilon at least: insertion | backdoor | epsilon stated | bounds hold |\n"
    + "| --- " * 11
    + "|"
)


def protected_line(name: str, record: dict[str, Any]) -> str:
    """Return what an audit found, as a line of the table."""
    tokens, rows, canaries = (record[part] for part in ("tokens", "sequences", "canaries"))
    cells = ["-"] * 3
    if tokens["made"]:
        worst = tokens["worst"]
        leak = "yes" if tokens["leak"] else "no"
        cells = [f"{worst['share']:.2f}", f"{worst['guessed_share']:.2f}", leak]
    if rows["made"]:
        rouge = rows["worst"]["rougeL"]
        cells += [f"{rows['worst']['share']:.2f}", "-" if rouge is None else f"{rouge:.2f}"]
    else:
        cells += ["-", "-"]
    auc = next(iter(record["membership"]["scores"].values()))["auc"]
    cells.append(f"{auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})")
    cells += [f"{canaries['kinds'][kind]['epsilon']:.2f}" for kind in ("insertion", "backdoor")]
    epsilon = (record["stated"] or {}).get("epsilon")
    holds = {True: "yes", False: "NO", None: "-"}[canaries["holds"]]
    return f"| {' | '.join([name, *cells, '-' if epsilon is None else f'{epsilon:.2f}', holds])} |"


def lines_of(settings: list[dict[str, object]], model: str, rows: str) -> Iterator[str]:
    """Yield the lines of a table of settings."""
    yield HEAD
    for given in settings:
        run = audited(model, rows, **given)
        noises = (0.0, 0.01, 0.03, 0.1, 1.0) if given["rank"] in (64, "full") else (0.0,)
        plain = given["steps"] == 1 and given["optimizer"] == "sgd"
        if plain and given["length"] == 12:
            yield line(given, 0.0, "1", shares(run, first=True))
        whole = whole_rows(run)
        for noise in noises if plain and given["length"] == 24 else (0.0,):
            yield line(given, noise, "2 to 4", shares(run, noise), "- | -" if noise else whole)


def protection_lines(model: str, rows: str) -> Iterator[str]:
    """Yield the lines of the second table."""
    yield PROTECTED_HEAD
    for name, privacy in PROTECTIONS.items():
        yield protected_line(name, protected(model, rows, privacy))


PARTS = {
    "sgd": ("SGD, by rank, length, local steps and noise", partial(lines_of, sgd_settings())),
    "adamw": ("AdamW, by rank, length and local steps", partial(lines_of, adamw_settings())),
    "protections": ("The whole audit by protection", protection_lines),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began, text = time.process_time(), ""
    for part in asked.parts:
        title, lines = PARTS[part]
        text += f"\n## {title}\n\n"
        for one in lines(asked.model, asked.rows):
            print(one, flush=True)
            text += f"{one}\n"
    head = (
        f"# Tokens read from updates\n\n{Path(asked.model).name}, {Path(asked.rows).name}; torch "
        f"{torch.__version__}, transformers {transformers.__version__}; "
        f"{time.process_time() - began:.0f} s of one core. What each column is: the docstring of "
        "`benchmarks/privacy_audit.py`.\n"
    )
    if asked.out is not None:
        asked.out.write_text(head + text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
