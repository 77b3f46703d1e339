"""What ``fedloom data stats`` and ``fedloom data check`` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.accounting.quantities import human_count
from fedloom.display.untrusted_text import message, named
from fedloom.reports.data_page import WORDS, client_rows, doubts, summary
from fedloom.runs.data_check import Finding
from fedloom.runs.records import account_tables

BAR = 40
"""Characters of the longest bar."""

STATES = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "fault": ("FAULT  ", "red")}


def statistics_view(record: Mapping[str, Any]) -> Group:
    """Return the statistics of rows for a terminal."""
    lengths = record["lengths"]
    parts: list[RenderableType] = [
        *(Text(named(line), style="dim") for line in record["layouts"]),
        *(Text(named(line)) for line in summary(record)),
        Text(),
        histogram("tokens of training rows, before truncation", lengths["train"]["bins"]),
        Text(),
        histogram("tokens of held-out rows, before truncation", lengths["test"]["bins"]),
        Text(),
        _by_client("clients", client_rows(record), words=False),
        Text(),
        _by_client("what they hold", client_rows(record), words=True),
        account_tables({**record["accounts"], "clients": []}),
    ]
    told = dict.fromkeys([*record["warnings"], *doubts(record)])
    parts += [Text(f"warning: {message(text)}", style="yellow") for text in told]
    return Group(*parts)


def histogram(title: str, bins: Mapping[str, int]) -> Table:
    """Return counts as bars."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    most = max(bins.values(), default=1)
    for name, count in bins.items():
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        table.add_row(
            Text(name, justify="right"), Text(bar, no_wrap=True), Text(human_count(count))
        )
    return table


def _by_client(title: str, rows: Sequence[Mapping[str, str]], *, words: bool) -> Table:
    """Return what clients have, in numbers or in words; columns that are empty for all are left out."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown = [n for n in rows[0] if (n in WORDS) == words and any(own[n] for own in rows)]
    columns = ["client", *(name for name in shown if name != "client")]
    for name in columns:
        table.add_column(Text(name), justify="left" if words else "right", overflow="fold")
    for own in rows:
        table.add_row(*(Text(named(own[name])) for name in columns))
    return table


def check_view(found: Sequence[Finding]) -> Group:
    """Return what was checked, a line for each thing, and how many faults there are."""
    lines = []
    for own in found:
        name, style = STATES[own.state]
        lines.append(Text.assemble((name, style), " ", message(own.text)))
    faults = sum(own.state == "fault" for own in found)
    doubtful = sum(own.state == "warning" for own in found)
    lines.append(Text(f"\n{faults} faults, {doubtful} warnings", style="bold"))
    return Group(*lines)
