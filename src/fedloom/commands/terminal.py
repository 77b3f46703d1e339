"""The terminal view of a run: a live table, plain lines, or nothing.

It only observes (see ``federation/records.py``); no result depends on it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from fedloom.accounting.quantities import human_bytes, human_count, human_flops, human_seconds
from fedloom.display.untrusted_text import HIDDEN, message, visible
from fedloom.runs.progress import RoundWork, TimeLeft, tokens_a_second

if TYPE_CHECKING:
    from pathlib import Path

    from fedloom.federation.records import Evaluation, RoundRecord
    from fedloom.runs.comparison import Comparison
    from fedloom.runs.cost_estimate import Estimate
    from fedloom.runs.observers import Plan
    from fedloom.runs.tuning import Trial

SHOWN_ROUNDS = 12
"""Rounds in the live table; earlier ones scroll away (all are in rounds.jsonl)."""


SILENCE = 30.0
"""Seconds after which plain lines say what is under way."""

WORTH_SAYING = 5.0
"""Seconds that a piece of an evaluation must take for plain lines to hold an estimate."""

HowFar = Callable[[], tuple[int, int]]
"""Says how many rounds of a comparison's runs are done, and how many there are in all."""


class PlainConsole(Console):
    """A console without markup, in which untrusted text cannot move the terminal's cursor."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of rich's own console."""
        # rich's search for what to highlight takes minutes on a word of 200,000 letters
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text as it is laid out, in tables too."""
        return super().render_str(visible(text), **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Return what is written for something that is shown."""
        if isinstance(renderable, Text) and HIDDEN.search(renderable.plain):
            renderable = Text(visible(renderable.plain), renderable.style, end=renderable.end)
        return super().render(renderable, options)

    def status(self, status: RenderableType, **settings: Any) -> Status:
        """Return a line that says what is under way."""
        shown = Text(visible(status)) if isinstance(status, str) else status
        return super().status(shown, **settings)


def make_console() -> Console:
    """Return the console of every command."""
    return PlainConsole()


def make_text(text: str) -> Text:
    """Return untrusted text in a form in which rich reads no markup."""
    return Text(visible(text))


