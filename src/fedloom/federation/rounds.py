"""LOOP 1: the rounds. There is no other loop of rounds.

Sample a cohort, run the method's exchanges, check the answers, evaluate, record, save. It knows neither
the algorithm nor where clients run; evaluation and saving are passed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloom.accounting.ledger import Ledger
from fedloom.errors import OutputError, RoundFailed
from fedloom.federation.admission import Admission
from fedloom.federation.asynchronous import Arrivals
from fedloom.federation.best_round import BestRound
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.contract import begin, require_exchange, require_state
from fedloom.federation.engine import Engine
from fedloom.federation.participants import FederationSettings
from fedloom.federation.presence import NOBODY_YET, Presence
from fedloom.federation.protocol import Cohort, Method, Replies, Round, SummedReplies
from fedloom.federation.records import (
    Absence,
    ArrivalRecord,
    Evaluation,
    Observer,
    RoundRecord,
    SimulatedTime,
)
from fedloom.federation.secure_exchange import PROTOCOL, SecureAggregation
from fedloom.federation.selection import (
    Selection,
    Uniform,
    UniformSettings,
    draw,
    draw_candidates,
)
from fedloom.federation.selection_contract import Observation, Told
from fedloom.federation.streaming_mean import EXAMPLES, StreamingMean
from fedloom.privacy.private_mean import AccountedMean
from fedloom.security.audit_log import Record, no_op_recorder
from fedloom.tensors import State
from fedloom.wire.messages import Answer, Exchange, Payload, StoredTensors, encode
from fedloom.wire.schema import LOSS, NumberSpec

STREAM_ABOVE = 128 << 20
"""Bytes of an exchange's answers above which each is added and let go of, if means are all it takes."""

MOST_EMPTY = 10
"""Rounds in a row in which nobody is asked as all clients are in quarantine, before the run ends."""

DISK_BUFFER_ABOVE = 512 << 20
"""Bytes of an exchange's answers above which they are buffered on disk."""


