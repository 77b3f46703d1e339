"""The rows of an experiment: partitioned among clients, held out, public.

No model is needed for it, so that it can be shown before one is loaded (``assembly.py`` does that).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.accounting.quantities import human_count
from fedloom.data.contamination import benchmark_texts
from fedloom.data.duplicates import near_duplicates
from fedloom.data.examples import Example, Instruction, Labelled, Preference, as_choice
from fedloom.data.feedback_partition import FeedbackPartition, partition_feedback, undivided
from fedloom.data.loading import (
    OVER_MOST,
    DataSource,
    LoadedData,
    decontaminated,
    few,
    load_examples,
    without_judged,
)
from fedloom.data.partition import Indices, LabelDistribution, partition, shares
from fedloom.data.public import as_task, read_public, take_public
from fedloom.data.row_accounting import Account, Accounts, added
from fedloom.data.sources import CLIENTS as ELSEWHERE
from fedloom.data.sources import DataSettings
from fedloom.data.splits import (
    SAME_GROUP,
    SAME_PROMPT,
    SAME_ROW,
    Split,
    group_key,
    group_keys,
    limit_of,
    row_key,
    row_keys,
    split,
)
from fedloom.data.stored_rows import StoredRows, are_pairs, labels_of, row_numbers, take
from fedloom.data.tokenize import MARGIN
from fedloom.display.untrusted_text import placed
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.objectives import make_objective
from fedloom.objectives.base import Objective
from fedloom.randomness import derive_seed, generator
from fedloom.settings.plugins import Choices

AGAIN = "held out already (a row that the mixture repeats)"
UNROLLED = "pairs as two single answers"
PARTITIONED_ANEW = 'answers redistributed (partition.feedback = "spread")'
SHOWN_PAIRS = 3
"""Near-duplicates that are named."""


def _lacks_load(kind: type[Any]) -> list[str]:
    return [] if callable(getattr(kind, "load", None)) else ["it must define load(rng)"]


SOURCES: Choices[Any] = Choices("fedloom.sources", {}, object, _lacks_load)
"""Classes of others that ``data.source`` may name."""


def own_source(settings: DataSettings) -> str | None:
    """Return the class that ``data.source`` names, ``None`` where it names rows; imports nothing."""
    name = settings.source
    if not isinstance(name, str) or settings.is_builtin or settings.is_private or settings.domains:
        return None
    return name if SOURCES.is_foreign(name) and not Path(name).exists() else None


@dataclass(frozen=True)
class PartitionedData:
    """The rows of all parties, before any model is loaded.

    Attributes:
        loaded: What was read.
        train: Training rows of each client; with data.streaming they stay in their files.
        held_out: Rows of each client kept for its own evaluation.
        test: The global held-out set.
        classes: Class names in the order of their ids; empty unless the data is labelled.
        shares: Label distribution of each client, for the table and the picture.
        feedback: The account of pairs where single answers are trained on, else ``None``.
        public: Rows that every party has; empty where no method needs them.
        judged: Kind of the global held-out set.
        accounts: The account of every row.
        files: What was read of each client's file, where each has its own.
    """

    loaded: LoadedData
    train: dict[int, Sequence[Example]]
    held_out: dict[int, list[Example]]
    test: list[Example]
    classes: tuple[str, ...]
    shares: LabelDistribution
    feedback: FeedbackPartition | None = None
    public: tuple[Example, ...] = ()
    judged: str = ""
    accounts: Accounts = field(default_factory=lambda: Accounts(Account(0)))
    files: Mapping[int, LoadedData] = field(default_factory=dict)

    def place(self, client: int, row: int) -> tuple[str, int]:
        """Return where a client's row stands: the name of its file or set, and its number there."""
        return self.files.get(client, self.loaded).place(row)


