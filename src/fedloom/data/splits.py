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
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

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
from fedloom.data.stored_rows import Facts, Keys, StoredRows, are_pairs, row_numbers, take
from fedloom.errors import DataError

Key = bytes
"""Digest of what rows of a group have in common."""

Positions = NDArray[np.int64]

SIZE = 16
"""Bytes of a key."""

KEY = f"S{SIZE}"

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


def group_keys(rows: Sequence[Example], column: str | None = None) -> Keys:
    """Return ``(rows,)`` their :func:`group_key`; of rows in files from their index.

    Raises:
        DataError: A row has no such column.
    """
    if not isinstance(rows, StoredRows):
        return np.array([group_key(row, column) for row in rows], KEY)
    keys: Keys = rows.entry("prompt" if column is None else "group")
    if column is not None and (without := np.flatnonzero(keys == b"")).size:
        group_key(rows[int(without[0])], column)
    return keys


def row_keys(rows: Sequence[Example]) -> Keys:
    """Return ``(rows,)`` their :func:`row_key`; of rows in files from their index."""
    if isinstance(rows, StoredRows):
        return rows.entry("whole")
    return np.array([row_key(row) for row in rows], KEY)


def facts_of(example: Example, group: str | None, value: str | None) -> Facts:
    """Return what the index of rows in files keeps of one.

    Args:
        example: The row.
        group: ``data.group``.
        value: Of the column that clients differ in.
    """
    own = group_key(example, group) if group is not None and group in example.columns else b""
    return Facts(group_key(example), row_key(example), own, value)


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
    if not any(limit.rows for limit in limits.values()):
        return _undivided(rows, column)
    keys = {client: group_keys(own, column) for client, own in rows.items()}
    judged = {
        client: are_pairs(own) if only is not None else np.ones(len(own), np.bool_)
        for client, own in rows.items()
    }
    chooser = _Chooser(keys, judged, limits, order, never)
    chooser.together()
    chooser.least_harm(any_size=column is not None)
    found: dict[int, Positions] = {}
    if column is None:
        for any_size in (
            False,
            True,
        ):  # rows over the most that are judged are lost: the last way out
            if chooser.empty():
                more = _by_row(rows, chooser, judged, limits, order, never, any_size)
                found |= {client: own for client, own in more.items() if len(own)}
                chooser.settle({client: len(own) for client, own in more.items() if len(own)})
            if not any_size:
                chooser.least_harm(any_size=True)
    held = {client: np.flatnonzero(chooser.has(client)) for client in rows} | found
    claimed = chooser.are_taken()
    copies = tuple(found if column is None else rows)
    sides = _sides(rows, judged, limits, order, held, claimed, copies, column, over)
    return replace(sides, by_row=tuple(sorted(found)), without=tuple(chooser.empty()))


def _undivided(rows: Mapping[int, Sequence[Example]], column: str | None) -> Split:
    """Return all rows as trained on, where nobody holds any out; checks that they have the column."""
    if column is not None:
        for own in rows.values():
            group_keys(own, column)
    return Split(
        {client: list(range(len(own))) for client, own in rows.items()},
        {client: [] for client in rows},
        {client: Counter({NOT_JUDGED: 0}) for client in rows},
    )


def limit_of(count: int, fraction: float, most: int) -> Limit:
    """Return how many of ``count`` rows a client may hold out: at least one, none of under 5."""
    if fraction == 0 or count < FEWEST:
        return Limit(0, most)
    return Limit(min(max(1, min(round(fraction * count), most)), count - 1), most)


def keyed(key: Key, order: int) -> tuple[bytes, Key]:
    """Return a group's place in the order."""
    return hashlib.blake2b(key, digest_size=8, key=order.to_bytes(8, "big")).digest(), key


