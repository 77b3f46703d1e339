"""Runs an experiment, and resumes it.

Reports and resumed runs read only the run folder (``storage/run_folder.py``).
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.accounting.costs import BEGIN, REFERENCE, REPEATED, Cost
from fedloom.accounting.quantities import human_count
from fedloom.data.loading import DataSource
from fedloom.data.reader import require_files
from fedloom.display.untrusted_text import named
from fedloom.errors import (
    AuditError,
    CheckpointError,
    DataError,
    Interrupted,
    OutputError,
    RoundFailed,
    SettingsError,
)
from fedloom.evaluation.generate import Ask, generate_answers
from fedloom.evaluation.metrics import PRIMARY_METRICS, PrimaryMetric
from fedloom.experiment.experiment import Experiment
from fedloom.experiment.unread import unread_settings
from fedloom.federation.admission import Admission
from fedloom.federation.engine import RemoteEngine, RunDescription
from fedloom.federation.participants import draw_cohort
from fedloom.federation.presence import NOBODY_YET, Presence
from fedloom.federation.records import RoundRecord
from fedloom.federation.rounds import Server
from fedloom.federation.violations import of_rounds
from fedloom.methods import METHODS
from fedloom.methods.contract.soundness import first_state
from fedloom.models.adapters import AdapterModel
from fedloom.models.load import require_reachable
from fedloom.models.saved_adapter import WEIGHTS
from fedloom.objectives.base import Objective
from fedloom.reports import record_marks, row_account
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.division import partition_data
from fedloom.runs.made_with import (
    MadeWith,
    naming_plugins,
    plugin_digests,
    require_same_plugins,
)
from fedloom.runs.model_building import model_folder, of_server
from fedloom.runs.model_cards import ModelCards
from fedloom.runs.observers import Plan, RunObserver, Silent
from fedloom.runs.progress import RoundWork
from fedloom.runs.records import (
    SIMULATION,
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
from fedloom.runs.result import Result
from fedloom.runs.row_tables import say_layouts
from fedloom.runs.start import (
    Start,
    check_base,
    find_start,
    kept_start,
    sent,
    told,
    travels,
    with_adapter_settings,
)
from fedloom.runs.trackers import Tracker, open_trackers, round_numbers
from fedloom.runs.verification import Verifier
from fedloom.runs.workers import Workers, WorkerTask, host_process, with_workers
from fedloom.security import audit_log
from fedloom.security.audit_log import AuditLog
from fedloom.storage import checkpoint
from fedloom.storage import run_folder as names
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.client_store import ClientStore
from fedloom.storage.files import remove_temporary
from fedloom.storage.run_folder import Record, RunFolder, other_versions
from fedloom.tensors import State, Tensors
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.results import OnStep, reported
from fedloom.training.steps import row_tokens
from fedloom.wire.messages import Payload, encode
from fedloom.wire.schema import Schema

if TYPE_CHECKING:
    from fedloom.runs.profiling import Profile

PUT_BACK = "put it back from a backup, or start a new run"
"""Advice where a record of a run to resume is damaged."""


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
) -> Result:
    """Run an experiment in a new folder, with clients in this process or where ``remote`` has them.

    With ``profile`` a trace of where the time goes is left in the folder. With several ``workers``,
    as many processes of this machine work on clients.
    """
    _require_here(workers, on_step, profile)
    start = find_start(experiment)
    experiment = with_adapter_settings(experiment, start)
    with _new_folder(experiment) as folder, host_process(workers) as host:
        try:
            folder.write_text(names.EXPERIMENT, experiment.to_toml())
            trackers = _open_trackers(experiment, folder)
            observer.stage("reading data")
            _require_rows(experiment, remote)
            division = partition_data(experiment, data, objective)
            say_layouts(division.loaded, observer)
            if start is not None:
                _require_base(experiment, start, observer)
                start = start.kept_in(folder)
            parts = assemble(
                experiment,
                division,
                objective=objective,
                stage=observer.stage,
                remote=remote,
                start=start,
                on_step=on_step,
            )
            state = first_state(parts.method, parts.initial)
            for text in unread_settings(experiment).values():
                observer.warning(text)
            _report_rows(parts, observer)
            _report_start(experiment, parts.objective, observer)
            log = AuditLog(folder.path / audit_log.FILE)
            made = MadeWith(objective, data)
            for text in made.warnings:
                observer.warning(text)
            task = WorkerTask(experiment, objective, data, start)
            parts = with_workers(parts, workers, host, task, observer)
            run = _Run(experiment, folder, parts, observer, log, made, trackers, remote, start)
            run.profiled = profile
            run.prepare(-1)
        except RoundFailed:
            raise  # the audit log in the folder names clients that could not take part
        except BaseException:
            shutil.rmtree(
                folder.path, ignore_errors=True
            )  # nothing was trained: leave nothing behind
            raise
        return run.go(state, -1)


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

    Raises:
        CheckpointError: The checkpoint is damaged or of another experiment.
        OutputError: ``path`` is not a run folder.
    """
    _require_here(workers, on_step, profile)
    observer = observer or Silent()
    folder = RunFolder.existing(path)
    if not folder.is_begun:
        raise OutputError(
            f"no run was begun in {path}, it holds {names.EXPERIMENT} alone: start one with "
            f"fedloom run {path / names.EXPERIMENT}"
        )
    with folder.locked(), host_process(workers) as host:
        for place in (folder.path, folder.checkpoints):
            remove_temporary(place)
        begun: Record | None = folder.read_json(names.RUN)
        experiment, start = _experiment_of(folder, begun, experiment_file, assignments, observer)
        _require_same_engine(folder, begun, remote)
        _require_rows(experiment, remote)
        made = MadeWith(objective, data)
        made.require_same(folder.path, begun)
        require_same_plugins(folder.path, begun, experiment)
        log = _log_of(folder)
        trackers = _open_trackers(experiment, folder)
        observer.stage("reading data")
        division = partition_data(experiment, data, objective)
        say_layouts(division.loaded, observer)
        digest = fingerprint(experiment, division, made)
        saved = None
        if folder.checkpoints.is_dir() and any(folder.checkpoints.glob("round-*")):
            saved = checkpoint.load(folder.checkpoints, digest, from_round, fresh_clients)
            _require_records(folder, saved, log)
        _require_same_data(folder, begun, digest)
        store = ClientStore(saved.clients if saved else None)
        laid_out = _laid_out(experiment, begun)
        parts = assemble(
            laid_out,
            division,
            objective=objective,
            store=store,
            stage=observer.stage,
            remote=remote,
            start=start,
            on_step=on_step,
        )
        _require_same_model(folder, begun, parts)
        _report_rows(parts, observer)
        _report_start(experiment, parts.objective, observer)
        _report_versions(begun, observer)
        done = saved.round if saved else -1
        if cut := record_marks.cut_back(folder, saved.records["files"] if saved else {}):
            observer.stage(f"cut off, as these rounds are run again: {', '.join(cut)}")
        task = WorkerTask(laid_out, objective, data, start)
        parts = with_workers(parts, workers, host, task, observer)
        run = _Run(experiment, folder, parts, observer, log, made, trackers, remote, start)
        run.profiled = profile
        run.prepare(done, begun if done >= 0 else None)
        if saved is not None:
            run.presence = _presence_of(saved, parts)
        state = saved.state if saved else first_state(parts.method, parts.initial)
        observer.stage(_where(done, experiment.federation.rounds))
        return run.go(state, done)


