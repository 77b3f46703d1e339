"""A fair comparison: one base experiment, a grid of objectives, methods and seeds, one budget for all.

The published study this package starts from gave its configurations different numbers of optimizer steps,
different lengths and different checkpoints. Here every run of the grid has the same work per client and
round and is evaluated at the same round; the work that each run really did is read from its ledger and
shown. Each is a run folder: a comparison that was stopped continues with the missing runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from fedloom.accounting.cores import available_cores
from fedloom.accounting.network import Link
from fedloom.accounting.quantities import parse_quantity
from fedloom.data.reader import require_files
from fedloom.errors import CheckpointError, FedloomError, Interrupted, OutputError, SettingsError
from fedloom.experiment.aliases import require_own_names, with_own_names
from fedloom.experiment.client_privacy import require_secret
from fedloom.experiment.experiment import COMPARE, Experiment
from fedloom.experiment.unused_settings import unread_in_all, unread_settings
from fedloom.methods import DEFAULT, METHODS, make_method
from fedloom.models.load import MADE, fingerprint, load_tokenizer, require_reachable
from fedloom.objectives import OBJECTIVES
from fedloom.runs.assembly import assemble
from fedloom.runs.initial_adapter import find_start, with_adapter_settings
from fedloom.runs.model_building import model_folder, of_server
from fedloom.runs.observers import Silent
from fedloom.runs.parent_process import end_with_parent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import versions
from fedloom.runs.run import resume_run, run_experiment
from fedloom.runs.stopping import Terminated
from fedloom.settings.schema import Settings, Table, parse
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import override, read_toml, write_toml
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder, is_comparison, other_versions
from fedloom.training.settings import AMOUNTS

Overrides = dict[str, dict[str, Any]]
"""Sections of an experiment, with the settings in which a configuration differs from the base."""


class LinkSettings(Settings):
    """``[compare.links.NAME]``: links and devices of a class of clients."""

    uplink: str = "20Mbit"
    """Bits a second from the client."""
    downlink: str = "100Mbit"
    """Bits a second to it."""
    latency: str = "30ms"
    """Of a message there and back."""
    speed: str = "1TFLOP"
    """Floating-point operations per second that its device reaches in practice."""

    def contradictions(self) -> list[str]:
        """Return what is not a quantity."""
        found = []
        for name, unit in LINK_UNITS.items():
            try:
                parse_quantity(getattr(self, name), unit)
            except ValueError as error:
                found.append(f"{name}: {error}")
        return found

    def link(self) -> Link:
        """Return the numbers."""
        numbers = {name: parse_quantity(getattr(self, name), u) for name, u in LINK_UNITS.items()}
        return Link(**numbers)


LINK_UNITS = {"uplink": "bit", "downlink": "bit", "latency": "s", "speed": "FLOP"}


class CompareSettings(Settings):
    """``[compare]``: the axes of the grid, and the common budget."""

    budget: Literal["steps", "examples", "tokens", "as_set"] = "steps"
    """The unit of work that is equal for every client, round and configuration: optimizer steps, examples
    (a pair counts as the two answers it holds) or tokens. as_set: each configuration's own settings."""
    amount: int | None = Field(default=None, ge=1)
    """Amount of the budget per client and round; not with as_set."""
    per_model: bool = False
    """Whether the amount is of each model that a client trains, a batch counted once; else it is of all
    that a client computes in a round: its personal model too, and each of several steps on a batch."""
    objectives: list[str] | dict[str, Overrides] = {}
    """Names of objectives with their defaults, or configurations by name, each with the sections in which
    it differs from the base experiment."""
    scenarios: dict[str, Overrides] = {}
    """Instead of objectives: situations by name (clients, partition, model, ...), in each of which all
    methods are compared: quality, traffic, client compute, memory, time."""
    methods: list[str] | dict[str, Overrides] = [DEFAULT]
    """Names of methods with their defaults, or configurations by name with their sections."""
    judged_by: Literal["global", "clients"] = "global"
    """Of scenarios. global: the global held-out set, and what quality costs (frameworks). clients: each
    client's own held-out rows, by the model it would use (personalised methods)."""
    seeds: list[int] = [0, 1, 2]
    """Each repeats the whole grid with other data orders, partitions and adapters."""
    links: dict[str, LinkSettings] = {}
    """With scenarios: classes of clients by name, for how long a round would take them."""

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        if (self.amount is None) != (self.budget == "as_set"):
            needs = "takes no" if self.budget == "as_set" else "needs a"
            found.append(f"compare.budget = {self.budget!r} {needs} compare.amount")
        if self.per_model and self.budget == "as_set":
            found.append('compare.per_model says what a budget is of; compare.budget = "as_set"')
        if bool(self.objectives) == bool(self.scenarios):
            found.append("compare needs objectives or scenarios, one of the two")
        if not self.methods or not self.seeds:
            found.append("compare.methods and compare.seeds must not be empty")
        if self.judged_by == "clients" and (self.links or not self.scenarios):
            found.append('compare.judged_by = "clients" goes with scenarios and without links')
        if self.links and not self.scenarios:
            found.append("compare.links go with compare.scenarios")
        for name, link in self.links.items():
            found += [f"compare.links.{name}.{problem}" for problem in link.contradictions()]
        if len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            found.append(f"compare.seeds must be different and at least 0, got {self.seeds}")
        for name in self.objectives if isinstance(self.objectives, list) else ():
            if name not in OBJECTIVES:
                found.append(f"compare.objectives {name!r}: {nearest(name, OBJECTIVES)}")
        for name in self.methods if isinstance(self.methods, list) else ():
            if name not in METHODS:
                found.append(f"compare.methods {name!r}: {nearest(name, METHODS)}")
        for name in (*self.rows, *self.methods):
            if not name.replace("_", "").isalnum():
                found.append(
                    f"compare: configuration {name!r} names a folder; use letters, digits and _"
                )
        return found

    @property
    def rows(self) -> dict[str, Overrides]:
        """The objectives or the scenarios, whichever are compared."""
        if isinstance(self.objectives, list):
            return {name: {"objective": {"name": name}} for name in self.objectives}
        return self.objectives or self.scenarios

    @property
    def kind(self) -> str:
        """What the page is about: objectives, scenarios, or personal."""
        if self.judged_by == "clients":
            return "personal"
        return "scenarios" if self.scenarios else "objectives"

    @property
    def method_configurations(self) -> dict[str, Overrides]:
        """Every configuration of the method axis with its sections."""
        if isinstance(self.methods, dict):
            return self.methods
        return {name: {"method": {"name": name}} for name in self.methods}


