"""The resident worker: one process on a client's host that keeps model and rows between messages.

It receives requests from the process that fetches Flower's messages, over a socket that only this user
can open, and from the server over a stream that the worker has opened. Requests have the same form in
both cases: an envelope, answered by an envelope. It carries them out with the engine of simulations, for
its one client.

Its process begins in ``worker_process.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.consent import Approvals, Day
from fedloom.deployment.error_report import ReportedError, Sentence, failing_as, text_for_server
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.gateway_client import GatewayClient, RunIsOver
from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.policy_enforcement import permitted, require_steps
from fedloom.deployment.row_privacy import (
    ClientPrivacy,
    costs_to_report,
    forget_key,
    private_work,
)
from fedloom.deployment.rows import partitioned
from fedloom.deployment.secure_sums import SecureSums, require_stage
from fedloom.engines.in_process import ClientResources
from fedloom.errors import (
    AuditError,
    ConnectionFailed,
    FedloomError,
    MessageError,
    OutputError,
    PolicyError,
    PrivacyError,
    Refusal,
    VerificationError,
)
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import silence_transformers
from fedloom.models.request_limits import Allowance
from fedloom.models.saved_adapter import holds_adapter
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.client_privacy import added_noise
from fedloom.runs.code_digests import plugin_digests
from fedloom.runs.initial_adapter import SENT, Start, digest_of_tensors, own_models
from fedloom.runs.model_cards import ModelCards
from fedloom.runs.records import verified_sentence
from fedloom.runs.verification import Verifier
from fedloom.security.audit_log import FILE, AuditLog, digest_of
from fedloom.security.certificates import issued_key, read_certificate
from fedloom.security.keys import is_signed, read_key, secret_number, sign
from fedloom.storage.checkpoint import KEPT
from fedloom.storage.client_store import ClientStore
from fedloom.storage.files import write_atomically
from fedloom.storage.versioned_client_store import ClientVersions, Version
from fedloom.wire.envelope import (
    LONGEST_HEADER,
    PHASES,
    PROTOCOL,
    Envelope,
    Joined,
    ReplyHeader,
    RequestHeader,
    seal,
)
from fedloom.wire.framing import StreamOver, listen, read_frame, reader, write_frame
from fedloom.wire.messages import Exchange, decode
from fedloom.wire.schema import Schema

LOG = logging.getLogger("fedloom.worker")

PAUSE = 0.5
"""Seconds between attempts to reopen a broken stream."""

START_FILE = "start.safetensors"
"""File in the folder of a run: the start of the run."""

COOLING = 5.0
"""Seconds for which a failure to read rows or model is repeated without reading them again."""

RETURNING = 30.0
"""Seconds of attempts; afterwards the next message opens another stream."""


@dataclass
class Run:
    """A run that this client takes part in, made ready.

    Attributes:
        id: Id of the run.
        client: This client's number in it.
        began: Segment of the run in the latest message (how many times it had been started or resumed).
        experiment: As this client takes part in it.
        parts: Model, rows and handlers, for this client alone.
        kept: The client store on disk.
        every: Rounds between the server's checkpoints.
        secret_noise: Whether noise that hides rows is drawn from the client's key.
        policy: The client's policy when the run was prepared.
        privacy: How its own steps hide its rows.
        sums: Its part in secure aggregation, where the server sees sums alone.
        moment: Segment and round of the store in memory.
        latest: The latest segment and round with a request for work; earlier ones are over.
    """

    id: str
    client: int
    began: int
    experiment: Experiment
    parts: RunComponents
    kept: ClientVersions
    every: int
    secret_noise: bool
    policy: PolicySettings
    privacy: ClientPrivacy
    sums: SecureSums | None = None
    moment: Version | None = None
    latest: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Failed:
    """The refusal of a run and its experiment, and until when it is repeated without a new attempt."""

    asked: tuple[str, str]
    error: FedloomError
    until: float

    def again(self, asked: tuple[str, str]) -> bool:
        return asked == self.asked and time.monotonic() < self.until


class Worker:
    """Answers envelopes."""

    def __init__(self, client_folder: ClientFolder) -> None:
        """Read the client's registration.

        Raises:
            SettingsError: It was not.
        """
        self.client_folder, self.registration = client_folder, client_folder.registration()
        self.key = read_key(Path(self.registration.key))
        authority = self.registration.authority
        self.authority = read_certificate(Path(authority)) if authority else None
        self.log, self.damage = _own_log(client_folder)
        self.run: Run | None = None
        self.day, self.approvals = Day.of(client_folder), Approvals(client_folder)
        self.heard = time.monotonic()
        self._lock = threading.Lock()
        self._last: tuple[str | int, ...] | None = None
        self._reply: Envelope | None = None
        self._streaming: str | None = None
        self._failed: _Failed | None = None

    def answer(self, packed: bytes, *, streamed: bool) -> bytes:
        """Return the packed reply to a packed request; errors are reported in the reply.

        Args:
            packed: The request.
            streamed: Whether it came over a stream, whose server was verified when it was opened.

        Raises:
            MessageError: It is not a request, or not from the server, so there is no reply.
        """
        with self._lock:
            self.heard = time.monotonic()
            envelope = Envelope.unpack(packed)
            header = envelope.read(RequestHeader)
            if not streamed:
                self._require_server(envelope, header)
            # a run that was killed before it began counts its messages anew in the same stretch
            counted = (header.run, len(header.began), header.number)
            asked = (*counted, header.kind, header.round, header.action)
            if (
                asked == self._last and self._reply is not None
            ):  # it did not reach the server completely
                return self._reply.pack()[header.held :]
            reply, payload = self._carried_out(envelope, header)
            signing = None if streamed else partial(sign, self.key)
            self._last, self._reply = asked, seal(reply, payload, signing)
            self.heard = time.monotonic()
            if not streamed and header.streams:
                self._open_stream(self.registration.gateway, header.run)
            return self._reply.pack()

    def largest(self) -> int:
        """Return the largest size of a message in bytes, by the client's current policy."""
        return LONGEST_HEADER + self.client_folder.own_file().policy.max_bytes

    def _require_server(self, envelope: Envelope, header: RequestHeader) -> None:
        """Check that the message is signed by a server of this client's authority."""
        if self.authority is None:
            return
        key = issued_key(header.certificate or "", self.authority)
        if key is None or not is_signed(key, envelope.header, envelope.signature):
            raise MessageError(
                "the message is not signed by a server of your authority; it was ignored"
            )

    def _carried_out(self, envelope: Envelope, header: RequestHeader) -> tuple[ReplyHeader, bytes]:
        reply = ReplyHeader(
            run=header.run,
            began=len(header.began),
            client=header.client,
            round=header.round,
            number=header.number,
        )
        try:
            if self.damage is not None:
                raise self.damage
            run = self._ready(header, envelope.payload)
            if header.kind == "join":
                return reply.model_copy(update={"joined": self._joined(run)}), b""
            if header.kind == "end":
                forget_key(self.client_folder, run.id)
                self._write_model(run, header, envelope.payload)
                return reply, b""
            payload, error = self._exchanged(run, header, envelope.payload)
            costs = run.parts.ledger.take()[-PHASES:]
            said = {"work": costs_to_report(costs, run.experiment), "error": error}
            if payload:
                said["payload"] = digest = digest_of(payload)
                self._note("answered", header, payload, digest)
            return reply.model_copy(update=said), payload
        except Exception as error:  # an error here must not stop the worker
            LOG.info("message %d was not carried out", header.number)
            return reply.model_copy(update={"error": text_for_server(error)}), b""

    def _note(self, event: str, header: RequestHeader, payload: bytes, digest: str) -> None:
        """Record a request or an answer in this client's audit log."""
        if header.kind == "exchange" and self.log is not None:
            where = {"run": header.run, "client": header.client}
            what = {"round": header.round, "action": header.action}
            self.log.record(event, **where, **what, bytes=len(payload), message=digest)

    def _ready(self, header: RequestHeader, payload: bytes) -> Run:
        """Return the run of a message, prepared.

        Raises:
            PolicyError: The client's own file does not allow it.
            ReportedError: Its rows or its model cannot be used, or it is not approved yet.
        """
        if self.run is not None and self.run.id == header.run:
            if header.client != self.run.client:
                raise ReportedError(Sentence.FOREIGN)
            if len(header.began) < self.run.began:
                raise ReportedError(Sentence.RESUMED)
            self.run.began = len(header.began)
            return self.run
        if header.experiment is None:
            raise ReportedError(Sentence.ANEW)
        begun = time.monotonic()
        own, number = self.client_folder.own_file(), header.client
        experiment = permitted(header.experiment, own, number, len(header.classes))
        if number >= experiment.federation.clients:
            raise ReportedError(Sentence.UNFIT)
        if own.policy.approve and not self.approvals.has(header.run, header.experiment):
            self.approvals.ask(header.run, header.experiment, number, len(header.classes))
            raise ReportedError(Sentence.WAITS)
        start = self._start(header, payload, experiment, own.policy)
        self.day.begin_run(header.run, header.experiment, own.policy)
        self.run = None  # one model at a time; a refused run does not affect the current one
        asked = header.run, header.experiment
        if self._failed is not None and self._failed.again(asked):
            raise self._failed.error
        try:
            parts, privacy = self._assembled(header, experiment, own, start)
        except (PolicyError, ReportedError, PrivacyError, OutputError) as error:
            self._failed = _Failed(asked, error, time.monotonic() + COOLING)
            raise
        parts.local.error_text = text_for_server
        parts.local.allowance = _allowance(experiment, own.policy, parts.local.resources[number])
        LOG.info(
            "run %s: ready after %.1f s, backbone loaded from %s",
            header.run[:8],
            time.monotonic() - begun,
            parts.model_path,
        )
        kept = ClientVersions(self.client_folder.run(header.run) / "kept")
        every = experiment.output.checkpoint_every
        secret = own.worker.secret_noise
        segment = len(header.began)
        self.run = Run(
            header.run, number, segment, experiment, parts, kept, every, secret, own.policy, privacy
        )
        if experiment.privacy.secure_aggregation:
            with privacy.failing():
                self.run.sums = self._sums(header, experiment, own.policy)
            parts.local.secure = self.run.sums.clients(experiment.federation.seed)
        return self.run

    def _sums(
        self, header: RequestHeader, experiment: Experiment, policy: PolicySettings
    ) -> SecureSums:
        """Return the client's part in the sums of a run."""
        return SecureSums(
            self.client_folder,
            self.registration.gateway,
            self.key,
            header.run,
            header.client,
            self.registration.number,
            policy,
            added_noise(experiment),
            experiment.privacy.seeded,
            experiment.federation.rounds,
        )

    def _assembled(
        self, header: RequestHeader, experiment: Experiment, own: OwnFile, start: Start | None
    ) -> tuple[RunComponents, ClientPrivacy]:
        """Return a run with this client's rows and model, and how its steps hide its rows.

        Raises:
            PolicyError: It takes more steps, or more of the privacy budget, than the file allows.
            ReportedError: Rows or model cannot be used.
        """
        number = header.client
        with failing_as(Sentence.READING):
            division = partitioned(experiment, own, number, tuple(header.classes))
        require_steps(experiment, own, len(division.train[number]))
        privacy = ClientPrivacy(self.client_folder, header, experiment, own)
        with failing_as(Sentence.LOADING), privacy.failing():
            parts = assemble(
                experiment,
                division,
                only=number,
                stage=LOG.info,
                start=start,
                noise=privacy.noise,
            )
        privacy.keep_ledger(parts, number, self.registration.gateway)
        return parts, privacy

    def _start(
        self, header: RequestHeader, payload: bytes, experiment: Experiment, policy: PolicySettings
    ) -> Start | None:
        """Return the start of the run, as sent now or before, with this client's own model.

        Raises:
            PolicyError: It is larger than the policy allows.
            ReportedError: It has not been sent yet, or is not what the experiment names.
        """
        match = SENT.fullmatch(experiment.adapter.start or "")
        if match is None:
            return None
        digest, earlier = match.groups()
        file = self.client_folder.run(header.run) / START_FILE
        if header.kind == "join" and header.request is not None:
            shared = decode(payload, _schemas(header, policy)[0]).tensors
            if digest_of_tensors(shared) != digest:
                raise ReportedError(Sentence.UNFIT)
            write_atomically(file, safetensors.torch.save(shared))
        try:
            shared = safetensors.torch.load_file(file)
        except (OSError, SafetensorError):
            raise ReportedError(Sentence.START) from None
        if digest_of_tensors(shared) != digest:
            raise ReportedError(Sentence.START)
        own = {}
        if earlier is not None and own_models(experiment):
            folder = self.client_folder.run(earlier) / "model"
            own = {header.client: folder} if holds_adapter(folder) else {}
        return Start(match[0], shared or None, own)

    def _joined(self, run: Run) -> Joined:
        parts, number = run.parts, run.client
        return Joined(
            rows=parts.local.rows(number),
            held_out=len(parts.division.held_out.get(number, [])),
            model=parts.model_digest,
            version=version("fedloom"),
            protocol=PROTOCOL,
            plugins=plugin_digests(run.experiment),
            private=private_work(parts.row_privacies.get(number)),
            signing=run.sums.signing() if run.sums is not None else None,
        )

    def _exchanged(self, run: Run, header: RequestHeader, data: bytes) -> tuple[bytes, str | None]:
        number, engine = run.client, run.parts.local
        request, reply = _schemas(header, run.policy)
        masking = run.sums.masking(header) if run.sums is not None else None
        stage = require_stage(header.action, engine.handlers, masking)
        moment = (len(header.began), header.round)
        if moment < run.latest:
            raise ReportedError(Sentence.UNFIT)
        run.latest = moment
        going_on = engine.under_way(number, header.round)
        asked = (
            f"{header.action} {masking.number}" if stage and masking is not None else header.action
        )
        if run.sums is not None and masking is not None and not stage:
            begun = engine.secure is not None and engine.secure.under_way(number)
            run.sums.require_first_sum(header, masking, begun=begun)
        self.day.begin_work((run.id, *moment), asked, run.policy, going_on=going_on)
        self._note("asked", header, data, header.payload)  # at most as often as the policy allows
        self._remember(run, header, header.round)
        if not stage:
            if run.secret_noise:  # the same for the same request, and for no other
                engine.noise_seed = secret_number(self.key, run.id, header.payload)
            run.privacy.begin_request(header, engine.store, number, going_on=going_on)
        exchange = Exchange(header.action, header.round, request, reply, {number: data})
        if run.sums is not None and masking is not None:
            exchange = run.sums.joined(exchange, masking, header, engine, self._trusted)
        (answer,) = engine.exchange(exchange)
        engine.finish_round()
        if number in engine.store.changed:
            oldest = header.round - (KEPT + 1) * run.every
            now = Version(len(header.began), header.round, header.number)
            kept, repeated = engine.store.flat().get(number, {}), run.parts.method.asynchronous
            run.kept.put(now, kept, oldest=oldest, repeated=repeated)
            engine.store.changed.clear()
        return answer.data or b"", answer.error

    def _trusted(self, **facts: object) -> None:
        """Record keys of other clients that are trusted at their first use."""
        LOG.info("trusted at their first use: %s", facts["keys"])
        if self.log is not None:
            self.log.record("trusted", **facts)

    def _remember(self, run: Run, header: RequestHeader, round: int) -> None:
        """Load the client store as it was before this message, without discarded versions.

        Versions of this same message, from a worker that died before it answered, are not used.
        """
        segment = len(header.began)
        now = Version(segment, round)
        if run.moment == now and not header.undone:
            return
        discarded = {(began, number) for began, number in header.undone} | {
            (segment, header.number)
        }
        known = run.kept.latest(header.began, round, discarded)
        store = ClientStore({run.client: known[1]} if known is not None else None)
        if run.moment == now:
            run.parts.local.store = store
        else:
            run.parts.local.restart(store)
        run.moment = now

    def _write_model(self, run: Run, header: RequestHeader, data: bytes) -> None:
        """Write this client's model into its folder, if it has personal parts."""
        if header.request is None:
            return
        engine, folder = run.parts.local, self.client_folder.run(header.run) / "model"
        self._remember(run, header, run.parts.evaluator.rounds)
        payload = decode(data, _schemas(header, run.policy)[0])
        client = engine.client(run.client, run.parts.evaluator.rounds)
        run.parts.method.load(client, payload)
        client.model.save(folder)
        verifier = Verifier(run.experiment, run.parts)
        verifier.note(folder, client.model, run.client)
        ModelCards(run.experiment, run.parts).write(folder, client.model, run.client)
        LOG.info("run %s: own model written to %s", header.run[:8], folder)
        about = {"run": header.run, "client": run.client}
        try:
            outcome = verifier.verify()
        except VerificationError as error:
            if self.log is not None:
                self.log.record("differs", **about, reason=str(error))
            raise
        LOG.info("run %s: %s", header.run[:8], verified_sentence(outcome))
        if self.log is not None:
            self.log.record("verified", **about, **outcome)

    def _open_stream(self, address: str, run: str) -> None:
        if self._streaming == run:
            return
        self._streaming = run
        threading.Thread(target=self._stream, args=(address, run), daemon=True).start()

    def _stream(self, address: str, run: str) -> None:
        """Answer requests over a stream, and reopen it where it breaks.

        Where the server ends it, or it cannot be opened for a while, the next message opens another.
        """
        authority = self.registration.authority
        content = Path(authority).read_bytes() if authority else None
        gateway, until = GatewayClient(address, self.key, content, self.client_folder.id), math.inf
        while time.monotonic() < until:
            try:
                with gateway.stream(run) as (read, send), self._answering(send) as put:
                    LOG.info("run %s: stream to %s", run[:8], address)
                    while (message := read_frame(read, self.largest)) is not None:
                        until = math.inf
                        put(message)
                raise ConnectionFailed("it ended")
            except (RunIsOver, StreamOver):
                break
            except ConnectionFailed as error:
                until = min(until, time.monotonic() + RETURNING)
                LOG.info("run %s: stream broke: %s", run[:8], error)
                time.sleep(PAUSE)
            except (FedloomError, OSError) as error:
                LOG.info("run %s: stream ended: %s", run[:8], error)
                break
            except Exception:
                LOG.exception("run %s: stream failed", run[:8])
                break
        if self._streaming == run:  # and not the stream of another run
            self._streaming = None

    @contextlib.contextmanager
    def _answering(self, send: Callable[[bytes], None]) -> Iterator[Callable[[bytes], None]]:
        """Yield a function that queues messages of a stream, which are answered one after the other.

        They are answered by a thread, so that the reading thread notices a broken stream at once and
        opens another during the work; the server repeats its request over that one.
        """
        messages: queue.Queue[bytes | None] = queue.Queue(maxsize=1)

        over = threading.Event()

        def put(message: bytes) -> None:
            try:
                messages.put_nowait(message)
            except queue.Full:
                raise MessageError(
                    "another message arrived while one waits; no fedloom server sends that"
                ) from None

        def answer_all() -> None:
            while not over.is_set() and (message := messages.get()) is not None:
                try:
                    send(self.answer(message, streamed=True))
                except OSError:  # it broke: the request is repeated over another stream
                    return
                except Exception:
                    LOG.exception("a message of a stream cannot be answered")
                    with contextlib.suppress(OSError):
                        send(b"")

        threading.Thread(target=answer_all, daemon=True).start()
        try:
            yield put
        finally:
            with contextlib.suppress(queue.Full):
                messages.put_nowait(None)
            over.set()

    @property
    def busy(self) -> bool:
        """Whether work is in progress, or may arrive over a stream."""
        return self._lock.locked() or self._streaming is not None


