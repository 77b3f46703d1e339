"""The page about an experiment's rows: lengths, truncation, overlaps, scripts, labels by client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.accounting.quantities import human_count
from fedloom.display.untrusted_text import quoted
from fedloom.reports import row_account
from fedloom.reports.html import fill, write_page

Record = Mapping[str, Any]

MANY_CUT = 0.05
"""Share of a client's rows that are cut above which it is told."""

LONGER = 0.6
"""Share of pairs whose chosen answer is the longer one above which it is told."""

WORDS = ("script", "labels")
"""What is said of clients in words."""

SHOWN = 5
"""Clients that a sentence names."""

LONGEST_PASSAGE = 120
"""Characters of a passage that is shown."""


def write_data_page(record: Record, target: Path) -> Path:
    """Write the page, which needs no other file and asks no other machine.

    Args:
        record: Of :func:`fedloom.runs.data_statistics.data_statistics`.
        target: The file.

    Raises:
        OutputError: It cannot be written.
    """
    return write_page(render(record), target)


def render(record: Record) -> str:
    """Return the page as HTML."""
    from fedloom.reports import figures

    lengths = record["lengths"]
    pictures = {
        f"Tokens of {whose}, before truncation": figures.histogram_chart(
            lengths[part]["bins"], "tokens", "rows"
        )
        for part, whose in (("train", "training rows"), ("test", "held-out rows"))
        if lengths[part]["bins"]
    }
    named = {"labels": "Labels by client", "scripts": "Script of most letters, by client"}
    pictures |= {
        title: figures.partition_svg(record[part])
        for part, title in named.items()
        if record[part] is not None and len(record[part]["values"]) > 1
    }
    matrix = record["overlaps"]["rows"]["matrix"]
    if matrix is not None and record["overlaps"]["rows"]["twice"]:
        clients = [str(client) for client in record["overlaps"]["rows"]["clients"]]
        pictures["Rows that two clients share"] = figures.matrix_chart(
            matrix, clients, "rows with the same text", diagonal=False
        )
    return fill(
        "data.html.j2",
        title=f"Rows: {record['name']}",
        record=record,
        lines=summary(record),
        doubts=[*record["warnings"], *doubts(record)],
        pictures=pictures,
        accounts={
            name: row_account.lines(own)
            for name, own in row_account.sources(record["accounts"]).items()
        },
        clients=_without_empty(client_rows(record)),
        words=WORDS,
    )


def client_rows(record: Record) -> list[dict[str, str]]:
    """Return one row a client, as texts: how many rows, how long, what is cut, what is shared."""
    shared = {own["client"]: own for own in record["overlaps"]["with_test"]}
    passages = {own["client"]: own["rows"] for own in record["contamination"]["clients"]}
    scripts, labels = _commonest(record["scripts"]), _commonest(record["labels"])
    rows = []
    for own in record["lengths"]["clients"]:
        client = own["client"]
        cut, count = own["cut"]["cut_rows"], own["cut"]["rows"]
        rows.append(
            {
                "client": str(client),
                "rows": human_count(count),
                "median tokens": human_count(int(own["p50"])),
                "95 %": human_count(int(own["p95"])),
                "most": human_count(int(own["most"])),
                "cut": f"{human_count(cut)} ({cut / count:.0%})" if cut else "0",
                "script": scripts.get(client, ""),
                "labels": labels.get(client, ""),
                "held-out prompts": human_count(shared[client]["prompts"]),
                "held-out passages": human_count(passages[client]),
            }
        )
    return rows


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows without the columns that are empty for all."""
    kept = [name for name in rows[0] if any(own[name] for own in rows)]
    return [{name: own[name] for name in kept} for own in rows]


def _commonest(record: Record | None) -> dict[int, str]:
    """Return for each client the commonest values with their shares."""
    found = {}
    for own in () if record is None else record["clients"]:
        whole = sum(own["counts"].values())
        top = sorted(own["counts"].items(), key=lambda pair: (-pair[1], pair[0]))[:3]
        told = [f"{value} {count / whole:.0%}" for value, count in top if count]
        more = sum(count > 0 for count in own["counts"].values()) - len(told)
        found[own["client"]] = ", ".join(told) + (f" and {more} more" if more else "")
    return found


def summary(record: Record) -> list[str]:
    """Return what there is as sentences without a full stop, for the terminal and the page's top."""
    lengths, rows = record["lengths"], record["overlaps"]["rows"]
    train, count = lengths["train"], sum(own["cut"]["rows"] for own in lengths["clients"])
    cut = sum(own["cut"]["cut_rows"] for own in lengths["clients"])
    found = [
        f"{human_count(count)} {record['kind']} rows of {len(lengths['clients'])} clients, as "
        f"{record['model']} reads them: {human_count(int(train['p50']))} tokens in the middle, "
        f"{human_count(int(train['p95']))} at 95 %, {human_count(int(train['most']))} at most",
        f"data.max_length = {lengths['max_length']} cuts {human_count(cut)} training rows"
        f"{f' ({cut / count:.1%})' if cut else ''}",
        f"{human_count(rows['twice'])} of {human_count(rows['distinct'])} different texts are with more "
        "than one client",
    ]
    if pairs := lengths["longer_chosen"]:
        found.append(
            f"the chosen answer is longer in {pairs['longer'] / pairs['pairs']:.0%} of "
            f"{human_count(pairs['pairs'])} pairs, shorter in {pairs['shorter'] / pairs['pairs']:.0%}"
        )
    own = record["contamination"]
    found.append(
        f"{human_count(own['rows'])} of {human_count(own['of'])} training rows share a passage of "
        f"{own['words']} words, or a whole shorter text, with a held-out row"
    )
    return found


