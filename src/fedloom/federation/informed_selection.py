"""What selections have in common that go by what single clients tell of their rows and their work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedloom.federation.selection_contract import (
    DETAILS,
    Observation,
    Selection,
    Told,
)
from fedloom.reports.sections.spec import SectionSpec
from fedloom.settings.schema import NamedSettings, Of

LEAST_ROWS = 8
"""Fewest rows whose losses may be asked for: the mean of fewer tells of single rows."""


class InformedSettings(NamedSettings):
    """Settings of every selection that goes by what clients tell."""

    losses: Literal["rows", "training"] = "rows"
    """Which losses it goes by: "rows": clients are asked for the loss of some of their rows under the
    model that they would use in this round, in an exchange of its own before they train; "training": the
    mean loss that clients report of a training anyway, as it was when they last took part, with no
    exchange."""
    rows: Annotated[int, Of("selection.losses", ("rows",))] = Field(default=64, ge=LEAST_ROWS)
    """Most rows of a client whose losses are asked for; of more, as many are drawn anew in each round."""
    largest: float = Field(default=10, ge=1)
    """A loss counts as this many times the median of the losses told at most, so that one false loss
    cannot outweigh all others; a client that claims a large loss is still drawn more often."""


@dataclass(frozen=True)
class Known:
    """What is known of a client from the rounds that it was drawn for.

    Attributes:
        rows: Its training rows.
        loss: Mean loss that it last told; ``None`` before.
        root_mean_square: Of the losses of its rows, likewise.
        seconds: How long its last work took, or how long was waited for it.
        last: Last round of which its answer counted; 0 before.
        count: How many did.
        drop: Share of its loss by which the last training lowered it.
    """

    rows: int = 0
    loss: float | None = None
    root_mean_square: float | None = None
    seconds: float | None = None
    last: int = 0
    count: int = 0
    drop: float = 0.0

    def after(self, round: int, own: Observation) -> Known:
        """Return what is known after a round; an answer that never came changes the time alone."""
        seconds = self.seconds if own.seconds is None else own.seconds
        if not own.answered:
            return replace(self, seconds=seconds)
        told = own.before
        if told is None and own.loss is not None:
            told = Told(own.loss, abs(own.loss))
        loss = self.loss if told is None else told.loss
        square = self.root_mean_square if told is None else told.root_mean_square
        return Known(
            own.rows, loss, square, seconds, round, self.count + 1, relative_drop(self, own)
        )


def relative_drop(known: Known, own: Observation) -> float:
    """Return (before - after) / before, from -1 to 1: how far a client's training lowered its loss.

    Before: what it told of its rows, or its last training's loss. After: the mean loss of this training.
    0 where one is not known or the first is not above 0.
    """
    before = own.before.loss if own.before is not None else known.loss
    if before is None or own.loss is None or before <= 0:
        return 0.0
    return min(1.0, max(-1.0, (before - own.loss) / before))


class InformedSelection(Selection):
    """Base of selections that go by what clients tell.

    Attributes:
        known: What is known of each client that was drawn before, by id.
        round: The round of the next draws.
    """

    informed: ClassVar[bool] = True
    sections: ClassVar[tuple[SectionSpec, ...]] = (
        SectionSpec(
            "client_draws",
            "Who was drawn, and why",
            "How often each client was drawn, for which reason, and what it told last: the mean loss "
            "that the selection goes by, and how long its work took.",
            DETAILS,
        ),
    )
    settings: InformedSettings

    def __init__(self, settings: NamedSettings) -> None:
        """Know nothing of any client."""
        super().__init__(settings)
        self.known: dict[int, Known] = {}
        self.round = 1

    @property
    def asks(self) -> Literal["candidates", "drawn"] | None:
        """Those drawn are asked, unless losses of trainings are what it goes by."""
        return "drawn" if self.settings.losses == "rows" else None

    @property
    def rows(self) -> int:
        """Most rows of a client whose losses are asked for."""
        return self.settings.rows

    def begin(self, round: int, told: Mapping[int, Told]) -> None:
        """Forget why clients were drawn before."""
        self.round, self.reasons = round, {}

    def observe(self, round: int, observed: Mapping[int, Observation]) -> None:
        """Keep what is known of each client now."""
        for client, own in observed.items():
            self.known[client] = self.known.get(client, Known()).after(round, own)

    def saved(self) -> dict[str, Any]:
        """Return what is known, by client id."""
        return {"known": {str(client): asdict(own) for client, own in sorted(self.known.items())}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what :meth:`saved` returned."""
        self.known = {int(client): Known(**own) for client, own in saved["known"].items()}

    def details(self, round: int, observed: Mapping[int, Observation]) -> dict[str, Any]:
        """Return why each client was drawn, and what it told."""
        found = {}
        for client, own in observed.items():
            loss = own.before.loss if own.before is not None else own.loss
            found[str(client)] = {
                "why": self.reasons.get(client, "drawn"),
                "answered": own.answered,
                "loss": loss,
                "root_mean_square": own.before.root_mean_square if own.before else None,
                "seconds": own.seconds,
            }
        return {DETAILS: found}

    def drawn(self, clients: Iterable[int], why: str) -> list[int]:
        """Return clients, whose reason is noted."""
        found = list(clients)
        self.reasons |= dict.fromkeys(found, why)
        return found