@dataclass(frozen=True)
class OwnRows:
    """The rows of one client on its own machine, which nobody else reads.

    Attributes:
        client: Its number.
        data: Where they are and how they are read.
        classes: Class names in the order of their ids, as the coordinator has them; ``None`` for those
            that the rows have, where no coordinator was asked.
    """

    client: int
    data: DataSettings
    classes: tuple[str, ...] | None


def partition_data(
    experiment: Experiment,
    source: DataSource | None = None,
    objective: Objective | None = None,
    *,
    own: OwnRows | None = None,
) -> PartitionedData:
    """Read the data and partition it among the clients.

    Args:
        experiment: The settings.
        source: A user's own source of examples instead of the one in the settings.
        objective: A user's own objective: pairs are unrolled where it trains on feedback.
        own: All rows of this one client instead; there is no partition then.

    Raises:
        DataError: The data cannot be read, a client would be left without rows, or has others' classes.
    """
    loaded, files = _read(experiment, source, objective, own)
    by_files = own is None and bool(files)
    classes = _known_classes(experiment, objective, own, loaded)
    limit = experiment.evaluation
    judged = list(few(loaded.test, limit.max_examples, _drawing(experiment)))
    loaded, public, public_account = _with_public(experiment, loaded, judged, classes)
    pools = _partitioned(experiment, loaded, own, files)
    sides = _sides(experiment, loaded, pools, public, apart=by_files)
    train = {c: take(pools[c], kept) for c, kept in sides.trained.items()}
    held_out = {c: list(take(pools[c], aside)) for c, aside in sides.held_out.items()}
    warnings = [
        *loaded.warnings,
        *_split_warnings(sides, train, held_out),
        *(_overlaps(experiment, train, held_out, judged, sides) if by_files else ()),
    ]
    answers, feedback = _as_trained(experiment, objective, train)
    taken = 0 if public_account else len(public)
    accounts = _accounts(loaded, files, pools, sides, train, answers, taken)
    accounts = replace(accounts, public=public_account)
    if accounts.test is not None:
        over = {OVER_MOST: len(loaded.test) - len(judged)}
        accounts = replace(accounts, test=accounts.test.dropping(over, judged=len(judged)))
    division = PartitionedData(
        loaded,
        answers,
        {c: _judged(rows, experiment) for c, rows in held_out.items()},
        _judged(judged, experiment),
        classes,
        shares(list(answers.values()), experiment.partition),
        feedback,
        tuple(public),
        judged_kind(experiment, loaded.held_out_kind),
        accounts,
        files,
    )
    threshold = experiment.data.near_duplicates
    if threshold is not None:
        warnings += _near(division, train, held_out, judged, threshold)
    warnings = [*_left_out(accounts.source.dropped), *warnings]
    return replace(division, accounts=replace(accounts, warnings=tuple(warnings)))


def _judged_once(sides: Split, pools: Mapping[int, Sequence[Example]]) -> Split:
    """Return the sides without held-out rows that are there again, as a mixture repeats rows."""
    held_out: dict[int, list[int]] = {}
    dropped = {client: Counter(counts) for client, counts in sides.dropped.items()}
    for client, aside in sides.held_out.items():
        rows = take(pools[client], aside)
        own = zip(row_numbers(rows).tolist(), row_keys(rows).tolist(), strict=True)
        once = dict(zip(own, aside, strict=True))
        held_out[client] = sorted(once.values())
        dropped[client][AGAIN] += len(aside) - len(held_out[client])
    return replace(sides, held_out=held_out, dropped=dropped)


def _as_trained(
    experiment: Experiment, objective: Objective | None, train: dict[int, Sequence[Example]]
) -> tuple[dict[int, Sequence[Example]], FeedbackPartition | None]:
    """Return the rows as the objective trains on them, and the account of pairs made single answers."""
    if (objective or make_objective(experiment.objective)).kind != "feedback":
        return train, None
    stored = {c: rows for c, rows in train.items() if isinstance(rows, StoredRows)}
    if stored:
        return train, undivided(stored)
    together = experiment.partition.feedback == "together"
    rng = None if together else generator(experiment.federation.seed, "feedback")
    feedback = partition_feedback(train, rng)
    return {client: list(rows) for client, rows in feedback.rows.items()}, feedback


