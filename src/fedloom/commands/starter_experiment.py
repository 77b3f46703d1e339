"""The commented experiment that ``fedloom init`` writes and ``fedloom demo`` runs."""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import OutputError


def starting_file() -> Path:
    """Return its path."""
    return Path(__file__).with_name("starting.toml")


def write_starting_file(path: Path, text: str | None = None) -> None:
    """Write it, or another text of an experiment, to ``path``.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.write_text(text or starting_file().read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