@dataclass(frozen=True)
class GridRun:
    """One run of the grid.

    Attributes:
        objective: Name of its configuration on the objective axis, or of its scenario.
        method: Name of its configuration on the method axis.
        seed: Its seed.
        experiment: All of its settings.
    """

    objective: str
    method: str
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.objective}-{self.method}-s{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A grid of runs that is ready to go.

    Attributes:
        name: The file's name without its ending.
        settings: The axes and the budget.
        grid_runs: Every run, in the order objective, method, seed.
        table: The file as it was read, for the record.
        notes: On settings that were read under another name.
    """

    name: str
    settings: CompareSettings
    grid_runs: tuple[GridRun, ...]
    table: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class CompareObserver(Protocol):
    """Who watches a comparison."""

    def stage(self, text: str) -> None:
        """Something is being prepared."""
        ...

    def begin(
        self, comparison: Comparison, waiting: int, workers: int, far: Callable[[], tuple[int, int]]
    ) -> None:
        """The runs are about to start; ``waiting`` of them are still to be done.

        ``far`` returns how many rounds of those are done, the evaluation of the start among them, and how
        many there are in all.
        """
        ...

    def run_done(self, name: str, metric: str, value: float | None, done: int, of: int) -> None:
        """A run has ended well."""
        ...

    def warning(self, text: str) -> None:
        """Something the user should know."""
        ...

    def end(self) -> None:
        """All runs are over, well or not."""
        ...


def read_comparison(path: Path, assignments: Iterable[str] = ()) -> Comparison:
    """Read a comparison and check every run of its grid.

    Args:
        path: An experiment file with a section ``[compare]``.
        assignments: As after ``--set``.

    Raises:
        SettingsError: With every mistake, each said once.
    """
    return comparison_of(override(read_toml(path), assignments), path.stem, str(path))


def comparison_of(table: Mapping[str, Any], name: str, place: str) -> Comparison:
    """Check every run of a comparison that has been read.

    Args:
        table: Sections of an experiment, and ``compare``.
        name: Of the comparison.
        place: Where mistakes are.

    Raises:
        SettingsError: With every mistake, each said once.
    """
    if COMPARE not in table:
        raise SettingsError([f"[{COMPARE}] is missing: name the configurations and seeds"], place)
    base = {section: value for section, value in table.items() if section != COMPARE}
    base, notes, problems = with_own_names(base)
    settings, complaints = parse(CompareSettings, table[COMPARE], COMPARE)
    problems += complaints
    problems += settings.contradictions() if settings else []
    if settings is None or problems:
        raise SettingsError(problems, place)
    grid_runs = []
    for objective, sections in settings.rows.items():
        for method, more in settings.method_configurations.items():
            for seed in settings.seeds:
                try:
                    own = [_renamed(changed, notes) for changed in (sections, more)]
                    merged = _merged(base, *own, {"federation": {"seed": seed}})
                    experiment = Experiment.from_table(_budgeted(merged, settings))
                    if settings.judged_by == "clients" and not experiment.evaluation.per_client:
                        raise SettingsError(
                            ['compare.judged_by = "clients" needs evaluation.per_client']
                        )
                    require_secret(experiment.privacy, {"comparison": True})
                except SettingsError as error:
                    problems += [
                        f"configuration {objective}-{method}: {text}" for text in error.problems
                    ]
                    break
                grid_runs.append(GridRun(objective, method, seed, experiment))
    problems += _unlike_rows(grid_runs)
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)), place)
    return Comparison(name, settings, tuple(grid_runs), table, tuple(dict.fromkeys(notes)))


def _renamed(sections: Mapping[str, Any], notes: list[str]) -> Table:
    """Return what a configuration changes under fedloom's names, and add notes on other names."""
    found, own = require_own_names(sections, COMPARE)
    notes += own
    return found


def _unlike_rows(grid_runs: Iterable[GridRun]) -> list[str]:
    """Return configurations that train on rows which others in their row of the grid hold out."""
    found = []
    for objective, group in groupby(grid_runs, key=lambda grid_run: grid_run.objective):
        configurations = [
            (grid_run.method, grid_run.experiment)
            for grid_run in group
            if grid_run.experiment.partition.client_test_fraction
        ]
        holding = [method for method, experiment in configurations if experiment.judges_clients]
        for method, experiment in configurations:
            partly = not METHODS[experiment.method.name][1].whole_at_clients
            if holding and partly and experiment.evaluation.per_client:
                found.append(
                    f"configuration {objective}-{method}: clients of a split model are judged by no rows "
                    "of their "
                    f"own and train on all, and those of {objective}-{holding[0]} hold some out: set "
                    "evaluation.per_client = false for all configurations"
                )
    return found


def compare(
    comparison: Comparison,
    folder: Path | None = None,
    *,
    workers: int | None = None,
    observer: CompareObserver | None = None,
) -> Path:
    """Run the missing runs of the grid in a folder from which the report is made.

    This process holds the lock of the folder.

    Args:
        comparison: From :func:`read_comparison`.
        folder: Where to (default: comparisons/NAME); runs that are done there are not repeated.
        workers: Processes side by side (default: one a core on a CPU, one with a GPU). The results
            do not depend on it.
        observer: Watches.

    Returns:
        The folder.

    Raises:
        OutputError: The folder holds another comparison, or another process writes there.
        CheckpointError: Finished runs used other rows or another model than the current ones.
        DataError: The data cannot be read.
        ModelError: The model is not there, or the start of a configuration is not, or has changed.
        FedloomError: Some runs failed; the others are done and kept.
    """
    folder = folder or Path("comparisons") / comparison.name
    comparison = replace(comparison, grid_runs=tuple(map(_resolved, comparison.grid_runs)))
    with contextlib.ExitStack() as held:
        known = is_comparison(folder)  # a refused comparison must not leave a folder behind
        if known:
            held.enter_context(RunFolder(folder).locked())
        waiting = [grid_run for grid_run in comparison.grid_runs if not _is_done(folder, grid_run)]
        if waiting and observer is not None:
            observer.stage("checking data and models of every configuration")
        _check_reachable(waiting)
        if not known:
            _make(folder)
            held.enter_context(RunFolder(folder).locked())
            waiting = [
                grid_run for grid_run in comparison.grid_runs if not _is_done(folder, grid_run)
            ]
        left = {grid_run.name for grid_run in waiting}
        done = [grid_run for grid_run in comparison.grid_runs if left and grid_run.name not in left]
        _require_same_rows(folder, done)
        _write_record(folder, comparison)
        workers = max(1, min(workers or _default_workers(comparison), len(waiting)))
        if observer is not None:
            observer.begin(comparison, len(waiting), workers, partial(_how_far, folder, waiting))
            unread = unread_in_all(grid_run.experiment for grid_run in comparison.grid_runs)
            for text in (*comparison.notes, *unread):
                observer.warning(text)
            for text in _other_versions(folder, done, len(comparison.grid_runs)):
                observer.warning(text)
        return _run_waiting(comparison, waiting, folder, workers, observer)


def _run_waiting(
    comparison: Comparison,
    waiting: list[GridRun],
    folder: Path,
    workers: int,
    observer: CompareObserver | None,
) -> Path:
    """Run the missing runs of the grid; see :func:`compare`."""
    failed: dict[str, str] = {}
    try:
        by_clients = comparison.settings.judged_by == "clients"
        outcomes = _outcomes(waiting, folder, workers, by_clients=by_clients)
        for count, outcome in enumerate(outcomes, 1):
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
            elif observer is not None:
                observer.run_done(outcome.name, outcome.metric, outcome.value, count, len(waiting))
            if observer is not None:
                for text in outcome.warnings:
                    observer.warning(f"{outcome.name}: {text}")
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"stopped; what is done is kept in {folder}, the same command goes on with the rest"
        ) from None
    except BrokenProcessPool:
        raise FedloomError(
            "a worker was killed, perhaps for lack of memory; try --workers 1. What is done is kept in "
            f"{folder}, the same command goes on with the rest"
        ) from None
    finally:
        if observer is not None:
            observer.end()
    if failed:
        first = next(iter(failed))
        raise FedloomError(
            f"{len(failed)} of {len(waiting)} runs failed ({', '.join(failed)}); the first: "
            f"{failed[first]}\nthe others are kept in {folder}: the same command goes on with the rest"
        )
    return folder


