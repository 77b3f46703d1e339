"""What became of every example that was read: one account for each source and each client, which closes.

Everything is counted in examples. Where a row becomes another number of them (a pair two single answers,
texts pairs), the difference stands in a signed line of its own, so that

    rows + made = malformed + dropped + public + trained + held out + judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.accounting.quantities import human_count
from fedloom.data.token_set import TokenSet, Untokenized

Counts = Mapping[str, int]
"""How many, by reason; zeros are left out."""

NOT_FOR_ALL = "public row without a token to learn"

WARNED_SHARE = 0.05
"""Share of rows that were cut above which a user is warned."""

SHOWN_CLIENTS = 5
"""Clients that a warning names."""


@dataclass(frozen=True)
class Cut:
    """What ``max_length`` cut, and what was read as text; both sequences of a pair are one row.

    Attributes:
        rows: Rows that were tokenised.
        prompt_rows: Of these, rows that lost the beginning of a prompt, or the end of a labelled text.
        completion_rows: Rows that lost the end of a completion.
        cut_rows: Rows that lost either.
        prompt_tokens: Tokens that prompts (or labelled texts) lost; of several sequences with one prompt,
            once.
        completion_tokens: Tokens that completions lost.
        escaped_rows: Rows in whose text control tokens stand, which are encoded as text.
    """

    rows: int = 0
    prompt_rows: int = 0
    completion_rows: int = 0
    cut_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    escaped_rows: int = 0

    @property
    def share(self) -> float:
        """Share of the rows that lost something."""
        return self.cut_rows / self.rows if self.rows else 0.0

    def __add__(self, other: Cut) -> Cut:
        """Return what was cut in both."""
        return Cut(*(getattr(self, name) + getattr(other, name) for name in CUT_FIELDS))


CUT_FIELDS = tuple(own.name for own in fields(Cut))


def cut_of(tokens: TokenSet) -> Cut:
    """Count what was cut from rows."""
    return cuts_of(tokens, np.array([0, len(tokens)]))[0]


def cuts_of(tokens: TokenSet, ends: NDArray[np.int64]) -> list[Cut]:
    """Count what was cut from the rows of many, who stand in a set one after another.

    Args:
        tokens: The rows of all.
        ends: ``(clients + 1,)`` ascending positions: where each one's rows begin, and the last one's end.
    """
    cut = tokens.cut.reshape(-1, tokens.width, 2)
    prompts, completions = cut[:, :, 0].max(axis=1, initial=0), cut[:, :, 1].sum(axis=1)
    counts = [
        np.ones(len(cut), np.int64),
        prompts > 0,
        completions > 0,
        prompts + completions > 0,
        prompts,
        completions,
        tokens.escaped,
    ]
    before = np.array([np.concatenate([[0], np.cumsum(own)]) for own in counts])
    return [Cut(*own) for own in np.diff(before[:, ends]).T.tolist()]


@dataclass(frozen=True)
class Account:
    """What became of rows.

    Attributes:
        rows: Rows that were read or, of a client, dealt to it.
        made: Examples more (or fewer) than rows, by reason.
        malformed: Rows at fault.
        dropped: Sound examples that are neither trained on nor judged, by reason.
        public: Examples that all parties have.
        trained: Examples that clients train on.
        held_out: Examples that clients are judged by.
        judged: Examples of the global held-out set.
        cut: What was cut from those trained on; ``None`` where nothing was tokenised.
        held_out_cut: What was cut from those judged.
    """

    rows: int
    made: Counts = field(default_factory=dict)
    malformed: int = 0
    dropped: Counts = field(default_factory=dict)
    public: int = 0
    trained: int = 0
    held_out: int = 0
    judged: int = 0
    cut: Cut | None = None
    held_out_cut: Cut | None = None

    @property
    def difference(self) -> int:
        """Examples that are unaccounted for; 0."""
        lost = self.malformed + sum(self.dropped.values())
        used = self.public + self.trained + self.held_out + self.judged
        return self.rows + sum(self.made.values()) - lost - used

    @property
    def closes(self) -> bool:
        """Whether every example is accounted for."""
        return self.difference == 0

    def dropping(self, dropped: Counts, **changed: Any) -> Account:
        """Return the account with more that was dropped, and other fields as given."""
        return replace(self, dropped=added(self.dropped, dropped), **changed)

    def losing(self, lost: Sequence[Untokenized], side: str) -> Account:
        """Return the account without rows of one side that could not be tokenised."""
        if not lost:
            return self
        bad = sum(one.malformed for one in lost)
        reasons = Counter(one.reason for one in lost if not one.malformed)
        left = getattr(self, side) - len(lost)
        return self.dropping(reasons, malformed=self.malformed + bad, **{side: left})

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {
            "rows": self.rows,
            "made": dict(self.made),
            "malformed": self.malformed,
            "dropped": dict(self.dropped),
            "public": self.public,
            "trained": self.trained,
            "held_out": self.held_out,
            "judged": self.judged,
            "cut": self.cut and dict(self.cut.__dict__),
            "held_out_cut": self.held_out_cut and dict(self.held_out_cut.__dict__),
            "unaccounted": self.difference,
        }


@dataclass(frozen=True)
class Accounts:
    """All accounts of a division.

    Attributes:
        source: Of the rows that clients' shares come from; with a file for each client, of all files.
        test: Of ``data.test_source``, where there is one.
        public: Of ``public.source``, where there is one.
        clients: Of each client's rows.
        warnings: What a user should know of who is trained on and judged by what.
    """

    source: Account
    test: Account | None = None
    public: Account | None = None
    clients: Mapping[int, Account] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Account, ...]:
        """Of every source, and of every client."""
        several = [own for own in (self.test, self.public) if own is not None]
        return (self.source, *several, *self.clients.values())

    @property
    def closes(self) -> bool:
        """Whether every example of every account is accounted for."""
        return all(account.closes for account in self.all)

    @property
    def dropped(self) -> dict[str, int]:
        """Sound examples that were dropped from all sources, by reason."""
        return _summed(own.dropped for own in (self.source, self.test, self.public) if own)

    @property
    def malformed(self) -> int:
        """Malformed rows of all sources."""
        return sum(own.malformed for own in (self.source, self.test, self.public) if own)

    def tokenised(
        self,
        trained: Mapping[int, tuple[Cut, Sequence[Untokenized]]],
        held_out: Mapping[int, TokenSet],
        judged: TokenSet,
        unread: int,
    ) -> Accounts:
        """Return the accounts after tokenising.

        Args:
            trained: For each client whose rows are here, what was cut and which are lost.
            held_out: The clients' held-out rows, as far as they are judged here.
            judged: The global held-out set.
            unread: Public rows that not every model can read.
        """
        clients, source = {}, self.source
        sums = [Cut(), Cut()]
        for client, account in self.clients.items():
            cut, lost = trained.get(client, (None, ()))
            own = held_out.get(client)
            aside = () if own is None else own.dropped
            account = account.losing(lost, "trained").losing(aside, "held_out")
            source = source.losing(lost, "trained").losing(aside, "held_out")
            held_cut = None if own is None else cut_of(own)
            clients[client] = replace(account, cut=cut, held_out_cut=held_cut)
            sums = [sums[0] + (cut or Cut()), sums[1] + (held_cut or Cut())]
        test, public = self.test, self.public
        if test is None:
            source = source.losing(judged.dropped, "judged")
            sums[1] += cut_of(judged)
        else:
            test = replace(test.losing(judged.dropped, "judged"), held_out_cut=cut_of(judged))
        if unread and public is None:
            source = source.dropping({NOT_FOR_ALL: unread}, public=source.public - unread)
        elif unread and public is not None:
            public = public.dropping({NOT_FOR_ALL: unread}, public=public.public - unread)
        source = replace(source, cut=sums[0] if trained else None, held_out_cut=sums[1])
        return Accounts(source, test, public, clients, self.warnings)

    def to_record(self) -> dict[str, Any]:
        """Return them as plain JSON, for ``run.json``."""
        return {
            "source": self.source.to_record(),
            "test_source": self.test and self.test.to_record(),
            "public_source": self.public and self.public.to_record(),
            "clients": [
                {"client": client, **account.to_record()}
                for client, account in sorted(self.clients.items())
            ],
            "warnings": list(self.warnings),
        }


def cut_warnings(accounts: Accounts, kind: str, max_length: int) -> list[str]:
    """Return a warning where much was cut from the rows of all, or of some clients.

    Args:
        accounts: After tokenising.
        kind: Kind of the training rows.
        max_length: Tokens that a row may have.
    """
    cut = accounts.source.cut
    much = {
        client: account.cut
        for client, account in sorted(accounts.clients.items())
        if account.cut is not None and account.cut.share > WARNED_SHARE
    }
    if cut is None or (cut.share <= WARNED_SHARE and not much):
        return []
    whose = "training rows"
    if cut.share <= WARNED_SHARE:
        shown = [f"{client} ({own.share:.0%})" for client, own in much.items()][:SHOWN_CLIENTS]
        more = f" and {len(much) - len(shown)} more" if len(much) > len(shown) else ""
        whose += f", of client{'s' if len(much) > 1 else ''} {', '.join(shown)}{more} above all"
    return [
        f"{max_length} tokens are too few for {human_count(cut.cut_rows)} of "
        f"{human_count(cut.rows)} {whose} "
        f"({cut.share:.1%}): {told_cut(cut, kind)} are cut; raise data.max_length as far as the model "
        "and memory allow"
    ]


def escaped_warnings(accounts: Accounts) -> list[str]:
    """Return a warning where control tokens stand in the text of rows that are trained on."""
    cut = accounts.source.cut
    if cut is None or not cut.escaped_rows:
        return []
    return [
        f"control tokens of the tokenizer, such as its end token, stand in the text of "
        f"{human_count(cut.escaped_rows)} of {human_count(cut.rows)} training rows and are "
        "encoded as text; if these rows were "
        'rendered with the chat template beforehand: data.control_tokens = "control"'
    ]


def told_cut(cut: Cut, kind: str) -> str:
    """Return what was cut in words: from how many rows how many tokens."""
    if kind == "labelled":
        return (
            f"{human_count(cut.prompt_tokens)} tokens from the end of "
            f"{human_count(cut.prompt_rows)} texts"
        )
    parts = [
        (cut.prompt_tokens, f"the beginning of {human_count(cut.prompt_rows)} prompts"),
        (
            cut.completion_tokens,
            f"the end of the answers of {human_count(cut.completion_rows)} rows",
        ),
    ]
    told = " and ".join(
        f"{human_count(tokens)} tokens from {where}" for tokens, where in parts if tokens
    )
    return told or "nothing"


def added(one: Counts, other: Counts) -> dict[str, int]:
    """Return two counts added up."""
    return _summed((one, other))


def _summed(counts: Iterable[Counts]) -> dict[str, int]:
    found: dict[str, int] = {}
    for own in counts:
        for reason, number in own.items():
            found[reason] = found.get(reason, 0) + number
    return {reason: number for reason, number in found.items() if number}