def make_observer(console: Console, *, quiet: bool) -> Terminal:
    """Return the observer for this terminal: live where it can be redrawn, else plain lines."""
    if quiet:
        return Terminal(console, silent=True)
    return LiveTerminal(console) if console.is_terminal else Terminal(console)


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show what a command is doing; yield a function that changes the text.

    On a terminal that is a line which moves, else plain lines, at least every :data:`SILENCE` seconds.
    """
    if console.is_terminal:
        with console.status(make_text(text)) as status:
            yield lambda then: status.update(make_text(then))
        return
    now, lines = text, Lines(console)

    def stage(then: str) -> None:
        nonlocal now
        now = then
        lines.line(then, "dim")

    stage(text)
    lines.watch(lambda: now)
    try:
        yield stage
    finally:
        lines.end()


@dataclass
class Lines:
    """Prints lines, and the current work whenever none was printed for :data:`SILENCE` seconds.

    Attributes:
        console: Where to print.
        silent: Whether only warnings are printed.
        said: When the last line was printed, in seconds of ``time.perf_counter``.
        over: Whether the periodic lines have ended.
    """

    console: Console
    silent: bool = False
    said: float = field(default_factory=time.perf_counter)
    over: threading.Event = field(default_factory=threading.Event)

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.said = time.perf_counter()
        _print(self.console, text, style)

    def watch(self, under_way: Callable[[], str]) -> None:
        """Print the current work at intervals, until the end."""
        self.over.clear()
        self.said = began = time.perf_counter()

        def look() -> None:
            while not self.over.wait(max(0.01, SILENCE - (time.perf_counter() - self.said))):
                if time.perf_counter() - self.said >= SILENCE:
                    taken = human_seconds(time.perf_counter() - began)
                    self.line(f"{under_way()}, {taken} after the beginning", "dim")

        threading.Thread(target=look, daemon=True).start()

    def warning(self, text: str) -> None:
        """Print a warning, also when quiet."""
        _warn(self.console, text)

    def end(self) -> None:
        """End the periodic lines."""
        self.over.set()


@dataclass
class Terminal(Lines):
    """Plain lines: one for each round."""

    plan: Plan | None = None
    last: float = field(default_factory=time.perf_counter)
    time_left: TimeLeft = field(default_factory=lambda: TimeLeft(()))
    under_way: str = "evaluating the start"

    def stage(self, text: str) -> None:
        """Print what is being prepared."""
        if not self.silent:
            self.line(text, "dim")

    def begin(self, plan: Plan) -> None:
        """Print the plan of the run."""
        self.plan, self.last = plan, time.perf_counter()
        self.time_left = TimeLeft(plan.ahead or [RoundWork(1.0)] * (plan.rounds + 1))
        if not self.silent:
            for text, style in ((plan.headline, "bold"), (plan.details, "dim")):
                self.line(text, style)
            if not plan.withheld:
                self.watch(lambda: self.under_way)

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Print a line where clients take long; of quick ones, only what the round comes to."""
        self.under_way = f"round {round}: {done} of {of} clients have answered"
        if not self.silent and time.perf_counter() - self.said >= SILENCE:
            self.line(self.under_way, "dim")

    def round_done(self, record: RoundRecord) -> None:
        """Print the round on one line, and after the evaluation of the start how long it may take."""
        if self.plan is None:
            return
        self.under_way = f"round {record.round + 1}: no client has answered yet"
        if self.silent:
            return
        cells = [f"{n} {v}" for n, v in self._cells(record).items() if v]
        self.line("  ".join(cells))
        if record.round == 0 and self.plan.work and record.seconds:
            a_round = record.seconds * (1 + self.plan.work)
            self.line(
                f"estimate, from the time that this took: {human_seconds(a_round)} a round, "
                f"{human_seconds(a_round * self.plan.rounds)} in all",
                "dim",
            )

    def _cells(self, record: RoundRecord) -> Mapping[str, str]:
        assert self.plan is not None
        now = time.perf_counter()
        self.time_left.round_done(record, now - self.last)
        self.last, speed = now, tokens_a_second(record)
        down = sum(cost.bytes_down for cost in record.costs)
        up = sum(cost.bytes_up for cost in record.costs)
        metric, worst = self._judged(record.evaluation)
        if self.plan.withheld:
            reached = {self.plan.metric: _number(metric)}
            return {"round": f"{record.round}/{self.plan.rounds}", **reached}
        taken = len(record.clients) - len(record.rejected)
        missing = record.absent.keys() | record.rejected.keys() | record.paused.keys()
        simulated = record.simulated
        return {
            "round": f"{record.round}/{self.plan.rounds}",
            "clients": self._clients(record, taken),
            "missing": ", ".join(self.plan.names.get(c, str(c)) for c in sorted(missing)),
            "loss": _number(record.train.get("loss")),
            self.plan.metric: _number(metric),
            "worst client": _number(worst),
            "sent": f"{human_bytes(down)} down {human_bytes(up)} up" if down + up else "",
            "tokens/s": human_count(round(speed)) if speed else "",
            **({"simulated": human_seconds(simulated.end)} if simulated is not None else {}),
            "left": self._left(record.round),
        }

    def _clients(self, record: RoundRecord, taken: int) -> str:
        """Return how many answers were taken, of those asked or, where some are missing, of all."""
        if not record.clients:
            return "start"
        away = record.absent or record.paused
        expected = len(self.plan.names) if self.plan is not None and away else 0
        return f"{taken}/{max(expected, len(record.clients))}"

    def _judged(self, evaluation: Evaluation | None) -> tuple[float | None, float | None]:
        """Return the metric on the global held-out set and that of the worst client."""
        assert self.plan is not None
        if evaluation is None:
            return None, None
        name = self.plan.metric
        own = [metrics[name] for metrics in evaluation.clients.values() if name in metrics]
        worst = min if self.plan.higher_is_better else max
        return evaluation.metrics.get(name), worst(own) if own else None

    def _left(self, round: int) -> str:
        assert self.plan is not None
        left = self.time_left.seconds()
        return "" if left is None or round == self.plan.rounds else human_seconds(left)


