"""Runs an experiment, and resumes it.

Reports and resumed runs read only the run folder (``storage/run_folder.py``).
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.accounting.costs import BEGIN, REFERENCE, REPEATED, Cost
from fedloom.accounting.garbage import without_collection
from fedloom.data.loading import DataSource
from fedloom.display.untrusted_text import named
from fedloom.engines.ray_pool import RayCluster
from fedloom.errors import (
    Interrupted,
    OutputError,
    RoundFailed,
    SettingsError,
)
from fedloom.evaluation.generate import Ask, generate_answers
from fedloom.evaluation.metrics import METRICS, PRIMARY_METRICS, PrimaryMetric
from fedloom.experiment.client_privacy import require_secret
from fedloom.experiment.experiment import Experiment
from fedloom.experiment.unused_settings import unread_settings
from fedloom.federation.admission import Admission
from fedloom.federation.asynchronous import Arrivals
from fedloom.federation.best_round import BestRound
from fedloom.federation.clock import ClockState
from fedloom.federation.codec_choice import require_budget
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.engine import Engine, RemoteEngine, RunDescription
from fedloom.federation.presence import NOBODY_YET, Presence
from fedloom.federation.records import RoundRecord
from fedloom.federation.rounds import Server
from fedloom.federation.secure_exchange import SecureAggregation
from fedloom.federation.selection import Selection, UniformSettings
from fedloom.federation.violations import of_rounds
from fedloom.methods.contract.closed_forms import answers
from fedloom.methods.contract.row_losses import RowLosses
from fedloom.methods.contract.soundness import first_state
from fedloom.models.adapters import AdapterModel
from fedloom.models.saved_adapter import WEIGHTS
from fedloom.objectives.base import Objective
from fedloom.privacy.distributed_mean import DistributedMean
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import PrivateMean
from fedloom.privacy.statement import of_settings
from fedloom.reports import record_marks, row_account
from fedloom.reports.compression import compression_record
from fedloom.runs.answer_order import not_taken, order_of_answers
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.auditor import Auditor
from fedloom.runs.client_privacy import (
    RunPrivacy,
    key_file,
    noise_warning,
    restore,
    selection_of,
)
from fedloom.runs.code_digests import (
    MadeWith,
    naming_plugins,
    plugin_digests,
    require_same_plugins,
)
from fedloom.runs.initial_adapter import (
    Start,
    check_base,
    find_start,
    sent,
    told,
    travels,
    with_adapter_settings,
)
from fedloom.runs.model_building import model_folder, of_server
from fedloom.runs.model_cards import ModelCards
from fedloom.runs.new_folder import (
    discard,
    new_folder,
    require_rows,
)
from fedloom.runs.observers import RunObserver, Silent
from fedloom.runs.partitioning import PartitionedData, partition_data
from fedloom.runs.plan import evaluated_first, plan_of
from fedloom.runs.ray_workers import with_workers_of, worker_source
from fedloom.runs.records import (
    answers_of,
    fingerprint,
    partition_record,
    prompt_of,
    round_record,
    run_record,
    start_record,
    summary_record,
    summary_text,
    tools_of,
    unseen_clients_record,
    versions,
)
from fedloom.runs.released import Withholding, release
from fedloom.runs.result import Result
from fedloom.runs.resume_checks import (
    engine_name,
    experiment_of,
    log_of,
    presence_of,
    report_versions,
    require_records,
    require_same_data,
    require_same_engine,
    require_same_model,
    where_it_goes_on,
    with_recorded_layout,
)
from fedloom.runs.row_privacy import (
    keep_ledgers,
    kept_noise,
    new_noise,
    own_steps,
    reported_steps,
    row_statement,
)
from fedloom.runs.trackers import Tracker, open_trackers, round_numbers
from fedloom.runs.verification import Verifier
from fedloom.runs.workers import HostProcess, Workers, WorkerTask
from fedloom.security import audit_log
from fedloom.security.audit_log import AuditLog
from fedloom.settings.suggestions import nearest
from fedloom.storage import checkpoint
from fedloom.storage import run_folder as names
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.client_store import ClientStore
from fedloom.storage.files import remove_temporary
from fedloom.storage.run_folder import Record, RunFolder
from fedloom.tensors import State, Tensors
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.results import OnStep, reported
from fedloom.wire.messages import Payload, encode
from fedloom.wire.schema import Schema

if TYPE_CHECKING:
    from fedloom.runs.profiling import Profile


@dataclass(frozen=True)
class _Given:
    """What the caller of a run gives beside the experiment; see :func:`resume_run`."""

    observer: RunObserver
    objective: Objective | None
    data: DataSource | None
    remote: RemoteEngine | None
    on_step: OnStep | None
    profile: bool
    workers: Workers
    ray: str | None
    auditor: Auditor | None = None

    def __post_init__(self) -> None:
        _require_here(self.workers, self.on_step, self.profile, self.ray)

    def require_secret(self, experiment: Experiment) -> None:
        """Check that nothing of it shows who is drawn, where that is secret.

        Raises:
            SettingsError: Something does.
        """
        asked = {
            "machines": self.remote is not None,
            "ray": self.ray is not None,
            "on_step": self.on_step is not None,
            "profile": self.profile,
            "audit": self.auditor is not None,
        }
        require_secret(experiment.privacy, asked)

    def withholding(self, folder: RunFolder) -> _Given:
        """Return the same with an observer that is told what may leave, where that is not everything."""
        if folder.released is None:
            return self
        return replace(self, observer=Withholding(self.observer, folder))

    def partitioned(self, experiment: Experiment) -> PartitionedData:
        """Read the data and partition it among the clients; report by which layout each file was read."""
        with without_collection():
            division = partition_data(experiment, self.data, self.objective)
        for text in division.loaded.layouts:
            self.observer.stage(named(text))
        return division if self.auditor is None else self.auditor.planted(division)

    def engine(self, parts: RunComponents) -> Engine:
        """Return the engine of a run's rounds, which an auditor sees the messages of."""
        return parts.engine if self.auditor is None else self.auditor.intercepting(parts)

    def components(
        self,
        experiment: Experiment,
        division: PartitionedData,
        start: Start | None,
        noise: NoiseSource | None,
        saved: Checkpoint | None = None,
    ) -> RunComponents:
        """Load the model and build what the run needs, with the client store of a checkpoint."""
        return assemble(
            experiment,
            division,
            objective=self.objective,
            store=ClientStore(saved.clients if saved else None),
            stage=self.observer.stage,
            remote=self.remote,
            start=start,
            on_step=self.on_step,
            noise=noise,
        )

    def with_workers(
        self,
        parts: RunComponents,
        source: HostProcess | RayCluster | None,
        experiment: Experiment,
        start: Start | None,
    ) -> RunComponents:
        """Have as many workers as are asked for work on the run's clients."""
        task = WorkerTask(experiment, self.objective, self.data, start)
        return with_workers_of(parts, self.workers, source, task, self.observer)