def judged_kind(experiment: Experiment, kind: str) -> str:
    """Return what held-out rows of a kind are judged as: see the kinds of ``PRIMARY_METRICS``."""
    if kind == "preference" and experiment.compares:
        return "selection"
    if kind == "preference" and experiment.scores_answers:
        return "reward"
    if kind != "instruction":
        return kind
    if experiment.data.choices:
        return "choice"
    own = {"rouge_l": "answer", "exact_match": "exact"}
    return own.get(experiment.evaluation.judged_by, kind)


def only(division: PartitionedData, client: int) -> PartitionedData:
    """Return the part of one client."""
    return replace(
        division,
        train={client: division.train[client]},
        held_out={client: division.held_out[client]},
        accounts=replace(
            division.accounts, clients={client: division.accounts.clients[client]}, warnings=()
        ),
    )


def _read(
    experiment: Experiment,
    source: DataSource | None,
    objective: Objective | None,
    own: OwnRows | None,
) -> tuple[LoadedData, dict[int, LoadedData]]:
    """Return all rows, and what was read of each client's own file where each has one."""
    if own is not None:
        kept = _columns_of_clients(own.data, experiment, objective)
        loaded = _whole(own.data, experiment.federation.seed, own.classes, kept)
        return loaded, {own.client: loaded}
    if source is None and experiment.partition.kind == "files":
        return _by_files(experiment, objective)
    return _loaded(experiment, source, objective), {}


def _loaded(
    experiment: Experiment, source: DataSource | None, objective: Objective | None
) -> LoadedData:
    """Return what the experiment's sources hold, or a user's own, with the held-out set set apart."""
    rng, most = generator(experiment.federation.seed, "data"), experiment.evaluation.max_examples
    drawing = _drawing(experiment)
    named = own_source(experiment.data)
    if source is not None or named is not None:
        _require_rows_as_given(experiment.data)
    if experiment.data.streaming and (source is not None or named is not None):
        raise DataError(
            "data.streaming = true reads rows of files and of the Hub, and a source of your own gives "
            "its examples itself: leave data.streaming out"
        )
    if source is None and named is not None:
        try:
            source = SOURCES[named][1](experiment.data)
        except SettingsError as error:
            raise SettingsError(
                [f"data.source = {named!r}: {t}" for t in error.problems]
            ) from error
    if source is None:
        column = experiment.partition.column or "label"
        return load_examples(experiment.data, rng, most, drawing=drawing, column=column)
    loaded = source.load(rng)
    _require_kind(experiment, loaded.kind, source, objective)
    taken = few(loaded.test, most, drawing)
    train, dropped, warnings = without_judged(loaded.train, taken, experiment.data.group)
    account = Account(len(loaded.train)).dropping(dropped, trained=len(train))
    judged = Account(len(loaded.test), judged=len(loaded.test))
    return replace(
        loaded, train=train, account=account, test_account=judged, warnings=warnings, places=()
    )


def _require_rows_as_given(data: DataSettings) -> None:
    """Check that nothing is asked for that is done where rows are read.

    Raises:
        DataError: A user's own source, which gives examples, would leave it undone.
    """
    asked = {
        "data.map": bool(data.map),
        "data.filter": data.filter is not None,
        "data.deduplicate": data.deduplicate,
        "data.decontaminate": data.decontaminate != "off",
    }
    told = [name for name, there in asked.items() if there]
    if told:
        raise DataError(
            f"{' and '.join(told)}: of rows that are read from files and the Hub, and a source of your "
            "own gives its examples itself: do it in its load(), and leave the setting out"
        )


