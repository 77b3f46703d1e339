"""Bytes, held-out loss and accuracy with codecs of ``[wire]``, in pairs with runs without them.

    .venv/bin/python benchmarks/wire.py [--parts builtin-sft builtin-dpo hh-7m hh-25m] [--seeds 0 1 2]
        [--methods FedAvg ...] [--hh helpful-base.jsonl.gz --small FOLDER --large FOLDER] [--work FOLDER]
        [--write] [--list]

Parts:

- builtin-try: two rounds of FedAvg as it is and with int8, to see in a minute that all of it works
- builtin-sft: built-in instructions, model "tiny"; FedAvg, SCAFFOLD and FLoRA, and with the first seed
  Fed-SB and FedKSeed, which send little by construction
- builtin-dpo: the same with built-in preferences and DPO, at a constant learning rate
- builtin-dpo-cosine: at one that falls, so that a run does not end in the middle of a jump
- hh-7m: SFT on chosen answers of HH-RLHF, the 64 tokens around their beginning, the model of
  ``--small``, FedAvg: as it is and three presets
- hh-25m: the same with the model of ``--large``: as it is and one preset, the first seed

FLoRA multiplies the factors that it gets, and takes codecs of 8 bits or more: int8, rounded at random or
to nearest, and bfloat16 are what there is. Bytes are those of encoded payloads of a client in a round,
headers and scales included, without evaluation; FLoRA's down hold the factors of all clients.

A run with a codec is compared with the run as it is of the same seed, row by row: they have the same
start, clients, batches and held-out rows. Intervals of differences (95 %) cluster rows by seed, with
Student's t of one degree less than there are seeds, and are no narrower than those over rows alone; with
one seed they are over rows. Loss differences are in percent of the loss as it is, and of what training
took off it.

Each run is a line of WORK/wire.jsonl as soon as it is over, and is not made again: the benchmark can be
stopped and started. ``--write`` puts all lines that there are into results/wire.md.
"""

import argparse
import gzip
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from fedloom.accounting.costs import EVALUATE
from fedloom.data.examples import Instruction
from fedloom.data.loading import LoadedData
from fedloom.data.row_parsing import TURN
from fedloom.experiment.experiment import Experiment
from fedloom.objectives import make_objective
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import run_experiment
from fedloom.runs.saved_models import assemble_saved
from fedloom.statistics.intervals import student
from fedloom.training.references import add_reference_logps
from fedloom.training.steps import row_losses

RESULT = Path(__file__).parent / "results/wire.md"
LINES = "wire.jsonl"
PLAIN = "as it is"
EQUAL = 1.0
"""Percent of the loss below which the upper end of a difference counts as equal quality."""

PRESETS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "int8": {"up": "int8", "down": "int8"},
    "int4": {"up": "int4", "down": "int4"},
    "small, int4 down": {"up": "small", "down": "int4"},
    "small": {"up": "small", "down": "small"},
    "smallest classic, int4 down": {"up": "smallest", "down": "int4", "error_feedback": "classic"},
    "top 10 % classic, int4 down": {
        "up": ["top_k:0.1", "int4", "zstd"], "down": "int4", "error_feedback": "classic",
    },
    "int8 nearest": {"up": ["int8:nearest", "zstd"], "down": ["int8:nearest", "zstd"]},
    "bf16": {"up": ["bf16", "zstd"], "down": ["bf16", "zstd"]},
}  # fmt: skip
"""``[wire]`` of each preset."""

AVERAGED = [*PRESETS][:7]
MULTIPLIED = [PLAIN, "int8", "int8 nearest", "bf16"]

METHODS: dict[str, dict[str, dict[str, object]]] = {
    "FedAvg": {"method": {"name": "fedavg"}},
    "SCAFFOLD": {"method": {"name": "scaffold"}},
    "FLoRA": {"method": {"name": "flora"}},
    "Fed-SB": {"method": {"name": "fed_sb"}, "training": {"learning_rate": 0.03}},
    "FedKSeed": {
        "method": {"name": "fedkseed"},
        "training": {"learning_rate": 1e-3, "schedule": "constant"},
    },
}
"""Tables of each method, over those of a part; FedKSeed makes plain steps of SGD."""

LITTLE = ("Fed-SB", "FedKSeed")
"""Methods that send little by construction."""