def _require_here(workers: Workers, on_step: OnStep | None, profile: bool) -> None:
    """Check that what follows each step is in the process in which clients train.

    Raises:
        SettingsError: It is not.
    """
    if workers != 1 and (on_step is not None or profile):
        asked = "on_step" if on_step is not None else "--profile"
        raise SettingsError(
            [f"{asked} follows steps in this process, and workers are others: leave out workers"],
            "the command",
        )


def _laid_out(experiment: Experiment, begun: Record | None) -> Experiment:
    """Return the experiment with the pass size that the run was started with, on any device."""
    recorded = (begun or {}).get("tokens_per_pass")
    if recorded is None or experiment.training.tokens_per_pass != "auto":
        return experiment
    training = experiment.training.model_copy(update={"tokens_per_pass": recorded})
    return replace(experiment, training=training)


def _presence_of(saved: Checkpoint, parts: RunComponents) -> Presence:
    """Return the presence in a checkpoint."""
    if saved.presence is None:
        return Presence.assumed(parts.engine.membership(), saved.round)
    return Presence.from_table(saved.presence)


def _experiment_of(
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


def _log_of(folder: RunFolder) -> AuditLog:
    """Open the log of a run that is resumed.

    Raises:
        AuditError: It is damaged.
    """
    try:
        return AuditLog(folder.path / audit_log.FILE)
    except AuditError as error:
        raise AuditError(f"{error}; {PUT_BACK}") from None


def _require_records(folder: RunFolder, saved: Checkpoint, log: AuditLog) -> None:
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


def _where(done: int, rounds: int) -> str:
    """Return where a resumed run continues, in words."""
    if done < 0:
        return "starting again from the beginning"
    if done == rounds:
        return f"round {done} was the last: the final files are written again"
    return f"continuing after round {done} of {rounds}"


@dataclass
class _Run:
    """One run: owns its folder, its components and its observer."""

    experiment: Experiment
    folder: RunFolder
    parts: RunComponents
    observer: RunObserver
    audit: AuditLog
    made: MadeWith
    trackers: list[Tracker] = field(default_factory=list)
    remote: RemoteEngine | None = None
    start: Start | None = None
    presence: Presence = NOBODY_YET
    last: tuple[int, State, dict[str, Any], Presence] | None = None
    saved: int = -1
    profiled: bool = False
    profile: Profile | None = None

    def __post_init__(self) -> None:
        """Begin to follow the records."""
        self.admission = Admission()
        self.marks = record_marks.Marks(self.folder)
        lines = self.folder.read_lines(names.COSTS)  # of rounds before a resume
        self.scored = {line["client"] for line in lines if line["phase"] == REFERENCE}
        self.verifier = Verifier(self.experiment, self.parts)
        self.cards = ModelCards(self.experiment, self.parts, self.made.objective)

    def prepare(self, done: int, known: Record | None = None) -> None:
        """Wait for clients on other machines, and write the records known before the next round.

        Args:
            done: The last finished round, -1 before the evaluation of the start.
            known: What ``run.json`` holds, where this run goes on.
        """
        id = known["id"] if known else uuid.uuid4().hex
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
            earlier = audit_log.events(self.audit.path, "began", "undone")
            began = [e for e in earlier if e["event"] == "began" and e.get("run") == id]
            discarded = [e for e in earlier if e["event"] == "undone"]
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
            )
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

    def _for_clients(self, start: Tensors) -> Experiment:
        """Return the experiment as sent to clients: without other members and paths."""
        own = told(self.experiment, self.start, start)
        return replace(own, federation=own.federation.model_copy(update={"members": None}))

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
        record = run_record(self.folder.path, experiment, parts, self.made, id, _name_of(remote))
        record["start"] = start_record(experiment, self.start, parts.objective)
        if remote is not None:
            record["members"] = [
                {"client": client, "number": own.number, "name": own.name}
                for client, own in enumerate(remote.participants)
            ]
        self.folder.write_json(names.RUN, record)

    def _report_heaviest(self, sizes: Mapping[int, int]) -> None:
        """Report the bound on a client's weight, and the clients above it."""
        bound = self.admission.weight_bound(sizes)
        if bound.examples is None:
            return
        self.observer.stage(f"a client weighs at most {bound.examples} examples: {bound.why}")
        for client, registered in bound.cut.items():
            self.observer.warning(
                f"client {client} registered {registered} rows and weighs {bound.examples}: "
                f"{bound.why}"
            )

    def go(self, state: State, done: int) -> Result:
        """Run the remaining rounds, then write the final files."""
        experiment, parts = self.experiment, self.parts
        server = Server(
            method=parts.method,
            engine=parts.engine,
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
        )
        self.observer.begin(_plan(experiment, parts, done))
        if done < 0:
            self.observer.stage(_evaluated_first(parts))
        self.saved = done
        try:
            with self._profiling(server, done) as server:
                state = server.run(state, done)
        except BaseException as error:
            self._keep_last()
            if isinstance(error, KeyboardInterrupt):
                raise self._interrupted() from None
            raise
        finally:
            shutil.rmtree(self.folder.path / "spool", ignore_errors=True)
            self.observer.end()
            for tracker in self.trackers:
                tracker.close()
        return self._finish(state)

    @contextlib.contextmanager
    def _profiling(self, server: Server, done: int) -> Iterator[Server]:
        """Yield the server; where a trace is asked for, one of which everything is noted."""
        if not self.profiled:
            yield server
            return
        from fedloom.runs.profiling import Profile

        self.profile = Profile(self.folder.path / f"trace-{done + 1:04d}.json")
        try:
            with self.profile.recording(server) as watched:
                yield watched
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
        self.last = (record.round, state, self._records(), record.presence)
        every, rounds = self.experiment.output.checkpoint_every, self.experiment.federation.rounds
        if record.round % every == 0 or record.round == rounds:
            self._save(*self.last)

    @cached_property
    def digest(self) -> str:
        """The fingerprint of what shapes the results; it stays the same over a run."""
        return fingerprint(self.experiment, self.parts.division, self.made)

    def _records(self) -> dict[str, Any]:
        """Return what the records are now."""
        return {"files": self.marks.now(), "audit": self.audit.position}

    def _save(self, round: int, state: State, records: dict[str, Any], presence: Presence) -> None:
        store = self.parts.local.store
        profile = self.profile
        with profile.span("checkpoint", round=round) if profile else contextlib.nullcontext():
            checkpoint.save(
                self.folder.checkpoints,
                Checkpoint(round, state, store.flat(), self.digest, records, presence.to_table()),
                store.changed,
            )
        store.changed.clear()
        self.saved = round

    def _keep_last(self) -> None:
        """Save the last finished round, if it was not due; a full disk hides no other error."""
        if self.last is not None and self.last[0] > self.saved:
            try:
                self._save(*self.last)
            except OutputError as error:
                self.observer.warning(f"round {self.last[0]} is not saved: {error}")

    def _interrupted(self) -> Interrupted:
        """Return how to resume the run."""
        what = f"everything up to round {self.saved}" if self.saved >= 0 else "nothing yet"
        return Interrupted(
            f"stopped; {what} is saved. Go on with: fedloom run --resume {self.folder.path}"
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
        )
        rounds = self.experiment.federation.rounds
        joined = self.parts.unseen.evaluate_all(
            state, rounds, self.parts.engine, self.admission, self.audit.record
        )
        if joined:
            summary["newcomers"] = unseen_clients_record(joined, self._primary_metric)
        if self.remote is not None:
            self.remote.end(self._own_models(state))
        summary["records"] = self.marks.now()
        self._write_cards(summary)
        if self.experiment.output.verify:
            self.observer.stage("verifying what was saved")
        summary["verified"] = self.verifier.verify()
        self.folder.write_json(names.SUMMARY, summary)
        written = summary["adapter"]["sha256"] if summary["adapter"] else None
        self.audit.record("ended", adapter=written)
        self.audit.sync()
        return Result(
            self.folder.path,
            summary["after_metrics"],
            summary["before_metrics"],
            adapter,
            summary["totals"],
            summary_text(summary, self._primary_metric, self.folder.path),
        )

    def _write_adapters(self, state: State) -> Path | None:
        """Write the global adapter, and each client's own where they keep one; return the former."""
        shared = self.parts.method.shared(state)
        self.verifier.folders = len(self._owners()) + (shared is not None)
        try:
            if shared is not None:
                self.parts.model.write(shared)
                self.parts.model.save(self.folder.adapter)
                self.verifier.note(self.folder.adapter, self.parts.model)
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
        for client in self._owners():
            model = self.parts.local.resources[client].model
            self.cards.write(self.folder.client(client), model, client, summary)

    def _owners(self) -> list[int]:
        """Return the clients that have something of their own to be judged by."""
        method, store = self.parts.method, self.parts.local.store
        if not (method.own_models or method.personal):
            return []
        return [client for client in self.parts.local.sizes() if store.slots(client)]

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