def _resolved(grid_run: GridRun) -> GridRun:
    """Return a run of the grid with the settings of its starting adapter.

    Raises:
        SettingsError: It says otherwise.
    """
    try:
        start = find_start(grid_run.experiment)
        return replace(grid_run, experiment=with_adapter_settings(grid_run.experiment, start))
    except SettingsError as error:
        configuration = f"configuration {grid_run.objective}-{grid_run.method}"
        raise SettingsError([f"{configuration}: {text}" for text in error.problems]) from None


@dataclass
class _Outcome:
    """Outcome of a run of the grid; plain data, as it comes from another process."""

    name: str
    metric: str = ""
    value: float = 0.0
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


class _Collecting(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        """Keep the warning for the parent process."""
        self.warnings.append(text)


def _outcomes(
    grid_runs: list[GridRun], folder: Path, workers: int, *, by_clients: bool
) -> Iterator[_Outcome]:
    jobs = [
        (
            grid_run.name,
            grid_run.experiment.to_table(),
            str(folder / names.RUNS / grid_run.name),
            by_clients,
        )
        for grid_run in grid_runs
    ]
    if workers == 1:
        yield from (_run_one(*job) for job in jobs)
        return
    # spawn: a forked child of a process that has used torch's threads may hang. Jobs are handed out one
    # by one: what a pool has queued cannot be taken back when the user stops.
    waiting = iter(jobs)
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        running = {pool.submit(_run_one, *job) for job in islice(waiting, workers)}
        try:
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_run_one, *job) for job in islice(waiting, len(ended))}
                yield from (future.result() for future in ended)
        except Terminated:
            for worker in active_children():  # Ctrl-C in a terminal reaches them by itself
                if worker.pid is not None:
                    os.kill(worker.pid, signal.SIGINT)
            raise