UP_TIMES = {"FedAvg": 16, "SCAFFOLD": 16, "FLoRA": 4}
"""Times fewer bytes up that each method is to reach at equal quality."""


@dataclass(frozen=True)
class Part:
    """What the runs of a part have in common.

    Attributes:
        objective: Name of the objective.
        source: "builtin", "small" or "large".
        rounds: Of a run.
        steps: Of a client in a round.
        rate: Learning rate of the first round.
        schedule: How it goes on.
        clients: All of them take part in each round.
        batch: Rows of a step.
        rows: Rows in all; a fifth of them is held out.
        grid: Presets of each method.
    """

    objective: str
    source: str
    rounds: int
    steps: int
    rate: float
    schedule: str
    clients: int
    batch: int
    rows: int
    grid: Mapping[str, Sequence[str]]


WHOLE: dict[str, list[str]] = {
    "FedAvg": AVERAGED,
    "SCAFFOLD": AVERAGED,
    "FLoRA": MULTIPLIED,
    "Fed-SB": [PLAIN],
    "FedKSeed": [PLAIN],
}
HH_7M = {"FedAvg": [PLAIN, "int8", "int4", "small, int4 down"]}
HH_25M = {"FedAvg": [PLAIN, "small, int4 down"]}

PARTS = {
    "builtin-try": Part(
        "dpo", "builtin", 2, 1, 1e-3, "constant", 2, 2, 60, {"FedAvg": AVERAGED[:2]}
    ),
    "builtin-sft": Part("sft", "builtin", 6, 6, 2e-3, "cosine", 6, 4, 1000, WHOLE),
    "builtin-dpo": Part("dpo", "builtin", 5, 10, 1e-3, "constant", 4, 8, 1000, WHOLE),
    "builtin-dpo-cosine": Part("dpo", "builtin", 6, 10, 1e-3, "cosine", 4, 8, 1000, WHOLE),
    "hh-7m": Part("sft", "small", 6, 6, 3e-3, "cosine", 4, 4, 400, HH_7M),
    "hh-25m": Part("sft", "large", 3, 2, 3e-3, "cosine", 4, 4, 200, HH_25M),
}

HEAD = (
    "`benchmarks/wire.py`; {seconds:.0f} s of one core in all. Bytes are of a client in a round. "
    "Differences are of runs in pairs, of the same seed and rows, with 95 % intervals that cluster rows "
    "by seed (of one seed: over rows); of the loss in percent of that as it is, and their mean also in "
    "percent of what training took off it. Fed-SB and FedKSeed stand beside FedAvg as it is. A claim "
    "holds where a preset has so many times fewer bytes and the upper end of its interval is below 1 %. "
    "Settings were chosen by runs as they are against int8; builtin-dpo-cosine was added after intervals "
    "of builtin-dpo had proved too wide to decide anything, as one seed jumps at its end. The weights of "
    "the models that read HH-RLHF are random."
)

Key = tuple[str, str, str, int]
"""Part, method, preset, and seed."""


@dataclass(frozen=True)
class Files:
    """HH-RLHF and the folders of the models that read it, ``""`` where not given."""

    hh: str = ""
    small: str = ""
    large: str = ""


@dataclass(frozen=True)
class Row:
    """What a run came to.

    Attributes:
        up: Bytes that a client sent in a round.
        down: Bytes that it was sent.
        before: Held-out loss before any training.
        losses: ``(rows,)`` held-out losses after it, of SFT each summed over the answer's tokens.
        weights: ``(rows,)`` 1 each, of SFT these tokens.
        accuracy: Share of pairs, or of tokens, that are right.
        seconds: Of one core.
    """

    up: float
    down: float
    before: float
    losses: list[float]
    weights: list[float]
    accuracy: float
    seconds: float

    @property
    def loss(self) -> float:
        """Mean held-out loss after training."""
        return sum(self.losses) / sum(self.weights)


def keys(parts: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Key]:
    """Yield the runs of these parts and methods, seed by seed."""
    for part in (own for own in PARTS if own in parts):
        for seed in seeds:
            for method, presets in PARTS[part].grid.items():
                one_seed = method in LITTLE or part == "hh-25m"
                if method in methods and (seed == seeds[0] or not one_seed):
                    yield from ((part, method, preset, seed) for preset in presets)