def _report_start(experiment: Experiment, objective: Objective, observer: RunObserver) -> None:
    """Report the start of a run and its reference model."""
    name = experiment.adapter.start
    if name is not None:
        observer.stage(f"starting from the adapter {named(name)}")
    if objective.needs_reference:
        told = f"the adapter it starts from, {named(name)}"
        observer.stage(
            f"reference: {told if experiment.reference == 'start' else 'the base model'}"
        )


def _report_rows(parts: RunComponents, observer: RunObserver) -> None:
    """Report the account of rows, and warn of what could distort results."""
    for name, own in row_account.sources(parts.accounts.to_record()).items():
        observer.stage(row_account.sentence(name, own))
    for text in parts.accounts.warnings:
        observer.warning(text)


def _open_trackers(experiment: Experiment, folder: RunFolder) -> list[Tracker]:
    return open_trackers(
        experiment.output.trackers, folder.path, experiment.name, experiment.to_table()
    )


@contextlib.contextmanager
def _new_folder(experiment: Experiment) -> Iterator[RunFolder]:
    """Create the run folder, and take its lock.

    Raises:
        OutputError: It holds something already, another run begins there, or it cannot be made.
    """
    chosen, path = experiment.output.folder, free_folder(experiment)
    while True:
        remove_temporary(path, names.EXPERIMENT)  # of a run that was killed before it began
        _require_empty(path, chosen)
        try:
            path.mkdir(parents=True, exist_ok=bool(chosen))
            path.chmod(0o700)  # held-out prompts and answers are in it
            break
        except FileExistsError:  # another run was quicker
            path = free_folder(experiment)
        except OSError as error:
            raise OutputError(
                f"cannot make the run folder {path}: {error.strerror}; choose another output.folder"
            ) from error
    folder = RunFolder(path)
    with folder.locked():
        _require_empty(path, chosen)
        yield folder


