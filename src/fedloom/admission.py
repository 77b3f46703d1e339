"""Who is let in: answers from clients that are not trusted, checked before anything is made of them.

An answer must fit the schema that the server fixed before the round, be finite and of a possible size,
claim no more rows than its client registered with, and move what was sent no further than is allowed.
One that does not is left out with the reason, and counts as an offence; a client that gives no answer, or
says that it failed, has committed none. Repeat offenders are not asked for some rounds. All of it follows
from the records of rounds, so a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from fedloom.aggregation.robust import cut_change, distance
from fedloom.audit import Record, digest_of, unheard
from fedloom.errors import MessageError
from fedloom.messages import (
    Answer,
    Exchange,
    Payload,
    Reply,
    decode,
    require_finite,
)
from fedloom.settings import Settings


class AdmissionSettings(Settings):
    """``[admission]``: what the server lets in."""

    max_value: float = Field(default=1e6, gt=0)
    """Largest absolute value of a number in an answer's tensors."""
    max_change: float | None = Field(default=None, gt=0)
    """Largest norm of what a client changed, over all tensors that it was sent (default: any)."""
    on_excess: Literal["reject", "clip"] = "reject"
    """What becomes of an answer above it: left out, or its change shortened to it."""
    max_examples: int | None = Field(default=None, ge=1)
    """Examples that a client weighs as at most, however many it says that it has (default: any)."""
    offences: int = Field(default=3, ge=1)
    """Unusable answers after which a client is left out for some rounds."""
    pause: int = Field(default=10, ge=0)
    """These rounds; 0 never leaves anybody out."""

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        if self.on_excess == "clip" and self.max_change is None:
            return ['admission.on_excess = "clip" needs admission.max_change: clip to what?']
        return []


class Admission:
    """Checks answers and knows who has offended.

    Attributes:
        settings: What is let in.
        offences: Client to the rounds in which its answer was unusable, ascending.
    """

    def __init__(
        self,
        settings: AdmissionSettings | None = None,
        offences: Mapping[int, Iterable[int]] | None = None,
    ) -> None:
        """Begin with the offences of earlier rounds."""
        self.settings = settings or AdmissionSettings()
        self.offences = {client: sorted(rounds) for client, rounds in (offences or {}).items()}

    def accept(
        self,
        answers: Iterable[Answer],
        exchange: Exchange,
        sizes: Mapping[int, int],
        keep: Callable[[int, Payload], Payload] = lambda client, payload: payload,
        audit: Record = unheard,
    ) -> tuple[list[Reply], dict[int, str]]:
        """Check answers, each as it comes.

        Args:
            answers: In any order; asked for once the log says what was sent.
            exchange: What was asked.
            sizes: Rows each client registered with: the largest weight it may claim.
            keep: Puts a client's payload away where there is room, and returns what stands for it.
            audit: Told what was sent, what came and what became of it, without any content.

        Returns:
            The usable replies in client order, so that sums do not depend on who came first, and for
            each other client the reason why it is left out.
        """
        replies: dict[int, Reply] = {}
        rejected: dict[int, str] = {}
        came: dict[int, dict[str, Any]] = {}

        def note(event: str, client: int, **facts: Any) -> None:
            audit(event, round=exchange.round, action=exchange.action, client=client, **facts)

        for client, data in exchange.requests.items():
            note("sent", client, bytes=len(data), message=exchange.digests[client])
        for answer in answers:
            client = answer.client
            if client in replies or client in rejected or client not in exchange.requests:
                continue  # a second or an unasked answer counts for nothing
            if answer.data is not None:
                digest = answer.digest or digest_of(answer.data)
                came[client] = {"bytes": len(answer.data), "message": digest}
            try:
                payload = self._checked(answer, exchange, sizes)
                replies[client] = Reply(client, keep(client, payload))
            except MessageError as error:
                rejected[client] = str(error)
                if answer.data is not None:
                    self.offences.setdefault(client, []).append(exchange.round)
        for client in exchange.requests:
            if client not in replies and client not in rejected:
                rejected[client] = "no answer"
            event = "accepted" if client in replies else "refused" if client in came else "absent"
            reason = {"reason": rejected[client]} if client in rejected else {}
            note(event, client, **came.get(client, {}), **reason)
        return [replies[client] for client in sorted(replies)], rejected

    def offenders(self, round: int) -> list[int]:
        """Return who offended in a round."""
        return sorted(client for client, rounds in self.offences.items() if round in rounds)

    def paused(self, round: int) -> dict[int, int]:
        """Return the clients that are not asked in ``round``, each with the last such round."""
        found = {}
        for client, rounds in self.offences.items():
            until, count = 0, 0
            for offence in sorted({own for own in rounds if own < round}):
                count += 1
                if count == self.settings.offences:
                    until, count = offence + self.settings.pause, 0
            if round <= until:
                found[client] = until
        return found

    def _checked(self, answer: Answer, exchange: Exchange, sizes: Mapping[int, int]) -> Payload:
        if answer.data is None:
            raise MessageError(answer.error or "no answer")
        payload = decode(answer.data, exchange.reply_schema)
        largest = require_finite(payload)
        if exchange.check is not None:
            exchange.check(answer.client, payload)
        examples = payload.numbers.get("examples")
        if examples is not None and not 0 < examples <= sizes[answer.client]:
            raise MessageError(
                f"it claims {examples} examples and registered with {sizes[answer.client]}"
            )
        for name, value in largest.items():
            if value > self.settings.max_value:
                raise MessageError(
                    f"tensor {name} holds {value:.4g}, admission.max_value allows "
                    f"{self.settings.max_value:g}"
                )
        most = self.settings.max_examples
        if examples is not None and most is not None and examples > most:
            payload = replace(payload, numbers={**payload.numbers, "examples": float(most)})
        if self.settings.max_change is None:
            return payload
        return self._bounded(answer.client, payload, exchange, self.settings.max_change)

    def _bounded(
        self, client: int, payload: Payload, exchange: Exchange, largest: float
    ) -> Payload:
        """Return a payload that moves what was sent no further than ``largest``."""
        sent = decode(exchange.requests[client], exchange.request_schema).tensors
        both = {
            name: tensor
            for name, tensor in payload.tensors.items()
            if name in sent and sent[name].shape == tensor.shape and tensor.is_floating_point()
        }
        norm = distance(both, sent)
        if norm <= largest:
            return payload
        if self.settings.on_excess == "reject":
            raise MessageError(
                f"it changed what it was sent by {norm:.4g}, admission.max_change allows {largest:g}"
            )
        return replace(payload, tensors={**payload.tensors, **cut_change(both, sent, largest)})


def accept(
    answers: Iterable[Answer],
    exchange: Exchange,
    sizes: Mapping[int, int],
    audit: Record = unheard,
) -> tuple[list[Reply], dict[int, str]]:
    """Check answers of an exchange that stands by itself; see :meth:`Admission.accept`."""
    return Admission().accept(answers, exchange, sizes, audit=audit)
