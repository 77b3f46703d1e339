"""``[simulation.devices]``: simulated devices and links of clients, from distributions or from a trace.

A trace is a file with one row for each client, as devices were measured: CSV with a header, or JSONL.
What it has no column for is drawn. Every draw is by the seed and the client's id, so a client's device
does not depend on how many others there are. No torch here.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedloom.accounting.network import Link
from fedloom.accounting.quantities import parse_quantity
from fedloom.data.safe_open import UnreadableError, opened, text_of
from fedloom.display.untrusted_text import named, quoted
from fedloom.errors import SettingsError
from fedloom.randomness import generator
from fedloom.settings.schema import Settings, reason_of
from fedloom.settings.suggestions import nearest

NEEDS = {
    "constant": ("value",),
    "uniform": ("low", "high"),
    "loguniform": ("low", "high"),
    "lognormal": ("median", "sigma"),
}
"""Parameters of each kind of distribution."""

QUANTITIES = {"flops": "FLOP", "up": "bit", "down": "bit", "latency": "s", "dropout": None}
"""What is drawn for each client, with the unit in which text may give it."""

LISTED = 20
"""Mistakes of a trace that an error lists."""

Number = Annotated[float | None, Field(ge=0, le=1e21)]


class Distribution(Settings):
    """A distribution of a number over clients; a number or text in its place is the same for all."""

    kind: Literal["constant", "uniform", "loguniform", "lognormal"] = "constant"
    """constant (value), uniform or loguniform (low, high), or lognormal (median, sigma)."""
    value: Number = None
    """The value of every client."""
    low: Number = None
    """Lowest value."""
    high: Number = None
    """Highest value."""
    median: Number = None
    """Median."""
    sigma: float | None = Field(default=None, ge=0, le=5)
    """Standard deviation of the natural logarithm."""

    @model_validator(mode="after")
    def _complete(self) -> Distribution:
        needed = NEEDS[self.kind]
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        lacking = [name for name in needed if name not in given]
        other = [name for name in given if name not in needed and name != "kind"]
        if lacking or other:
            raise ValueError(f'kind = "{self.kind}" takes {" and ".join(needed)}, and nothing else')
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low:g} is above high = {self.high:g}")
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters of its kind."""
        return {name: float(getattr(self, name)) for name in NEEDS[self.kind]}

    def draw(self, rng: np.random.Generator) -> float:
        """Return one draw."""
        own = self.parameters
        if self.kind == "constant":
            return own["value"]
        if self.kind == "uniform":
            return float(rng.uniform(own["low"], own["high"]))
        if self.kind == "loguniform":
            return math.exp(rng.uniform(math.log(own["low"]), math.log(own["high"])))
        return own["median"] * math.exp(own["sigma"] * rng.standard_normal())


class AvailabilitySettings(Settings):
    """``[simulation.devices.available]``: when clients can be asked: a window in every period."""

    period: float = Field(default=86_400, gt=0)
    """Seconds after which the windows repeat."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the period in which a client is available; the begin of its window is drawn."""


class DevicesSettings(Settings):
    """``[simulation.devices]``: devices and links of simulated clients, for the simulated time."""

    flops: Distribution = Distribution(value=1e12)
    """Floating-point operations per second that a device reaches in practice: a number, a text
    ("1TFLOP"), or a distribution (default: 1 TFLOP/s)."""
    up: Distribution = Distribution(value=20e6)
    """Bits a second from a client: a number, a text ("20Mbit"), or a distribution (default: 20
    Mbit/s)."""
    down: Distribution = Distribution(value=100e6)
    """Bits a second to a client, in the same forms (default: 100 Mbit/s)."""
    latency: Distribution = Distribution(value=0.03)
    """Seconds of a message there and back: a number, a text ("30ms"), or a distribution (default: 30
    ms)."""
    dropout: Distribution = Distribution(value=0.0)
    """Probability that a client which was asked in a round loses its connection before its answer
    arrives: a number, or a distribution (default: 0)."""
    available: AvailabilitySettings | None = None
    """When clients can be asked (default: always)."""
    trace: str | None = None
    """File (CSV or JSONL) with a row for each client: client, and any of flops, up, down, latency,
    dropout (numbers in the units above), available (windows in seconds) and period; what it has no column
    for is drawn."""

    @field_validator(*QUANTITIES, mode="before")
    @classmethod
    def _as_distribution(cls, value: object, info: ValidationInfo) -> object:
        unit = QUANTITIES[str(info.field_name)]
        if isinstance(value, bool):
            return value
        if isinstance(value, int | float | str):
            value = {"value": value}
        if unit is None or not isinstance(value, Mapping):
            return value
        return {
            name: parse_quantity(own, unit) if isinstance(own, str) and name != "kind" else own
            for name, own in value.items()
        }

    @field_validator("flops", "up", "down")
    @classmethod
    def _positive(cls, own: Distribution) -> Distribution:
        if any(value <= 0 for name, value in own.parameters.items() if name != "sigma"):
            raise ValueError("a rate must be above 0")
        return own

    @field_validator("latency")
    @classmethod
    def _has_logarithm(cls, own: Distribution) -> Distribution:
        if own.kind == "loguniform" and own.low == 0:
            raise ValueError('low must be above 0 with kind = "loguniform"')
        return own

    @field_validator("dropout")
    @classmethod
    def _probability(cls, own: Distribution) -> Distribution:
        if own.kind not in ("constant", "uniform") or max(own.parameters.values()) > 1:
            raise ValueError("must be a probability from 0 to 1, constant or uniform")
        return own