def _require_empty(path: Path, chosen: str | None) -> None:
    """Check that nothing is in a folder that was chosen.

    Raises:
        OutputError: Something is.
    """
    if not chosen or not path.exists():
        return
    if not path.is_dir() or any(own.name != names.LOCK for own in path.iterdir()):
        raise OutputError(
            f"output.folder {chosen!r} is not empty: choose another, or go on with "
            f"fedloom run --resume {chosen}"
        )


def require_startable(experiment: Experiment) -> None:
    """Raise mistakes in a run that can be found before its data and model are read.

    Raises:
        OutputError: Its folder holds something already.
        DataError: A data file is not there or cannot be opened, or rows are not where they are needed.
        ModelError: The model's folder is none.
    """
    if experiment.output.folder:
        _require_empty(free_folder(experiment), experiment.output.folder)
    _require_rows(experiment, None)
    require_files(experiment.data)
    for path in (of_server(experiment).model.path, *_models(experiment)):
        require_reachable(path)


def _models(experiment: Experiment) -> set[str]:
    """Return the models of groups of clients."""
    groups = experiment.clients.groups.values()
    return {experiment.model.path, *(group.model for group in groups if group.model)}


def free_folder(experiment: Experiment) -> Path:
    """Return the folder that a run of an experiment goes to: as set, or a new one in ``runs``."""
    path = Path(experiment.output.folder or Path("runs") / experiment.name)
    if experiment.output.folder:
        return path
    number, candidate = 2, path
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate


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