def make_experiment(key: Key, folder: Path, files: Files) -> Experiment:
    """Return the experiment of one run."""
    name, method, preset, seed = key
    part, built_in = PARTS[name], PARTS[name].source == "builtin"
    kind = "preference" if part.objective == "dpo" else "instruction"
    table: dict[str, dict[str, object]] = {
        "model": {"path": "tiny" if built_in else getattr(files, part.source)},
        "adapter": {"rank": 16},
        "data": {
            "source": f"builtin:{kind}s" if built_in else files.hh, "kind": kind,
            "test_fraction": 0.2,
            **({"builtin_rows": part.rows} if built_in else {"max_length": 64}),
        },
        "partition": {"kind": "iid", "client_test_fraction": 0.0},
        "objective": {"name": part.objective, **({"beta": 0.5} if kind == "preference" else {})},
        "federation": {"clients": part.clients, "rounds": part.rounds, "seed": seed},
        "training": {
            "learning_rate": part.rate, "schedule": part.schedule, "batch_size": part.batch,
            "local_steps": part.steps,
        },
        "evaluation": {
            "samples": 0, "per_client": False, "max_examples": part.rows // 5,
            "every": part.rounds,
        },
        "simulation": {"cohort": "auto"},
        "output": {"folder": str(folder), "verify": False},
        "wire": PRESETS[preset],
    }  # fmt: skip
    for section, own in METHODS[method].items():
        table[section] = {**table.get(section, {}), **own}
    return Experiment.from_table(table)


@dataclass(frozen=True)
class ChosenAnswers:
    """Chosen answers of HH-RLHF as instructions: a data source of its own.

    Attributes:
        path: JSONL, compressed, whose lines have ``chosen``.
        rows: How many are drawn of the first ten times as many; a fifth of them is held out.
    """

    path: str
    rows: int
    kind = "instruction"

    def load(self, rng: np.random.Generator) -> LoadedData:
        """Return them."""
        with gzip.open(self.path, "rt") as file:
            texts = [json.loads(line)["chosen"] for line in islice(file, 10 * self.rows)]
        cut = [text.rpartition(TURN) for text in texts]
        whole = [(before + turn, answer) for before, turn, answer in cut if answer.strip()]
        drawn = [whole[place] for place in rng.permutation(len(whole))[: self.rows]]
        found = [Instruction(row, *text) for row, text in enumerate(drawn)]
        held_out = len(found) // 5
        digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
        return LoadedData(found[held_out:], found[:held_out], self.kind, digest)


def pair_losses(experiment: Experiment, adapter: Path) -> list[float]:
    """Return the loss of each held-out pair under a saved adapter."""
    model, held_out = assemble_saved(experiment, partition_data(experiment), adapter)
    share = held_out.share
    if share.reference_logps is None:
        share = add_reference_logps(model, share, held_out.budget)
    objective = make_objective(experiment.objective)
    return row_losses(model, share, objective, experiment.training, range(len(share)))[0]