@naming_plugins
def run_experiment(
    experiment: Experiment,
    *,
    objective: Objective | None = None,
    data: DataSource | None = None,
    observer: RunObserver,
    remote: RemoteEngine | None = None,
    on_step: OnStep | None = None,
    profile: bool = False,
    workers: Workers = 1,
    ray: str | None = None,
    auditor: Auditor | None = None,
) -> Result:
    """Run an experiment in a new folder, with clients in this process or where ``remote`` has them.

    With ``profile`` a trace of where the time goes is left in the folder. With several ``workers``,
    as many processes of this machine work on clients; with ``ray`` ("local", or the address of a
    cluster) they are actors of Ray. An ``auditor`` plants rows, and sees what clients send.
    """
    given = _Given(observer, objective, data, remote, on_step, profile, workers, ray, auditor)
    start = find_start(experiment)
    experiment = with_adapter_settings(experiment, start)
    given.require_secret(experiment)
    with new_folder(experiment) as folder, worker_source(workers, ray) as source:
        try:
            given = given.withholding(folder)
            run, state = _new_run(given, experiment, folder, source, start)
            run.prepare(-1)
        except RoundFailed:
            raise  # the audit log in the folder names clients that could not take part
        except BaseException:
            # nothing was trained: leave nothing behind
            discard(folder)
            key_file(folder).unlink(missing_ok=True)
            raise
        return run.go(state, -1)


def _new_run(
    given: _Given,
    experiment: Experiment,
    folder: RunFolder,
    source: HostProcess | RayCluster | None,
    start: Start | None,
) -> tuple[_Run, State]:
    """Read the data, build what a run in a new folder needs, and return it with its first state."""
    observer, remote = given.observer, given.remote
    folder.write_text(names.EXPERIMENT, experiment.to_toml())
    trackers = _open_trackers(experiment, folder)
    privacy = RunPrivacy.of(experiment, observer.stage)
    observer.stage("reading data")
    require_rows(experiment, remote)
    clock = order_of_answers(experiment, remote, observer.client_done)
    division = given.partitioned(experiment)
    if start is not None:
        _require_base(experiment, start, observer)
        start = start.kept_in(folder)
    noise = new_noise(experiment, folder, elsewhere=remote is not None)
    parts = given.components(experiment, division, start, noise)
    keep_ledgers(parts.row_privacies, experiment, folder)
    require_budget(experiment.wire, answers(parts.method, parts.initial), reported(parts.objective))
    state = first_state(parts.method, parts.initial)
    unread = unread_settings(experiment).values()
    for text in (*experiment.notes, *unread, *experiment.wire.warnings()):
        observer.warning(text)
    _report_start(experiment, parts, observer)
    log = AuditLog(folder.path / audit_log.FILE)
    made = MadeWith(given.objective, given.data)
    for text in made.warnings:
        observer.warning(text)
    parts = given.with_workers(parts, source, experiment, start)
    run = _Run(experiment, folder, parts, given, log, made, trackers, start, privacy, clock=clock)
    return run, state


