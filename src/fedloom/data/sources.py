"""``[data]``: where rows come from: files, the Hub, clients' own machines, or what is built in."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from fedloom.data.builtin import BUILTIN_KINDS
from fedloom.data.continuations import ContinuationSettings
from fedloom.data.examples import Kind
from fedloom.data.expressions import ExpressionError, parse_expression
from fedloom.data.files import ENDINGS, NOT_FOUND, STREAMED
from fedloom.data.labels import wrong_values
from fedloom.data.layouts import LAYOUTS
from fedloom.data.mixtures import StoppingStrategy
from fedloom.display.untrusted_text import quoted
from fedloom.settings.schema import Settings

BUILTIN_PREFIX = "builtin:"
CLIENTS = "clients"
"""The source of rows that only their owners can read."""

LONGEST_SEQUENCE = 1024
"""Tokens of a sequence at most, where ``max_length`` does not say it."""

SHOWN = 120
"""Characters of an expression that a message shows."""

MOST_COMPUTED = 32
"""Columns that ``map`` of a source computes."""

TrainOn = Literal["all_answers", "last_answer", "completion"]
ControlTokens = Literal["text", "control"]

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The day that chat templates with a clock take for today; the one that Llama 3.1's names itself."""


class SourceSettings(Settings):
    """``[data.domains.NAME]``: where rows come from and how they are read."""

    source: str | list[str] = "builtin:preferences"
    """A local file, a pattern of files ("data/*.jsonl"; their names are the column "file"), a Hub
    name, a list of these, or "builtin:" and preferences, opposed, tastes, feedback, instructions or
    labelled; or "clients": each client, on a machine of its own, names its rows itself."""
    subset: str | None = None
    """Configuration of a set on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a set on the Hub (default: its main branch, whatever it holds then)."""
    data_dir: str | None = None
    """Folder of a set on the Hub that keeps its parts in folders."""
    split: str = "train"
    """Split of a set on the Hub."""
    columns: dict[str, str] = {}
    """Our column name to yours, where they differ: { prompt = "question", label = "category" }. Common
    layouts (data/layouts.py) are recognised without it; what is said here comes first."""
    template: str | None = None
    """Makes the prompt from your columns: "Question: {question}\\nAnswer:"."""
    only: dict[str, list[str]] = {}
    """Your column to the values it may have; other rows are left out."""
    map: dict[str, str] = {}
    """New column to an expression over yours (docs/data.md has the grammar), computed before anything
    else is read of a row, one after another: { prompt = "question.strip() + '\\n' + context" }."""
    filter: str | None = None
    """Expression over your columns and those of map that is true of the rows that are kept, such as
    "len(answer) > 20 and lang in ['en', 'de']"; the others are dropped and counted."""
    answers_between: str | None = None
    """What stands between the answers where chosen or rejected holds several ("; "): the first is
    taken. Of a list of texts it is taken in any case."""
    values: dict[str, list[str | int | float | bool]] = {}
    """What labels mean, where they are not true and false: of feedback { desirable = ["4", "5"],
    undesirable = ["1"] }, of two answers { first = ["A"], second = ["B"], tie = ["both"] }. An entry may
    be a comparison (">= 4", "<= 2"). Rows with other values are dropped and counted."""
    min_margin: float | None = Field(default=None, ge=0)
    """Of preferences with scores: answers whose scores are closer are a tie, dropped and counted
    (default: only equal scores, where nothing else says which is better)."""
    continuations: ContinuationSettings | None = None
    """Of preferences: the source holds labelled texts, of which pairs are made."""
    max_rows: int | None = Field(default=None, ge=1)
    """Most rows of the source that are used, drawn from the seed before any is held out."""
    weight: float | None = Field(default=None, gt=0)
    """Of a domain: its part of the mixture that is trained on, beside the weights of the others; of each
    next row the domain is drawn by it (default: all rows of all domains)."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source there is."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def expressions(self) -> dict[str, str]:
        """Every expression by the setting that says it."""
        found = {f"map.{name}": text for name, text in self.map.items()}
        return found if self.filter is None else {**found, "filter": self.filter}

    @property
    def is_builtin(self) -> bool:
        """Whether a source is generated."""
        return any(source.startswith(BUILTIN_PREFIX) for source in self.sources)

    @property
    def is_private(self) -> bool:
        """Whether each client names its rows itself."""
        return CLIENTS in self.sources


class DataSettings(SourceSettings):
    """``[data]``: where examples come from and what is in them."""

    test_source: str | None = None
    """Where the global held-out set comes from (default: test_fraction of the source)."""
    test_split: str | None = None
    """Split on the Hub that is the global held-out set (a file has no splits)."""
    test_kind: Kind | None = None
    """Kind of the test_source, where it is another one: single answers may be trained on and pairs
    judged (default: kind)."""
    kind: Kind | None = None
    """instruction, preference, feedback or labelled; built-in sets know theirs."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Share of the rows kept from training for the global held-out set, but no more rows than
    evaluation.max_examples; not used with a test_source, where it may be 0."""
    incomplete_pairs: Literal["drop", "feedback"] = "drop"
    """What becomes of a pair with one answer missing or both alike: dropped and counted, or turned into
    single answers for objectives that train on them (two that are alike pull against each other)."""
    ambiguous: Literal["drop", "keep"] = "drop"
    """What becomes, file by file, of pairs that are marked both ways or whose answers differ in white
    space alone, and of single answers that are desirable in one row and undesirable in another;
    and of pairs that differ behind max_length alone: dropped and counted, or kept."""
    streaming: bool = False
    """Whether training rows stay in their files, for sources larger than memory: JSON lines, Parquet and
    sets on the Hub. An index of where they stand and their tokens lie in the cache folder instead
    (FEDLOOM_CACHE); the result is the same bit for bit. Held-out rows, and a test_source, are read
    whole."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of malformed rows above which the run does not start."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion together (default: the model's context, at most 1024)."""
    train_on: TrainOn = "all_answers"
    """Of a completion with several turns: every answer of the assistant ("all_answers"), the last one
    ("last_answer"), or everything, users' turns too ("completion")."""
    control_tokens: ControlTokens = "text"
    """What control tokens of the tokenizer mean that stand in a row's text ("<|im_end|>", "</s>"): that
    text, which nobody can end a turn with ("text"), or the token ("control", for rows that were rendered
    with the chat template beforehand)."""
    template_date: datetime.date = TEMPLATE_DATE
    """The day that a chat template with a clock takes for today, so that a run is the same on any day."""
    builtin_rows: int = Field(default=1600, ge=1)
    """Rows that a built-in source generates."""
    choices: list[str] = []
    """Of instructions: all the completions there are (verbalisers: ["no", "yes"]); a column of numbers
    (of a table: of digits, unless completions are) counts them from 0; others are dropped.
    Held-out rows are then judged by whether the right one has the lowest mean loss a token among them,
    and clients may be divided by the column "completion"."""
    group: str | None = None
    """Column of what rows have in common that must not be both trained on and judged: a patient, a user,
    a document (default: the prompt). With partition.kind iid or size the rows of a group stay with one
    client."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Jaccard similarity of two rows' word 3-grams, such as 0.8, from which they are near-duplicates:
    held-out rows that have one in training are counted, none is removed (needs fedloom[dedup])."""
    domains: dict[str, SourceSettings] = {}
    """Several sources, each read in its own way, in place of one; a row's domain is its column
    "domain"."""
    stopping_strategy: StoppingStrategy = "first_exhausted"
    """Of domains with weights, when the mixture ends: with the first domain that is exhausted, or with
    the last, rows of the others being repeated ("all_exhausted")."""
    deduplicate: bool = False
    """Whether of rows with the same text (without case, white space as one space) the first alone is
    used: among all rows that are dealt to clients, or, where each client reads its own, among those of
    each. The others are dropped and counted."""
    decontaminate: Literal["off", "report", "drop"] = "off"
    """What becomes of training rows that share a passage with the global held-out set or with
    data.benchmarks: nothing, a warning with their number, or they are dropped and counted."""
    decontamination_words: int = Field(default=13, ge=2, le=100)
    """Words of a passage that contaminates; a shorter held-out text does so as a whole."""
    benchmarks: list[str] = []
    """Files, patterns or Hub names (split "test") of benchmarks for data.decontaminate: every text in
    every column of theirs counts, whatever their columns are called."""

    @property
    def parts(self) -> dict[str, SourceSettings]:
        """Sources by domain; where there are no domains, the only one without a name."""
        return dict(self.domains) or {"": self}

    @property
    def all_sources(self) -> tuple[str, ...]:
        """Every source of every domain."""
        return tuple(source for part in self.parts.values() for source in part.sources)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are one client's, and none is held out for all."""
        return False

    @property
    def builtin_kind(self) -> str | None:
        """Kind of a built-in source, ``None`` for others and for one that is not there."""
        return (
            BUILTIN_KINDS.get(self.sources[0].removeprefix(BUILTIN_PREFIX))
            if self.sources and not self.domains
            else None
        )

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = self._wrong_sources()
        if self.streaming:
            found += self._not_streamed()
        elsewhere = self.test_source is not None or self.test_split is not None
        if self.test_fraction == 0 and not elsewhere and not self.is_whole:
            found.append(
                "data.test_fraction = 0 leaves no global held-out set: name one as data.test_source, or "
                "hold rows out, such as 0.2"
            )
        if elsewhere and (self.domains or self.continuations):
            name = "domains" if self.domains else "continuations"
            found.append(f"data.{name}: the held-out set is drawn from them (test_fraction)")
        if self.domains:
            fields = SourceSettings.model_fields
            beside = [name for name in fields if getattr(self, name) != fields[name].default]
            found += [f"data.{name} is said by each of data.domains for itself" for name in beside]
        found += self._wrong_mixture() + self._wrong_contamination()
        if self.is_private:
            if self.sources != (CLIENTS,) or self.domains:
                found.append(f'data.source = "{CLIENTS}" stands alone')
            if self.test_source is None:
                found.append(
                    f'data.source = "{CLIENTS}": the coordinator holds none of these rows; name a global '
                    "held-out set as data.test_source"
                )
        if self.choices and (self.kind != "instruction" or len(set(self.choices)) < 2):
            found.append(
                f"data.choices = {self.choices}: at least two different completions of instructions"
            )
        builtin = self.is_builtin and not self.domains
        known = self.builtin_kind
        if self.test_kind not in (None, self.kind or known):
            if self.test_source is None and self.test_split is None:
                found.append("data.test_kind needs data.test_source or data.test_split")
            if "labelled" in (self.test_kind, self.kind or known):
                found.append("data.test_kind: labelled texts are judged by labelled texts alone")
        if not builtin and self.kind is None:
            what = "what the domains hold" if self.domains else repr(self.source)
            found.append(f"data.kind is missing: is {what} {', '.join(LAYOUTS)}?")
        if builtin and self.kind is not None and known is not None and self.kind != known:
            found.append(f"data.kind = {self.kind!r}, but {self.source!r} holds {known} examples")
        return found

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each domain of a mixture; empty where all rows are used as they are."""
        return {name: part.weight for name, part in self.domains.items() if part.weight is not None}

    def _wrong_mixture(self) -> list[str]:
        """Return what in weights and the end of a mixture cannot both be meant."""
        without = sorted(set(self.domains) - set(self.weights))
        found = []
        if self.weights and without:
            found.append(
                f"data.domains.{without[0]}.weight is missing: all domains of a mixture have a weight, "
                "or none has"
            )
        if not self.domains and self.weight is not None:
            found.append("data.weight is for [data.domains.NAME], the sources of a mixture")
        if self.stopping_strategy != "first_exhausted" and not self.weights:
            found.append("data.stopping_strategy needs a weight in each of data.domains")
        return found

    def _wrong_contamination(self) -> list[str]:
        """Return what is said of contamination and has no effect, or nothing to compare with."""
        if self.decontaminate != "off":
            if self.is_whole and not self.benchmarks:
                return [
                    "data.decontaminate: the held-out set is with the server; name data.benchmarks here"
                ]
            if self.is_private:
                return [
                    f'data.decontaminate: with data.source = "{CLIENTS}" the rows are on other '
                    "machines; each client says it in its own file, with data.benchmarks"
                ]
            return []
        return [
            f'data.{name} is for data.decontaminate = "drop" or "report"'
            for name in ("benchmarks", "decontamination_words")
            if getattr(self, name) != DataSettings.model_fields[name].default
        ]

    def _wrong_sources(self) -> list[str]:
        """Return what cannot both be meant in one source, or in the source of a domain."""
        found = []
        kinds = [kind for kind in (self.kind, self.test_kind) if kind is not None]
        for name, part in self.parts.items():
            section = f"data.domains.{name}" if name else "data"
            if not part.sources:
                found.append(f"{section}.source is an empty list")
            if part.is_builtin and len(part.sources) > 1:
                found.append(
                    f"{section}.source: a built-in source cannot stand in a list with others"
                )
            found += _wrong_expressions(part, section)
            if part.is_builtin and name:
                found.append(f"{section}.source: a domain's rows come from files or the Hub")
            found += [
                text.replace("data.", f"{section}.", 1) for text in wrong_values(part.values, kinds)
            ]
            if part.min_margin is not None and "preference" not in kinds:
                found.append(f"{section}.min_margin is for preferences with scores")
            if part.is_builtin and (part.values or part.min_margin is not None):
                found.append(
                    f"{section}.values and min_margin are for rows that are read from files"
                )
            if part.is_builtin and part.expressions:
                found.append(f"{section}.filter and map are for rows that are read from files")
            if part.continuations and self.kind != "preference":
                found.append(f'{section}.continuations makes pairs: data.kind = "preference"')
        return found

    def _not_streamed(self) -> list[str]:
        """Return what in these settings needs all rows in memory, or to be read from the beginning."""
        what, found = "data.streaming = true", []
        if self.is_whole:
            found.append(f"{what}: the rows that a client has on its own machine are read whole")
        if self.is_private:
            found.append(f'{what}: with data.source = "{CLIENTS}" the rows are on other machines')
        for name, part in self.parts.items():
            section = f"data.domains.{name}" if name else "data"
            if part.is_builtin:
                found.append(f"{what}: {section}.source = {part.source!r} is generated in memory")
            if part.continuations:
                found.append(f"{what}: {section}.continuations makes pairs of all texts together")
            found += [
                f"{what}: {section}.source = {source!r}: {NOT_FOUND}"
                for source in part.sources
                if source.lower().endswith(ENDINGS) and not source.lower().endswith(STREAMED)
            ]
        if self.near_duplicates is not None:
            found.append(f"{what}: data.near_duplicates compares all rows with each other")
        return found


def _wrong_expressions(part: SourceSettings, section: str) -> list[str]:
    """Return what is wrong with each expression of a source."""
    found = []
    if len(part.map) > MOST_COMPUTED:
        found.append(
            f"{section}.map computes {len(part.map)} columns, at most {MOST_COMPUTED} are computed"
        )
    for setting, text in part.expressions.items():
        try:
            parse_expression(text)
        except ExpressionError as error:
            found.append(f"{section}.{setting} = {quoted(text, SHOWN)} {error}")
    return found
