"""Which rows are held out: by group, in an order that depends on the group and the seed alone.

Rows of a group (by default those with the same prompt) stay on one side, so that nothing that is judged
was trained on. No generator draws: groups are ordered by a keyed hash of what they are, so that a prompt
that several clients have comes at the same place for all of them, between machines too, without anyone
telling. Nothing here knows of files, tokens or settings.
"""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.data.examples import (
    Choice,
    Example,
    Feedback,
    Instruction,
    Labelled,
    Preference,
    Text,
    plain_text,
)
from fedloom.errors import DataError

Key = bytes
"""Digest of what rows of a group have in common."""

Sizes = Mapping[int, Mapping[Key, int]]
"""For each client, how many rows of each group it has."""

FEWEST = 5
"""Rows below which a client holds out none."""

UNTOLD = frozenset({"system", "developer"})
"""Roles whose messages do not tell one prompt from another."""

NOT_JUDGED = "single answer beside held-out pairs"
SAME_PROMPT = "same prompt as a held-out row"
SAME_GROUP = "same data.group as a held-out row"
SAME_ROW = "same text as a held-out row"


@dataclass(frozen=True)
class Limit:
    """How many rows a client may hold out.

    Attributes:
        rows: As its share asks; 0 for none.
        most: Rows that are judged at most.
    """

    rows: int
    most: int


@dataclass(frozen=True)
class Split:
    """What each client trains on and holds out, as ascending positions in its rows.

    Attributes:
        trained: Positions of the rows that are trained on.
        held_out: Positions of the rows that are judged.
        dropped: Rows on neither side, by reason.
        by_row: Clients that have too few prompts to hold one out: divided by prompt and completion.
        without: Clients that were to hold rows out and could not.
    """

    trained: dict[int, list[int]]
    held_out: dict[int, list[int]]
    dropped: dict[int, Counter[str]] = field(default_factory=dict)
    by_row: tuple[int, ...] = ()
    without: tuple[int, ...] = ()


def normalised(text: str) -> str:
    """Return a text as it is compared: NFKC, without case, each run of white space one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def prompt_text(example: Example) -> str:
    """Return what a row asks, normalised: without system messages, and of a labelled row its text.

    Where nothing is asked it is the whole row.
    """
    asked = example.text if isinstance(example, Labelled) else _asked(example.prompt)
    return normalised(asked) or row_text(example)


def row_text(example: Example) -> str:
    """Return a whole row, normalised: its prompt and all its completions."""
    if isinstance(example, Labelled):
        return normalised(example.text)
    completions: Sequence[Text]
    match example:
        case Instruction(completion=completion) | Feedback(completion=completion):
            completions = [completion]
        case Preference(chosen=chosen, rejected=rejected):
            completions = [chosen, rejected]
        case Choice(choices=choices):
            completions = choices
    parts = [_asked(example.prompt), *map(plain_text, completions)]
    return "\n".join(map(normalised, parts))


def group_key(example: Example, column: str | None = None) -> Key:
    """Return what a row has in common with those that must stay on its side.

    Args:
        example: The row.
        column: ``data.group``; by default rows with the same prompt belong together.

    Raises:
        DataError: The row has no such column; those it has are named.
    """
    if column is None:
        return _digest("prompt", prompt_text(example))
    if column not in example.columns:
        near = difflib.get_close_matches(column, sorted(example.columns), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"data.group = {column!r}: row {example.row} has no such column; {hint}there are: "
            f"{', '.join(sorted(example.columns)) or 'none'}"
        )
    return _digest("group", example.columns[column])


def row_key(example: Example) -> Key:
    """Return what a row has in common with its exact duplicates."""
    return _digest("row", row_text(example))


def split(
    rows: Mapping[int, Sequence[Example]],
    limits: Mapping[int, Limit],
    order: int,
    column: str | None = None,
    *,
    never: Collection[Key] = frozenset(),
    only: type[Preference] | None = None,
    over: str = "over the most that are judged",
) -> Split:
    """Divide each client's rows into those it trains on and those it is judged by.

    Groups are taken in the order of their keyed hash until a client's limit is reached; one that does not
    fit is passed over. A group that several clients have is held out by all of them or, as long as
    anything else can be, by none. Who has nothing then takes the group of which the others have fewest
    rows, of at most half of its own; they hold it out too, or, without room for twice their share, are
    left without it. A client whose rows share so few prompts that none can be held out is divided by
    prompt and completion.

    Args:
        rows: Each client's.
        limits: How many each may hold out.
        order: Key of the hash, in [0, 2**63).
        column: ``data.group``, which has no way out: who has one group alone holds out nothing.
        never: Groups, and rows by their key, that are trained on in any case.
        only: Kind of row that can be judged (default: any); others of a held-out group are dropped.
        over: What a row is that is held out with its group beyond the most that are judged.

    Raises:
        DataError: A row has no such column, or a client would train on nothing.
    """
    keys = {client: [group_key(row, column) for row in own] for client, own in rows.items()}
    judged = {
        client: [only is None or isinstance(row, only) for row in own]
        for client, own in rows.items()
    }
    chooser = _Chooser(keys, judged, limits, order, never)
    chooser.together()
    chooser.least_harm(any_size=column is not None)
    found: dict[int, list[int]] = {}
    if column is None:
        for any_size in (
            False,
            True,
        ):  # rows over the most that are judged are lost: the last way out
            if chooser.empty():
                taken = chooser.taken()
                more = _by_row(
                    rows, keys, judged, limits, order, chooser.empty(), taken, never, any_size
                )
                found |= {client: own for client, own in more.items() if own}
                chooser.settle({client: len(own) for client, own in more.items() if own})
            if not any_size:
                chooser.least_harm(any_size=True)
    claimed = chooser.taken()
    held = {
        client: [i for i, key in enumerate(own) if key in chooser.chosen[client]]
        for client, own in keys.items()
    } | found
    copies = tuple(found if column is None else rows)
    sides = _sides(rows, keys, judged, limits, order, held, claimed, copies, column, over)
    return replace(sides, by_row=tuple(sorted(found)), without=tuple(chooser.empty()))


def limit_of(count: int, fraction: float, most: int) -> Limit:
    """Return how many of ``count`` rows a client may hold out: at least one, none of under 5."""
    if fraction == 0 or count < FEWEST:
        return Limit(0, most)
    return Limit(min(max(1, min(round(fraction * count), most)), count - 1), most)


def keyed(key: Key, order: int) -> tuple[bytes, Key]:
    """Return a group's place in the order."""
    return hashlib.blake2b(key, digest_size=8, key=order.to_bytes(8, "big")).digest(), key