def _run_one(name: str, table: dict[str, Any], path: str, by_clients: bool) -> _Outcome:
    """Run or continue one run of the grid; errors are returned, not raised."""
    observer = _Collecting()
    known = set(unread_settings(Experiment.from_table(table)).values())  # told of the comparison
    table = {**table, "output": {**table["output"], "folder": path}, "name": name}
    try:
        if (Path(path) / names.RUN).is_file():
            result = resume_run(Path(path), observer=observer)
        else:
            shutil.rmtree(path, ignore_errors=True)
            result = run_experiment(Experiment.from_table(table), observer=observer)
    except Interrupted:
        raise  # the user stopped everything, not this run alone
    except FedloomError as error:
        return _Outcome(name, error=str(error), warnings=observer.warnings)
    except Exception as error:  # a crash of one run must not lose the results of others
        return _Outcome(name, error=f"{type(error).__name__}: {error}", warnings=observer.warnings)
    summary = json.loads((result.folder / names.SUMMARY).read_text(encoding="utf-8"))
    metric, clients = summary["metric"], summary["clients_after"]
    value = clients["mean"][metric] if by_clients and clients else summary["after"]
    told = [text for text in observer.warnings if text not in known]
    return _Outcome(name, metric, value, warnings=told)


def _check_reachable(grid_runs: Sequence[GridRun]) -> None:
    """Read each configuration's data and build its models without weights, before any run starts.

    Raises:
        DataError: The data cannot be read or partitioned as a configuration asks.
        ModelError: A model is missing, or cannot be used as a configuration asks.
    """
    experiments = {_reads(grid_run): grid_run.experiment for grid_run in reversed(grid_runs)}
    for path, revision in {(e.model.path, e.model.revision) for e in experiments.values()}:
        if path not in MADE:
            load_tokenizer(path, revision)
    for experiment in experiments.values():
        partition_data(experiment)
    for experiment in {
        grid_run.method: grid_run.experiment for grid_run in reversed(grid_runs)
    }.values():
        assemble(experiment, partition_data(experiment), empty=True)


