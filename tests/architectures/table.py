"""The table of ``docs/architectures.md``: ``PYTHONPATH=tests python -m architectures.table FOLDER`` writes it.

FOLDER has the tokenizer that the small models are given.
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import transformers

from architectures.sweep import Outcome, swept
from architectures.zoo import MODEL_TYPES, make_folder

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

HEADER = "| model type | adapter | without one | reward head | merged |"

CLOSE = 1e-4
"""Largest difference of a row's log-prob that counts as none, in nats."""


def close(outcome: Outcome) -> float:
    """Return the same where two steps moved a row by so many nats that float32 rounds by more."""
    return max(CLOSE, outcome.moved * 2**-20)


def line(model_type: str, outcome: Outcome) -> str:
    """Return a model type's row of the table."""
    if outcome.refused:
        return f"| {model_type} | refused: {_cell(outcome.refused)} | | | |"
    right = max(outcome.saved, outcome.padded) < close(outcome) and outcome.batched
    reward = "yes" if "pdpo" in (outcome.losses or {}) else "no"
    refused = isinstance(outcome.merged, str)
    merged = (
        f"refused: {_cell(str(outcome.merged))}"
        if refused
        else _yes(outcome.merged < close(outcome))
    )
    names = ", ".join(outcome.left_out)
    return f"| {model_type} | {_yes(right)} | {names} | {reward} | {merged} |"


def lines(document: str) -> dict[str, str]:
    """Return the rows of the table by model type."""
    rows = document.partition(HEADER)[2].splitlines()[2:]
    return {row.split("|")[1].strip(): row for row in rows if row.startswith("|")}


def written(document: str, outcomes: Mapping[str, Outcome]) -> str:
    """Return a document with another table, and how many model types are in it."""
    taken = sum(not outcome.refused for outcome in outcomes.values())
    count = f"{len(outcomes)} model types, of which {taken} are taken"
    document = re.sub(r"\d+ model types, of which \d+ are taken", count, document)
    rows = [line(model_type, outcomes[model_type]) for model_type in sorted(outcomes)]
    return "\n".join(
        [document.partition(HEADER)[0] + HEADER, "| --- | --- | --- | --- | --- |", *rows, ""]
    )


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _yes(right: bool) -> str:
    return "yes" if right else "NO"


def main() -> None:
    """Sweep over all model types and write the table."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    outcomes = {}
    for model_type in MODEL_TYPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            make_folder(model_type, folder, tokenizer)
            outcomes[model_type] = swept(folder, Path(name))
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