def _schemas(header: RequestHeader, policy: PolicySettings) -> tuple[Schema, Schema]:
    """Return the schemas of a request and its reply, once neither is larger than the policy allows.

    Raises:
        MessageError: One is none.
        PolicyError: One is too large; nothing of that size has been allocated.
    """
    nothing = Schema().to_table()
    request, reply = (Schema.from_table(own or nothing) for own in (header.request, header.reply))
    for schema in (request, reply):
        if schema.max_bytes > policy.max_bytes:
            reason = f"{schema.max_bytes} bytes, {policy.max_bytes} are allowed"
            raise PolicyError(Refusal("policy.max_bytes", reason))
    if request.codec_groups:  # changes are bytes within it; what they decode to is checked first
        raise MessageError("the schema of a request names a codec: its own tensors have none")
    return request, reply


def _allowance(experiment: Experiment, policy: PolicySettings, own: ClientResources) -> Allowance:
    """Return the bound on the work of one request; feddpa has two adapters of the largest rank."""
    numbers = sum(tensor.numel() for tensor in own.initial.values())
    larger = max(1.0, policy.max_rank / experiment.adapter.rank)
    return Allowance(policy.max_steps, policy.max_seconds, 2 * larger * numbers)


def _own_log(client_folder: ClientFolder) -> tuple[AuditLog | None, AuditError | None]:
    """Return the client's audit log, or the error that every message is then answered with."""
    try:
        return AuditLog(client_folder.path / FILE), None
    except AuditError as error:
        LOG.error("%s", error)
        return None, error