@dataclass(frozen=True)
class Availability:
    """When a client can be asked.

    Attributes:
        windows: Begin and end in seconds of simulated time, ascending and apart; none: always.
        period: Seconds after which they repeat; ``None``: they do not.
    """

    windows: tuple[tuple[float, float], ...] = ()
    period: float | None = None

    def _around(self, now: float) -> Iterator[tuple[float, float]]:
        """Yield the windows around a time and of the period after it, ascending."""
        if self.period is None:
            yield from self.windows
            return
        cycle = math.floor(now / self.period)
        for number in range(cycle - 1, cycle + 3):
            for begin, end in self.windows:
                yield begin + number * self.period, end + number * self.period

    def until(self, now: float) -> float:
        """Return the end of the window that holds ``now``, ``now`` itself where none does."""
        if not self.windows:
            return math.inf
        for begin, end in self._around(now):
            if begin <= now < end:
                return end
        return now

    def next(self, now: float) -> float | None:
        """Return the earliest time from ``now`` on at which it can be asked; ``None``: never again."""
        if self.until(now) > now:
            return now
        return next((begin for begin, _ in self._around(now) if begin > now), None)


@dataclass(frozen=True)
class Device:
    """A client's device and link.

    Attributes:
        link: Rates, latency and floating-point operations a second.
        dropout: Probability that it loses its connection in a round, 0 to 1.
        available: When it can be asked.
    """

    link: Link
    dropout: float = 0.0
    available: Availability = Availability()


def devices_of(settings: DevicesSettings, clients: int, seed: int) -> dict[int, Device]:
    """Return the device of every client.

    Args:
        settings: Distributions, and perhaps a trace.
        clients: Number of clients.
        seed: The experiment's seed.

    Raises:
        DataError: The trace is not there.
        SettingsError: It is not a trace of these clients; with line and value of each mistake.
    """
    measured = _read_trace(Path(settings.trace), clients) if settings.trace is not None else {}
    return {
        client: _device(settings, measured.get(client, {}), client, seed)
        for client in range(clients)
    }


def trace_digest(settings: DevicesSettings | None) -> str | None:
    """Return the SHA-256 of the trace, ``None`` where there is none.

    Raises:
        DataError: It is not there.
    """
    if settings is None or settings.trace is None:
        return None
    with _opened(Path(settings.trace)) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _device(settings: DevicesSettings, row: Mapping[str, Any], client: int, seed: int) -> Device:
    own = {
        name: row[name]
        if name in row
        else getattr(settings, name).draw(generator(seed, f"device {name}", client))
        for name in QUANTITIES
    }
    available = Availability()
    if "available" in row:
        available = Availability(row["available"], row.get("period"))
    elif settings.available is not None and settings.available.share < 1:
        period = settings.available.period
        begin = float(generator(seed, "device available", client).uniform(0, period))
        end = begin + settings.available.share * period
        available = Availability(((begin, end),), period)
    link = Link(own["up"], own["down"], own["latency"], own["flops"])
    return Device(link, own["dropout"], available)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a trace; one that cannot be read is an error that names it."""
    try:
        with opened(path) as file:
            yield file
    except UnreadableError as error:
        raise SettingsError([f"{named(path)} {error}"], "simulation.devices.trace") from None


def _read_trace(path: Path, clients: int) -> dict[int, dict[str, Any]]:
    """Return the rows of a trace by client, with the columns that it has.

    Raises:
        SettingsError: With every mistake, its line and value.
    """
    problems: list[str] = []
    found: dict[int, dict[str, Any]] = {}
    lines: dict[int, int] = {}
    with _opened(path) as file:
        text = text_of(file, "")
        rows = _json_rows(text, problems) if _is_json(path) else _csv_rows(text, problems)
        for line, row in rows:
            faults, own = _checked(row, clients)
            problems += [f"line {line}: {fault}" for fault in faults]
            client = own.pop("client", None)
            if client is None:
                continue
            if client in found:
                problems.append(
                    f"line {line}: client = {client} stands in line {lines[client]} already"
                )
            found[client], lines[client] = own, line
    missing = [client for client in range(clients) if client not in found]
    if missing and not problems:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        problems.append(
            f"{len(missing)} of {clients} clients have no line: {shown}; give one line for each client, "
            f"0 to {clients - 1}"
        )
    if problems:
        more = len(problems) - LISTED
        told = problems[:LISTED] + [f"and {more} more"] * (more > 0)
        raise SettingsError(told, f"the trace {named(path)}")
    return found


def _is_json(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))


def _csv_rows(text: Any, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line and cells of each row of a CSV; an empty cell is a gap."""
    reader = csv.reader(text)
    try:
        header = [name.strip() for name in next(reader, [])]
        if faults := _faulty_columns(header):
            problems += [f"line 1: {fault}" for fault in faults]
            return
        for cells in reader:
            if len(cells) != len(header):
                if cells:
                    problems.append(
                        f"line {reader.line_num}: {len(cells)} cells, the header has {len(header)}"
                    )
                continue
            yield reader.line_num, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")


