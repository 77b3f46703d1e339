"""Quantities as people read and write them: "13.6 MB", "50 Mbit"."""

from __future__ import annotations

import math
import re

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}

UNITS = {"bit": r"bit(?:/s)?|bps", "B": r"B", "FLOP": r"FLOP(?:/s|S)?", "s": r"s"}
"""What may stand after a number and its prefix, by what is meant."""

EXAMPLES = {"bit": "10Mbit", "B": "8GB", "FLOP": "5TFLOP", "s": "40ms"}


def human_bytes(count: float) -> str:
    """Return bytes in SI units with three digits: ``13.6 MB``."""
    return _scaled(count, 1000.0, ("B", "kB", "MB", "GB", "TB"))


def human_flops(count: float) -> str:
    """Return floating-point operations with three digits: ``2.45 TFLOP``."""
    return _scaled(count, 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def human_seconds(seconds: float) -> str:
    """Return a duration: ``0.42 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def human_count(count: float, *, signed: bool = False) -> str:
    """Return a whole number with thin thousands: ``12 345``, or ``+12 345`` if signed."""
    return f"{count:{'+' * signed},.0f}".replace(",", "\u202f")


def human_number(value: float) -> str:
    """Return a number with thin thousands if it is whole or large, else with four digits: ``0.1235``."""
    whole = value == round(value) if math.isfinite(value) else False
    return human_count(value) if whole or 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    unit = 0
    while abs(value) >= step and unit < len(units) - 1:
        value /= step
        unit += 1
    return f"{value:.0f} {units[0]}" if unit == 0 else f"{value:.3g} {units[unit]}"


def parse_quantity(text: str, unit: str) -> float:
    """Return a size that people write, such as ``10Mbit``, ``8GB``, ``40ms`` or ``5TFLOP``.

    Args:
        text: A number, a prefix of SI (``GiB`` counts in 1024s), a unit.
        unit: ``bit``, ``B``, ``FLOP`` or ``s``.

    Raises:
        ValueError: It is not such a quantity; the message shows an example.
    """
    small = "m|u" if unit == "s" else "k|M|G|T|P"
    found = re.fullmatch(rf"\s*([0-9.]+)\s*({small})?(i)?(?:{UNITS[unit]})\s*", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or not number > 0:
        raise ValueError(
            f"{text!r} is not a quantity above 0 in {unit}; write it like {EXAMPLES[unit]}"
        )
    if unit == "s":
        return number * {None: 1.0, "m": 1e-3, "u": 1e-6}[found[2]]
    power = list(PREFIXES).index(found[2] or "")
    return number * (1024.0**power if found[3] else PREFIXES[found[2] or ""])
