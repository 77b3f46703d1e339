"""Admission: answers of clients, which are not trusted, are checked before they are used.

An answer must fit the schema that the server fixed before the round, be finite and in range, claim no
more rows than its client registered, and change the tensors that were sent by no more than the allowed
norm. An answer that does not is left out with the reason, and counts as a violation (``violations.py``);
no answer, or the report of a failure, is not a violation. Violations outside of answers count in the same
way (:meth:`Admission.report`). Clients with repeated violations are in quarantine for some rounds. All
decisions follow from the records of rounds, so a resumed run makes the same ones.

The weight of a client is bounded, as the server cannot count its rows (:meth:`Admission.weight_bound`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from fedloom.aggregation.robust import cut_change, distance
from fedloom.errors import MessageError, OutOfStepError, OutputError, ViolationKind
from fedloom.federation.violations import WHY, Violation, ViolationObserver, one_line, quarantined
from fedloom.security.audit_log import Limited, Record, digest_of, no_op_recorder
from fedloom.settings.schema import Settings
from fedloom.wire.messages import Answer, Exchange, Payload, Reply, require_finite

TIMES, PART = 10, 10
"""Of the bound on a client's weight where its rows are not known: see :meth:`Admission.weight_bound`."""


class AdmissionSettings(Settings):
    """``[admission]``: which answers the server accepts."""

    max_value: float = Field(default=1e6, gt=0)
    """Largest absolute value of a number in an answer's tensors."""
    max_change: float | None = Field(default=None, gt=0)
    """Largest Euclidean norm of a client's change over all tensors that it was sent (default: any).
    What a client sends as a change already counts as it is: with scaffold also how c_k moves, which
    is the adapter's change over (steps times learning rate) and so by far the larger part."""
    on_excess: Literal["reject", "clip"] = "reject"
    """What to do with an answer above max_change: leave it out (reject), or scale its change to that norm
    (clip)."""
    max_examples: int | Literal["any"] | None = None
    """Largest weight of a client in examples, however many it claims; "any" for no bound (default:
    between machines ten times the upper quartile of the registered rows, or a tenth of all rows; in one
    process, where rows are counted and not claimed, no bound)."""
    offences: int = Field(default=3, ge=1)
    """Rounds with protocol violations after which a client is put in quarantine."""
    pause: int = Field(default=10, ge=0)
    """Rounds of the quarantine, in which the client is not asked anything; 0 for no quarantine."""

    @field_validator("max_examples", mode="before")
    @classmethod
    def _bound_or_any(cls, value: object) -> object:
        if value is None or value == "any" or (type(value) is int and value >= 1):
            return value
        raise ValueError('must be a whole number of at least 1, or "any"')

    def contradictions(self) -> list[str]:
        """Return the contradictions in these settings, one line each."""
        if self.on_excess == "clip" and self.max_change is None:
            return ['admission.on_excess = "clip" needs admission.max_change: the norm to clip to']
        return []


@dataclass(frozen=True)
class WeightBound:
    """The largest weight of a client.

    Attributes:
        examples: Largest number of examples; ``None`` for any number.
        cut: Clients that registered more, each with its rows.
        why: The bound in words.
    """

    examples: int | None
    cut: Mapping[int, int]
    why: str


def _recorder(audit: Record, exchange: Exchange, ages: Mapping[int, int]) -> Record:
    """Return what writes an event of a client's message into the round in which it was asked."""

    def note(event: str, *, client: int, **facts: Any) -> None:
        asked = exchange.round - ages.get(client, 0)
        audit(event, round=asked, action=exchange.action, client=client, **facts)

    return note