def _require_kind(
    experiment: Experiment, kind: str, source: DataSource, objective: Objective | None
) -> None:
    """Check that the examples of a user's own source are what it, or ``[data]``, says of them.

    Raises:
        DataError: They are of another kind, or of one that the objective cannot train on.
    """
    said, name = experiment.data.kind, experiment.objective.name
    needed = (objective or make_objective(experiment.objective)).accepts
    who = f"load() of {type(source).__qualname__} returned {kind} examples"
    if said not in (None, kind):
        raise DataError(f"{who}, and their kind is said to be {said!r}: mend one of them")
    if kind not in needed:
        raise DataError(
            f"{who}, and objective.name = {name!r} needs {' or '.join(needed)} data: say kind = {kind!r} "
            "in the class, and choose an objective for it"
        )


def _columns_of_clients(
    data: DataSettings, experiment: Experiment, objective: Objective | None
) -> Collection[str]:
    """Return the columns that a client's own rows keep: other columns are for dealing rows."""
    reads = (objective or make_objective(experiment.objective)).reads_margins
    return {*([data.group] if data.group is not None else []), *([MARGIN] if reads else [])}


def _whole(
    data: DataSettings, seed: int, classes: tuple[str, ...] | None, kept: Collection[str]
) -> LoadedData:
    """Return all rows of one client, as they are read on its own machine.

    Args:
        data: Where they are and how they are read.
        seed: The experiment's.
        classes: Those that rows may have; ``None`` for any.
        kept: Columns that rows keep (:func:`_columns_of_clients`).

    Raises:
        DataError: They cannot be read, or are of other classes than the coordinator's.
    """
    loaded = load_examples(data, generator(seed, "data"), hold_out=False)
    rows = [
        replace(row, columns={name: own for name, own in row.columns.items() if name in kept})
        for row in loaded.train
    ]
    if classes is not None:
        _require_known(rows, classes)
    return replace(loaded, train=rows)


def _by_files(
    experiment: Experiment, objective: Objective | None
) -> tuple[LoadedData, dict[int, LoadedData]]:
    """Return the held-out rows, and each client's own: those of a file, read as between machines.

    Raises:
        DataError: A file cannot be read, or holds other classes than the held-out rows.
    """
    data, seed = experiment.data, experiment.federation.seed
    # once all is read: with the coordinator's rows there is nothing to compare, nor with a file's alone
    alone = {"decontaminate": "off"}
    coordinators = data.model_copy(update={"source": ELSEWHERE, **alone})
    loaded = load_examples(coordinators, generator(seed, "data"))
    classes = _classes(loaded.test)
    kept = _columns_of_clients(data, experiment, objective)
    files: dict[int, LoadedData] = {}
    for client, source in enumerate(data.sources):
        apart = {"source": source, "test_source": None, "test_split": None, "test_kind": None}
        files[client] = _whole(data.model_copy(update=apart | alone), seed, classes, kept)
    if data.decontaminate != "off":
        benchmarks = benchmark_texts(data)
        for client, read in files.items():
            try:
                files[client] = decontaminated(read, loaded.test, benchmarks, data)
            except DataError as error:
                raise DataError(f"client {client}: {error}") from None
    digests = [loaded.digest, *(read.digest for read in files.values())]
    dropped = loaded.dropped
    account = Account(0)
    for read in files.values():
        dropped = added(dropped, read.dropped)
        own = read.account or Account(0)
        account = account.dropping(
            own.dropped,
            rows=account.rows + own.rows,
            malformed=account.malformed + own.malformed,
            made=added(account.made, own.made),
        )
    together = replace(
        loaded,
        train=[row for read in files.values() for row in read.train],
        digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
        bad_rows=(*loaded.bad_rows, *(bad for read in files.values() for bad in read.bad_rows)),
        dropped=dropped,
        account=account,
        warnings=(
            *loaded.warnings,
            *(f"client {c}: {text}" for c, read in files.items() for text in read.warnings),
        ),
        layouts=tuple(
            dict.fromkeys(line for read in (loaded, *files.values()) for line in read.layouts)
        ),
    )
    return together, files


