"""The public functions: what the commands do, for scripts and notebooks.

What only one of them needs is imported where it is called: a run does not wait for judges and pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.loading import DataSource
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import COMPARE, Experiment
from fedloom.experiment.keywords import changed_table, read_experiment
from fedloom.federation.records import Evaluation, RoundRecord
from fedloom.objectives.base import Objective
from fedloom.runs.observers import Callbacks, RunObserver, Silent
from fedloom.runs.result import Result
from fedloom.runs.run import resume_run, run_experiment
from fedloom.runs.workers import Workers
from fedloom.settings.toml import read_toml
from fedloom.storage.output_paths import require_new_file, require_place
from fedloom.storage.run_folder import RESULTS, RunFolder
from fedloom.training.results import OnStep

if TYPE_CHECKING:
    from fedloom.models.gguf_export import OutType
    from fedloom.runs.adapter_scores import HeldOutScores
    from fedloom.runs.export import Exported, Format

OnRound = Callable[[RoundRecord], object]
OnEvaluation = Callable[[int, Evaluation], object]


def run(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    *,
    objective: Objective | Mapping[str, Any] | None = None,
    data: DataSource | Mapping[str, Any] | None = None,
    observer: RunObserver | None = None,
    progress: bool = False,
    on_round: OnRound | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_step: OnStep | None = None,
    workers: Workers | None = None,
    ray: str | None = None,
    **settings: Any,
) -> Result:
    """Run an experiment to its end.

    Args:
        experiment: A TOML file, a table of sections, or an :class:`Experiment`.
        objective: Your own objective instead of the one in the experiment, or settings of the section.
        data: Your own source of examples (see :class:`~fedloom.data.loading.DataSource`; an attribute
            ``kind`` says what they are if no preferences), or settings of the section ``[data]``.
        observer: Watches the run; by default only warnings are shown.
        progress: Show what the command shows, in a terminal or notebook; not together with ``observer``.
        on_round: Called with the record of each round once it is saved; round 0 is the evaluation of the
            start. What it raises ends the run, which can be resumed.
        on_evaluation: Called with a round's number and its evaluation, in rounds that evaluate.
        on_step: Called after each optimizer step of a client (all are in this process) with a
            :class:`~fedloom.training.results.StepRecord`: round, client, step, loss, learning rate,
            examples, tokens. What it raises ends the run, which can be resumed from the last whole round.
        workers: Processes that work on clients, or "auto"; the results are those of one, which is the
            default without ``ray``.
        ray: "local", or HOST:PORT of a cluster: the workers are actors of Ray (an extra).
        settings: Other values than the experiment's, as after ``--set``: ``rounds=2``, or for keys that
            several sections have, ``evaluation={"batch_size": 8}``.

    Raises:
        FedloomError: See ``fedloom.errors`` for the tree.
    """
    if isinstance(objective, Mapping):
        settings, objective = {"objective": objective, **settings}, None
    source, settings = _own_source(data, settings)
    read = read_experiment(experiment, settings)
    watching = _watching(observer, progress, on_round, on_evaluation)
    return run_experiment(
        read,
        objective=objective,
        data=source,
        observer=watching,
        on_step=on_step,
        workers=_default_workers(workers, ray),
        ray=ray,
    )


def resume(
    folder: str | Path,
    *,
    from_round: int | None = None,
    objective: Objective | None = None,
    data: DataSource | None = None,
    observer: RunObserver | None = None,
    progress: bool = False,
    on_round: OnRound | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_step: OnStep | None = None,
    workers: Workers | None = None,
    ray: str | None = None,
) -> Result:
    """Continue a run and end with the same bits as if it had never stopped.

    Args:
        folder: The run folder.
        from_round: Go back to the checkpoint of this round.
        objective: As in :func:`run`, if the run was started with one.
        data: As in :func:`run`, if the run was started with one.
        observer: As in :func:`run`.
        progress: As in :func:`run`.
        on_round: As in :func:`run`; called for the rounds that are played now.
        on_evaluation: As in :func:`run`; called for the rounds that are played now.
        on_step: As in :func:`run`; called for the steps that are made now.
        workers: As in :func:`run`; the run may have had another number.
        ray: As in :func:`run`; also for a run that had none.

    Raises:
        CheckpointError: The checkpoint is damaged or of another experiment.
        OutputError: ``folder`` is not a run folder.
    """
    watching = _watching(observer, progress, on_round, on_evaluation)
    return resume_run(
        Path(folder),
        from_round=from_round,
        objective=objective,
        data=data,
        observer=watching,
        on_step=on_step,
        workers=_default_workers(workers, ray),
        ray=ray,
    )


@dataclass(frozen=True)
class ComparisonResult:
    """What came of a comparison.

    Attributes:
        folder: The comparison's folder; the runs lie in it.
        page: The report, a page for a browser.
        results: All its figures, as in ``results.json``: among others ``arms`` (one record for each
            objective and method) and ``paired`` (differences, with their intervals).
    """

    folder: Path
    page: Path
    results: Mapping[str, Any]


def compare(
    comparison: str | Path | Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> ComparisonResult:
    """Run a grid of objectives, methods and seeds; runs that are done in the folder are not repeated.

    Args:
        comparison: A TOML file with a section ``[compare]``, or a table of sections.
        folder: Where to (default: comparisons/NAME).
        workers: Processes side by side (default: one a core on a CPU, one with a GPU). The results do not
            depend on it. In a script with more than one, call this under ``if __name__ == "__main__"``.
        progress: Show what the command shows.
        settings: Other values than the file's, as in :func:`run`; ``compare={"seeds": [1, 2]}`` too.

    Raises:
        FedloomError: See ``fedloom.errors`` for the tree.
    """
    from fedloom.commands.terminal import ComparisonTerminal, make_console
    from fedloom.reports.choose import write_page_of
    from fedloom.runs import comparison as grids

    if isinstance(comparison, Mapping):
        table, place = comparison, "the call of compare"
        name = str(table.get("name", COMPARE))
    else:
        table, place = read_toml(Path(comparison)), str(comparison)
        name = Path(comparison).stem
    grid = {**table.get(COMPARE, {}), **settings.pop(COMPARE, {})}
    table = changed_table({key: own for key, own in table.items() if key != COMPARE}, settings)
    plan = grids.comparison_of({**table, COMPARE: grid} if grid else table, name, place)
    observer = ComparisonTerminal(make_console(), silent=not progress)
    done = grids.compare(
        plan, Path(folder) if folder is not None else None, workers=workers, observer=observer
    )
    page = write_page_of([done], None, observer.warning)
    return ComparisonResult(done, page, RunFolder(done).read_record(RESULTS) or {})


def evaluate(
    what: str | Path, *, adapter: str | Path | None = None, **settings: Any
) -> HeldOutScores:
    """Score an adapter on held-out rows.

    Args:
        what: A run folder: its adapter is scored on its held-out rows. Or an experiment file: the base
            model is scored on the rows that it holds out.
        adapter: Another adapter for the same rows: a PEFT folder, a run folder, or "base".
        settings: Other values than the experiment's, as in :func:`run`.

    Raises:
        ModelError: A path is none of what may be given, or the adapter is one of another model.
        SettingsError: With every mistake in the settings.
    """
    from fedloom.commands.evaluation import held_out_pairs
    from fedloom.runs.adapter_scores import evaluate_adapter

    own = Path(adapter) if adapter is not None else None
    ((experiment, path),) = held_out_pairs([Path(what)], own, [])
    return evaluate_adapter(read_experiment(experiment, settings), path)


def partition(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    *,
    data: DataSource | Mapping[str, Any] | None = None,
    picture: str | Path | None = None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Return which client would hold which rows, before anything is trained.

    Args:
        experiment: As in :func:`run`.
        data: As in :func:`run`.
        picture: An SVG file to draw it in, if it is to be drawn.
        settings: As in :func:`run`.

    Returns:
        What a run writes as ``partition.json``: ``kind``, ``column``, ``values``, and for each of
        ``clients`` its rows ``train`` and ``held_out``, and ``counts`` of each value. Warnings are shown.

    Raises:
        DataError: The rows cannot be read, or a client would be left without any.
        OutputError: The picture cannot be written.
        SettingsError: With every mistake in the settings.
    """
    from fedloom.runs.partition_table import show_partition

    source, settings = _own_source(data, settings)
    read = read_experiment(experiment, settings)
    target = None
    if picture is not None:
        target = require_new_file(Path(picture), "picture=", force=True)
    shown = show_partition(read, target, source)
    for text in shown.warnings:
        Silent().warning(text)
    return shown.record