@naming_plugins
def resume_run(
    path: Path,
    experiment_file: Path | None = None,
    assignments: Iterable[str] = (),
    *,
    from_round: int | None = None,
    fresh_clients: Collection[int] = (),
    observer: RunObserver | None = None,
    objective: Objective | None = None,
    data: DataSource | None = None,
    remote: RemoteEngine | None = None,
    on_step: OnStep | None = None,
    profile: bool = False,
    workers: Workers = 1,
    ray: str | None = None,
) -> Result:
    """Continue the run in ``path`` and end with the same bits as if it had never stopped.

    Args:
        path: The run folder.
        experiment_file: Checked against the folder's own experiment if it is given.
        assignments: As after ``--set``, with ``experiment_file``.
        from_round: Go back to the checkpoint of this round.
        fresh_clients: Clients that start with an empty store; their saved stores are not read.
        observer: Watches the run.
        objective: As in :func:`run`, if the run was started with one.
        data: As in :func:`run`, if the run was started with one.
        remote: Where the clients are, if not in this process.
        on_step: Called after each optimizer step of a client in this process.
        profile: Whether a trace of where the time goes is left in the folder.
        workers: Processes of this machine that work on clients; the run may have had another number.
        ray: "local", or the address of a Ray cluster whose actors are the workers; also of a run that
            had none.

    Raises:
        CheckpointError: The checkpoint is damaged or of another experiment.
        OutputError: ``path`` is not a run folder.
    """
    observer = observer or Silent()
    given = _Given(observer, objective, data, remote, on_step, profile, workers, ray)
    folder = _begun_folder(path)
    with folder.locked(), worker_source(workers, ray) as source:
        for place in (folder.path, folder.checkpoints):
            remove_temporary(place)
        begun: Record | None = folder.read_record(names.RUN)
        experiment, start = experiment_of(folder, begun, experiment_file, assignments, observer)
        given.require_secret(experiment)
        given = given.withholding(folder)
        run, saved = _begun_run(
            given, experiment, folder, source, start, begun, from_round, fresh_clients
        )
        return run.go_on(saved, begun)


def _begun_run(
    given: _Given,
    experiment: Experiment,
    folder: RunFolder,
    source: HostProcess | RayCluster | None,
    start: Start | None,
    begun: Record | None,
    from_round: int | None,
    fresh_clients: Collection[int],
) -> tuple[_Run, Checkpoint | None]:
    """Read the data and a checkpoint again, check that nothing has changed, and build what the run needs.

    Returns:
        The run, and the checkpoint from which it goes on, ``None`` where there is none yet.
    """
    observer, remote = given.observer, given.remote
    made = _made_again(folder, begun, experiment, given)
    clock = order_of_answers(experiment, remote, observer.client_done)
    log = log_of(folder)
    trackers = _open_trackers(experiment, folder, resumed=True)
    privacy = RunPrivacy.of(experiment, observer.stage)
    observer.stage("reading data")
    division = given.partitioned(experiment)
    digest = fingerprint(experiment, division, made)
    saved = _checkpoint(folder, digest, log, from_round, fresh_clients)
    require_same_data(folder, begun, digest)
    laid_out = with_recorded_layout(experiment, begun)
    finished = (folder.path / names.SUMMARY).is_file() and from_round is None
    noise = kept_noise(experiment, folder, finished=finished, elsewhere=remote is not None)
    parts = given.components(laid_out, division, start, noise, saved)
    keep_ledgers(parts.row_privacies, experiment, folder)
    require_same_model(folder, begun, parts)
    _report_start(experiment, parts, observer)
    report_versions(begun, observer)
    _cut_back(folder, saved, observer)
    parts = given.with_workers(parts, source, laid_out, start)
    run = _Run(experiment, folder, parts, given, log, made, trackers, start, privacy, clock=clock)
    return run, saved


def _begun_folder(path: Path) -> RunFolder:
    """Return the run folder at ``path``.

    Raises:
        OutputError: It is none, or no run was begun in it.
    """
    folder = RunFolder.existing(path, server=True)
    if not folder.is_begun:
        raise OutputError(
            f"no run was begun in {path}, it holds {names.EXPERIMENT} alone: start one with "
            f"fedloom run {path / names.EXPERIMENT}"
        )
    return folder


def _checkpoint(
    folder: RunFolder,
    digest: str,
    log: AuditLog,
    from_round: int | None,
    fresh_clients: Collection[int],
) -> Checkpoint | None:
    """Return the checkpoint that a run is continued from, ``None`` where there is none yet.

    Raises:
        CheckpointError: It is damaged or of another experiment, or a record of its rounds has changed.
        AuditError: An entry of the log that it counts is not there.
    """
    if not folder.checkpoints.is_dir() or not any(folder.checkpoints.glob("round-*")):
        return None
    saved = checkpoint.load(folder.checkpoints, digest, from_round, fresh_clients)
    require_records(folder, saved, log)
    return saved


