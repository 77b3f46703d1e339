"""What ``fedloom evaluate`` does and prints, one function for each of its forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.table import Table

from fedloom import __version__
from fedloom.commands.terminal import Bars, make_console, working
from fedloom.data.reader import require_files
from fedloom.display.untrusted_text import visible
from fedloom.errors import JudgeError, ModelError
from fedloom.evaluation.harness import require_tasks, run_harness
from fedloom.evaluation.judge_statistics import Estimate
from fedloom.evaluation.judges import choose
from fedloom.evaluation.judges.validation import AuditResult, read_audit_sets
from fedloom.evaluation.questions import load_benchmark
from fedloom.experiment.experiment import Experiment
from fedloom.models.device import choose_device
from fedloom.models.load import fingerprint, require_reachable
from fedloom.reports.evaluation_page import WARNINGS, write_evaluation
from fedloom.reports.html import interval
from fedloom.runs import benchmarks
from fedloom.runs.adapter_paths import adapter_folder, run_of
from fedloom.runs.adapter_scores import HeldOutScores, evaluate_adapter
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

BASE = Path(benchmarks.BASE)
HELD_OUT = "held_out.json"
"""The file of a held-out evaluation."""


def show_held_out(
    given: Sequence[Path], adapter: Path | None, assignments: Sequence[str], target: Path | None
) -> None:
    """Print the metrics of adapters on global held-out sets, and write them to a file.

    Args:
        given: An experiment in TOML, or run folders and adapters in them, each with its own experiment.
        adapter: With one of these: what is scored instead of the base model, or of the run's adapter.
        assignments: As after ``--set``, for every experiment.
        target: Folder of the file (default: evaluations/NAME).
    """
    pairs = held_out_pairs(given, adapter, assignments)
    folder = benchmarks.new_folder(target, pairs[0][0].name)
    console, records = make_console(), []
    with folder.locked():
        for experiment, own in pairs:
            label = str(own) if own is not None else f"{experiment.model.path} without an adapter"
            with Bars(console) as bars:
                bars.stage(f"scoring {label}")
                scores = evaluate_adapter(experiment, own, partial(bars.begin, "held-out rows"))
            print(visible(f"{label}, on {scores.rows} held-out rows of {experiment.name}"))
            for name, value in scores.metrics.items():
                beside = _interval_in_words(scores) if name == scores.headline else ""
                print(visible(f"{name} = {value:.6f}{beside}"))
            records.append(_held_out_record(experiment, own, scores))
        folder.write_json(HELD_OUT, {"fedloom": __version__, "evaluated": records})
    print(visible(f"wrote {folder.path / HELD_OUT}"))


def held_out_pairs(
    given: Sequence[Path], adapter: Path | None, assignments: Sequence[str]
) -> list[tuple[Experiment, Path | None]]:
    """Return experiments and the adapters to be scored on their held-out rows; ``None``: the base model.

    Raises:
        SettingsError: With every mistake in an experiment.
        ModelError: A path is none of what may be given, or an adapter lies in no run folder.
    """
    if adapter is not None and len(given) != 1:
        raise ModelError("--adapter goes with one experiment or run folder")
    pairs = []
    for path in given:
        own = adapter_folder(adapter) if adapter is not None and adapter != BASE else None
        if path.suffix == ".toml" and not path.is_dir():
            pairs.append((Experiment.from_toml(path, assignments), own))
            continue
        if path == BASE:
            raise ModelError(
                "the base model is scored on an experiment: fedloom evaluate EXPERIMENT.toml, or on the "
                "rows of a run: fedloom evaluate RUN_FOLDER --adapter base"
            )
        run = run_of(path)
        if adapter is None:
            own = adapter_folder(path)
        if run is None:
            raise ModelError(
                f"{path} lies in no run folder, so its held-out rows are not known: name the experiment, "
                f"fedloom evaluate EXPERIMENT.toml --adapter {path}; or give --benchmark or --lm-eval"
            )
        experiment = Experiment.from_toml(run / names.EXPERIMENT, assignments)
        pairs.append((experiment, own))
    return pairs


def _interval_in_words(scores: HeldOutScores) -> str:
    own = scores.interval
    if own is None:
        return ""
    if own.low is None or own.high is None:
        return f"  (no interval: {own.missing})"
    return f"  (95 % interval {own.low:.3f} to {own.high:.3f} over {own.units} {own.over})"


def _held_out_record(experiment: Experiment, adapter: Path | None, scores: HeldOutScores) -> Record:
    return {
        "experiment": experiment.to_table(defaults=False),
        "model": experiment.model.path,
        "adapter": str(adapter) if adapter is not None else None,
        "adapter_sha256": fingerprint(str(adapter)) if adapter is not None else None,
        "rows": scores.rows,
        "headline": scores.headline,
        "metrics": dict(scores.metrics),
        "interval": asdict(scores.interval) if scores.interval is not None else None,
    }


def check(
    given: Sequence[Path],
    assignments: Sequence[str],
    *,
    adapter: Path | None = None,
    benchmark: str | None = None,
    questions: Path | None = None,
    judges: Sequence[str] = (),
    tasks: Sequence[str] = (),
    target: Path | None = None,
) -> None:
    """Raise mistakes in an evaluation that can be found before a model is read."""
    if benchmark is None and not tasks:
        pairs = held_out_pairs(given, adapter, assignments)
        benchmarks.new_folder(target, pairs[0][0].name, make=False)
        for experiment, _ in pairs:
            require_files(experiment.data)
            require_reachable(experiment.model.path)
        return
    settings = benchmarks.EvaluateSettings.read(assignments)
    if tasks:
        require_tasks(tasks)
    if benchmark is not None:
        found = load_benchmark(benchmark, questions)
        choose.require_judges(judges or choose.default_judges(found))
    for candidate in benchmarks.find_candidates(given, settings.model, _names_model(assignments)):
        require_reachable(candidate.model)


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
    settings = benchmarks.EvaluateSettings.read(assignments)
    benchmark = load_benchmark(name, questions).first(limit)
    for row in benchmark.bad_rows:
        console.print(f"warning: left out: {row}", style="yellow", highlight=False)
    candidates = benchmarks.find_candidates(
        given,
        settings.model,
        _names_model(assignments),
        asked_as_trained=settings.generation.template is None,
    )
    if len(candidates) < len(given):
        text = "warning: a model that is given twice counts once"
        console.print(text, style="yellow", highlight=False)
    chosen = choose.make_judges(judges or choose.default_judges(benchmark), settings.judging)
    with Bars(console) as bars:
        folder = benchmarks.evaluate_benchmark(
            candidates, benchmark, chosen, settings, target, bars
        )
    page = write_evaluation(folder)
    record = RunFolder(folder).read_record(names.EVALUATION) or {}
    console.print(_score_table(record))
    for line in _doubts(record):
        console.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True)
    print(visible(f"report: {page}  (open it in a browser)"))


def show_audit(
    path: Path, judges: Sequence[str], assignments: Sequence[str], limit: int | None
) -> None:
    """Print the accuracy of judges on pairs judged by people, beside chance and the longer answer."""
    check_audit(path, judges, assignments)
    settings = benchmarks.EvaluateSettings.read(assignments).judging
    chosen = choose.make_judges(judges, settings)
    console = make_console()
    with Bars(console) as bars:
        for judge, results in benchmarks.audit_judges(path, chosen, settings.seed, limit, bars):
            console.print(_audit_table(judge.name, results))
    print(
        "accuracy: over pairs with usable verdicts in both orders, ties count half; longer: accuracy of "
        "'the longer answer is better'; steady: same winner in both orders"
    )


def check_audit(path: Path, judges: Sequence[str], assignments: Sequence[str]) -> None:
    """Raise mistakes that can be found before a judge is loaded; as :func:`show_audit`."""
    if not judges:
        raise JudgeError("--judge-audit needs a judge: --judge http://HOST/v1 or a model's folder")
    benchmarks.EvaluateSettings.read(assignments)
    choose.require_judges(judges)
    read_audit_sets(path, 1)


def show_harness(
    given: Sequence[Path], tasks: Sequence[str], assignments: Sequence[str], limit: int | None
) -> None:
    """Print the results of lm-eval for each adapter."""
    require_tasks(tasks)
    settings = benchmarks.EvaluateSettings.read(assignments)
    console, table = make_console(), Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("model", "task", "metric", "value", "95 %", "rows"):
        left = column in ("model", "task", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for candidate in benchmarks.find_candidates(given, settings.model, _names_model(assignments)):
        model = benchmarks.model_path(candidate.model)
        with working(console, f"lm-eval asks {candidate.label}: {', '.join(tasks)}"):
            found = run_harness(
                candidate.adapter,
                model,
                tasks,
                limit=limit,
                batch_size=settings.generation.batch_size,
                device=str(choose_device(settings.generation.device)),
                seed=settings.generation.seed,
            )
        for task, scores in found.items():
            for metric, own in scores.intervals().items():
                rows = "n not known" if scores.rows is None else str(scores.rows)
                ends = interval(own, "{:.3f}") if own.low is not None else "-"
                table.add_row(candidate.label, task, metric, f"{own.estimate:.4f}", ends, rows)
    console.print(table)


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
    """Return reasons to doubt the scores."""
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
    title = f"{judge}, on pairs judged by people; below each share its 95 % interval"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    left = ("set", "unusable")
    for column in ("set", "scored", "accuracy", "chance", "longer", "steady", "ties", "unusable"):
        table.add_column(
            column,
            justify="left" if column in left else "right",
            no_wrap=column not in left,
            overflow="fold",
            header_style="dim",
        )
    for found in results:
        table.add_row(
            found.name,
            f"{found.scored}/{found.pairs}",
            _two_lines(found.accuracy),
            "0.500",
            _two_lines(found.longer_wins),
            _two_lines(found.consistent),
            _two_lines(found.tied),
            ", ".join(f"{count} {reason}" for reason, count in found.reasons.items()) or "-",
        )
    return table


def _two_lines(own: Estimate) -> str:
    """Return a mean and below it its interval, which keeps a table of many within 80 columns."""
    if not own.count:
        return "-"
    return f"{own.mean:.3f}" + (f"\n{own.low:.2f}-{own.high:.2f}" if not own.missing else "")