def _json_rows(text: Any, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line and values of each row of a JSONL; all have the columns of the first."""
    columns: list[str] = []
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(
                f"line {number}: no JSON ({reason_of(error)}): {quoted(line.strip(), 60)}"
            )
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number}: must be an object, not {quoted(row, 60)}")
            continue
        faults = _faulty_columns(list(row))
        if faults:
            problems += [f"line {number}: {fault}" for fault in faults]
            continue
        columns = columns or list(row)
        yield number, {**dict.fromkeys(columns), **row}


COLUMNS = ("client", *QUANTITIES, "available", "period")


def _faulty_columns(header: Collection[str]) -> list[str]:
    """Return what is wrong with the names of columns."""
    found = [
        f"column {quoted(name, 60)}: {nearest(name, COLUMNS)}"
        for name in header
        if name not in COLUMNS
    ]
    if "client" not in header:
        found.append("there is no column client")
    if len(set(header)) < len(header):
        found.append("a column stands there twice")
    if "period" in header and "available" not in header:
        found.append("the column period needs a column available")
    return found


def _checked(row: Mapping[str, Any], clients: int) -> tuple[list[str], dict[str, Any]]:
    """Return what is wrong with a row, and what it says."""
    faults: list[str] = []
    found: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or value == "":
            faults.append(f"{name} is missing, and the trace has a column {name}: give it a value")
            continue
        try:
            found[name] = READERS[name](value)
        except (TypeError, ValueError, OverflowError) as error:
            why = f": {error}" if isinstance(error, _OutOfRange) else " is no number"
            if name == "available" and not isinstance(error, _OutOfRange):
                why = ' are no windows in seconds: write them like "0-28800 43200-60000" or [[0, 28800]]'
            faults.append(f"{name} = {quoted(value, 60)}{why}")
    client = found.get("client")
    if client is not None and client >= clients:
        faults.append(f"client = {client}: there are {clients} clients, 0 to {clients - 1}")
        del found["client"]
    windows, period = found.get("available"), found.get("period")
    if windows and period is not None and windows[-1][1] > windows[0][0] + period:
        faults.append(f"period = {period:g}: its windows take longer, up to {windows[-1][1]:g}")
    return faults, found


class _OutOfRange(ValueError):
    """A number that is none of those that may stand there."""


def _number(lowest: float, highest: float = 1e21, *, above: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not lowest <= number <= highest or (above and number == lowest):
            words = "above" if above else "at least"
            most = f" and at most {highest:g}" if highest < 1e21 else ""
            raise _OutOfRange(f"must be {words} {lowest:g}{most}")
        return number

    return read


def _client(value: Any) -> int:
    number = float(value)
    if isinstance(value, bool) or number < 0 or number != int(number):
        raise _OutOfRange("must be the number of a client, from 0")
    return int(number)


def _windows(value: Any) -> tuple[tuple[float, float], ...]:
    """Return windows from ``"0-28800 43200-60000"`` or ``[[0, 28800], [43200, 60000]]``."""
    pairs = [part.split("-") for part in value.split()] if isinstance(value, str) else value
    found = tuple((float(begin), float(end)) for begin, end in pairs)
    if not found or not all(0 <= begin < end <= 1e21 for begin, end in found):
        raise _OutOfRange("windows begin at 0 or later and end after they begin")
    if any(after[0] < before[1] for before, after in pairwise(found)):
        raise _OutOfRange("windows must be ascending and must not overlap")
    return found


READERS: dict[str, Callable[[Any], Any]] = {
    "client": _client,
    "flops": _number(0, above=True),
    "up": _number(0, above=True),
    "down": _number(0, above=True),
    "latency": _number(0),
    "dropout": _number(0, 1),
    "available": _windows,
    "period": _number(0, above=True),
}
"""How the value of each column is read."""
