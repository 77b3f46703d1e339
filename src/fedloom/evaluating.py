"""What ``fedloom evaluate`` does and prints, one function for each of its forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from fedloom import judging
from fedloom.assembly import choose_device
from fedloom.errors import JudgeError
from fedloom.evaluation.audit import AuditResult
from fedloom.evaluation.harness import run_harness
from fedloom.evaluation.questions import load_benchmark
from fedloom.experiment import Experiment
from fedloom.report import run_folder as names
from fedloom.report.evaluation_page import WARNINGS, write_evaluation
from fedloom.report.run_folder import Record, RunFolder
from fedloom.report.template import interval
from fedloom.runner import evaluate_adapter
from fedloom.shown import visible
from fedloom.terminal import Bars, make_console


def show_held_out(experiment: Experiment, adapter: Path | None) -> None:
    """Print an adapter's metrics on an experiment's global held-out set."""
    for name, value in evaluate_adapter(experiment, adapter).items():
        print(visible(f"{name} = {value:.6f}"))


def show_benchmark(
    given: Sequence[Path],
    name: str,
    questions: Path | None,
    judges: Sequence[str],
    assignments: Sequence[str],
    limit: int | None,
    target: Path | None,
) -> None:
    """Let adapters answer a benchmark, judge them, print the scores and write the page."""
    console = make_console()
    settings = judging.EvaluateSettings.read(assignments)
    benchmark = load_benchmark(name, questions).first(limit)
    for row in benchmark.bad_rows:
        console.print(f"warning: left out: {row}", style="yellow", highlight=False)
    candidates = judging.find_candidates(given, settings.model, _names_model(assignments))
    if len(candidates) < len(given):
        text = "warning: a model that is given twice counts once"
        console.print(text, style="yellow", highlight=False)
    chosen = judging.make_judges(judges or judging.default_judges(benchmark), settings.judging)
    with Bars(console) as bars:
        folder = judging.evaluate_benchmark(candidates, benchmark, chosen, settings, target, bars)
    page = write_evaluation(folder)
    record = RunFolder(folder).read_json(names.EVALUATION)
    console.print(_score_table(record))
    for line in _doubts(record):
        console.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True)
    print(visible(f"report: {page}  (open it in a browser)"))


def show_audit(
    path: Path, judges: Sequence[str], assignments: Sequence[str], limit: int | None
) -> None:
    """Print how judges do on pairs that people judged, beside chance and the longer answer."""
    if not judges:
        raise JudgeError("--judge-audit needs a judge: --judge http://HOST/v1 or a model's folder")
    settings = judging.EvaluateSettings.read(assignments).judging
    chosen = judging.make_judges(judges, settings)
    for judge, results in judging.audit_judges(path, chosen, settings.seed, limit):
        make_console().print(_audit_table(judge.name, results))
    print(
        "accuracy: over pairs with usable verdicts in both orders, ties count half; longer: accuracy of "
        "'the longer answer is better'; steady: same winner in both orders"
    )


def show_harness(
    given: Sequence[Path], tasks: Sequence[str], assignments: Sequence[str], limit: int | None
) -> None:
    """Print what lm-eval finds for each adapter."""
    settings = judging.EvaluateSettings.read(assignments)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("model", "task", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for candidate in judging.find_candidates(given, settings.model, _names_model(assignments)):
        model = judging.model_path(candidate.model)
        found = run_harness(
            candidate.adapter,
            model,
            tasks,
            limit=limit,
            batch_size=settings.generation.batch_size,
            device=str(choose_device(settings.generation.device)),
            seed=settings.generation.seed,
        )
        for task, metrics in found.items():
            for metric, value in metrics.items():
                table.add_row(candidate.label, task, metric, f"{value:.4f}")
    make_console().print(table)


def _names_model(assignments: Iterable[str]) -> bool:
    return any(text.replace(" ", "").startswith("model.path=") for text in assignments)


def _score_table(record: Record) -> Table:
    title = f"{record['benchmark']}, mean score and 95 % interval over questions"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for column in ("judge", "model", "score", "interval", "questions"):
        table.add_column(column, justify="left" if column in ("judge", "model") else "right")
    for judge in record["judges"]:
        for model, found in judge["models"].items():
            cells = ("-", "-")
            if found["mean"] is not None:
                cells = (f"{found['mean']:.3f}", interval(found, "{:.3f}"))
            count = f"{found['count']} of {record['questions']}"
            table.add_row(judge["name"], model, *cells, count)
    return table


def _doubts(record: Record) -> list[str]:
    """Return what speaks against believing the scores."""
    lines = []
    for judge in record["judges"]:
        lost = judge["asked"] - judge["usable"]
        if lost:
            reasons = ", ".join(f"{count} {reason}" for reason, count in judge["reasons"].items())
            lines.append(
                f"{judge['name']}: {lost} of {judge['asked']} verdicts unusable: {reasons}"
            )
        for flag in (judge["bias"] or {}).get("flags", ()):
            lines.append(f"{judge['name']}, {flag}: {WARNINGS[flag]}")
    if record["suspicious"]:
        lines.append(
            f"{len(record['suspicious'])} answers talk to the judge; the report shows them"
        )
    return lines


def _audit_table(judge: str, results: Sequence[AuditResult]) -> Table:
    table = Table(title=f"{judge}, on pairs judged by people", box=None, padding=(0, 2, 0, 0))
    left = ("set", "unusable")
    for column in (
        "set",
        "scored",
        "accuracy",
        "95 %",
        "chance",
        "longer",
        "steady",
        "ties",
        "unusable",
    ):
        table.add_column(
            column,
            justify="left" if column in left else "right",
            no_wrap=column != "unusable",
            header_style="dim",
        )
    for found in results:
        own, scored = found.accuracy, found.scored > 0
        table.add_row(
            found.name,
            f"{found.scored}/{found.pairs}",
            f"{own.mean:.3f}" if scored else "-",
            f"{own.low:.2f}-{own.high:.2f}" if scored else "-",
            "0.500",
            f"{found.longer_wins:.3f}",
            f"{found.consistent:.3f}" if scored else "-",
            f"{found.tied:.3f}" if scored else "-",
            ", ".join(f"{count} {reason}" for reason, count in found.reasons.items()) or "-",
        )
    return table