@dataclass
class LiveTerminal(Terminal):
    """A table that grows by a row a round, and a bar for the clients of the present one."""

    rows: list[Mapping[str, str]] = field(default_factory=list)
    live: Live | None = None
    progress: tuple[int, int, int] = (0, 0, 1)

    def begin(self, plan: Plan) -> None:
        """Open the live table."""
        super().begin(plan)
        self.over.set()  # the table shows the current work
        self.live = Live(self._picture(), console=self.console, refresh_per_second=8)
        self.live.start()

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Move the bar."""
        self.progress = (round, done, of)
        self._redraw()

    def round_done(self, record: RoundRecord) -> None:
        """Add a row."""
        if self.plan is not None:
            self.rows.append(self._cells(record))
        self._redraw()

    def end(self) -> None:
        """Leave the table as it stands."""
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
            self.live.stop()
            self.live = None

    def _redraw(self) -> None:
        if self.live is not None:
            self.live.update(self._picture())

    def _picture(self) -> Group:
        round, done, of = self.progress
        if self.plan is not None and self.plan.withheld:
            return Group(self._table())
        bar = ProgressBar(total=of, completed=done, width=30)
        label = Text(f" round {round}: {done} of {of} clients", style="dim")
        line = Table.grid()
        line.add_row(bar, label)
        return Group(self._table(), line)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        columns = list(self.rows[-1]) if self.rows else ["round"]
        for column in columns:
            table.add_column(Text(visible(column)), justify="right", no_wrap=True)
        for row in self.rows[-SHOWN_ROUNDS:]:
            table.add_row(*(Text(visible(cell)) for cell in row.values()))
        return table


FIRST = 1.0
"""Seconds between looks at how far the runs of a comparison are, until an estimate was given."""


@dataclass
class ComparisonTerminal(Lines):
    """A bar over the runs of a comparison, and a line for each that has ended.

    Where nothing can be redrawn, plain lines also say how far those under way are and, once there are two
    rounds a worker, how long all may take.
    """

    progress: Progress | None = None
    task: TaskID | None = None
    ended: int = 0

    def stage(self, text: str) -> None:
        """Print what is being prepared."""
        if not self.silent:
            self.line(text, "dim")

    def begin(self, comparison: Comparison, waiting: int, workers: int, far: HowFar) -> None:
        """Say what is about to run and open the bar."""
        if self.silent:
            return
        settings, cells = comparison.settings, comparison.grid_runs
        work = f"{settings.amount} {settings.budget} per client and round"
        what = "objectives" if settings.objectives else "scenarios"
        _print(
            self.console,
            f"{comparison.name}: {len(settings.rows)} {what} x {len(settings.method_configurations)} "
            f"methods x {len(settings.seeds)} seeds, "
            f"{'each as it is set' if settings.budget == 'as_set' else work}",
            "bold",
        )
        done = len(cells) - waiting
        note = f"{done} done before, " if done else ""
        self.console.print(
            f"{note}{waiting} runs to do, {workers} at a time", style="dim", highlight=False
        )
        if waiting and not self.console.is_terminal:
            self._follow(waiting, workers, far)
        elif waiting:
            self.progress = Progress(
                TextColumn("{task.completed} of {task.total} runs"),
                BarColumn(30),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.task = self.progress.add_task("runs", total=waiting)
            self.progress.start()

    def run_done(self, name: str, metric: str, value: float | None, done: int, of: int) -> None:
        """Print the run's result on one line and move the bar."""
        self.ended = done
        if self.silent:
            return
        shown = "not finite" if value is None else f"{value:.4f}"
        self.line(f"{done}/{of}  {name}  {metric} {shown}")
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done)

    def end(self) -> None:
        """Close the bar."""
        super().end()
        if self.progress is not None:
            self.progress.stop()

    def _follow(self, waiting: int, workers: int, far: HowFar) -> None:
        """Print the progress of the runs and, once known, an estimate of their time."""
        began, before = time.perf_counter(), far()[0]

        def under_way() -> str:
            done, rounds = far()
            return f"{self.ended} of {waiting} runs have ended, {done} of {rounds} rounds are done"

        def estimate() -> None:
            while not self.over.wait(FIRST):
                done, rounds = far()
                if done - before >= 2 * workers:
                    taken = time.perf_counter() - began
                    whole = human_seconds(taken * (rounds - before) / (done - before))
                    self.line(f"estimate, from the first rounds: {whole} in all", "dim")
                    return

        self.watch(under_way)
        threading.Thread(target=estimate, daemon=True).start()


