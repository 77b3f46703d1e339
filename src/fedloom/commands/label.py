"""``fedloom label``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.commands.app import app, begin_loading, doubt, say
from fedloom.commands.early_checks import refuse_early
from fedloom.storage.output_paths import require_new_file


@app.command()
def label(
    run: Annotated[
        Path,
        typer.Argument(
            help='Run folder with objective.name = "selector".',
            show_default=False,
        ),
    ],
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Prompts with two answers each: JSONL, CSV or Parquet.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File to write, JSONL; [data] source reads it.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Say which answer of each pair is better, by majority of a run's selectors, for DPO."""
    require_new_file(out, "--out", force=force)
    refuse_early(lambda: _check(run, pairs))
    begin_loading(quiet=False)
    from fedloom.runs.labelling import label_pairs

    found = label_pairs(run, pairs, out)
    voters = "1 selector" if found.selectors == 1 else f"{found.selectors} selectors"
    say(
        f"{found.pairs} pairs, each asked of {voters} in both orders: {found.labelled} labelled, "
        f"{found.unanimous} of them by all; {found.ties} ties and {found.too_long} too long are left out"
        + (f", and {found.unreadable} that cannot be read" if found.unreadable else "")
    )
    if found.agreement is not None:
        say(f"agreement with the file's own labels: {found.agreement:.4f}")
    say(f"answers that follow the position alone: {found.by_position:.4f}")
    if found.by_position > 0.5:
        doubt("most answers follow the position and not what is said: train the selectors longer")
    say(f"wrote {out}; train on it: data.source = {str(out)!r}, data.kind = 'preference'")


def _check(run: Path, pairs: Path) -> None:
    from fedloom.data.unlabelled_pairs import read_pairs
    from fedloom.runs.labelling import selectors_of

    selectors_of(run)
    read_pairs(pairs)