def _name_of(remote: RemoteEngine | None) -> str:
    return SIMULATION if remote is None else remote.name


def _require_rows(experiment: Experiment, remote: RemoteEngine | None) -> None:
    """Check that this engine has the rows where the experiment needs them."""
    if experiment.data.is_private and remote is None:
        raise DataError(
            'data.source = "clients": the rows are on other machines; use --engine flower'
        )
    if remote is not None and METHODS[experiment.method.name][1].pools_data:
        raise DataError(
            f"method.name = {experiment.method.name!r} puts all rows together: run it in one process"
        )


def _require_same_engine(
    folder: RunFolder, run: Record | None, remote: RemoteEngine | None
) -> None:
    """Check that the engine is the same, as it has the client stores."""
    made, now = (run or {}).get("engine"), _name_of(remote)
    if made is not None and made != now:
        raise SettingsError(
            [
                f"{folder.path} was run with --engine {made}; its clients' stores are there, and not "
                f"with {now}: resume it with --engine {made}"
            ],
            "the command",
        )


def _require_same_data(folder: RunFolder, run: Record | None, digest: str) -> None:
    """Check that a run which has no checkpoint is the one that began here.

    Raises:
        CheckpointError: Settings or data have changed since.
    """
    if run is not None and run["fingerprint"] != digest:
        raise CheckpointError(
            f"settings or data have changed since {folder.path} was started (fingerprint "
            f"{run['fingerprint'][:12]}, now {digest[:12]}); start a new run"
        )


def _report_versions(run: Record | None, observer: RunObserver) -> None:
    """Report the versions that differ from those at the start of the run."""
    if run is not None and (others := other_versions(run, versions())):
        observer.warning(
            f"resumed with other versions than the run was begun with: {', '.join(others)}; results may "
            "differ from those of a run without a break"
        )


