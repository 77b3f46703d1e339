"""Templates filled and pages written: what every kind of page shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from fedloom.accounting.quantities import (
    human_bytes,
    human_count,
    human_flops,
    human_number,
    human_seconds,
)
from fedloom.display.untrusted_text import visible
from fedloom.errors import OutputError
from fedloom.reports.glossary import INTERVALS, entries
from fedloom.statistics.intervals import Interval


def fill(template: str, **content: Any) -> str:
    """Return a template of ``templates/`` as HTML; whatever is filled in is escaped, and visible."""
    return str(_environment().get_template(template).render(**content))


@cache
def _environment() -> Any:
    """Return what compiles templates, once: a page has several, and each takes some 20 ms."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": lambda value: "-" if value is None else human_bytes(value),
        "flops": lambda value: "-" if value is None else human_flops(value),
        "seconds": lambda value: "-" if value is None else human_seconds(value),
        "count": human_count,
        "number": number,
        "figure": lambda value: "-" if value is None else human_number(value),
        "signed": lambda value: "-" if value is None else f"{value:+.3f}",
        "interval": lambda own: interval(own, "{:.3f}"),
        "signed_interval": lambda own: interval(own, "{:+.3f}"),
        "estimate": _estimate,
        "p": lambda value: "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}",
        "member": lambda name: f" ({name})" if name else "",
        "sentence": _sentence,
        "words": lambda name: str(name).replace("_", " "),
    }
    environment.globals |= {"definitions": entries, "intervals": INTERVALS}
    return environment


def _sentence(text: str) -> str:
    """Return a line as a sentence: with a full stop, and a capital unless a setting begins it."""
    first = text.split(" ", 1)[0]
    return f"{text if '.' in first or '_' in first else text[:1].upper() + text[1:]}."


def write_page(page: str, target: Path) -> Path:
    """Write a page and return where it is.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _shown(value: Any) -> Any:
    """Return what is filled in; text that is not markup of our own is shown with all that is in it."""
    return visible(value) if type(value) is str else value


def interval(own: Interval | Mapping[str, Any] | None, form: str) -> str:
    """Return an interval as it is read, or why there is none: ``0.478 to 0.576``."""
    if own is None:
        return "-"
    record = own if isinstance(own, Mapping) else asdict(own)
    if record["low"] is None or record["high"] is None:
        return str(record.get("missing") or "-")
    return f"{form.format(record['low'])} to {form.format(record['high'])}"


def _estimate(own: Mapping[str, Any] | float | None) -> str:
    """Return a mean with its interval; records of earlier releases have the mean alone."""
    if not isinstance(own, Mapping):
        return number(own)
    return f"{number(own['mean'])} ({interval(own, '{:.3f}')})"


def number(value: float | None) -> str:
    """Return a metric as it is read."""
    return "-" if value is None else f"{value:.3f}"