@dataclass(frozen=True)
class Server:
    """Everything the loop of rounds needs.

    Attributes:
        method: The algorithm.
        engine: Where clients run.
        federation: Rounds, cohort size, seed and quorum.
        learning_rate: Round to learning rate.
        evaluate: State and round to held-out metrics, or ``None`` in rounds that do not evaluate.
        finish: Called with each record and the state after it: writes record and checkpoint.
        ledger: Collects the costs of clients and server.
        observer: Observer of the run.
        admission: Checks answers and counts violations.
        audit: Audit log of every message that is sent, accepted or refused.
        disk_buffer: Folder for answers that together are too large for memory.
        reported: Names and ranges of what clients report of a training.
        presence: Presence in earlier rounds.
        clock: The simulated clock, where clients have simulated devices; or, of an asynchronous method,
            the order of real or recorded arrivals.
        selection: Draws the clients of each round.
        losses: State, round, clients and most rows of each to the exchange in which they are asked what
            their rows lose, where the selection has clients asked.
        measured: Whether a selection is told how long clients took by this machine's clock, where there
            is no simulated one.
        private: Takes means under client-level privacy; with it, what clients and the method report of
            a round stays out of the records.
        secure: Has replies summed of which the server sees none, where that is asked for.
        compression: Has tensors compressed on their way, where that is asked for.
        best: The best round so far, and when no later one is waited for, where that is asked for.
        means_alone: Whether the method needs the means of replies and no single one.
    """

    method: Method
    engine: Engine
    federation: FederationSettings
    learning_rate: Callable[[int], float]
    evaluate: Callable[[State, int], Evaluation | None]
    finish: Callable[[RoundRecord, State], None]
    ledger: Ledger
    observer: Observer
    admission: Admission = field(default_factory=Admission)
    audit: Record = no_op_recorder
    disk_buffer: Path | None = None
    reported: tuple[NumberSpec, ...] = (LOSS,)
    presence: Presence = NOBODY_YET
    clock: Arrivals | None = None
    selection: Selection = field(default_factory=lambda: Uniform(UniformSettings()))
    losses: Callable[[State, int, Collection[int], int], Exchange] | None = None
    measured: bool = False
    private: AccountedMean | None = None
    secure: SecureAggregation | None = None
    compression: Compression | None = None
    best: BestRound | None = None
    means_alone: bool = False

    def run(self, state: State, done: int = -1) -> State:
        """Run all rounds after round ``done`` and return the last state.

        Args:
            state: The state after round ``done``.
            done: Last finished round; -1 evaluates the start as round 0 first.

        Raises:
            RoundFailed: Fewer clients than the quorum gave a usable answer; the state of the round
                before has been saved.
        """
        if done < 0:
            start = time.perf_counter()
            evaluation = self.evaluate(state, 0)
            violations = self.admission.close(0)
            self._finish(RoundRecord(0, offences=violations, evaluation=evaluation), state, start)
        absent: Mapping[int, Absence] = {}
        presence = self.presence
        for round in range(max(done, 0) + 1, self.federation.rounds + 1):
            if self.best is not None and self.best.over:
                break
            start = time.perf_counter()
            state, record = self._played(round, state, presence, absent)
            presence, absent = record.presence, record.absent
            self._finish(record, state, start)
        return state

    def _played(
        self, round: int, state: State, before: Presence, gone: Mapping[int, Absence]
    ) -> tuple[State, RoundRecord]:
        """Play one round; return the next state, and what is known of the round.

        Args:
            round: From 1.
            state: After the round before.
            before: Presence in the rounds before.
            gone: Who was absent in the round before.
        """
        paused = self.admission.paused(round)
        presence = self._present(round, paused, before)
        if self._passes(round, presence):
            return state, self._passed(round, state, presence, gone)
        asked = _Asked()
        cohort = self._cohort(round, presence, state, asked)
        self._report_quarantined(round, paused)
        absent = self._report_absent(round, gone)
        exchanges = _RoundExchanges(self, cohort, asked.seconds)
        state, cohort = exchanges.run(state), exchanges.cohort
        drawn = self._observed(exchanges, asked.told)
        shown = self.private is None
        if self.private is not None and state.tensors:
            self.private.require_released(round)
        for text in cohort.warnings:
            self.observer.warning(text)
        presence = presence.closed(
            round, exchanges.answered - exchanges.rejected.keys(), exchanges.rejected
        )
        evaluation = self.evaluate(state, round)
        weighed = dict(sorted(self.admission.weighed.items()))
        train: dict[str, float] = {}
        if shown:
            train = _mean(exchanges.metrics, exchanges.examples) | exchanges.summed | cohort.notes
        return state, RoundRecord(
            round,
            cohort.clients,
            dict(sorted(exchanges.rejected.items())),
            self.admission.close(round),
            paused,
            weighed,
            exchanges.replaced,
            absent,
            cohort.learning_rate,
            train,
            dict(sorted(exchanges.metrics.items())) if shown else {},
            evaluation,
            details={**cohort.details, **drawn} if shown else {},
            presence=presence,
            wire=self.compression.record() if self.compression is not None else {},
        )

    def _passes(self, round: int, presence: Presence) -> bool:
        """Return whether nobody is asked in a round, as all are in quarantine and one is back soon.

        With client-level privacy every round releases noise: none passes.
        """
        if presence.available or not presence.suspended or self.private is not None:
            return False
        return min(presence.suspended.values()) - round < MOST_EMPTY

    def _passed(
        self, round: int, state: State, presence: Presence, gone: Mapping[int, Absence]
    ) -> RoundRecord:
        """Return the record of a round in which nobody is asked and the state stays as it is."""
        self._report_quarantined(round, presence.suspended)
        absent = self._report_absent(round, gone)
        back = min(presence.suspended.values()) + 1
        self.observer.warning(
            f"round {round}: all clients are in quarantine: nobody is asked before round {back}"
        )
        evaluation = self.evaluate(state, round)
        return RoundRecord(
            round,
            offences=self.admission.close(round),
            paused=presence.suspended,
            absent=absent,
            learning_rate=self.learning_rate(round),
            evaluation=evaluation,
            presence=presence.closed(round, set(), {}),
            wire=self.compression.record() if self.compression is not None else {},
        )

    def _finish(self, record: RoundRecord, state: State, start: float) -> None:
        costs = tuple(self.ledger.take())
        seconds = time.perf_counter() - start
        closed = self.clock.close() if self.clock is not None else None
        record = replace(
            record,
            costs=costs,
            seconds=seconds,
            simulated=closed if isinstance(closed, SimulatedTime) else None,
            arrivals=closed if isinstance(closed, ArrivalRecord) else None,
        )
        if self.best is not None:
            found = record.evaluation
            self.best.see(record.round, None if found is None else found.metrics, state)
        self.finish(record, state)
        self.observer.round_done(record)

    def _report_quarantined(self, round: int, paused: Mapping[int, int]) -> None:
        """Warn about each client whose quarantine starts in this round."""
        before = self.admission.paused(round - 1)
        for client, until in sorted(paused.items()):
            if before.get(client) != until:
                self.observer.warning(
                    f"{self.engine.title(client)} is in quarantine until round {until}: "
                    f"violations in {self.admission.settings.offences} rounds (admission.offences)"
                )
        self.admission.watch.quarantined(self.admission.run or "", round, paused)

    def _report_absent(self, round: int, before: Mapping[int, Absence]) -> Mapping[int, Absence]:
        """Return the absent clients of a round; warn about each change of presence."""
        absent = self.engine.absent()
        for client, own in sorted(absent.items()):
            if client not in before or before[client].reason != own.reason:
                self.observer.warning(
                    f"round {round} begins without {self.engine.title(client)}: {own.reason}"
                )
        for client in sorted(before.keys() - absent.keys()):
            self.observer.warning(f"{self.engine.title(client)} is back in round {round}")
        return absent

    def _present(self, round: int, paused: Mapping[int, int], before: Presence) -> Presence:
        """Return the presence at the start of a round; the engine may first wait for a quorum."""
        reachable = self.engine.sizes()
        if self.clock is not None:
            reachable = self.clock.begin(round, reachable)
        return before.begun(round, self.engine.membership(), reachable, paused)

    def _cohort(self, round: int, presence: Presence, state: State, asked: _Asked) -> Cohort:
        federation, selection, bounded = self.federation, self.selection, self.bounded(presence)
        if not presence.available:
            raise RoundFailed(
                f"round {round}: all clients are in quarantine for repeated violations ("
                f"admission.offences = {self.admission.settings.offences}) for more than {MOST_EMPTY} "
                f"rounds, or under client-level privacy: {sorted(presence.suspended)}"
            )
        if selection.asks == "candidates":
            candidates = draw_candidates(
                selection, bounded, federation.drawn, federation.seed, round
            )
            self._ask_losses(round, presence, state, candidates, asked)
        selection.begin(round, asked.told)
        clients = draw(selection, bounded, federation.drawn, federation.seed, round)
        if selection.asks == "drawn":
            self._ask_losses(round, presence, state, clients, asked)
        last = round == federation.rounds
        return Cohort(
            round, clients, presence, self.learning_rate(round), last=last, reported=self.reported
        )

    def bounded(self, presence: Presence) -> Presence:
        """Return the presence with no client's rows above the bound of its weight, for draws by rows."""
        most = self.admission.weight_bound(presence.rows).examples
        if most is None:
            return presence
        return replace(presence, rows={own: min(n, most) for own, n in presence.rows.items()})

    def _ask_losses(
        self,
        round: int,
        presence: Presence,
        state: State,
        clients: Collection[int],
        asked: _Asked,
    ) -> None:
        """Ask clients what their rows lose; one that gives no answer can take part in the round."""
        if self.losses is None or not clients:
            return
        exchange = self.losses(state, round, clients, self.selection.rows)
        answers: Iterable[Answer] = self.answers(exchange, asked.seconds)
        if self.clock is not None:
            answers = self.clock.timed(exchange, answers, self.ledger, preliminary=True)
        replies, rejected = self.admission.accept(
            answers, exchange, presence.rows, audit=self.audit
        )
        self.engine.discard(rejected.keys())
        for client, reason in sorted(rejected.items()):
            title = self.engine.title(client)
            self.observer.warning(
                f"round {round}: {title} did not say what its rows lose: {reason}"
            )
        asked.told.update((reply.client, Told.of(reply.payload.numbers)) for reply in replies)

    def answers(self, exchange: Exchange, seconds: dict[int, float]) -> Iterator[Answer]:
        """Pass answers on as they arrive, and note how long each took, where that is asked for."""
        begin = time.perf_counter()
        for answer in self.engine.exchange(exchange):
            if self.measured:
                took = time.perf_counter() - begin
                seconds[answer.client] = seconds.get(answer.client, 0.0) + took
            yield answer

    def _observed(self, exchanges: _RoundExchanges, told: Mapping[int, Told]) -> dict[str, Any]:
        """Tell the selection of a round; return what the record says of its draw."""
        if not self.selection.informed:
            return {}
        cohort = exchanges.cohort
        seconds = self.clock.seconds if self.clock is not None else exchanges.seconds
        rows, counted = cohort.presence.rows, exchanges.answered - exchanges.rejected.keys()
        most = self.admission.weight_bound(rows).examples
        observed = {
            client: Observation(
                client in counted,
                rows[client] if most is None else min(rows[client], most),
                told.get(client),
                exchanges.metrics.get(client, {}).get("loss"),
                seconds.get(client),
            )
            for client in sorted({*cohort.clients, *exchanges.replaced})
        }
        self.selection.observe(cohort.round, observed)
        return self.selection.details(cohort.round, observed)


