"""Numbers as people read them."""

from __future__ import annotations


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


def human_count(count: float) -> str:
    """Return a whole number with thin thousands: ``12 345``."""
    return f"{count:,.0f}".replace(",", "\u202f")


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    unit = 0
    while abs(value) >= step and unit < len(units) - 1:
        value /= step
        unit += 1
    return f"{value:.0f} {units[0]}" if unit == 0 else f"{value:.3g} {units[unit]}"