def _with_public(
    experiment: Experiment,
    loaded: LoadedData,
    test: Sequence[Example],
    classes: tuple[str, ...],
) -> tuple[LoadedData, list[Example], Account | None]:
    """Return the data without what is taken from it as public rows, these where the method needs them.

    And what became of the rows of their own source, if they have one.
    """
    if not METHODS[experiment.method.name][1].public_rows_needed(experiment.method):
        return loaded, [], None
    settings, seed = experiment.public, experiment.federation.seed
    account = None
    if settings.source is None:
        public, train = take_public(
            loaded.train,
            test,
            settings,
            generator(seed, "public rows"),
            experiment.data.group,
        )
        loaded = replace(loaded, train=train)
    else:
        rng = generator(seed, "public rows")
        public, account, warnings = read_public(settings, experiment.data, test, rng)
        loaded = replace(loaded, warnings=(*loaded.warnings, *warnings))
    return loaded, as_task(public, classes, labelled=settings.labelled), account


def _partitioned(
    experiment: Experiment,
    loaded: LoadedData,
    own: OwnRows | None,
    files: Mapping[int, LoadedData],
) -> dict[int, Sequence[Example]]:
    """Return the rows of each client; none where clients on other machines have their own.

    Args:
        experiment: With the settings of the partition.
        loaded: All rows, without those that were taken out as public ones.
        own: The only client that is in this process.
        files: What was read of each client's own file, where each has one.
    """
    if own is not None:
        return {own.client: loaded.train}
    if files:
        return {client: read.train for client, read in files.items()}
    count, seed = experiment.federation.clients, experiment.federation.seed
    if experiment.data.is_private:
        return {client: [] for client in range(count)}
    rng = generator(seed, "partition")
    dealt: list[Indices] = partition(
        loaded.train, experiment.partition, count, rng, experiment.data.group
    )
    return {client: take(loaded.train, own) for client, own in enumerate(dealt)}


def _sides(
    experiment: Experiment,
    loaded: LoadedData,
    pools: Mapping[int, Sequence[Example]],
    public: Sequence[Example],
    *,
    apart: bool,
) -> Split:
    """Split each client's rows into training and held-out rows.

    ``apart``: each by itself, as on machines of their own, where nobody knows of the others' rows.
    """
    column, evaluation = experiment.data.group, experiment.evaluation
    # where nobody judges them, rows are not kept from training
    fraction = experiment.partition.client_test_fraction if experiment.judges_clients else 0.0
    limits = {
        client: limit_of(len(rows), fraction, evaluation.client_max_examples)
        for client, rows in pools.items()
    }
    never = {group_key(row) for row in public} | {row_key(row) for row in public}
    if column is not None:
        ungrouped = {group_key(row) for row in public if column not in row.columns}
        never |= {group_key(row, column) for row in public if column in row.columns}
        if ungrouped:  # whoever has its prompt has it in the group's place
            every = (row for own in pools.values() for row in own)
            never |= {group_key(row, column) for row in every if group_key(row) in ungrouped}
    order = derive_seed(experiment.federation.seed, "client test")
    whole = Preference if loaded.kind == "preference" else None  # single answers are not judged
    parts = [
        split(
            {client: pools[client] for client in clients},
            limits,
            order,
            column,
            never=never,
            only=whole,
            over="over evaluation.client_max_examples",
        )
        for clients in ([[client] for client in pools] if apart else [list(pools)])
    ]
    sides = Split(
        {c: kept for part in parts for c, kept in part.trained.items()},
        {c: aside for part in parts for c, aside in part.held_out.items()},
        {c: counts for part in parts for c, counts in part.dropped.items()},
        tuple(c for part in parts for c in part.by_row),
        tuple(c for part in parts for c in part.without),
    )
    repeats = experiment.data.stopping_strategy == "all_exhausted"
    return _judged_once(sides, pools) if repeats else sides