class _Chooser:
    """Chooses groups for all clients at once, and keeps count of what each would train on.

    A group's number is its place in the order of keyed hashes.
    """

    def __init__(
        self,
        keys: Mapping[int, Keys],
        judged: Mapping[int, NDArray[np.bool_]],
        limits: Mapping[int, Limit],
        order: int,
        never: Collection[Key],
    ) -> None:
        self.clients, self.limits = list(keys), limits
        together = np.concatenate([np.zeros(0, KEY), *keys.values()])
        names, inverse = np.unique(together, return_inverse=True)
        places = _places(names, order)
        ends = np.cumsum([len(own) for own in keys.values()])[:-1]
        self.own = dict(zip(keys, np.split(places[inverse], ends), strict=True))
        self.never = np.zeros(len(names), np.bool_)
        self.never[places] = np.isin(names, np.array(list(never), KEY))
        self.groups: dict[int, Positions] = {}
        self.sizes: dict[int, Positions] = {}
        self.judged: dict[int, NDArray[np.bool_]] = {}
        for client, own in self.own.items():
            self.groups[client], self.sizes[client] = np.unique(own, return_counts=True)
            self.judged[client] = np.isin(self.groups[client], own[judged[client]])
        # who holds a group stands one after another, in the order of the clients
        groups = np.concatenate([np.zeros(0, np.int64), *self.groups.values()])
        by_group = np.argsort(groups, kind="stable")
        self._starts = np.searchsorted(groups[by_group], np.arange(len(names) + 1))
        numbers = np.arange(len(self.clients))
        self._who = np.repeat(numbers, [len(own) for own in self.groups.values()])[by_group]
        self._rows = np.concatenate([np.zeros(0, np.int64), *self.sizes.values()])[by_group]
        self._fit = np.concatenate([np.zeros(0, np.bool_), *self.judged.values()])[by_group]
        self.chosen: dict[int, dict[int, int]] = {client: {} for client in keys}
        self.left = {client: len(own) for client, own in keys.items()}
        self.settled: set[int] = set()

    def holders(self, group: int) -> list[tuple[int, int]]:
        """Return who holds a group, each with how many rows of it."""
        own = slice(self._starts[group], self._starts[group + 1])
        who = (self.clients[number] for number in self._who[own].tolist())
        return list(zip(who, self._rows[own].tolist(), strict=True))

    def empty(self) -> list[int]:
        """Return the clients that were to hold out rows and have none."""
        return [
            client
            for client, own in self.chosen.items()
            if self.limits[client].rows and not own and client not in self.settled
        ]

    def taken(self) -> frozenset[int]:
        """Return all groups that are held out by somebody."""
        return frozenset().union(*self.chosen.values())

    def has(self, client: int) -> NDArray[np.bool_]:
        """Return ``(rows,)`` whether a client's rows are of groups that it holds out."""
        return np.isin(self.own[client], list(self.chosen[client]))

    def are_taken(self) -> dict[int, NDArray[np.bool_]]:
        """Return for each client ``(rows,)`` whether its rows are of groups that somebody holds out."""
        taken = np.zeros(len(self.never), np.bool_)
        taken[list(self.taken())] = True
        return {client: taken[own] for client, own in self.own.items()}

    def settle(self, held: Mapping[int, int]) -> None:
        """Take note of clients that hold out so many rows otherwise."""
        for client, rows in held.items():
            self.settled.add(client)
            self.left[client] -= rows

    def together(self) -> None:
        """Hold out groups that have room with everybody who has them, so that no row is lost."""
        room = {client: limit.rows for client, limit in self.limits.items()}
        waiting = {client for client, rows in room.items() if rows}
        for group in self._with_room() if waiting else []:
            if not waiting:
                return
            who = self.holders(int(group))
            if any(rows > room[client] for client, rows in who):
                continue
            for client, rows in who:
                self._take(client, int(group), rows)
                room[client] -= rows
                if not room[client]:
                    waiting.discard(client)

    def _with_room(self) -> Positions:
        """Return the groups that all who have them could hold out, if they held out nothing else."""
        if not len(self._rows):
            return np.zeros(0, np.int64)
        room = np.array([self.limits[client].rows for client in self.clients])
        fit = np.logical_and.reduceat(
            self._fit & (self._rows <= room[self._who]), self._starts[:-1]
        )
        return np.flatnonzero(fit & ~self.never)

    def least_harm(self, *, any_size: bool) -> None:
        """Give each client that holds out nothing the group of which others have fewest rows."""
        whole = sum(self.left.values())
        claimed = set(self.taken())
        for client in self.empty():
            best: tuple[int, bool, int, int] | None = None
            own = len(self.own[client])
            judged = self.judged[client]
            pairs = zip(self.groups[client][judged], self.sizes[client][judged], strict=True)
            for group, size in ((int(one), int(rows)) for one, rows in pairs):
                if self.never[group] or 2 * size > own:
                    continue
                if size > self.limits[client].most and not any_size:
                    continue
                lost = 0
                if group not in claimed:
                    who = self.holders(group)
                    lost = sum(rows for other, rows in who if other != client)
                    if any(self.left[other] <= rows for other, rows in who):
                        continue
                    if 2 * (lost + size) > whole:
                        continue
                found = (lost, group not in claimed, size, group)
                best = found if best is None or found < best else best
            if best is None:
                continue
            size, group = best[2:]
            if group in claimed:
                self.chosen[client][group] = size
                continue
            claimed.add(group)
            for other, rows in self.holders(group):
                if other == client or self._fits_too(other, group, rows):
                    self._take(other, group, rows)
                else:
                    self.left[other] -= rows

    def _fits_too(self, client: int, group: int, rows: int) -> bool:
        """Return whether a client may hold out a group more, up to twice its share: else it loses it."""
        limit, held = self.limits[client], sum(self.chosen[client].values())
        judged = self.judged[client][np.searchsorted(self.groups[client], group)]
        return bool(judged) and held + rows <= min(limit.most, 2 * limit.rows)

    def _take(self, client: int, group: int, rows: int) -> None:
        self.chosen[client][group] = rows
        self.left[client] -= rows


