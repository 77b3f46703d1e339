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


def plan(**changes):
    from fedloom.progress import Plan

    return Plan(**{**PLAN, **changes})


PLAN = {
    "headline": "x: DPO by fedavg",
    "details": "model tiny",
    "rounds": 4,
    "metric": "accuracy",
    "higher_is_better": True,
}


def test_plain_lines_estimate_after_the_start_how_long_it_will_take():
    """2 s for the start and 1.5 times its work in a round: 2 x (1 + 1.5) = 5 s a round, 20 s in all."""
    from fedloom.progress import RoundRecord

    out = io.StringIO()
    shown = Terminal(Console(file=out, width=200))
    shown.begin(plan(work=1.5))
    shown.round_done(RoundRecord(0, seconds=2.0))
    shown.end()
    assert "estimate, from the time that this took: 5.00 s a round, 20 s in all" in out.getvalue()
    shown.begin(plan())
    shown.round_done(RoundRecord(0, seconds=2.0))
    shown.end()
    assert out.getvalue().count("estimate") == 1  # nothing is known of the work of others' machines


def test_plain_lines_say_what_is_under_way_when_nothing_was_said_for_a_while(monkeypatch):
    import time

    from fedloom import terminal

    monkeypatch.setattr(terminal, "SILENCE", 0.1)
    out = io.StringIO()
    shown = Terminal(Console(file=out, width=200))
    shown.begin(plan())
    time.sleep(0.35)
    assert out.getvalue().count("evaluating the start, ") in (2, 3)
    shown.said = time.perf_counter() - 1
    shown.client_done(2, 5, 3, 8)
    assert "round 2: 3 of 8 clients have answered\n" in out.getvalue()
    shown.end()
    before = out.getvalue()
    time.sleep(0.3)
    assert out.getvalue() == before


def test_quick_clients_and_quiet_runs_print_no_line_each():
    out = io.StringIO()
    for silent in (False, True):
        shown = Terminal(Console(file=out, width=200), silent=silent)
        shown.begin(plan())
        before = out.getvalue()
        for done in range(1, 9):
            shown.client_done(1, done, done, 8)
        shown.end()
        assert out.getvalue() == before
