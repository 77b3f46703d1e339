"""Tokenises the rows of an experiment for one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Example, Instruction, first_answer, last_answer, plain_text
from fedloom.data.reader import BadRow, check_bad
from fedloom.data.row_accounting import Cut, cuts_of
from fedloom.data.sources import LONGEST_SEQUENCE
from fedloom.data.stored_rows import joined
from fedloom.data.token_set import TokenSet, Untokenized
from fedloom.data.tokenize import LARGEST_MARGIN, tokenize
from fedloom.errors import DataError, ModelError
from fedloom.evaluation.held_out import Answering, HeldOut
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.models.consistency import embedded
from fedloom.objectives.base import Objective
from fedloom.randomness import generator
from fedloom.runs.partitioning import PartitionedData
from fedloom.storage.cache import cache_folder
from fedloom.training.layout import tokens_per_pass
from fedloom.training.reference_cache import ReferenceCache


def bad_rows_in_all(
    experiment: Experiment,
    division: PartitionedData,
    read: Mapping[int, tuple[Cut, Sequence[Untokenized]]],
    held_out: Mapping[int, TokenSet],
    judged: Sequence[Untokenized] = (),
) -> list[BadRow]:
    """Return the malformed rows, those among them that cannot be tokenised.

    Raises:
        DataError: There are too many.
    """
    own: list[BadRow] = []
    tests: list[BadRow] = []
    for client, (_, lost) in read.items():
        more = held_out[client].dropped if client in held_out else ()
        for one in (*lost, *more):
            if one.malformed:
                own.append(BadRow(*division.place(client, one.row), one.reason))
    accounts, most = division.accounts, experiment.data.max_bad_share
    for one in judged:
        if one.malformed and accounts.test:
            tests.append(BadRow("the test set", one.row, one.reason))
        elif one.malformed:
            own.append(BadRow(*division.place(-1, one.row), one.reason))
    own = list(dict.fromkeys(own))  # a pair whose answers are apart is one row
    check_bad("the data", own, accounts.source.rows, most)
    if accounts.test:
        check_bad("the test set", tests, accounts.test.rows, most)
    return [*division.loaded.bad_rows, *own, *tests]


def longest(max_length: int | None, context: int) -> int:
    """Return how many tokens a sequence has at most.

    Args:
        max_length: ``data.max_length``, or that of public rows.
        context: Tokens that the model reads.
    """
    return min(max_length or LONGEST_SEQUENCE, context)


def _require_margins(client: int, tokens: TokenSet) -> None:
    """Check that the column margin of every pair, where there is one, is a number.

    Raises:
        DataError: It is not; the first such row is named.
    """
    wrong = (
        np.zeros(0, np.int64) if tokens.margins is None else np.isnan(tokens.margins).nonzero()[0]
    )
    if len(wrong):
        raise DataError(
            f"the column margin is no number from {-LARGEST_MARGIN:g} to {LARGEST_MARGIN:g} in "
            f"{len(wrong)} rows of client {client}, such as row {tokens.rows[wrong[0]]}: correct it, or "
            "leave margins out with objective.margins = false"
        )


class TokenReader:
    """Tokenises each part of the rows, counting dropped rows."""

    def __init__(
        self,
        experiment: Experiment,
        division: PartitionedData,
        objective: Objective,
        encoder: TextEncoder,
        model: AdapterModel,
        context: int,
        references: ReferenceCache | None = None,
    ) -> None:
        self.experiment, self.division, self.objective = experiment, division, objective
        self.encoder, self.context = encoder, context
        self.embedded = embedded(model.model)
        self.max_length = longest(experiment.data.max_length, context)
        self.references = references
        self.pass_tokens = tokens_per_pass(experiment.training, model)
        self.held_out_length = min(experiment.evaluation.max_length or self.max_length, context)
        self.read: dict[int, tuple[Cut, list[Untokenized]]] = {}

    def training_shares(self, *, pooled: bool) -> dict[int, TokenShare]:
        """Return each client's training rows, or all rows as client 0's.

        What was cut from each client's rows, and which are lost, is kept in ``read``.
        """
        clients = self.division.train
        whole = self.tokens(joined(list(clients.values())), self.max_length)
        ends = np.cumsum([0, *map(len, clients.values())])
        kept = np.searchsorted(whole.index, ends)  # both ascending
        gone = np.searchsorted([one.position for one in whole.dropped], ends)
        for place, (client, cut) in enumerate(zip(clients, cuts_of(whole, kept), strict=True)):
            self.read[client] = cut, list(whole.dropped[gone[place] : gone[place + 1]])
        bad_rows_in_all(self.experiment, self.division, self.read, {})
        result = {}
        for place, client in enumerate([0] if pooled else clients):
            own = whole if pooled else whole.part(int(kept[place]), int(kept[place + 1]))
            if not len(own):
                lost = list(whole.dropped) if pooled else self.read[client][1]
                reasons = dict(Counter(one.reason for one in lost))
                raise DataError(
                    f"client {client} has no row left after tokenising ({reasons}); raise "
                    "data.max_length or partition.minimum, or use fewer clients"
                )
            result[client] = self._share(client, own)
        return result

    def held_out(self, rows: Sequence[Example], kind: str | None = None) -> HeldOut:
        """Return a held-out set (the global one, or of ``kind``); pairs stay pairs."""
        size = self.experiment.evaluation.batch_size
        tokens = self.tokens(rows, self.held_out_length)
        kind = kind or self.division.judged
        return HeldOut(
            TokenShare(tokens),
            kind,
            self.objective.beta,
            self.objective.gamma,
            size,
            self._answering(rows) if kind in ("answer", "exact") else None,
            tokens=self.pass_tokens,
            references=self.references,
        )

    def _answering(self, rows: Sequence[Example]) -> Answering:
        last = self.experiment.data.train_on == "last_answer"
        asked = last_answer if last else first_answer  # what the prompt's tokens ask for
        texts = [
            tuple(plain_text(own) for own in (asked(row.completion), *row.accepted))
            for row in rows
            if isinstance(row, Instruction)
        ]
        return Answering(self.encoder, self.experiment.evaluation.max_new_tokens, texts)

    def _share(self, client: int, tokens: TokenSet) -> TokenShare:
        if self.objective.reads_margins:
            _require_margins(client, tokens)
        if not self.objective.needs_mismatched:
            return TokenShare(tokens)
        rng = generator(self.experiment.federation.seed, "mismatched", client)
        bos = self.encoder.tokenizer.bos_token_id
        return TokenShare(tokens, mismatch(tokens, rng, self.max_length, bos))

    def public(self, rows: Sequence[Example]) -> TokenSet:
        """Tokenise public rows, as all parties do."""
        settings = self.experiment.public
        control = settings.control_tokens or self.experiment.data.control_tokens
        encoder = replace(self.encoder, control_tokens=control)
        max_length = longest(settings.max_length or self.experiment.data.max_length, self.context)
        return self.tokens(rows, max_length, encoder)

    def tokens(
        self, rows: Sequence[Example], max_length: int, encoder: TextEncoder | None = None
    ) -> TokenSet:
        """Tokenise rows, as training rows unless another ``encoder`` is given."""
        cache = cache_folder() / "tokens"
        alike = self.experiment.data.ambiguous == "keep"
        classes = self.division.classes
        encoder = encoder or self.encoder
        found = tokenize(rows, encoder, max_length, classes, cache, keep_alike=alike)
        most = found.largest_token
        if self.embedded is not None and most >= self.embedded:
            name = encoder.tokenizer.convert_ids_to_tokens(most)
            raise ModelError(
                f"a row has the token {name!r} ({most}), and the model embeds {self.embedded} tokens: "
                "take it out of the rows or of the chat template, or let it be text: "
                'data.control_tokens = "text"'
            )
        return found