class _Chooser:
    """Chooses groups for all clients at once, and keeps count of what each would train on."""

    def __init__(
        self,
        keys: Mapping[int, Sequence[Key]],
        judged: Mapping[int, Sequence[bool]],
        limits: Mapping[int, Limit],
        order: int,
        never: Collection[Key],
    ) -> None:
        self.sizes: dict[int, Counter[Key]] = {c: Counter(own) for c, own in keys.items()}
        self.judged = {
            client: {key for key, useful in zip(own, judged[client], strict=True) if useful}
            for client, own in keys.items()
        }
        self.limits, self.never = limits, never
        self.holders: defaultdict[Key, list[int]] = defaultdict(list)
        for client, own in self.sizes.items():
            for key in own:
                self.holders[key].append(client)
        self.places = {key: keyed(key, order) for key in self.holders}
        self.chosen: dict[int, set[Key]] = {client: set() for client in keys}
        self.left = {client: len(own) for client, own in keys.items()}
        self.settled: set[int] = set()

    def empty(self) -> list[int]:
        """Return the clients that were to hold out rows and have none."""
        return [
            client
            for client, own in self.chosen.items()
            if self.limits[client].rows and not own and client not in self.settled
        ]

    def taken(self) -> frozenset[Key]:
        """Return all groups that are held out by somebody."""
        return frozenset().union(*self.chosen.values())

    def settle(self, held: Mapping[int, int]) -> None:
        """Take note of clients that hold out so many rows otherwise."""
        for client, rows in held.items():
            self.settled.add(client)
            self.left[client] -= rows

    def together(self) -> None:
        """Hold out groups that have room with everybody who has them, so that no row is lost."""
        room = {client: limit.rows for client, limit in self.limits.items()}
        waiting = {client for client, rows in room.items() if rows}
        for key in sorted(self.holders, key=self.places.__getitem__):
            if not waiting:
                return
            who = self.holders[key]
            if key in self.never or any(self.sizes[c][key] > room[c] for c in who):
                continue
            if not all(key in self.judged[c] for c in who):
                continue
            for client in who:
                self._take(client, key)
                room[client] -= self.sizes[client][key]
                if not room[client]:
                    waiting.discard(client)

    def least_harm(self, *, any_size: bool) -> None:
        """Give each client that holds out nothing the group of which others have fewest rows."""
        whole = sum(self.left.values())
        claimed = set(self.taken())
        for client in self.empty():
            best: tuple[int, bool, int, tuple[bytes, Key]] | None = None
            own = sum(self.sizes[client].values())
            for key in self.judged[client]:
                size = self.sizes[client][key]
                if key in self.never or 2 * size > own:
                    continue
                if size > self.limits[client].most and not any_size:
                    continue
                others = [c for c in self.holders[key] if c != client]
                lost = 0
                if key not in claimed:
                    lost = sum(self.sizes[c][key] for c in others)
                    if any(self.left[c] <= self.sizes[c][key] for c in (client, *others)):
                        continue
                    if 2 * (lost + size) > whole:
                        continue
                found = (lost, key not in claimed, size, self.places[key])
                best = found if best is None or found < best else best
            if best is None:
                continue
            key = best[3][1]
            if key in claimed:
                self.chosen[client].add(key)
                continue
            claimed.add(key)
            for other in self.holders[key]:
                if other == client or self._fits_too(other, key):
                    self._take(other, key)
                else:
                    self.left[other] -= self.sizes[other][key]

    def _fits_too(self, client: int, key: Key) -> bool:
        """Return whether a client may hold out a group more, up to twice its share: else it loses it."""
        limit, held = (
            self.limits[client],
            sum(self.sizes[client][own] for own in self.chosen[client]),
        )
        return key in self.judged[client] and held + self.sizes[client][key] <= min(
            limit.most, 2 * limit.rows
        )

    def _take(self, client: int, key: Key) -> None:
        self.chosen[client].add(key)
        self.left[client] -= self.sizes[client][key]