def _places(names: Keys, order: int) -> Positions:
    """Return each group's place in the order of keyed hashes; those that are alike by their keys."""
    hashes = (int.from_bytes(keyed(name, order)[0], "big") for name in _bytes(names))
    by_hash = np.argsort(np.fromiter(hashes, np.uint64, len(names)), kind="stable")
    places = np.empty(len(names), np.int64)
    places[by_hash] = np.arange(len(names))
    return places


def _bytes(keys: Keys) -> Iterator[Key]:
    """Yield keys as they are, zeros at their ends too."""
    return (key.ljust(SIZE, b"\0") for key in keys)


def _by_row(
    rows: Mapping[int, Sequence[Example]],
    chooser: _Chooser,
    judged: Mapping[int, NDArray[np.bool_]],
    limits: Mapping[int, Limit],
    order: int,
    never: Collection[Key],
    any_size: bool,
) -> dict[int, Positions]:
    """Return the positions that clients with too few prompts hold out, by prompt and completion.

    Rows whose prompt another client holds out are not among them: they are left out of training.
    """
    empty = chooser.empty()
    places = {client: np.flatnonzero(~taken) for client, taken in chooser.are_taken().items()}
    whole = {client: _whole_keys(take(rows[client], own)) for client, own in places.items()}
    useful = {client: judged[client][own] for client, own in places.items()}
    own_limits = {
        client: Limit(
            min(limits[client].rows, max(0, len(own) - 1)) if client in empty else 0,
            limits[client].most,
        )
        for client, own in places.items()
    }
    by_row = _Chooser(whole, useful, own_limits, order, never)
    by_row.together()
    if any_size:
        by_row.least_harm(any_size=True)
    return {client: places[client][by_row.has(client)] for client in empty}


def _whole_keys(rows: Sequence[Example]) -> Keys:
    """Return each row's key; what was made of one row of the data stays together."""
    _, first, own = np.unique(row_numbers(rows), return_index=True, return_inverse=True)
    keys: Keys = row_keys(rows)[first[own]]
    return keys


def _sides(
    rows: Mapping[int, Sequence[Example]],
    judged: Mapping[int, NDArray[np.bool_]],
    limits: Mapping[int, Limit],
    order: int,
    held: Mapping[int, Positions],
    claimed: Mapping[int, NDArray[np.bool_]],
    copies: Collection[int],
    column: str | None,
    over: str,
) -> Split:
    """Put every row on its side, and count those that are on neither.

    ``held`` are positions of the rows of held-out groups, ``claimed`` which rows are of such groups; of
    the held-out rows of ``copies`` exact duplicates are left out of training.
    """
    result = Split({}, {}, {client: Counter() for client in rows})
    for client, own in rows.items():
        useful = held[client][judged[client][held[client]]]
        result.dropped[client][NOT_JUDGED] = len(held[client]) - len(useful)
        if len(useful) > limits[client].most:
            drawn = np.argsort(_places(row_keys(take(own, useful)), order), kind="stable")
            result.dropped[client][over] = len(useful) - limits[client].most
            useful = np.sort(useful[drawn[: limits[client].most]])
        result.held_out[client] = useful.tolist()
    aside = [row_keys(take(rows[client], held[client])) for client in copies]
    whole = np.concatenate([np.zeros(0, KEY), *aside])
    for client, own in rows.items():
        trained = np.ones(len(own), np.bool_)
        trained[held[client]] = False
        alike = trained & claimed[client]
        trained &= ~claimed[client]
        kept = np.flatnonzero(trained)
        copied = np.isin(row_keys(take(own, kept)), whole) if len(whole) else kept < 0
        kept = kept[~copied]
        for reason, count in ((same(column), alike.sum()), (SAME_ROW, copied.sum())):
            if count:
                result.dropped[client][reason] = int(count)
        if len(own) and not len(kept):
            who = f"client {client}" if client >= 0 else "training"
            raise DataError(
                f"{who} would have no row to train on: of its {len(own)} rows "
                f"{_told(result.dropped[client])}, and {len(result.held_out[client])} are held out; use "
                "fewer clients, a larger partition.minimum, or partition.client_test_fraction = 0"
            )
        result.trained[client] = kept.tolist()
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
    return hashlib.blake2b(data, digest_size=SIZE, person=what.encode()).digest()