def _cut_back(folder: RunFolder, saved: Checkpoint | None, observer: RunObserver) -> None:
    """Remove records of rounds after the checkpoint: these are run again."""
    if cut := record_marks.cut_back(folder, saved.records["files"] if saved else {}):
        observer.stage(f"cut off, as these rounds are run again: {', '.join(cut)}")


def _made_again(
    folder: RunFolder, begun: Record | None, experiment: Experiment, given: _Given
) -> MadeWith:
    """Return what a run goes on with, after a check that it began with the same.

    Raises:
        SettingsError: The engine is another.
        DataError: The engine does not have the rows where the experiment needs them.
        CheckpointError: A class of the user or of others is another.
    """
    require_same_engine(folder, begun, given.remote)
    require_rows(experiment, given.remote)
    made = MadeWith(given.objective, given.data)
    made.require_same(folder.path, begun)
    require_same_plugins(folder.path, begun, experiment)
    return made


def _require_here(workers: Workers, on_step: OnStep | None, profile: bool, ray: str | None) -> None:
    """Check that what follows each step is in the process in which clients train.

    Raises:
        SettingsError: It is not.
    """
    if workers != "auto" and (type(workers) is not int or workers < 1):
        raise SettingsError(
            [f'workers = {workers!r}: give a number from 1, or "auto"'], "the call of run"
        )
    if (workers != 1 or ray is not None) and (on_step is not None or profile):
        asked = "on_step" if on_step is not None else "--profile"
        out = "workers" if ray is None else "Ray"
        raise SettingsError(
            [f"{asked} follows steps in this process, and workers are others: leave out {out}"],
            "the command",
        )


@dataclass(frozen=True)
class _Finished:
    """The last finished round, as it would be saved."""

    round: int
    state: State
    records: dict[str, Any]
    presence: Presence
    clock: ClockState | None
    wire: tuple[dict[str, Any], Tensors] | None
    best: State | None = None