def require_readable(comparison: Comparison) -> None:
    """Check that the files and model folders of every configuration exist; nothing is read.

    Raises:
        DataError: A data file is not there or cannot be opened.
        ModelError: A model's folder is none.
    """
    for experiment in {
        _reads(grid_run): grid_run.experiment for grid_run in comparison.grid_runs
    }.values():
        require_files(experiment.data)
    for path in {grid_run.experiment.model.path for grid_run in comparison.grid_runs}:
        require_reachable(path)


def _reads(grid_run: GridRun) -> tuple[str, str]:
    """Return a key that differs between runs that read other data: public rows depend on the method."""
    method = grid_run.experiment.method
    needed = METHODS[method.name][1].public_rows_needed(method)
    return grid_run.objective, grid_run.method if needed else ""


def _is_done(folder: Path, grid_run: GridRun) -> bool:
    """Return whether a run of the grid is finished.

    Raises:
        OutputError: Its folder holds a run of other settings.
    """
    path = folder / names.RUNS / grid_run.name
    if not (path / names.EXPERIMENT).is_file():
        return False
    left, right = (e.to_table() for e in (_saved(path), grid_run.experiment))
    different = [s for s in left if s not in ("name", "output") and left[s] != right[s]]
    if different:
        raise OutputError(
            f"{path} holds a run with other settings in [{'], ['.join(different)}]; give another "
            "folder with --to, or delete that one"
        )
    known = (RunFolder(path).read_record(names.RUN) or {}).get("start") or {}
    start = find_start(grid_run.experiment) if known else None
    if start is not None and start.digests() != known["sha256"]:
        raise OutputError(
            f"{path} holds a run that started from adapter.start = {start.name!r} as it was before it "
            "changed; give another folder with --to, or delete that one"
        )
    return (path / names.SUMMARY).is_file()


def _saved(path: Path) -> Experiment:
    try:
        return Experiment.from_toml(path / names.EXPERIMENT)
    except SettingsError as error:
        raise CheckpointError(f"{path} holds a run of another version: {error}") from error


def _require_same_rows(folder: Path, done: Sequence[GridRun]) -> None:
    """Check that the runs which are left will read the rows and the model of those that are done.

    The seeds of a configuration share data and model, so one of them is checked.

    Raises:
        CheckpointError: They will not.
    """
    first = {_reads(grid_run): grid_run for grid_run in reversed(done)}
    models: dict[str, str] = {}
    for grid_run in first.values():
        path = folder / names.RUNS / grid_run.name
        run = RunFolder(path).read_record(names.RUN) or {}
        model = of_server(grid_run.experiment).model.path
        if model not in models:
            models[model] = fingerprint(model_folder(model))
        now = {"data": partition_data(grid_run.experiment).loaded.digest, "model": models[model]}
        before = {
            "data": run.get("data", {}).get("digest"),
            "model": run.get("model", {}).get("sha256"),
        }
        for what, digest in now.items():
            if (old := before[what]) is not None and old != digest:
                raise CheckpointError(
                    f"the {what} of configuration {grid_run.objective}-{grid_run.method} changed since "
                    f"{path} was run "
                    f"(SHA-256 {old[:12]}, now {digest[:12]}), and runs that differ in that cannot be "
                    "compared: put it back, or give another folder with --to"
                )