def _by_row(
    rows: Mapping[int, Sequence[Example]],
    keys: Mapping[int, Sequence[Key]],
    judged: Mapping[int, Sequence[bool]],
    limits: Mapping[int, Limit],
    order: int,
    empty: Collection[int],
    claimed: Collection[Key],
    never: Collection[Key],
    any_size: bool,
) -> dict[int, list[int]]:
    """Return the positions that clients with too few prompts hold out, by prompt and completion.

    Rows whose prompt another client holds out are not among them: they are left out of training.
    """
    places = {
        client: [i for i, key in enumerate(own) if key not in claimed]
        for client, own in keys.items()
    }
    whole = {client: _row_keys([rows[client][i] for i in own]) for client, own in places.items()}
    useful = {client: [judged[client][i] for i in own] for client, own in places.items()}
    own_limits = {
        client: Limit(
            min(limits[client].rows, max(0, len(own) - 1)) if client in empty else 0,
            limits[client].most,
        )
        for client, own in places.items()
    }
    chooser = _Chooser(whole, useful, own_limits, order, never)
    chooser.together()
    if any_size:
        chooser.least_harm(any_size=True)
    return {
        client: [
            i
            for i, key in zip(places[client], whole[client], strict=True)
            if key in chooser.chosen[client]
        ]
        for client in empty
    }


def _row_keys(rows: Sequence[Example]) -> list[Key]:
    """Return each row's key; what was made of one row of the data stays together."""
    first: dict[int, Key] = {}
    return [first.setdefault(row.row, row_key(row)) for row in rows]


def _sides(
    rows: Mapping[int, Sequence[Example]],
    keys: Mapping[int, Sequence[Key]],
    judged: Mapping[int, Sequence[bool]],
    limits: Mapping[int, Limit],
    order: int,
    held: Mapping[int, Sequence[int]],
    claimed: Collection[Key],
    copies: Collection[int],
    column: str | None,
    over: str,
) -> Split:
    """Put every row on its side, and count those that are on neither.

    ``held`` are positions of the rows of held-out groups, ``claimed`` those groups; of the held-out rows
    of ``copies`` exact duplicates are left out of training.
    """
    result = Split({}, {}, {client: Counter() for client in rows})
    for client, own in rows.items():
        useful = [i for i in held[client] if judged[client][i]]
        result.dropped[client][NOT_JUDGED] = len(held[client]) - len(useful)
        if len(useful) > limits[client].most:
            useful.sort(key=lambda i: keyed(row_key(own[i]), order))
            result.dropped[client][over] = len(useful) - limits[client].most
            useful = sorted(useful[: limits[client].most])
        result.held_out[client] = useful
    whole = {row_key(rows[client][i]) for client in copies for i in held[client]}
    for client, own in rows.items():
        aside, kept = set(held[client]), []
        for i, row in enumerate(own):
            if i in aside:
                continue
            if keys[client][i] in claimed:
                result.dropped[client][same(column)] += 1
            elif whole and row_key(row) in whole:
                result.dropped[client][SAME_ROW] += 1
            else:
                kept.append(i)
        if own and not kept:
            who = f"client {client}" if client >= 0 else "training"
            raise DataError(
                f"{who} would have no row to train on: of its {len(own)} rows "
                f"{_told(result.dropped[client])}, and {len(result.held_out[client])} are held out; use "
                "fewer clients, a larger partition.minimum, or partition.client_test_fraction = 0"
            )
        result.trained[client] = kept
    return result


def same(column: str | None) -> str:
    """Return why a row with a group's key is not trained on."""
    return SAME_PROMPT if column is None else SAME_GROUP


def _told(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} left out ({why})" for why, count in dropped.items() if count)


def _asked(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return plain_text(tuple(m for m in prompt if m.get("role") not in UNTOLD))


def _digest(what: str, text: str) -> Key:
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, person=what.encode()).digest()