@dataclass
class _Run:
    """One run: owns its folder, its components and its observer."""

    experiment: Experiment
    folder: RunFolder
    parts: RunComponents
    given: _Given
    audit: AuditLog
    made: MadeWith
    trackers: list[Tracker]
    start: Start | None
    privacy: RunPrivacy | None = None
    presence: Presence = NOBODY_YET
    clock: Arrivals | None = None
    last: _Finished | None = None
    saved: int = -1
    segment: int = 0
    clients_in: Path | None = None
    profile: Profile | None = None
    private: PrivateMean | DistributedMean | None = None

    def __post_init__(self) -> None:
        """Begin to follow the records."""
        self.observer, self.remote = self.given.observer, self.given.remote
        self.admission = Admission()
        self.compression = Compression.of(
            self.experiment.wire,
            self.experiment.federation.seed,
            self.parts.initial,
            started=self.start is not None,
            loss=self._held_out_loss if len(self.parts.evaluator.held_out) else None,
        )
        self.best = self._best_round()
        self.marks = record_marks.Marks(self.folder)
        lines = self.folder.read_lines(names.COSTS)  # of rounds before a resume
        self.scored = {line["client"] for line in lines if line["phase"] == REFERENCE}
        self.verifier = Verifier(self.experiment, self.parts)
        self.cards = ModelCards(self.experiment, self.parts, self.made.objective)

    def prepare(
        self, done: int, known: Record | None = None, clock: Mapping[str, Any] | None = None
    ) -> None:
        """Wait for clients on other machines, and write the records known before the next round.

        Args:
            done: The last finished round, -1 before the evaluation of the start.
            known: What ``run.json`` holds, where this run goes on.
            clock: What its checkpoint holds of work in flight.
        """
        id = known["id"] if known else uuid.uuid4().hex
        if self.privacy is not None:
            self.private = self.parts.method.private = self.privacy.mean(self.folder, done)
        self.admission = Admission(
            self.experiment.admission,
            of_rounds(self.folder.read_lines(names.ROUNDS)),
            rows_known=self.remote is None,
            run=id,
            watch=self.remote.watch if self.remote is not None else None,
            audit=self.audit.record,
        )
        self.admission.watch.began(id)
        start = sent(self.start, self.parts.initial)
        if self.remote is not None:
            self.observer.stage("waiting for clients")
            earlier = audit_log.events(self.audit.path, "began", "undone", audit_log.SUBMITTED)
            began = [e for e in earlier if e["event"] == "began" and e.get("run") == id]
            discarded = not_taken(earlier, clock)
            run_description = RunDescription(
                id,
                self._for_clients(start).to_toml(defaults=False),  # older ones know fewer
                self.parts.division.classes,
                self.parts.model_digest,
                (*(event["after"] for event in began), done),
                self.audit.record,
                tuple((e["client"], e["stretch"], e["message_number"]) for e in discarded),
                self.admission.report,
                self.observer.warning,
                start if travels(self.experiment) else None,
                plugin_digests(self.experiment),
                self.experiment.privacy.unit == "row",
                self.experiment.privacy.secure_aggregation,
            )
            self.segment = len(run_description.began)
            self.remote.begin(run_description, self.parts.ledger)
        elif known is None and travels(self.experiment):
            self._count_start(start)
        if known is None:
            self._write_start(id)
        sizes = self.parts.engine.sizes()
        rows = {str(client): size for client, size in sizes.items()}
        facts = {"run": id, "experiment": self.digest, "after": done, "clients": rows}
        self.audit.record("began", **facts, versions=versions())
        self._report_heaviest(sizes)

    def go_on(self, saved: Checkpoint | None, begun: Record | None) -> Result:
        """Continue from a checkpoint, or from the beginning where there is none; see :meth:`go`.

        Args:
            saved: The checkpoint of the last finished round.
            begun: What ``run.json`` holds.
        """
        done = saved.round if saved else -1
        clock = saved.clock if saved is not None else None
        self.prepare(done, begun if done >= 0 else None, clock)
        if saved is not None:
            self.presence, self.clients_in = presence_of(saved, self.parts), saved.folder
            if self.private is not None:
                restore(self.private, saved.records)
            if self.best is not None and "best" in saved.records:
                self.best.restore(saved.records["best"], saved.best)
            if "selection" in saved.records:
                self.selection.restore(saved.records["selection"])
            if self.compression is not None and saved.wire is not None:
                self.compression.restore(saved.wire, saved.held)
            if self.clock is not None and saved.clock is not None:
                self.clock = self.clock.at(ClockState.restored(saved.clock, saved.in_flight))
        state = saved.state if saved else first_state(self.parts.method, self.parts.initial)
        self.observer.stage(where_it_goes_on(done, self.experiment.federation.rounds))
        return self.go(state, done)

    @property
    def _shown_folder(self) -> Path:
        """The folder that the user is told of."""
        return self.folder.released or self.folder.path

    def _for_clients(self, start: Tensors) -> Experiment:
        """Return the experiment as sent to clients: without other members, paths, patterns, selection."""
        own = told(self.experiment, self.start, start)
        federation = own.federation.model_copy(update={"members": None})
        if own.adapter.pattern is not None:
            named = own.adapter.model_copy(update={"targets": self.parts.model.adapted_layers})
            own = replace(own, adapter=named)
        return replace(own, federation=federation, selection=UniformSettings())

    def _count_start(self, start: Tensors) -> None:
        """Count the bytes that each client would be sent before the first round."""
        size = len(encode(Payload(start), Schema.of(start)))
        for client in self.parts.local.resources:
            cost = Cost(0, client, BEGIN, bytes_down=size, exchanges=1)
            self.parts.ledger.costs.append(cost)

    def _write_start(self, id: str) -> None:
        """Write down what is known before the first round."""
        experiment, parts, remote = self.experiment, self.parts, self.remote
        sizes = parts.engine.sizes()
        held_out = remote.held_out() if remote is not None else None
        partition = partition_record(experiment, parts.division, sizes, held_out)
        self.folder.write_json(names.PARTITION, partition)
        record = run_record(
            self._shown_folder, experiment, parts, self.made, id, engine_name(remote)
        )
        record["start"] = start_record(experiment, self.start, parts.objective)
        if remote is not None:
            record["members"] = [
                {"client": client, "number": own.number, "name": own.name}
                for client, own in enumerate(remote.participants)
            ]
        if self.privacy is not None:
            record["privacy"] = promise = self.privacy.promise(numbers=self._sent_numbers)
            if warning := noise_warning(promise):
                self.observer.warning(warning)
        if (of_rows := self._row_promise(made=False)) is not None:
            record["privacy"] = of_rows
            for sentence in of_rows["sentences"]:
                self.observer.stage(sentence)
        record["privacy_of_settings"] = of_settings(
            experiment.privacy, elsewhere=remote is not None
        )
        for sentence in record["privacy_of_settings"]:
            self.observer.stage(sentence)
        self.folder.write_json(names.RUN, record)

    def _row_promise(self, *, made: bool) -> Record | None:
        """Return what the run promises each row, ``None`` where it does not or nobody is there yet."""
        if self.experiment.privacy.unit != "row":
            return None
        if self.remote is None:
            steps = own_steps(self.experiment, self.parts.row_privacies, made=made)
        else:
            steps = reported_steps(self.experiment, self.remote.private_work())
        away = self.remote is not None
        return row_statement(self.experiment, steps, elsewhere=away) if steps else None

    @property
    def _sent_numbers(self) -> int:
        """How many numbers a client sends back."""
        method = self.parts.method
        sent = method.sent_for_evaluation(first_state(method, self.parts.initial))
        return sum(tensor.numel() for tensor in (sent or {}).values())

    def _report_heaviest(self, sizes: Mapping[int, int]) -> None:
        """Report the bound on a client's weight, and the clients above it."""
        bound = self.admission.weight_bound(sizes)
        if bound.examples is None or self.folder.released is not None:
            return
        self.observer.stage(f"a client weighs at most {bound.examples} examples: {bound.why}")
        for client, registered in bound.cut.items():
            self.observer.warning(
                f"client {client} registered {registered} rows and weighs {bound.examples}: "
                f"{bound.why}"
            )

    def go(self, state: State, done: int) -> Result:
        """Run the remaining rounds, then write the final files."""
        server = self._server()
        plan = plan_of(self.experiment, self.parts, done)
        self.observer.begin(replace(plan, folder=str(self.folder.path.resolve())))
        if done < 0:
            self.observer.stage(evaluated_first(self.parts))
        self.saved = done
        try:
            with self._profiling(server, done) as server:
                state = server.run(state, done)
            self._keep_last()  # a run that ends early has not saved it
        except BaseException as error:
            self._keep_last()
            if isinstance(error, KeyboardInterrupt):
                raise self._interrupted() from None
            if isinstance(self.observer, Withholding):
                raise self.observer.shown(error) from None
            raise
        finally:
            shutil.rmtree(self.folder.path / "spool", ignore_errors=True)
            self.observer.end()
            for tracker in self.trackers:
                tracker.close()
        if self.best is not None and self.best.state is not None:
            state = self.best.state
        return self._finish(state)

    def _server(self) -> Server:
        """Return what plays the rounds."""
        experiment, parts = self.experiment, self.parts
        return Server(
            method=parts.method,
            engine=self.given.engine(parts),
            federation=experiment.federation,
            learning_rate=lambda round: round_learning_rate(
                experiment.training, round, experiment.federation.rounds
            ),
            evaluate=lambda state, round: parts.evaluator.evaluate(
                state,
                round,
                parts.engine,
                parts.model,
                parts.ledger,
                self.admission,
                self.audit.record,
            ),
            finish=self._finish_round,
            ledger=parts.ledger,
            observer=self.observer,
            audit=self.audit.record,
            disk_buffer=self.folder.path / "spool",
            admission=self.admission,
            reported=reported(parts.objective),
            presence=self.presence,
            clock=self.clock,
            selection=self.selection,
            losses=RowLosses(parts.method).request,
            measured=self.remote is not None,
            private=self.private,
            secure=self._secure(),
            compression=self.compression,
            best=self.best,
            means_alone=parts.method.means_alone,
        )

    def _held_out_loss(self, tensors: Tensors, round: int) -> float | None:
        """Return the loss of the global held-out set under an adapter."""
        parts = self.parts
        return parts.evaluator.loss_of(tensors, round, parts.model, parts.ledger)

    def _best_round(self) -> BestRound | None:
        """Return what follows the best round, where its adapter is kept.

        Raises:
            SettingsError: The global held-out set has no such metric, or no rows.
        """
        asked, headline = self.experiment.evaluation, self._primary_metric
        if asked.best_round_by is None:
            return None
        name, held_out = asked.metric_for_best_model or headline.name, self.parts.evaluator.held_out
        there = [spec.name for spec in METRICS[held_out.kind]]
        if not len(held_out):
            raise SettingsError(
                [f"{asked.best_round_by} needs global held-out rows, and there are none"]
            )
        if name not in there:
            raise SettingsError(
                [f"evaluation.metric_for_best_model = {name!r}: {nearest(name, there)}"]
            )
        higher = headline.higher_is_better if name == headline.name else not name.endswith("loss")
        patience, threshold = asked.early_stopping_patience, asked.early_stopping_threshold
        return BestRound(name, higher, patience, threshold)

    def _secure(self) -> SecureAggregation | None:
        """Return what has replies summed, where the server may see none of them."""
        private = self.private if isinstance(self.private, DistributedMean) else None
        run, privacy = self.admission.run, self.experiment.privacy
        return SecureAggregation.of(privacy, run, self.segment, private)

    @contextlib.contextmanager
    def _profiling(self, server: Server, done: int) -> Iterator[Server]:
        """Yield the server; where a trace is asked for, one of which everything is noted."""
        if not self.given.profile:
            yield server
            return
        from fedloom.runs.profiling import Profile

        self.profile = Profile(self.folder.path / f"trace-{done + 1:04d}.json")
        try:
            with self.profile.recording(server) as recorded:
                yield recorded
        finally:
            self.observer.stage(
                f"profile: {self.profile.path}  (open it at https://ui.perfetto.dev or chrome://tracing)"
            )

    def _finish_round(self, record: RoundRecord, state: State) -> None:
        self.audit.record("round", round=record.round, state=state.digest())
        self.audit.sync()
        for cost in record.costs:
            if cost.phase == REFERENCE and cost.client in self.scored:
                cost.phase = REPEATED
        self.folder.append(names.COSTS, [asdict(cost) for cost in record.costs])
        self.folder.append(
            names.ROUNDS, [round_record(record, self._primary_metric, self.parts.engine.title)]
        )
        for tracker in self.trackers:
            tracker.log(round_numbers(record), record.round)
        if record.train.get("desirable_share") in (0.0, 1.0):
            which = "desirable" if record.train["desirable_share"] else "undesirable"
            self.observer.warning(
                f"round {record.round}: every row trained on was {which}; KTO sees one side only"
            )
        self.last = (
            None  # what clients keep is neither the last round's nor this one's for a moment
        )
        self.parts.engine.finish_round()
        clock = self.clock.state if self.clock is not None else None
        wire = self.compression.saved() if self.compression is not None else None
        best = self.best.state if self.best is not None else None
        records = self._records()
        self.last = _Finished(record.round, state, records, record.presence, clock, wire, best)
        every, rounds = self.experiment.output.checkpoint_every, self.experiment.federation.rounds
        if record.round % every == 0 or record.round == rounds:
            self._save(self.last)

    @cached_property
    def selection(self) -> Selection:
        """What draws the clients of each round."""
        return selection_of(self.experiment, self.private)

    @cached_property
    def digest(self) -> str:
        """The fingerprint of what shapes the results; it stays the same over a run."""
        return fingerprint(self.experiment, self.parts.division, self.made)

    def _records(self) -> dict[str, Any]:
        """Return what the records are now."""
        found = {"files": self.marks.now(), "audit": self.audit.position}
        if self.best is not None:
            found["best"] = self.best.saved()
        if kept := self.selection.saved():
            found["selection"] = kept
        return found if self.private is None else found | {"privacy": self.private.saved()}

    def _save(self, last: _Finished) -> None:
        store = self.parts.local.store
        profile = self.profile
        clock, in_flight = last.clock.saved() if last.clock is not None else (None, {})
        wire, held = last.wire or (None, {})
        with profile.span("checkpoint", round=last.round) if profile else contextlib.nullcontext():
            clients = checkpoint.save(
                self.folder.checkpoints,
                Checkpoint(
                    last.round,
                    last.state,
                    store.flat(),
                    self.digest,
                    last.records,
                    last.presence.to_table(rows=self.given.remote is not None),
                    clock,
                    in_flight,
                    wire=wire,
                    held=held,
                    best=last.best,
                ),
                store.changed,
                self.clients_in,
            )
        store.saved(clients)
        self.saved, self.clients_in = last.round, clients.folder
        if isinstance(self.private, DistributedMean):
            self.private.forget(last.round)

    def _keep_last(self) -> None:
        """Save the last finished round, if it was not due; a full disk hides no other error."""
        if self.last is not None and self.last.round > self.saved:
            try:
                self._save(self.last)
            except OutputError as error:
                self.observer.warning(f"round {self.last.round} is not saved: {error}")

    def _interrupted(self) -> Interrupted:
        """Return how to resume the run."""
        what = f"everything up to round {self.saved}" if self.saved >= 0 else "nothing yet"
        return Interrupted(
            f"stopped; {what} is saved. Go on with: fedloom run --resume {self._shown_folder}"
        )

    @property
    def _primary_metric(self) -> PrimaryMetric:
        return PRIMARY_METRICS[self.parts.division.judged]

    def _finish(self, state: State) -> Result:
        adapter = self._write_adapters(state)
        if self.parts.prompts and (self.parts.local.shares or self.parts.method.shared(state)):
            self.folder.write_json(names.SAMPLES, self._samples(state))
        summary = summary_record(
            self.folder.read_lines(names.ROUNDS),
            self.folder.read_lines(names.COSTS),
            self._primary_metric.name,
            next(adapter / name for name in WEIGHTS if (adapter / name).is_file())
            if adapter
            else None,
            self.best.round if self.best is not None else None,
        )
        rounds = self.experiment.federation.rounds
        if self.best is not None:
            summary["best_round"] = self.best.record(summary["rounds"])
        joined = self.parts.unseen.evaluate_all(
            state, rounds, self.parts.engine, self.admission, self.audit.record
        )
        if joined:
            summary["newcomers"] = unseen_clients_record(joined, self._primary_metric)
        if self.remote is not None:
            self.remote.end(self._own_models(state))
        if self.experiment.wire.compresses:
            summary["wire"] = compression_record(
                self.folder.read_record(names.RUN) or {},
                self.folder.read_lines(names.COSTS),
                self.folder.read_lines(names.ROUNDS),
            )
        if self.privacy is not None:
            summary["privacy"] = self.privacy.promise(self.private, self._sent_numbers)
        if (promise := self._row_promise(made=True)) is not None:
            summary["privacy"] = promise
        summary["records"] = self.marks.now()
        self._write_cards(summary)
        if self.experiment.output.verify:
            self.observer.stage("verifying what was saved")
        summary["verified"] = self.verifier.verify()
        self.folder.write_json(names.SUMMARY, summary)
        key_file(self.folder).unlink(missing_ok=True)
        written = summary["adapter"]["sha256"] if summary["adapter"] else None
        self.audit.record("ended", adapter=written)
        self.audit.sync()
        folder = self._shown_folder
        if self.folder.released is not None:
            summary = release(self.folder, summary)
            adapter = adapter and folder / adapter.name
        return Result(
            folder,
            summary["after_metrics"],
            summary["before_metrics"],
            adapter,
            summary.get("totals", {}),
            summary_text(summary, self._primary_metric, folder),
        )

    def _write_adapters(self, state: State) -> Path | None:
        """Write the global adapter, and each client's own where they keep one; return the former."""
        shared = self.parts.method.shared(state)
        ensemble = self.parts.method.ensemble(state)
        folders = len(self._owners()) + len(ensemble) + (shared is not None)
        self.verifier.folders = folders
        try:
            if shared is not None:
                self.parts.model.write(shared)
                self.parts.model.save(self.folder.adapter)
                self.verifier.note(self.folder.adapter, self.parts.model)
            for name, adapter in ensemble.items():
                self.parts.model.write(adapter)
                self.parts.model.save(self.folder.named_adapter(name))
                self.verifier.note(self.folder.named_adapter(name), self.parts.model)
            for client in self._owners():
                model = self._write_own(client, state)
                model.save(self.folder.client(client))
                self.verifier.note(self.folder.client(client), model, client)
        except OSError as error:
            raise OutputError(f"cannot write the adapter: {error}") from error
        return self.folder.adapter if shared is not None else None

    def _write_cards(self, summary: Mapping[str, Any]) -> None:
        """Write the model cards of all that was saved."""
        if self.folder.adapter.is_dir():
            self.cards.write(self.folder.adapter, self.parts.model, None, summary)
        for folder in self.folder.named_adapters:
            self.cards.write(folder, self.parts.model, None, None)
        for client in self._owners():
            model = self.parts.local.resources[client].model
            self.cards.write(self.folder.client(client), model, client, summary)

    def _owners(self) -> list[int]:
        """Return the clients that have something of their own to be judged by."""
        method, store = self.parts.method, self.parts.local.store
        if not (method.own_models or method.personal):
            return []
        return [client for client in self.parts.local.sizes() if client in store]

    def _own_models(self, state: State) -> Payload | None:
        """Return what clients elsewhere are sent to write models of their own with, if they have some."""
        method = self.parts.method
        if not (method.own_models or method.personal):
            return None
        return Payload(method.sent_for_evaluation(state) or {})

    def _write_own(self, client: int, state: State) -> AdapterModel:
        """Load a client's parameters into its model, and return it."""
        method, engine = self.parts.method, self.parts.local
        seen = engine.client(client, self.experiment.federation.rounds)
        method.load(seen, Payload(method.sent_for_evaluation(state) or {}))
        return seen.model

    def _samples(self, state: State) -> list[dict[str, Any]]:
        parts, limit = self.parts, self.experiment.evaluation.max_new_tokens
        given = [(prompt_of(example), tools_of(example)) for example in parts.prompts]
        texts = [parts.encoder.prompt_text(*one) for one in given]
        parts.model.write(parts.initial)
        asks = [Ask(tuple(parts.encoder.prompt(*one))) for one in given]
        before = generate_answers(parts.model, parts.encoder, asks, limit)
        shared, model = parts.method.shared(state), parts.model
        if shared is None:  # every client has its own: show the first one's
            model = self._write_own(min(parts.local.shares), state)
        else:
            model.write(shared)
        after = generate_answers(model, parts.encoder, asks, limit)
        return [
            {"prompt": text, "before": old, "after": new, **answers_of(example)}
            for example, text, old, new in zip(parts.prompts, texts, before, after, strict=True)
        ]