def _drawing(experiment: Experiment) -> np.random.Generator:
    """Return what draws the global held-out rows that are judged, of more than there may be."""
    return generator(experiment.federation.seed, "held-out", -1)


def _judged(rows: list[Example], experiment: Experiment) -> list[Example]:
    """Return held-out rows as they are judged: choices, where all completions are known."""
    choices = experiment.data.choices
    return [
        as_choice(row, choices) if choices and isinstance(row, Instruction) else row for row in rows
    ]


def _accounts(
    loaded: LoadedData,
    files: Mapping[int, LoadedData],
    pools: Mapping[int, Sequence[Example]],
    sides: Split,
    train: Mapping[int, Sequence[Example]],
    answers: Mapping[int, Sequence[Example]],
    public: int,
) -> Accounts:
    """Return the account of every row, before tokenising.

    Args:
        loaded: What was read and is dealt.
        files: What was read of each client's own file.
        pools: Rows that each client has.
        sides: What each client trains on and holds out.
        train: Rows that each trains on.
        answers: The same as they are trained on: pairs may be two single answers, dealt anew.
        public: How many rows were taken out as public ones.
    """
    source = loaded.account or Account(0)
    clients = {}
    for client, rows in train.items():
        read = files[client].account if client in files else None
        if read is None and not pools[client]:
            continue  # its rows are elsewhere
        dropped = sides.dropped[client]
        pairs = 0
        if answers is not train:
            pairs = int(are_pairs(rows).sum())
        made = {UNROLLED: pairs, PARTITIONED_ANEW: len(answers[client]) - len(rows) - pairs}
        account = read or Account(len(pools[client]))
        clients[client] = account.dropping(
            dropped,
            made=added(account.made, made),
            public=public if read else 0,
            trained=len(answers[client]),
            held_out=len(sides.held_out[client]),
        )
        source = source.dropping(dropped, made=added(source.made, made))
    if clients:
        source = replace(
            source,
            public=public,
            trained=sum(account.trained for account in clients.values()),
            held_out=sum(account.held_out for account in clients.values()),
        )
    return Accounts(source, loaded.test_account, None, clients)


def _left_out(dropped: Mapping[str, int]) -> list[str]:
    """Return a warning of training rows that were left out since something like them is judged."""
    reasons = [(dropped[r], r) for r in (SAME_PROMPT, SAME_GROUP, SAME_ROW) if dropped.get(r)]
    if not reasons:
        return []
    told = ", ".join(f"{human_count(count)} with the {reason}" for count, reason in reasons)
    return [f"training rows left out: {told}"]


def _split_warnings(
    sides: Split,
    train: Mapping[int, Sequence[Example]],
    held_out: Mapping[int, Sequence[Example]],
) -> list[str]:
    """Return what could not be divided as it should be."""
    found = []
    if sides.by_row:
        known = np.concatenate([group_keys(rows) for rows in train.values()])
        rows = [row for client in sides.by_row for row in held_out[client]]
        both = int(np.isin(group_keys(rows), known).sum())
        found.append(
            f"{_named(sides.by_row)} too few prompts to hold one out: rows are held out by prompt and "
            f"completion, and {human_count(both)} of {human_count(len(rows))} held-out rows have "
            "their prompt in training"
        )
    if sides.without:
        found.append(
            f"{_named(sides.without)} no rows to be judged by: more than half are of one group, or alike"
        )
    return found


def _named(clients: Sequence[int]) -> str:
    """Return who has something, of many clients the first."""
    shown = ", ".join(str(client) for client in clients[:5])
    more = f" and {len(clients) - 5} more" if len(clients) > 5 else ""
    return f"client {shown} has" if len(clients) == 1 else f"clients {shown}{more} have"