def serve(worker: Worker, client_folder: ClientFolder, idle: float) -> None:
    """Answer at the folder's socket until there was no request for ``idle`` seconds."""
    with listen(client_folder.socket) as listening:
        listening.settimeout(1.0)
        LOG.info("worker %d listens for client %d", os.getpid(), worker.registration.number)
        while worker.busy or time.monotonic() - worker.heard < idle:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            worker.heard = time.monotonic()
            connection.settimeout(None)
            threading.Thread(target=_serve, args=(worker, connection), daemon=True).start()
    LOG.info("worker %d ends: no request for %g seconds", os.getpid(), idle)


def _serve(worker: Worker, connection: socket.socket) -> None:
    with connection:
        try:
            message = read_frame(reader(connection), worker.largest)
            if message is not None:
                write_frame(connection, worker.answer(message, streamed=False))
        except (FedloomError, OSError) as error:
            LOG.warning("a message was not answered: %s", error)


def run(path: Path) -> int:
    """Serve the client's folder at ``path`` until idle; return the process's exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    silence_transformers()
    client_folder = ClientFolder(path)
    try:
        serve(Worker(client_folder), client_folder, client_folder.own_file().worker.idle)
    except FedloomError as error:
        LOG.error("%s", error)
        return error.exit_code
    return 0
