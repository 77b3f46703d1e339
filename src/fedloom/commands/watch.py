"""``fedloom watch``, and the live page beside ``fedloom run --live``."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.commands.app import app, say
from fedloom.errors import OutputError

if TYPE_CHECKING:
    from fedloom.runs.observers import Plan, RunObserver


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 0,
) -> None:
    """Show a run on a page of this machine, while it goes on, stopped, or over.

    It is read from the run folder alone, and the run is not touched. Ctrl-C ends the page, not the run.
    """
    from fedloom.reports.live_server import LivePage

    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        with LivePage(run, port) as page:
            say(f"live page: {page.address}  (open it in a browser; Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def with_live_page(observer: RunObserver, wanted: bool) -> Iterator[RunObserver]:
    """Yield an observer that opens the live page when the run begins; at the end it is closed."""
    if not wanted:
        yield observer
        return
    with contextlib.ExitStack() as open_page:
        yield _Live(observer, open_page)


class _Live:
    """Passes everything on, and opens the page when the run begins."""

    def __init__(self, observer: RunObserver, open_page: contextlib.ExitStack) -> None:
        self._observer, self._open_page = observer, open_page

    def begin(self, plan: Plan) -> None:
        """Open the page; a run goes on without one."""
        from fedloom.reports.live_server import LivePage

        if plan.folder:
            try:
                page = self._open_page.enter_context(LivePage(Path(plan.folder)))
                self._open_page.callback(page.show_the_end)
                say(f"live page: {page.address}  (open it in a browser)")
            except OutputError as error:
                self._observer.warning(f"without a live page: {error}")
        self._observer.begin(plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer, name)
