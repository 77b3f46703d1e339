"""What a run must be like for it to be resumed, and what of its folder is read for that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fedloom.errors import (
    AuditError,
    CheckpointError,
    SettingsError,
)
from fedloom.experiment.experiment import Experiment
from fedloom.federation.engine import RemoteEngine
from fedloom.federation.presence import Presence
from fedloom.reports import record_marks
from fedloom.runs.assembly import RunComponents
from fedloom.runs.initial_adapter import (
    Start,
    kept_start,
    with_adapter_settings,
)
from fedloom.runs.observers import RunObserver
from fedloom.runs.records import (
    SIMULATION,
    versions,
)
from fedloom.security import audit_log
from fedloom.security.audit_log import AuditLog
from fedloom.storage import run_folder as names
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.run_folder import Record, RunFolder, other_versions

PUT_BACK = "put it back from a backup, or start a new run"
"""Advice where a record of a run to resume is damaged."""


def with_recorded_layout(experiment: Experiment, begun: Record | None) -> Experiment:
    """Return the experiment with the pass size that the run was started with, on any device."""
    recorded = (begun or {}).get("tokens_per_pass")
    if recorded is None or experiment.training.tokens_per_pass != "auto":
        return experiment
    training = experiment.training.model_copy(update={"tokens_per_pass": recorded})
    return replace(experiment, training=training)


def presence_of(saved: Checkpoint, parts: RunComponents) -> Presence:
    """Return the presence in a checkpoint."""
    if saved.presence is None:
        return Presence.assumed(parts.engine.membership(), saved.round)
    return Presence.from_table(saved.presence)


def experiment_of(
    folder: RunFolder,
    run: Record | None,
    file: Path | None,
    assignments: Iterable[str],
    observer: RunObserver,
) -> tuple[Experiment, Start | None]:
    """Return the experiment of a run folder and what it starts from, after comparing it with one given.

    Raises:
        CheckpointError: They differ in more than name and output.
        SettingsError: Settings were given without an experiment.
    """
    experiment = Experiment.from_toml(folder.path / names.EXPERIMENT)
    start = kept_start(experiment, folder, run)
    if file is not None:
        given = Experiment.from_toml(file, assignments, name=experiment.name)
        if given.adapter.start == experiment.adapter.start:
            given = with_adapter_settings(given, start)
        _require_same(given, experiment, folder.path)
        observer.stage(
            f"the settings are those of {folder.path / names.EXPERIMENT}; {file} has the same, but for "
            "its [output], which is not used"
        )
    elif list(assignments):
        raise SettingsError(["--set cannot change a run that is resumed"], "the command")
    return experiment, start


def log_of(folder: RunFolder) -> AuditLog:
    """Open the log of a run that is resumed.

    Raises:
        AuditError: It is damaged.
    """
    try:
        return AuditLog(folder.path / audit_log.FILE)
    except AuditError as error:
        raise AuditError(f"{error}; {PUT_BACK}") from None


def require_records(folder: RunFolder, saved: Checkpoint, log: AuditLog) -> None:
    """Check that the records and the log are what they were when a checkpoint was saved.

    Raises:
        CheckpointError: A record is not.
        AuditError: The log is not.
    """
    record_marks.require_unchanged(folder, saved.records.get("files", {}), saved.round)
    try:
        log.require(saved.records["audit"])
    except AuditError as error:
        raise AuditError(f"{error} by round {saved.round}; {PUT_BACK}") from None


def where_it_goes_on(done: int, rounds: int) -> str:
    """Return where a resumed run continues, in words."""
    if done < 0:
        return "starting again from the beginning"
    if done == rounds:
        return f"round {done} was the last: the final files are written again"
    return f"continuing after round {done} of {rounds}"


def _require_same(given: Experiment, own: Experiment, path: Path) -> None:
    """Refuse to continue a run as another experiment; name what differs."""
    problems = []
    left, right = given.to_table(), own.to_table()
    for section in left:
        if section in ("name", "output") or left[section] == right[section]:
            continue
        for key in sorted(left[section].keys() | right[section].keys()):
            new, old = left[section].get(key), right[section].get(key)
            if new != old:
                problems.append(f"{section}.{key} is {new!r}, the run in {path} has {old!r}")
    if problems:
        raise CheckpointError(
            f"{path} holds a run of another experiment:\n  " + "\n  ".join(problems)
        )


def engine_name(remote: RemoteEngine | None) -> str:
    """Return what ``run.json`` calls the engine."""
    return SIMULATION if remote is None else remote.name


def require_same_engine(folder: RunFolder, run: Record | None, remote: RemoteEngine | None) -> None:
    """Check that the engine is the same, as it has the client stores."""
    made, now = (run or {}).get("engine"), engine_name(remote)
    if made is not None and made != now:
        raise SettingsError(
            [
                f"{folder.path} was run with --engine {made}; its clients' stores are there, and not "
                f"with {now}: resume it with --engine {made}"
            ],
            "the command",
        )


def require_same_data(folder: RunFolder, run: Record | None, digest: str) -> None:
    """Check that a run which has no checkpoint is the one that began here.

    Raises:
        CheckpointError: Settings or data have changed since.
    """
    if run is not None and run["fingerprint"] != digest:
        raise CheckpointError(
            f"settings, data or reward models have changed since {folder.path} was started (fingerprint "
            f"{run['fingerprint'][:12]}, now {digest[:12]}); start a new run"
        )


def report_versions(run: Record | None, observer: RunObserver) -> None:
    """Report the versions that differ from those at the start of the run."""
    if run is not None and (others := other_versions(run, versions())):
        observer.warning(
            f"resumed with other versions than the run was begun with: {', '.join(others)}; results may "
            "differ from those of a run without a break"
        )


def require_same_model(folder: RunFolder, run: Record | None, parts: RunComponents) -> None:
    """Check that the model is the one that the run was begun with.

    Raises:
        CheckpointError: It has changed.
    """
    if run is not None and run["model"]["sha256"] != parts.model_digest:
        raise CheckpointError(
            f"the model {run['model']['name']} has changed since {folder.path} was started "
            f"(SHA-256 {run['model']['sha256'][:12]}, now {parts.model_digest[:12]}); start a new run"
        )
