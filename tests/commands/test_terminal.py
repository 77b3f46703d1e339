"""What strangers say is shown as they said it: it neither styles the terminal nor ends the run."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedloom.commands import terminal
from fedloom.commands.terminal import Bars, ComparisonTerminal, LiveTerminal, Terminal, working


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
    from fedloom.runs.observers import Plan

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
    from fedloom.federation.records import RoundRecord

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


def wait_for(text, out, times=1):
    """Wait until the text was said so many times: how soon depends on the machine's load."""
    end = time.monotonic() + 30
    while out.getvalue().count(text) < times:
        assert time.monotonic() < end, out.getvalue()
        time.sleep(0.01)


def test_plain_lines_say_what_is_under_way_when_nothing_was_said_for_a_while(monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE", 0.1)
    out = io.StringIO()
    shown = Terminal(Console(file=out, width=200))
    shown.begin(plan())
    begun = time.monotonic()
    wait_for("evaluating the start, ", out, times=2)
    assert time.monotonic() - begun > 0.15  # once every 0.1 s and not faster
    shown.said = time.perf_counter() - 1
    shown.client_done(2, 5, 3, 8)
    assert "round 2: 3 of 8 clients have answered\n" in out.getvalue()
    shown.end()
    before = out.getvalue()
    time.sleep(0.3)
    assert out.getvalue() == before


GRID = SimpleNamespace(
    name="grid",
    settings=SimpleNamespace(
        amount=4,
        budget="steps",
        objectives=["dpo"],
        rows=["dpo"],
        method_configurations=["fedavg"],
        seeds=[0, 1],
    ),
    grid_runs=["one", "two"],
)
"""What is shown of a comparison before it begins."""


def test_a_comparison_says_how_far_it_is_and_how_long_it_may_take(monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE", 0.1)
    monkeypatch.setattr(terminal, "FIRST", 0.01)
    monkeypatch.setattr(terminal, "human_seconds", "{:.1f} s".format)
    out, rounds = io.StringIO(), [10]
    shown = ComparisonTerminal(Console(file=out, width=200))
    shown.stage("checking data and models of every configuration")
    shown.begin(GRID, 2, 3, lambda: (rounds[0], 40))
    wait_for("10 of 40 rounds", out)
    time.sleep(0.15)
    rounds[0] += 5  # of three workers one has not done two
    wait_for("15 of 40 rounds", out)
    assert "estimate" not in out.getvalue()
    rounds[0] += 1
    wait_for("estimate", out)
    shown.run_done("dpo-fedavg-s0", "accuracy", 0.5, 1, 2)
    wait_for("1 of 2 runs have ended, 16 of 40", out)
    shown.end()
    told = out.getvalue().splitlines()
    assert told[:3] == [
        "checking data and models of every configuration",
        "grid: 1 objectives x 1 methods x 2 seeds, 4 steps per client and round",
        "2 runs to do, 3 at a time",
    ]
    (estimate,) = (line for line in told if line.startswith("estimate"))
    seconds = re.fullmatch(r"estimate, from the first rounds: ([0-9.]+) s in all", estimate)[1]
    assert 1.4 < float(seconds) < 60.0  # five times the 0.3 s or more that six of 30 rounds took
    assert told[3].startswith("0 of 2 runs have ended, 10 of 40 rounds are done, ")
    assert "1/2  dpo-fedavg-s0  accuracy 0.5000" in told
    assert told[-1].startswith("1 of 2 runs have ended, 16 of 40 rounds are done, ")
    time.sleep(0.15)
    assert out.getvalue().splitlines() == told


def test_quick_comparisons_and_quiet_ones_say_no_more_than_their_results():
    out = io.StringIO()
    shown = ComparisonTerminal(Console(file=out, width=200), silent=True)
    shown.stage("checking")
    shown.begin(GRID, 2, 2, lambda: (0, 40))
    shown.run_done("dpo-fedavg-s0", "accuracy", 0.5, 1, 2)
    shown.end()
    assert out.getvalue() == ""


def without_times(text):
    """Lines without the time, and without those that say the same again, as on a machine that is busy."""
    lines = re.sub(r", [0-9.]+ s after", ", after", text).splitlines()
    return list(dict.fromkeys(lines))


def test_an_evaluation_says_how_far_it_is_and_how_long_it_may_take(monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE", 0.1)
    monkeypatch.setattr(terminal, "human_seconds", lambda own: f"{round(own, -3):.0f} s")
    out, real, ahead = io.StringIO(), time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: real() + ahead[0])
    with Bars(Console(file=out, width=200)) as bars:
        bars.stage("scoring adapter")
        wait_for("scoring adapter, ", out)
        advance = bars.begin("held-out rows", 80)
        ahead[0] += 2000.0
        advance(8)
        advance(8)
        bars.begin("quick", 8)(8)
        wait_for("quick: 8 of 8", out)
    assert without_times(out.getvalue()) == [
        "scoring adapter", "scoring adapter, after the beginning",
        "held-out rows: 80", "estimate, from the first 8: 20000 s in all",
        "quick: 8", "quick: 8 of 8, after the beginning",
    ]  # fmt: skip


def test_what_a_command_does_is_said_for_as_long_as_it_does_it(monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE", 0.1)
    monkeypatch.setattr(terminal, "human_seconds", "{:.1f} s".format)
    out = io.StringIO()
    with working(Console(file=out, width=200), "reading [data]") as stage:
        wait_for("reading [data], ", out)
        stage("counting")
        wait_for("counting, ", out)
    time.sleep(0.15)
    assert without_times(out.getvalue()) == [
        "reading [data]", "reading [data], after the beginning",
        "counting", "counting, after the beginning",
    ]  # fmt: skip


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