def run_one(key: Key, files: Files) -> Row:
    """Run an experiment and return what it came to."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        experiment = make_experiment(key, Path(folder) / "run", files)
        part = PARTS[key[0]]
        source = None if part.source == "builtin" else ChosenAnswers(files.hh, part.rows)
        result = run_experiment(experiment, data=source, observer=Silent())
        costs = [
            json.loads(line) for line in (result.folder / "costs.jsonl").read_text().splitlines()
        ]
        last = json.loads((result.folder / "rounds.jsonl").read_text().splitlines()[-1])
        rows = last["evaluation"]["rows"]
        losses, weights = rows["totals"], rows.get("weights", [1.0] * len(rows["totals"]))
        if rows["metric"] != "loss":
            assert result.adapter_path is not None
            losses, weights = pair_losses(experiment, result.adapter_path), [1.0] * len(weights)
    own = [cost for cost in costs if cost["phase"] != EVALUATE]
    sent = {way: sum(cost[f"bytes_{way}"] for cost in own) for way in ("up", "down")}
    each = part.clients * part.rounds
    right = "preference_accuracy" if rows["metric"] != "loss" else "token_accuracy"
    return Row(
        sent["up"] / each,
        sent["down"] / each,
        result.metrics_before["loss"],
        [float(f"{loss:.6g}") for loss in losses],
        weights,
        result.metrics[right],
        time.process_time() - began,
    )


def known(path: Path) -> dict[Key, Row]:
    """Return the lines that there are; one that was cut off is left out."""
    found: dict[Key, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        part, method, preset, seed = record.pop("key")
        found[part, method, preset, seed] = Row(**record)
    return found


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval; ``half`` is its half width."""

    mean: float
    half: float

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def times(self, factor: float) -> str:
        """Return it in another unit, with both ends."""
        mean, half = factor * self.mean, factor * self.half
        return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def difference(plain: Sequence[Row], coded: Sequence[Row]) -> Difference:
    """Return the mean of coded - plain over rows, one pair of runs a seed.

    Its variance is the larger of that over seeds, whose rows go together, and that over single rows:
    the linearised ones of a ratio, G / (G - 1) times the sum of squares over G clusters.
    """
    gaps = [np.subtract(b.losses, a.losses) for a, b in zip(plain, coded, strict=True)]
    weights = [np.asarray(row.weights) for row in plain]
    whole = sum(own.sum() for own in weights)
    mean = sum(own.sum() for own in gaps) / whole
    rest = [(gap - mean * own) / whole for gap, own in zip(gaps, weights, strict=True)]
    halves = []
    for clusters in (np.array([own.sum() for own in rest]), np.concatenate(rest)):
        if (count := len(clusters)) > 1:
            deviation = float(np.sqrt(count / (count - 1) * (clusters @ clusters)))
            halves.append(student(count - 1) * deviation)
    return Difference(float(mean), max(halves))


def of_seeds(values: Sequence[float]) -> Difference | None:
    """Return the mean of one value a seed; ``None`` of a single one."""
    if len(values) < 2:
        return None
    return Difference(fmean(values), student(len(values) - 1) * stdev(values) / len(values) ** 0.5)


@dataclass(frozen=True)
class Judged:
    """A preset of a method beside the same runs as they are.

    Attributes:
        method: Its name.
        preset: That of the codecs.
        plain: Runs of FedAvg or of the same method as they are, one a seed.
        coded: Those with codecs.
    """

    method: str
    preset: str
    plain: list[Row]
    coded: list[Row]

    def fewer(self, way: str) -> float:
        """Return how many times fewer bytes travel, "up" or "down"."""
        return fmean(getattr(r, way) for r in self.plain) / fmean(
            getattr(r, way) for r in self.coded
        )

    @property
    def percent(self) -> float:
        """What a difference of losses is multiplied by for percent of the loss as it is."""
        return 100 / fmean(row.loss for row in self.plain)

    @property
    def upper(self) -> float:
        """Upper end of the difference of losses, in percent."""
        return self.percent * difference(self.plain, self.coded).high

    def line(self) -> str:
        """Return its line of the table."""
        loss = fmean(row.loss for row in self.coded)
        right = fmean(row.accuracy for row in self.coded)
        kilo = {way: fmean(getattr(row, way) for row in self.coded) / 1e3 for way in ("up", "down")}
        own = [f"{loss:.4f}", "", "", f"{right:.3f}", ""]
        if self.coded is not self.plain:
            gap = difference(self.plain, self.coded)
            fall = fmean(row.before - row.loss for row in self.plain)
            won = of_seeds(
                [b.accuracy - a.accuracy for a, b in zip(self.plain, self.coded, strict=True)]
            )
            own[1], own[2] = gap.times(self.percent), f"{100 * gap.mean / fall:+.1f}"
            own[4] = won.times(100) if won is not None else ""
        return (
            f"| {self.method} | {self.preset} | {len(self.coded)} | {kilo['up']:.4g} | "
            f"{self.fewer('up'):.1f} | {kilo['down']:.4g} | {self.fewer('down'):.1f} | "
            f"{' | '.join(own)} |"
        )