def _require_same_model(folder: RunFolder, run: Record | None, parts: RunComponents) -> None:
    if run is not None and run["model"]["sha256"] != parts.model_digest:
        raise CheckpointError(
            f"the model {run['model']['name']} has changed since {folder.path} was started "
            f"(SHA-256 {run['model']['sha256'][:12]}, now {parts.model_digest[:12]}); start a new run"
        )


def _plan(experiment: Experiment, parts: RunComponents, done: int) -> Plan:
    federation, sizes = experiment.federation, parts.engine.sizes()
    headline = PRIMARY_METRICS[parts.division.judged]
    trained = sum(p.numel() for p in parts.model.parameters.values())
    absent = parts.engine.absent()
    there = len(sizes)
    everybody = there + len(absent)
    cohort = min(federation.cohort_size, there)
    missing = ", ".join(parts.engine.title(client) for client in sorted(absent))
    of = f"{there} of {everybody} clients, without {missing}" if absent else f"{there} clients"
    objective = type(parts.objective).__name__
    feedback = parts.division.feedback
    pairs = ""
    if feedback is not None and feedback.pairs:
        pairs = (
            f"; {human_count(feedback.pairs)} pairs as single answers, {experiment.partition.feedback}: "
            f"{feedback.intact_share:.2f} of the pairs whole at one client"
        )
    return Plan(
        f"{experiment.name}: {objective} by {experiment.method.name}, {federation.rounds} rounds, "
        f"{cohort} of {of} a round",
        f"model {of_server(experiment).model.path}, {human_count(trained)} trained parameters, "
        f"rows per client {min(sizes.values())} to {max(sizes.values())}, "
        f"{len(parts.division.test)} held out"
        f"{pairs}",
        federation.rounds,
        headline.name,
        headline.higher_is_better,
        {client: parts.engine.title(client) for client in sorted({*sizes, *absent})},
        _work(experiment, parts, sizes) if there == len(parts.local.sizes()) else 0.0,
        _ahead(experiment, parts, sizes, done),
    )


def _ahead(
    experiment: Experiment, parts: RunComponents, sizes: Mapping[int, int], done: int
) -> tuple[RoundWork, ...]:
    """Return what each round does, from the evaluation of the start on, if who is there now stays.

    Of clients elsewhere rows are known and no tokens; a token a row does then.
    """
    federation, training = experiment.federation, experiment.training
    every, scores = experiment.evaluation.every, parts.objective.needs_reference
    participations = federation.rounds * min(federation.cohort_size, len(sizes)) / len(sizes)
    tokens = {
        client: float(row_tokens(parts.local.shares[client]).sum())
        if client in parts.local.shares
        else float(rows)
        for client, rows in sizes.items()
    }
    due = {
        client: training.work(rows, participations).most_tokens(
            rows, tokens[client], training.batch_size
        )
        for client, rows in sizes.items()
    }
    new, found = set(sizes), [RoundWork(0.0)]
    for round in range(1, federation.rounds + 1):
        cohort = draw_cohort(federation, round, tuple(sizes))
        first = new.intersection(cohort) if scores and round > done else set()
        new -= first
        judged = float(round % every == 0 or round == federation.rounds)
        trained = sum(due[client] for client in cohort)
        found.append(RoundWork(trained, sum(tokens[client] for client in first), judged))
    return tuple(found)


TRAINED = 3.0
"""Forward passes that training on a row takes: its own, and a backward one that is twice as long."""


def _work(experiment: Experiment, parts: RunComponents, sizes: Mapping[int, int]) -> float:
    """Return what a round trains, in rows judged at the start; see :class:`Plan`."""
    federation, training = experiment.federation, experiment.training
    judged = len(parts.division.test) + sum(map(len, parts.evaluator.client_held_out.values()))
    participations = federation.rounds * min(federation.cohort_size, len(sizes)) / len(sizes)
    steps = [
        training.work(rows, participations).most_steps(rows, training.batch_size)
        for rows in sizes.values()
    ]
    trained = sum(steps) / len(steps) * training.batch_size
    return TRAINED * trained * min(federation.cohort_size, len(sizes)) / max(1, judged)


def _evaluated_first(parts: RunComponents) -> str:
    """Report the work before the first round, which may take as long as one."""
    clients = parts.evaluator.client_held_out
    own = f", and {sum(map(len, clients.values()))} of {len(clients)} clients" if clients else ""
    return (
        f"evaluating the start, before any training: {len(parts.division.test)} held-out rows{own}"
    )
