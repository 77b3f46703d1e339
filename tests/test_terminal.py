"""What strangers say is shown as they said it: it neither styles the terminal nor ends the run."""

import io

import pytest
from rich.console import Console

from fedloom.terminal import ComparisonTerminal, LiveTerminal, Terminal


@pytest.mark.parametrize("kind", [Terminal, LiveTerminal, ComparisonTerminal])
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("cannot read [/data/rows.jsonl]", "cannot read [/data/rows.jsonl]"),
        ("[data] is missing", "[data] is missing"),
        ("[red]fine[/red]", "[red]fine[/red]"),
        ("löss ≥ 1\nsecond", "löss ≥ 1\nsecond"),
    ],
)
def test_a_warning_is_shown_as_it_was_said(kind, said, shown):
    out = io.StringIO()
    kind(Console(file=out, force_terminal=True, width=200, color_system=None)).warning(said)
    assert out.getvalue() == f"warning: {shown}\n"


def test_a_stage_may_name_any_file():
    out = io.StringIO()
    Terminal(Console(file=out, width=200)).stage("reading [/data/a.jsonl]")
    assert out.getvalue() == "reading [/data/a.jsonl]\n"