def _other_versions(folder: Path, done: Sequence[GridRun], of: int) -> list[str]:
    """Return a warning about runs made with other versions than the remaining ones will be."""
    found: Counter[str] = Counter()
    for grid_run in done:
        run = RunFolder(folder / names.RUNS / grid_run.name).read_record(names.RUN)
        found[", ".join(other_versions(run, versions())) if run else ""] += 1
    return [
        f"{count} of {of} runs were made with other versions than those that are left will be: {text}; "
        "configurations may differ for that alone"
        for text, count in found.items()
        if text
    ]


def _how_far(folder: Path, grid_runs: Iterable[GridRun]) -> tuple[int, int]:
    """Return how many rounds of runs are done and how many there are, that of the start among them."""
    done = of = 0
    for grid_run in grid_runs:
        with contextlib.suppress(OSError):
            path = folder / names.RUNS / grid_run.name / names.ROUNDS
            done += path.read_bytes().count(b"\n") if path.is_file() else 0
        of += grid_run.experiment.federation.rounds + 1
    return done, of


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; choose another --to") from error


def _write_record(folder: Path, comparison: Comparison) -> None:
    files = RunFolder(folder)
    files.write_text("compare.toml", write_toml(comparison.table))
    files.write_json(
        names.COMPARISON,
        {
            "name": comparison.name,
            "budget": comparison.settings.budget,
            "amount": comparison.settings.amount,
            "per_model": comparison.settings.per_model,
            "seeds": comparison.settings.seeds,
            "kind": comparison.settings.kind,
            "links": {name: asdict(own.link()) for name, own in comparison.settings.links.items()},
            "objectives": list(comparison.settings.rows),
            "methods": list(comparison.settings.method_configurations),
            "cells": [
                {"name": c.name, "objective": c.objective, "method": c.method, "seed": c.seed}
                for c in comparison.grid_runs
            ],
        },
    )


CHOOSERS = {"adapter": ("kind", "lora")}
"""Section to the setting that says which others it may have, and its default; else it is the name."""


def _merged(base: Mapping[str, Any], *changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``base`` with sections changed; another name, or kind of adapter, starts a section anew."""
    table = {s: dict(v) if isinstance(v, Mapping) else v for s, v in base.items()}
    for change in changes:
        for section, values in change.items():
            own = table.get(section, {})
            chooser, default = CHOOSERS.get(section, ("name", None))
            fresh = chooser in values and values[chooser] != own.get(chooser, default)
            table[section] = dict(values) if fresh else {**own, **values}
    return table


def _budgeted(table: dict[str, Any], settings: CompareSettings) -> dict[str, Any]:
    """Return ``table`` with the work per client and round that the comparison prescribes."""
    if settings.budget == "as_set":
        return table
    per = "amount_per"
    training = {k: v for k, v in table.get("training", {}).items() if k not in (*AMOUNTS, per)}
    training[f"local_{settings.budget}"] = settings.amount
    if not settings.per_model and _trains_more_than_once(table):
        training[per] = "round"
    return {**table, "training": training}


def _trains_more_than_once(table: Mapping[str, Any]) -> bool:
    """Return whether a client trains several models in a round, or repeats steps on a batch.

    Mistakes in the settings are reported when the experiment is built from them.
    """
    sections = {name: table[name] for name in ("method", "federation") if name in table}
    try:
        own = Experiment.from_table({**table, **sections, "training": {}})
    except SettingsError:
        return False
    method, rounds = make_method(own.method), own.federation.rounds
    return method.repeats > 1 or max(method.trainings_of(r, rounds) for r in {1, rounds}) > 1


def _default_workers(comparison: Comparison) -> int:
    """One process a core where each uses one thread; a GPU is not shared."""
    import torch

    training = comparison.grid_runs[0].experiment.training
    on_cpu = training.device == "cpu" or (
        training.device == "auto" and not torch.cuda.is_available()
    )
    return max(1, available_cores() // (training.threads or 1)) if on_cpu else 1