def doubts(record: Record) -> list[str]:
    """Return what may be wrong with rows that can be trained on, and what to do about it."""
    return [*_cut(record), *_alike(record), *_unbalanced(record)]


def _cut(record: Record) -> Iterator[str]:
    lengths = record["lengths"]
    much = [
        f"{own['client']} ({own['cut']['cut_rows'] / own['cut']['rows']:.0%})"
        for own in lengths["clients"]
        if own["cut"]["cut_rows"] > MANY_CUT * own["cut"]["rows"]
    ]
    if much:
        yield (
            f"data.max_length = {lengths['max_length']} cuts many rows of clients {_listed(much)}: raise "
            "it as far as the model and memory allow"
        )
    for reason, count in lengths["untokenised"].items():
        yield f"{human_count(count)} rows cannot be trained on: {reason}"
    pairs = lengths["longer_chosen"]
    if pairs and pairs["longer"] > LONGER * pairs["pairs"]:
        yield (
            f"the chosen answer is the longer one in {pairs['longer'] / pairs['pairs']:.0%} of pairs: "
            "length is easily learnt in its place (objectives with length normalisation: simpo)"
        )


def _alike(record: Record) -> Iterator[str]:
    rows = record["overlaps"]["rows"]
    if rows["twice"]:
        most = rows["largest"][0]
        yield (
            f"{human_count(rows['twice'])} texts are with more than one client (most: clients "
            f"{most['clients'][0]} and {most['clients'][1]} share {human_count(most['shared'])}): "
            + (
                "data.deduplicate works within each file and keeps them"
                if record["partition"]["kind"] == "files"
                else "data.deduplicate = true keeps one of each"
            )
        )
    own = record["contamination"]
    if own["rows"]:
        yield (
            f"{human_count(own['rows'])} training rows share a passage of {own['words']} words with a "
            f"held-out row ({quoted(own['passage'], LONGEST_PASSAGE)}): data.decontaminate = "
            '"drop" leaves them out'
        )


def _unbalanced(record: Record) -> Iterator[str]:
    labels = record["labels"]
    if labels is None or len(labels["values"]) < 2:
        return
    alone = [
        str(own["client"])
        for own in labels["clients"]
        if sum(count > 0 for count in own["counts"].values()) < 2
    ]
    if alone:
        yield (
            f"clients {_listed(alone)} have rows of one of the {len(labels['values'])} labels alone: a "
            "larger partition.alpha deals them more evenly"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
