"""``fedloom evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import Assignments, app, begin_loading
from fedloom.commands.early_checks import refuse_early
from fedloom.storage.output_paths import require_place

What = Annotated[
    list[Path] | None,
    typer.Argument(
        help='Run folders, an experiment in TOML, or adapters: PEFT folders, "base".',
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help='With an experiment or a run folder: a PEFT folder, a run folder, or "base".'
    ),
]
Benchmark = Annotated[
    str | None, typer.Option(help="mt-bench-1, vicuna, advbench, or a file of questions.")
]
Questions = Annotated[Path | None, typer.Option(help="Where a named benchmark's questions lie.")]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        help="refusal, reference, longest, a model's folder, a reward model's run, or http://HOST/v1."
    ),
]
JudgeAudit = Annotated[
    Path | None, typer.Option(help="Measure the judges on pairs that people judged, instead.")
]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks of lm-eval, by name or YAML file: mmlu,arc_easy.")
]
Limit = Annotated[int | None, typer.Option(help="First questions only.", min=1)]
Target = Annotated[Path | None, typer.Option("--to", help="Folder (default: evaluations/NAME).")]


@app.command()
def evaluate(
    what: What = None,
    adapter: Adapter = None,
    benchmark: Benchmark = None,
    questions: Questions = None,
    judge: Judges = None,
    judge_audit: JudgeAudit = None,
    lm_eval: Tasks = None,
    limit: Limit = None,
    target: Target = None,
    assignments: Assignments = None,
) -> None:
    """Score adapters: on held-out rows, on a benchmark with judges, or with lm-eval.

    Run folders and experiments are scored on their global held-out sets. A judge's key is read from the
    environment variable FEDLOOM_JUDGE_KEY.
    """
    given = what or []
    _require_one_purpose(given, adapter, benchmark, judge_audit, lm_eval)
    tasks = lm_eval.split(",") if lm_eval is not None else []
    require_place(target, "--to")
    if judge_audit is None:
        refuse_early(
            lambda: _check_evaluation(
                given, assignments, adapter, benchmark, questions, judge, tasks, target
            )
        )
    else:
        refuse_early(lambda: _check_audit(judge_audit, judge, assignments))
    begin_loading(quiet=False)
    from fedloom.commands import evaluation

    judges, settings = judge or [], assignments or []
    if judge_audit is not None:
        evaluation.show_audit(judge_audit, judges, settings, limit)
    elif benchmark is not None:
        evaluation.show_benchmark(given, benchmark, questions, judges, settings, limit, target)
    elif lm_eval is not None:
        evaluation.show_harness(given, tasks, settings, limit)
    else:
        evaluation.show_held_out(given, adapter, settings, target)


def _require_one_purpose(
    given: list[Path],
    adapter: Path | None,
    benchmark: str | None,
    judge_audit: Path | None,
    lm_eval: str | None,
) -> None:
    """Refuse a command line that asks for nothing, or for several things at once."""
    chosen = sum(option is not None for option in (benchmark, judge_audit, lm_eval))
    if chosen > 1:
        raise typer.BadParameter("give one of --benchmark, --judge-audit and --lm-eval")
    if not given and judge_audit is None:
        raise typer.BadParameter(
            "give a run folder or an experiment in TOML, or adapters with --benchmark or --lm-eval, or "
            "--judge-audit"
        )
    if adapter is not None and chosen:
        raise typer.BadParameter(
            "--adapter goes with an experiment or run folder alone; name adapters before --benchmark"
        )


def _check_evaluation(
    given: list[Path],
    assignments: list[str] | None,
    adapter: Path | None,
    benchmark: str | None,
    questions: Path | None,
    judges: list[str] | None,
    tasks: list[str],
    target: Path | None,
) -> None:
    """Raise mistakes in an evaluation that can be found without a model."""
    from fedloom.commands import evaluation

    evaluation.check(
        given,
        assignments or [],
        adapter=adapter,
        benchmark=benchmark,
        questions=questions,
        judges=judges or [],
        tasks=tasks,
        target=target,
    )


def _check_audit(path: Path, judges: list[str] | None, assignments: list[str] | None) -> None:
    from fedloom.commands import evaluation

    evaluation.check_audit(path, judges or [], assignments or [])