def _overlaps(
    experiment: Experiment,
    train: Mapping[int, Sequence[Example]],
    held_out: Mapping[int, Sequence[Example]],
    test: Sequence[Example],
    sides: Split,
) -> list[str]:
    """Return a warning of rows that would be left out if clients on machines of their own knew others'.

    A row counts that has the group of a row that another client, or the coordinator, holds out.
    """
    column = experiment.data.group

    def keys(row: Example) -> set[bytes]:
        own = {group_key(row), row_key(row)}
        return own | ({group_key(row, column)} if column in row.columns else set())

    def claim(row: Example, *, whole: bool = False) -> bytes:
        return row_key(row) if whole else group_key(row, column if column in row.columns else None)

    claims = {
        client: {claim(row, whole=client in sides.by_row) for row in rows}
        for client, rows in held_out.items()
    }
    claimed = Counter(key for own in claims.values() for key in own)
    judged = {claim(row) for row in test}
    count = shared = 0
    for client, rows in train.items():
        for row in rows:
            own = keys(row)
            count += any(claimed[key] > (key in claims[client]) for key in own)
            shared += not own.isdisjoint(judged)
    if not count and not shared:
        return []
    what = "prompt" if column is None else "data.group"
    return [
        f"{human_count(count)} training rows have the {what} of a row that another client holds "
        "out, and "
        f"{human_count(shared)} that of a row of the global held-out set; they are trained on, "
        "as between machines "
        "nobody can know of them"
    ]


def _near(
    division: PartitionedData,
    train: Mapping[int, Sequence[Example]],
    held_out: Mapping[int, Sequence[Example]],
    test: Sequence[Example],
    threshold: float,
) -> list[str]:
    """Return a warning of held-out rows that are nearly the same as one that is trained on."""
    trained = [(client, row) for client, rows in train.items() for row in rows]
    judged = [(-1, row) for row in test]
    judged += [(client, row) for client, rows in held_out.items() for row in rows]
    found = near_duplicates([row for _, row in judged], [row for _, row in trained], threshold)
    if not found:
        return []
    pairs = []
    for one, other in list(found.items())[:SHOWN_PAIRS]:
        (owner, row), (client, near) = judged[one], trained[other]
        elsewhere = owner < 0 and division.loaded.test_account is not None
        where = f"the test set's row {row.row}" if elsewhere else _shown_place(division, owner, row)
        pairs.append(f"{where} and {_shown_place(division, client, near)}")
    everyone = sum(position < len(test) for position in found)
    return [
        f"near-duplicates (Jaccard {threshold:g} of word 3-grams): {human_count(everyone)} of "
        f"{human_count(len(test))} rows of "
        f"the global held-out set and {human_count(len(found) - everyone)} of "
        f"{human_count(len(judged) - len(test))} that "
        f"clients hold out have one in training, such as {'; '.join(pairs)}"
    ]


def _shown_place(division: PartitionedData, client: int, row: Example) -> str:
    return placed(*division.place(client, row.row))


def _known_classes(
    experiment: Experiment, objective: Objective | None, own: OwnRows | None, loaded: LoadedData
) -> tuple[str, ...]:
    """Return the classes that the coordinator knows, the objective has, or the rows are of."""
    if own is not None and own.classes is not None:
        return own.classes
    outputs = (objective or make_objective(experiment.objective)).outputs
    return outputs or _classes(loaded.train, loaded.test)


def _classes(*several: Sequence[Example]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*map(labels_of, several))))


def _require_known(rows: Sequence[Example], classes: tuple[str, ...]) -> None:
    """Check that the coordinator knows the classes of a client's rows.

    Raises:
        DataError: A row is of another one.
    """
    other = [row for row in rows if isinstance(row, Labelled) and row.label not in classes]
    if other:
        raise DataError(
            f"{len(other)} of {len(rows)} rows are of classes that the coordinator's held-out set does "
            f"not have, such as {other[0].label!r} in row {other[0].row}; it has: {', '.join(classes)}"
        )