def _require_base(experiment: Experiment, start: Start, observer: RunObserver) -> None:
    """Check that what a run starts from is of its model; warn where nobody can know.

    Raises:
        ModelError: It is of another.
    """
    owned = of_server(experiment)
    doubt = check_base(owned, start, model_folder(owned.model.path, observer.stage))
    if doubt is not None:
        observer.warning(doubt)


def _report_start(experiment: Experiment, parts: RunComponents, observer: RunObserver) -> None:
    """Report a run's rows, what could distort its results, its start and its reference model."""
    of_all = replace(parts.accounts, clients={}).to_record()
    for source, own in row_account.sources(of_all).items():
        observer.stage(row_account.sentence(source, own))
    for text in parts.accounts.warnings:
        observer.warning(text)
    name = experiment.adapter.start
    if name is not None:
        observer.stage(f"starting from the adapter {named(name)}")
    if parts.objective.needs_reference:
        told = f"the adapter it starts from, {named(name)}"
        observer.stage(
            f"reference: {told if experiment.reference == 'start' else 'the base model'}"
        )


def _open_trackers(
    experiment: Experiment, folder: RunFolder, *, resumed: bool = False
) -> list[Tracker]:
    table = experiment.to_table()
    return open_trackers(
        experiment.output.trackers, folder.path, experiment.name, table, resumed=resumed
    )