def export(
    folder: str | Path,
    *,
    client: int | None = None,
    reward: bool = False,
    to: str | Path | None = None,
    format: Format = "merged",
    out_type: OutType = "f16",
) -> Exported:
    """Write a model of a run as a folder that other programs load.

    Args:
        folder: The run folder.
        client: Whose model (default: the global one).
        reward: Write the explicit reward head, as a model that scores texts, instead.
        to: A new or empty folder (default: in the run folder).
        format: ``"merged"``: a whole model for transformers; ``"adapter"``: for PEFT, with its card;
            ``"gguf"``: a whole model for llama.cpp (an extra).
        out_type: Of the matrices of a GGUF file: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``.

    Returns:
        Where it is (``folder``), the line that loads it (``loading``), and what came of loading it again
        and comparing it with the merged model (``verified``).

    Raises:
        OutputError: It is no run folder, has no such model, or the target is not empty.
        ModelError: The model cannot be had, has no such head, or cannot be written in this format.
        VerificationError: What was written, loaded again, is not the model that was merged.
    """
    from fedloom.runs.export import export as export_run

    target = Path(to) if to is not None else None
    require_place(target, "to=")
    return export_run(Path(folder), client, target, reward=reward, format=format, out_type=out_type)


def report(*folders: str | Path, to: str | Path | None = None) -> Path:
    """Make the page of a run, of several runs, of a comparison or of an evaluation.

    Args:
        folders: Run folders, or the folder of one comparison or evaluation.
        to: The file to write (default: report.html in the folder; comparison.html here for several runs).

    Returns:
        The file; it needs nothing but a browser.

    Raises:
        OutputError: A folder is none of these, or the page cannot be written.
    """
    from fedloom.reports.choose import write_page_of

    if not folders:
        raise SettingsError(
            ["give a run folder, or the folder of a comparison"], "the call of report"
        )
    target = Path(to) if to is not None else None
    if target is None and len(folders) > 1:
        target = Path("comparison.html")
    return write_page_of([Path(folder) for folder in folders], target, Silent().warning)


def _default_workers(workers: Workers | None, ray: str | None) -> Workers:
    if workers is not None:
        return workers
    return 1 if ray is None else "auto"


def _own_source(
    data: DataSource | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[DataSource | None, dict[str, Any]]:
    """Return a user's own source, if ``data`` is one, and all settings.

    A source that says its kind stands in the experiment in place of the rows that would be read.
    """
    if isinstance(data, Mapping):
        return None, {"data": data, **settings}
    kind = getattr(data, "kind", None)
    if kind is None:
        return data, dict(settings)
    own = type(data)
    named = {"source": f"object {own.__module__}.{own.__qualname__}", "kind": kind}
    return data, {"data": named, **settings}


def _watching(
    observer: RunObserver | None,
    progress: bool,
    on_round: OnRound | None,
    on_evaluation: OnEvaluation | None,
) -> RunObserver:
    if observer is None:
        observer = _on_terminal() if progress else Silent()
    if on_round is None and on_evaluation is None:
        return observer
    return Callbacks(observer, on_round, on_evaluation)


def _on_terminal() -> RunObserver:
    from fedloom.commands.terminal import make_console, make_observer

    return make_observer(make_console(), quiet=False)