def judged(lines: Mapping[Key, Row], part: str) -> list[Judged]:
    """Return each preset of a part, with the seeds that both it and its reference have."""
    found = []
    for method, presets in PARTS[part].grid.items():
        beside = "FedAvg" if method in LITTLE else method
        for preset in presets:
            seeds = sorted(
                {k[3] for k in lines if k[:3] == (part, method, preset)}
                & {k[3] for k in lines if k[:3] == (part, beside, PLAIN)}
            )
            if seeds:
                plain = [lines[part, beside, PLAIN, seed] for seed in seeds]
                coded = [lines[part, method, preset, seed] for seed in seeds]
                same = (method, preset) == (beside, PLAIN)
                found.append(Judged(method, preset, plain, plain if same else coded))
    return found


def claims(part: str, found: Sequence[Judged]) -> Iterator[str]:
    """Yield a sentence on each claim: does it hold, and with which presets."""
    for method, least in UP_TIMES.items():
        coded = [own for own in found if own.method == method and own.preset != PLAIN]
        for way, times in (("up", least), ("down", 8)):
            strong = [own for own in coded if own.fewer(way) >= times]
            told = {
                f"{own.preset} ({own.fewer(way):.1f} times, upper end {own.upper:+.2f} % of "
                f"{len(own.coded)} seeds)": own.upper
                for own in strong
            }
            good = "; ".join(words for words, upper in told.items() if upper < EQUAL)
            other = "; ".join(words for words, upper in told.items() if upper >= EQUAL)
            verdict = f"holds with {good}" if good else "does not hold"
            beyond = "" if strong else ": no preset has so few"
            if coded:
                yield (
                    f"- {part}, {method}, {times} times fewer bytes {way} at equal loss: "
                    f"{verdict}{beyond}{f'; not with {other}' if other else ''}"
                )
    for own in found:
        if own.method in LITTLE:
            loss, beside = (fmean(row.loss for row in rows) for rows in (own.coded, own.plain))
            yield (
                f"- {part}, {own.method}: {own.fewer('up'):.0f} times fewer bytes up than FedAvg as "
                f"it is, {own.fewer('down'):.0f} down, with a loss of {loss:.4f}; of FedAvg {beside:.4f}"
            )


def text_of(lines: Mapping[Key, Row]) -> str:
    """Return the tables of all parts and the claims."""
    found = []
    for part, own in PARTS.items():
        if rows := judged(lines, part):
            before = fmean(row.before for row in rows[0].plain)
            found += [
                f"## {part}",
                "",
                f"{own.objective.upper()}, {own.clients} clients, {own.rounds} rounds of {own.steps} "
                f"steps of {own.batch} rows, AdamW at {own.rate:g} ({own.schedule}), {own.rows // 5} "
                f"held-out rows; loss before training {before:.4f}.",
                "",
                "| method | preset | seeds | up, kB | fewer | down, kB | fewer | loss | difference, % | "
                "of the fall, % | accuracy | difference, points |",
                "| --- " * 12 + "|",
                *(row.line() for row in rows),
                "",
                *claims(part, rows),
                "",
            ]
    return "\n".join(found)


def main() -> None:
    """Run what is missing, print the tables and write them if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=["builtin-try"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--hh", default="", help="JSONL of HH-RLHF, compressed, for hh-7m and hh-25m"
    )
    parser.add_argument("--small", default="", help="model of hh-7m")
    parser.add_argument("--large", default="", help="model of hh-25m")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    given = parser.parse_args()
    files = Files(given.hh, given.small, given.large)
    for part in given.parts if not given.list else ():
        if (needed := PARTS[part].source) != "builtin" and not (
            files.hh and getattr(files, needed)
        ):
            parser.error(f"{part} needs --hh FILE and --{needed} FOLDER")
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / LINES
    lines = known(path)
    missing = [key for key in keys(given.parts, given.methods, given.seeds) if key not in lines]
    print(f"{len(missing)} runs are missing, {len(lines)} are in {path}", flush=True)
    for key in [] if given.list else missing:
        row = lines[key] = run_one(key, files)
        with path.open("a") as file:
            file.write(json.dumps({"key": list(key), **asdict(row)}) + "\n")
        print(f"{', '.join(map(str, key))}: {row.loss:.4f}, {row.seconds:.0f} s", flush=True)
    text = text_of(lines)
    print(text)
    if given.write:
        seconds = sum(row.seconds for row in lines.values())
        RESULT.write_text(
            f"# Bytes and quality of codecs\n\n{HEAD.format(seconds=seconds)}\n\n{text}"
        )


if __name__ == "__main__":
    main()