class Bars:
    """A bar for each piece of work of an evaluation; plain lines where nothing can be redrawn."""

    def __init__(self, console: Console) -> None:
        """Open nothing yet."""
        self.console = console
        self.lines = Lines(console)
        self.under_way: Callable[[], str] = lambda: "loading"
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(30),
            TextColumn("{task.completed} of {task.total}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        """Open the bars."""
        self.progress.start()
        if not self.console.is_terminal:
            self.lines.watch(lambda: self.under_way())
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they stand."""
        self.lines.end()
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Say what is done without a bar."""
        self.under_way = lambda: text
        self.lines.line(text, "dim")

    def begin(self, text: str, total: int) -> Callable[[int], None]:
        """Open a bar; what is returned moves it."""
        plain, done, began = not self.console.is_terminal, 0, time.perf_counter()
        if plain:
            self.lines.line(f"{text}: {total}", "dim")
        self.under_way = lambda: f"{text}: {done} of {total}"
        task = self.progress.add_task(visible(text), total=total)

        def advance(count: int) -> None:
            nonlocal done
            first, done = done == 0, done + count
            self.progress.update(task, advance=count)
            whole = (time.perf_counter() - began) * total / max(1, done)
            if plain and first and whole >= WORTH_SAYING:
                took = human_seconds(whole)
                self.lines.line(f"estimate, from the first {done}: {took} in all", "dim")

        return advance


def results_table(folder: Path) -> Table:
    """Return the table of what a comparison is about."""
    from fedloom.reports.comparison_page import summary

    own = summary(folder)
    table = Table(title=own.title, box=None, padding=(0, 1, 0, 0))
    for place, column in enumerate(own.columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in own.rows:
        heading = len(row) < len(own.columns)
        table.add_row(*(Text(cell, style="bold" if heading else "") for cell in row))
    return table


def estimate_table(options: Sequence[Estimate]) -> Table:
    """Return, for each method, the derived costs of a round for the client with the most work."""
    table = Table(
        title="a round of the client with the most work, derived", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("framework", no_wrap=True)
    for column in ("down", "up", "trips", "compute", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits")
    for option in options:
        if option.problem:
            table.add_row(option.name, *["-"] * 6, "no")
            continue
        table.add_row(
            option.name,
            human_bytes(option.sent.down),
            human_bytes(option.sent.up),
            str(option.sent.exchanges),
            human_flops(option.flops),
            human_bytes(option.memory),
            human_seconds(option.seconds),
            "yes" if option.fits else "no",
        )
    return table


def tuning_table(trial: Trial) -> Table:
    """Return how fast each value of a setting was."""
    first = trial.candidates[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first.setting, justify="right")
    for column in ("tokens/s", "peak memory", f"times as fast as {first.value}"):
        table.add_column(column, justify="right", no_wrap=True)
    for own in trial.candidates:
        if own.problem:
            table.add_row(str(own.value), own.problem)
            continue
        ends = f" ({min(own.ratios):.2f}-{max(own.ratios):.2f})" if own is not first else ""
        table.add_row(
            str(own.value),
            human_count(round(own.speed)),
            human_bytes(own.memory),
            f"{own.ratio:.2f}{ends}",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print(console: Console, text: str, style: str = "") -> None:
    """Print a line on any kind of console, which may be the caller's."""
    console.print(Text(visible(text), style), highlight=False, soft_wrap=True)


def _warn(console: Console, text: str) -> None:
    """Print a warning that may hold untrusted text, whose brackets are not markup."""
    console.print(Text(message(f"warning: {text}"), "yellow"), highlight=False, soft_wrap=True)
