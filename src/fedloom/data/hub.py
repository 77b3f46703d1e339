"""Sets on the Hub to rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedloom.errors import DataError, first_line


def hub_rows(
    name: str,
    split: str,
    subset: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> Any:
    """Return the rows of a set on the Hub, which has a length and is indexed from 0.

    Raises:
        DataError: It cannot be had.
    """
    import datasets

    try:
        return datasets.load_dataset(
            name,
            subset,
            data_dir=data_dir,
            split=split,
            revision=revision,
            trust_remote_code=False,
        )
    except Exception as error:  # datasets raises whatever the network, the Hub or the files raise
        reason = first_line(error)
        at = "" if revision is None else f", revision {revision!r}"
        raise DataError(
            f"{name!r} (split {split!r}{at}) cannot be had from the Hub: {reason}\n"
            "a local copy does as well: --set data.source=FILE.jsonl (or .csv, .parquet)"
        ) from error


def told(name: str, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield rows; what goes wrong while one of them is had is an error of the set."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above: whatever the files of the set raise
            reason = first_line(error)
            raise DataError(
                f"{name!r} cannot be read on: {reason}\n"
                "a local copy does as well: --set data.source=FILE.jsonl (or .csv, .parquet)"
            ) from error
        yield row