@dataclass
class _Asked:
    """What a selection learns of a round's clients: what they told, and seconds by this machine."""

    told: dict[int, Told] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)


class _RoundExchanges:
    """The exchanges of one round: drives the method's generator and collects the results."""

    def __init__(self, server: Server, cohort: Cohort, seconds: dict[int, float]) -> None:
        self.server, self.cohort, self.seconds = server, cohort, seconds
        self.rejected = cohort.rejected
        self.told: set[int] = set()
        self.replaced: tuple[int, ...] = ()
        self.metrics: dict[int, dict[str, float]] = {}
        self.examples: dict[int, float] = {}
        self.answered: set[int] = set()
        self.summed: dict[str, float] = {}
        self.sums = 0

    def run(self, state: State) -> State:
        method = self.server.method
        steps, exchange = begin(method, state, self.cohort)
        replies = self._replies(exchange, last=not self.server.federation.replacements)
        if self.server.federation.replacements:
            steps, replies = self._with_replacements(state, steps, exchange, replies)
        while True:
            try:
                exchange = require_exchange(method, steps.send(replies))
            except StopIteration as stop:
                self._report_progress()
                self._require_quorum()
                return require_state(method, stop.value, "round(state, cohort)")
            replies = self._replies(exchange)

    def _with_replacements(
        self, state: State, steps: Round, exchange: Exchange, replies: Replies
    ) -> tuple[Round, Replies]:
        """Draw replacements for clients without a usable answer, and send them the round's first request.

        The round starts again with them in the cohort. The other clients need not repeat their work if
        their requests are the same bytes; if they are not, the round continues without replacements.
        """
        federation, cohort = self.server.federation, self.cohort
        lost = sorted(self.rejected.keys() & set(cohort.clients))
        free = self.server.bounded(cohort.presence)
        free = free.without(cohort.clients) if lost else free
        count = min(len(lost), len(free.available), federation.replacements)
        if count:
            drawn = draw(
                self.server.selection, free, count, federation.seed, cohort.round, "replacement"
            )
            kept = [client for client in cohort.clients if client not in lost[:count]]
            other = replace(
                cohort, clients=tuple(sorted([*kept, *drawn])), notes={}, details={}, warnings=[]
            )
            again, first = begin(self.server.method, state, other)
            new = {c: data for c, data in first.requests.items() if c not in exchange.requests}
            if _goes_on(exchange, first, replies, new.keys() <= set(drawn)):
                self.cohort, self.replaced = other, tuple(lost[:count])
                if new:
                    replies += self._replies(replace(first, requests=new), last=False)
                steps = again
            else:
                again.close()
        self._require_quorum()
        return steps, Replies(sorted(replies, key=lambda reply: reply.client), self.rejected)

    def _replies(self, exchange: Exchange, *, last: bool = True) -> Replies:
        """Return the usable replies; unless replacements may still be drawn, they must reach the quorum.

        Clients in quarantine are not asked, even where a method asks all clients.
        """
        exchange = self.server.admission.without_paused(exchange)
        if self.server.secure is not None:
            return self._sum(self.server.secure, exchange)
        compression = self.server.compression
        if compression is not None:
            exchange = compression.carried(exchange)
        exchange, answers, staleness = self._carried(exchange)
        keep, streamed = self._keeping(exchange), None
        if self._streams(exchange):
            streamed = StreamingMean(exchange.plain or exchange, keep)
            answers, keep = streamed.settling(answers), streamed.keep
        replies, rejected = self.server.admission.accept(
            answers, exchange, self.cohort.presence.rows, keep, self.server.audit, staleness
        )
        replies = [replace(own, staleness=staleness.get(own.client, 0)) for own in replies]
        self.rejected.update(rejected)
        self.answered.update(reply.client for reply in replies)
        self.server.engine.discard(rejected.keys())
        if compression is not None:
            compression.settle(exchange, replies)
        self._report_progress()
        if last:
            self._require_quorum()
        for reply in replies:
            self.metrics.setdefault(reply.client, {}).update(reply.payload.metrics)
            if "examples" in reply.payload.numbers or reply.client not in self.examples:
                self.examples[reply.client] = reply.payload.numbers.get("examples", 1.0)
        return (
            Replies(replies, rejected) if streamed is None else streamed.replies(replies, rejected)
        )

    def _streams(self, exchange: Exchange) -> bool:
        """Return whether replies are added as they come and let go of.

        Where another client may still be drawn for one that is lost, or it is measured which codec serves
        best, all are kept until they have come.
        """
        server, schema = self.server, (exchange.plain or exchange).reply_schema
        measured = server.compression is not None and server.compression.choice is not None
        waits = server.federation.replacements or measured
        size = len(exchange.requests) * schema.max_bytes
        weighed = any(spec.name == EXAMPLES for spec in schema.numbers)
        return server.means_alone and weighed and not waits and size > STREAM_ABOVE

    def _sum(self, secure: SecureAggregation, exchange: Exchange) -> Replies:
        """Return the sum of the replies to an exchange, which is carried in stages."""
        admission, rows = self.server.admission, self.cohort.presence.rows
        largest = admission.weight_bound(rows).examples
        signers = self.server.engine.signing_keys()
        stages = secure.stages(exchange, self.sums, rows, largest, signers)
        self.sums += 1
        counted = False  # once the sum has a reply, it counts, whether or not its client goes on
        stage = next(stages)
        while True:
            answers = self._arriving(stage)
            _, left_out = admission.accept(answers, stage, rows, _none_of_it, self.server.audit)
            if not counted:
                self.rejected.update(left_out)
                self.server.engine.discard(left_out.keys())
            counted = counted or stage.action not in PROTOCOL
            self._report_progress()
            try:
                stage = stages.send(left_out)
            except StopIteration as stop:
                total = stop.value
                break
        self._require_quorum()
        self.answered.update(total.clients)
        self.summed |= {**total.metrics, "cut_off": total.cut}
        return SummedReplies(total, self.rejected)

    def _carried(self, exchange: Exchange) -> tuple[Exchange, Iterable[Answer], dict[int, int]]:
        """Return an exchange as it is carried, its answers, and their staleness where it is not 0.

        Of a buffered exchange the clients whose answers arrive become the cohort.
        """
        clock, ledger = self.server.clock, self.server.ledger
        if exchange.buffered is None:
            answers = self._arriving(exchange)
            return exchange, clock.timed(exchange, answers, ledger) if clock else answers, {}
        if clock is None:
            raise RoundFailed(
                f"round {exchange.round}: nothing decides in which order the answers of an asynchronous "
                "round count: its method must declare asynchronous = True"
            )
        arrived = clock.arrivals(exchange, self._arriving, ledger)
        requests = {own.client: own.request for own in arrived}
        self.cohort = replace(self.cohort, clients=tuple(sorted(requests)))
        staleness = {own.client: exchange.round - own.round for own in arrived}
        plain = exchange.plain
        if (
            plain is not None and plain.requests
        ):  # all are sent alike; who arrives may be away by now
            alike = next(iter(plain.requests.values()))
            plain = replace(plain, requests=dict.fromkeys(requests, alike))
        exchange = replace(exchange, requests=requests, buffered=None, plain=plain)
        return exchange, [own.answer for own in arrived], staleness

    def _arriving(self, exchange: Exchange) -> Iterator[Answer]:
        """Pass answers on as they arrive, and notify the observer."""
        asked = len(exchange.requests)
        for done, answer in enumerate(self.server.answers(exchange, self.seconds), 1):
            if exchange.action not in PROTOCOL:
                self.server.observer.client_done(exchange.round, answer.client, done, asked)
            yield answer

    def _keeping(self, exchange: Exchange) -> Callable[[int, Payload], Payload]:
        """Return a function that stores payloads until all have arrived: on disk if they are large."""
        schema, folder = (exchange.plain or exchange).reply_schema, self.server.disk_buffer
        if folder is None or len(exchange.requests) * schema.max_bytes <= DISK_BUFFER_ABOVE:
            return lambda client, payload: payload

        def put_away(client: int, payload: Payload) -> Payload:
            path = folder / f"{client:06d}"
            try:
                path.write_bytes(encode(replace(payload, metrics={}), schema))
            except OSError as error:
                raise OutputError(f"cannot write {path}: {error.strerror}") from error
            return replace(payload, tensors=StoredTensors(path, schema))

        folder.mkdir(parents=True, exist_ok=True)
        return put_away

    def _report_progress(self) -> None:
        """Warn once about each client that was left out."""
        for client in sorted(self.rejected.keys() - self.told):
            title, reason = self.server.engine.title(client), self.rejected[client]
            self.server.observer.warning(f"round {self.cohort.round}: {title} left out: {reason}")
        self.told |= self.rejected.keys()

    def _require_quorum(self) -> None:
        """Check the quorum over all clients of the round that are not left out so far."""
        asked, federation = len(self.cohort.clients), self.server.federation
        if self.server.private is not None:
            return  # whether a round counts must not hang on one client; without any it is noise alone
        usable = asked - len(self.rejected.keys() & set(self.cohort.clients))
        expected = asked - federation.extra if asked > federation.cohort_size else asked
        needed = max(1, math.ceil(federation.quorum * expected))
        if usable < needed:
            title, alike = self.server.engine.title, dict[str, list[str]]()
            for client, why in sorted(self.rejected.items()):
                alike.setdefault(why, []).append(title(client))
            reasons = "; ".join(f"{', '.join(who)}: {why}" for why, who in alike.items())
            raise RoundFailed(
                f"round {self.cohort.round}: {usable} of {asked} clients gave a usable answer, "
                f"federation.quorum asks for {needed}. {reasons}"
            )


def _none_of_it(client: int, payload: Payload) -> Payload:
    """Return a payload of nothing: a masked answer has been added to the sum, and is let go of."""
    return Payload()


def _goes_on(exchange: Exchange, first: Exchange, replies: Replies, only_drawn: bool) -> bool:
    """Return whether a restarted round sends the clients that have answered the same requests.

    Args:
        exchange: First exchange of the round before.
        first: First exchange of the round now.
        replies: Replies to the earlier exchange.
        only_drawn: Whether clients that are asked now and were not before are replacements.
    """
    same = all(first.requests.get(c) == exchange.requests[c] for c in replies.answered)
    return same and only_drawn and first.action == exchange.action


def _mean(
    metrics: Mapping[int, Mapping[str, float]], weights: Mapping[int, float]
) -> dict[str, float]:
    """Mean of each metric over the clients that sent it, weighted by their examples."""
    names = sorted({name for values in metrics.values() for name in values})
    means = {}
    for name in names:
        present = [client for client in sorted(metrics) if name in metrics[client]]
        total = sum(weights[client] for client in present)
        means[name] = sum(metrics[c][name] * weights[c] for c in present) / total
    return means
