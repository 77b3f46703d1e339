"""Checks everything about an experiment's rows, and finds every fault at once."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedloom.accounting.quantities import human_count
from fedloom.data.contamination import benchmark_texts
from fedloom.data.files import is_file, is_pattern
from fedloom.data.loading import row_index
from fedloom.data.reader import Read, Reader
from fedloom.data.sources import DataSettings, SourceSettings
from fedloom.errors import FedloomError
from fedloom.experiment.experiment import Experiment
from fedloom.reports.data_page import doubts
from fedloom.runs.data_statistics import data_statistics, require_here
from fedloom.runs.partitioning import own_source

State = Literal["ok", "warning", "fault"]

SHOWN = 3
"""Malformed rows of a file that are named."""


@dataclass(frozen=True)
class Finding:
    """One line of a check: what is in order, doubtful, or wrong."""

    state: State
    text: str


def check_data(experiment: Experiment) -> list[Finding]:
    """Check every source, and then the rows as clients would have them.

    Args:
        experiment: Its settings have been checked.

    Raises:
        DataError: Its rows are with the clients.
    """
    require_here(experiment)
    found = list(_sources(experiment))
    if any(own.state == "fault" for own in found):
        return [*found, Finding("warning", "clients' rows are not looked at before this is mended")]
    try:
        record = data_statistics(experiment)
    except FedloomError as error:
        return [*found, Finding("fault", str(error))]
    return [*found, *_rows(record)]


def _rows(record: dict[str, Any]) -> Iterator[Finding]:
    """Yield what is said of the rows as clients have them."""
    source, clients = record["accounts"]["source"], record["partition"]["clients"]
    yield Finding(
        "ok",
        f"{human_count(source['rows'])} rows: {human_count(source['trained'])} to train on, with "
        f"{len(clients)} clients of {human_count(min(own['train'] for own in clients))} to "
        f"{human_count(max(own['train'] for own in clients))}",
    )
    told = dict.fromkeys([*record["warnings"], *doubts(record)])
    yield from (Finding("warning", text) for text in told)


def _sources(experiment: Experiment) -> Iterator[Finding]:
    """Yield what is found in each source alone."""
    data = experiment.data
    patient = data.model_copy(update={"max_bad_share": 1.0})
    if own_source(data) is None:
        for name, part in data.parts.items():
            kind = "labelled" if part.continuations else str(data.kind)
            for source in () if part.is_builtin else part.sources:
                for file in each_file([source]):
                    apart = file != source
                    yield from _source(data, patient, part, kind, name, file, part.split, apart)
    kind = str(data.test_kind or data.kind)
    if data.test_source or data.test_split:
        tests = [data.test_source] if data.test_source else list(data.sources)
        for source in tests:
            for file in each_file([source]):
                apart, split = file != source, data.test_split or "test"
                yield from _source(data, patient, data, kind, "", file, split, apart)
    for source in each_file(data.benchmarks):
        alone = data.model_copy(update={"benchmarks": [source]})
        try:
            texts = sum(map(len, benchmark_texts(alone)))
        except FedloomError as error:
            yield Finding("fault", f"{source}: {error}")
        else:
            yield Finding("ok", f"{source}: {human_count(texts)} texts of a benchmark")


def _source(
    data: DataSettings,
    patient: DataSettings,
    part: SourceSettings,
    kind: str,
    name: str,
    source: str,
    split: str,
    apart: bool,
) -> Iterator[Finding]:
    """Yield what is found in one file, or one set on the Hub.

    ``patient`` are the settings with which any share of malformed rows is read. A file that stands
    ``apart`` is one of a pattern's, and may give no example as long as another does.
    """
    read = Read()
    try:
        store = row_index(data, None) if data.streaming else None
        Reader(patient, part, kind, read, name, store=store, apart=apart).read(source, split)
    except FedloomError as error:
        rows = "".join(f"\n  {row}" for row in read.bad[:SHOWN])
        yield Finding("fault", f"{error}{'; malformed:' if rows else ''}{rows}")
        return
    layouts = "; ".join(read.layouts) or "no layout"
    dropped = "".join(f", {human_count(n)} dropped ({why})" for why, n in read.dropped.items())
    told = f"{os.path.basename(source)}: {layouts}; {human_count(read.seen)} rows{dropped}"
    if not read.bad:
        yield Finding("ok", told)
        return
    causes = Counter(own.cause or own.reason for own in read.bad)
    rows = "".join(f"\n  {row}" for row in read.bad[:SHOWN])
    reasons = ", ".join(f"{human_count(count)} {cause}" for cause, count in causes.most_common())
    too_many = len(read.bad) > data.max_bad_share * read.seen
    allowed = f"data.max_bad_share allows {data.max_bad_share:.1%}"
    yield Finding(
        "fault" if too_many else "warning",
        f"{told}, {human_count(len(read.bad))} malformed ({reasons}; {allowed}):{rows}",
    )


def each_file(sources: Sequence[str]) -> list[str]:
    """Return sources with a pattern's files one by one, so that a fault in one hides no other's."""
    found = []
    for source in sources:
        paths = glob.glob(os.path.expanduser(source)) if is_pattern(source) else []
        found += sorted(paths) if paths and is_file(source) else [source]
    return found