class Admission:
    """Checks answers and counts violations of clients.

    Attributes:
        settings: The bounds of accepted answers.
        rows_known: Whether the server has counted the clients' rows itself, as in one process.
        run: Id of the run, for the observer.
        watch: Observer of every violation as it occurs.
        audit: Audit log of violations outside of answers.
        weighed: Clients of the current round whose claim was reduced: examples claimed and examples
            counted.
    """

    def __init__(
        self,
        settings: AdmissionSettings | None = None,
        earlier: Iterable[Violation] = (),
        *,
        rows_known: bool = True,
        run: str | None = None,
        watch: ViolationObserver | None = None,
        audit: Record = no_op_recorder,
    ) -> None:
        """Start with the violations of earlier rounds."""
        self.settings = settings or AdmissionSettings()
        self.rows_known, self.run, self.watch = rows_known, run, watch or ViolationObserver()
        self.weighed: dict[int, tuple[float, int]] = {}
        self._audit = Limited(audit)
        self._violations: dict[int, set[int]] = {}
        self._open: dict[tuple[int, ViolationKind], Violation] = {}
        self._lock = threading.Lock()
        for violation in earlier:
            if violation.round is not None:
                self._violations.setdefault(violation.client, set()).add(violation.round)

    def accept(
        self,
        answers: Iterable[Answer],
        exchange: Exchange,
        sizes: Mapping[int, int],
        keep: Callable[[int, Payload], Payload] = lambda client, payload: payload,
        audit: Record = no_op_recorder,
        ages: Mapping[int, int] | None = None,
    ) -> tuple[list[Reply], dict[int, str]]:
        """Check answers, each as it arrives.

        Args:
            answers: Answers in any order; iterated once the log holds what was sent.
            exchange: What was asked.
            sizes: Registered rows of each client: the largest weight it may claim.
            keep: Stores a client's payload in memory or on disk, and returns a payload that reads it.
            audit: Audit log of requests, answers and decisions, without any content.
            ages: Rounds ago in which each client was asked, where that is not 0.

        Returns:
            The usable replies in client order, so that sums do not depend on the order of arrival, and
            for each other client the reason why it is left out, in one line.
        """
        replies: dict[int, Reply] = {}
        rejected: dict[int, str] = {}
        came: dict[int, dict[str, Any]] = {}
        weight_bound = self.weight_bound(sizes).examples
        note = _recorder(audit, exchange, ages or {})
        for client, data in exchange.requests.items():
            note("sent", client=client, bytes=len(data), message=exchange.digests[client])
        for answer in answers:
            client = answer.client
            if client in replies or client in rejected or client not in exchange.requests:
                continue  # an engine yields one for each client asked
            facts = came.setdefault(client, {})
            if answer.data is not None:
                digest = answer.digest or digest_of(answer.data)
                facts |= {"bytes": len(answer.data), "message": digest}
            try:
                if answer.data is None:
                    rejected[client] = one_line(answer.error or "no answer", WHY)
                    kind = answer.violation
                else:
                    payload = self._checked(client, answer.data, exchange, sizes, weight_bound)
                    replies[client], kind = Reply(client, keep(client, payload)), None
            except MessageError as error:
                rejected[client] = one_line(str(error), WHY)
                kind = None if isinstance(error, OutOfStepError) else error.kind
            if kind is not None:
                facts["kind"] = kind
                self._note(Violation(client, kind, rejected[client], exchange.round, self.run))
        for client in exchange.requests:
            facts = came.get(client, {})
            if client in replies:
                note("accepted", client=client, **facts)
            else:
                event = "refused" if "message" in facts else "absent"
                note(event, client=client, **facts, reason=rejected.setdefault(client, "no answer"))
        return [replies[client] for client in sorted(replies)], rejected

    def report(self, client: int, kind: ViolationKind, reason: str) -> None:
        """Count a violation outside of an answer; thread-safe.

        It counts for the current round, or where none is under way, for the next. A full disk is not an
        error here: it ends the run where records are written.
        """
        why = one_line(reason)
        self._note(Violation(client, kind, why, None, self.run))
        with contextlib.suppress(OutputError):
            self._audit("offence", source=client, client=client, kind=kind, reason=why)

    def close(self, round: int) -> tuple[Violation, ...]:
        """End a round: return its violations for the record, one per client and kind.

        From then on they count for quarantine.
        """
        with self._lock:
            found, self._open = self._open, {}
        for client, _ in found:
            self._violations.setdefault(client, set()).add(round)
        self.weighed = {}
        return tuple(replace(found[key], round=round) for key in sorted(found))

    def paused(self, round: int) -> dict[int, int]:
        """Return the clients in quarantine in ``round``, each with its last round there."""
        own = self.settings
        return quarantined(self._violations, round, limit=own.offences, pause=own.pause)

    def without_paused(self, exchange: Exchange) -> Exchange:
        """Return an exchange without the clients that are in quarantine in its round."""
        paused = self.paused(exchange.round)
        if not paused.keys() & exchange.requests.keys():
            return exchange
        asked = {c: data for c, data in exchange.requests.items() if c not in paused}
        return replace(exchange, requests=asked)

    def weight_bound(self, sizes: Mapping[int, int]) -> WeightBound:
        """Return the largest weight of a client, given the registered rows of all.

        Where rows are claimed and not counted, one client's claim must not decide the mean: with 2^40
        rows it would be the mean. The bound is ``TIMES`` the rows of the client at the upper quartile, or
        a ``PART``-th of all rows where that is more, claims beyond the former counted as the former:

        - It leaves ordinary federations as they are. Of this project's recipes whose data was at hand the
          largest client has 1.0 to 2.9 times the upper quartile (28.7 times the median: a strong skew of
          three labels leaves half of ten clients with almost no rows, which is why it is not the median
          that counts). Of Dirichlet partitions with alpha 0.5 over 3 to 100 clients it cut none of 1,400;
          with alpha 0.1 and three labels 2 to 12 in a hundred from ten clients on, and then clients with
          more than a tenth of all rows.
        - A client cannot move it by its own claim: in sorted order the quartile is the one at place
          3 (n - 1) / 4, rounded down, of two clients the smaller one. More than a quarter of the others
          would have to lie alike.
        - A client at the bound weighs as ten others: of a round of ten equal ones 10 / 19 and not all,
          of a hundred a tenth. Who knows the rows of all sets a number; ``aggregation.rule`` and
          ``admission.max_change`` bound what any weight can do.

        Args:
            sizes: Rows of each client.
        """
        chosen = self.settings.max_examples
        if not sizes or chosen == "any" or (chosen is None and self.rows_known):
            return WeightBound(None, {}, "")
        most, why = chosen, "admission.max_examples"
        if most is None:
            ordered = sorted(sizes.values())
            quartile = ordered[3 * (len(ordered) - 1) // 4]
            times = TIMES * quartile
            most = max(times, sum(min(rows, times) for rows in ordered) // PART)
            why = (
                f"{TIMES} times the upper quartile of the rows registered ({quartile}), or a tenth of "
                'all; admission.max_examples sets another bound, or "any"'
            )
        return WeightBound(most, {c: rows for c, rows in sorted(sizes.items()) if rows > most}, why)

    def _note(self, violation: Violation) -> None:
        """Keep a violation for the round's record: the first of each client and kind, and a count."""
        key = (violation.client, violation.kind)
        with self._lock:
            known = self._open.get(key)
            more = violation if known is None else replace(known, count=known.count + 1)
            self._open[key] = more
        self.watch.record(violation)

    def _checked(
        self,
        client: int,
        data: bytes,
        exchange: Exchange,
        sizes: Mapping[int, int],
        weight_bound: int | None,
    ) -> Payload:
        payload = exchange.read_reply(client, data)
        largest = require_finite(payload)
        if exchange.check is not None:
            exchange.check(client, payload)
        examples = payload.numbers.get("examples")
        if examples is not None and not 0 < examples <= sizes[client]:
            raise MessageError(
                f"it claims {examples:g} examples and registered with {sizes[client]}",
                "out_of_range",
            )
        for name, value in largest.items():
            if value > self.settings.max_value:
                raise MessageError(
                    f"tensor {name} holds {value:.4g}, admission.max_value allows "
                    f"{self.settings.max_value:g}",
                    "out_of_range",
                )
        if self.settings.max_change is not None:
            payload = self._bounded(client, payload, exchange, self.settings.max_change)
        if examples is not None and weight_bound is not None and examples > weight_bound:
            self.weighed[client] = (examples, weight_bound)
            payload = replace(payload, numbers={**payload.numbers, "examples": float(weight_bound)})
        return payload

    def _bounded(
        self, client: int, payload: Payload, exchange: Exchange, largest: float
    ) -> Payload:
        """Return a payload that moves what was sent no further than ``largest``."""
        sent = exchange.sent_to(client)
        both = {
            name: tensor
            for name, tensor in payload.tensors.items()
            if name in sent and sent[name].shape == tensor.shape and tensor.is_floating_point()
        }
        changes, whole = exchange.changes, exchange.replies_are_changes
        sent = {
            name: torch.zeros_like(tensor) if whole or name.startswith(changes) else sent[name]
            for name, tensor in both.items()
        }
        norm = distance(both, sent)
        if norm <= largest:
            return payload
        if self.settings.on_excess == "reject":
            raise MessageError(
                f"it changed what it was sent by {norm:.4g}, admission.max_change allows {largest:g}",
                "out_of_range",
            )
        return replace(payload, tensors={**payload.tensors, **cut_change(both, sent, largest)})
