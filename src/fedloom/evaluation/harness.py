"""Standard benchmarks (MMLU, ARC, ...) through EleutherAI's lm-eval, an optional extra.

It is asked about the base model with our PEFT folder on it, so what it reports belongs to the very
files that a run leaves.
"""

from __future__ import annotations

import difflib
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.errors import DataError, ModelError, first_line
from fedloom.statistics.intervals import LEAST, Interval, share_interval, student, too_few

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of rows; of others lm-eval's own standard error is taken."""

STDERR = "_stderr"
"""What lm-eval puts behind the name of a metric for its standard error."""

EXTRA = 'pip install "fedloom[harness]"'


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval found on one task.

    Attributes:
        metrics: Its numbers by name, standard errors among them.
        rows: How many rows they are over; ``None`` where lm-eval does not say (groups of tasks).
    """

    metrics: Mapping[str, float]
    rows: int | None

    def intervals(self) -> dict[str, Interval]:
        """Return each metric but standard errors, with its 95 % interval over rows where there is one.

        Shares have Wilson's, other means Student's t times lm-eval's standard error.
        """
        return {
            name: self._interval(name, value)
            for name, value in self.metrics.items()
            if STDERR not in name
        }

    def _interval(self, name: str, value: float) -> Interval:
        metric, comma, filter = name.partition(",")
        if self.rows is None:
            return Interval(value, None, None, 0, "rows", missing="n not known")
        if metric in SHARES and 0 <= value <= 1:
            return replace(share_interval(value * self.rows, self.rows), estimate=value)
        error = self.metrics.get(f"{metric}{STDERR}{comma}{filter}", math.nan)
        if self.rows < LEAST or not error > 0:
            missing = "not estimable without a standard error"
            missing = too_few(self.rows, "rows") if self.rows < LEAST else missing
            return Interval(value, None, None, self.rows, "rows", missing=missing)
        half = student(self.rows - 1) * error
        return Interval(value, value - half, value + half, self.rows, "rows")


def run_harness(
    adapter: Path | None,
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, TaskScores]:
    """Return what lm-eval finds of an adapter, by task.

    Args:
        adapter: PEFT folder, ``None`` for the base model.
        model: Folder or Hub name of the base model.
        tasks: Names that lm-eval knows, or YAML files of tasks.
        limit: First rows of each task only.
        batch_size: Rows in one forward pass.
        device: Where the model runs.
        seed: Of everything that lm-eval draws.

    Raises:
        ModelError: lm-eval is not installed.
        DataError: A task is not known, or its data or the model cannot be had.
    """
    require_tasks(tasks)
    lm_eval = _import()
    names, folders = _names(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within lm-eval and the data sets it loads
        # Indexing the thousands of tasks that lm-eval knows takes ten seconds: only where one is named.
        manager = lm_eval.tasks.TaskManager(
            include_path=folders or None, include_defaults=len(folders) < len(names)
        )
        _check_known(names, manager.all_tasks)
        try:
            backbone = _backbone(lm_eval, model, adapter, batch_size, device)
            found = lm_eval.simple_evaluate(
                model=backbone,
                tasks=names,
                limit=limit,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise DataError(
                f"lm-eval cannot run {', '.join(names)} on {adapter or model}: {reason}"
            ) from error
    rows = found.get("n-samples", {})
    return {
        task: TaskScores(_numbers(metrics), rows.get(task, {}).get("effective"))
        for task, metrics in found["results"].items()
    }


def _backbone(lm_eval: Any, model: str, adapter: Path | None, batch_size: int, device: str) -> Any:
    """Return a model as lm-eval has it, with a PEFT folder on it; no code of the model is run."""
    return lm_eval.models.huggingface.HFLM(
        pretrained=model,
        peft=str(adapter) if adapter is not None else None,
        device=device,
        batch_size=batch_size,
        trust_remote_code=False,
    )


def require_tasks(tasks: Sequence[str]) -> None:
    """Check, before lm-eval is imported, that what is given as tasks can be some.

    Raises:
        DataError: One is a file that is not YAML, or an empty name.
    """
    for task in tasks:
        suffix = Path(task).suffix
        if not task.strip():
            raise DataError("--lm-eval has an empty task; write tasks as mmlu,arc_easy")
        if suffix in (".toml", ".json", ".jsonl", ".csv") or (
            suffix not in (".yaml", ".yml") and Path(task).is_file()
        ):
            raise DataError(
                f"--lm-eval {task}: no task; give names that lm-eval knows (mmlu,arc_easy) or a YAML "
                "file of a task, and adapters before it: fedloom evaluate RUN_FOLDER --lm-eval mmlu"
            )


def _import() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ModelError(f"--lm-eval needs lm-eval, which is not installed: {EXTRA}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _names(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return task names, and the folders of those that are given as files."""
    names: list[str] = []
    folders: list[str] = []
    for task in tasks:
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        names.append(_task_name(path))
        folders.append(str(path.resolve().parent))
    return names, folders


def _task_name(path: Path) -> str:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"the task file {path} cannot be read: {error}") from error
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise DataError(f"the task file {path} names no task; it needs a line `task: NAME`")
    return name


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
            )
            raise DataError(f"lm-eval has no task {name!r}{hint}")


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results, the filter's name left out where it is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
