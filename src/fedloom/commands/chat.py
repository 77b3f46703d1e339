"""``fedloom chat``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import app, begin_loading
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import OutputError

if TYPE_CHECKING:
    from fedloom.serving.locate import Located

Folder = Annotated[
    Path, typer.Argument(help="Run folder, or a saved adapter or model.", show_default=False)
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", help="Folder or Hub name (default: as the adapter names it)."),
]


@app.command()
def chat(
    folder: Folder,
    beside: Annotated[
        str | None,
        typer.Option(help='Another folder that answers too, or "base": the model before training.'),
    ] = None,
    client: Annotated[
        int | None, typer.Option(help="Whose model of the run (default: the global one).", min=0)
    ] = None,
    base_model: BaseModel = None,
    system: Annotated[str, typer.Option(help="Instructions before the conversation.")] = "",
    temperature: Annotated[
        float, typer.Option(help="0: the most probable token each time.", min=0, max=2)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the most probable tokens of this share; above 0.", max=1),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above a temperature of 0.", min=0)] = 0,
    max_tokens: Annotated[
        int, typer.Option(help="Of an answer; never more than half the context.", min=1)
    ] = 512,
) -> None:
    """Talk with a trained model in the terminal, or with two side by side.

    Each line is a question; /help lists what else can be typed. Ctrl-C stops an answer. Without a
    terminal, each line of the standard input is a question as it stands, without commands, and the
    answers are printed; Ctrl-C ends the command.
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p {top_p:g}: it is above 0 and at most 1")
    refuse_early(lambda: _located(folder, beside, client, base_model))
    begin_loading(quiet=True)
    from fedloom.commands.conversation import converse
    from fedloom.commands.terminal import PlainConsole, make_console, working
    from fedloom.serving.conversation import Conversation, Sampling
    from fedloom.serving.models import ReadyModels

    console = make_console()
    found = _located(folder, beside, client, base_model)
    with working(PlainConsole(stderr=True), "loading the model") as stage:
        models = ReadyModels(found, stage)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    converse(Conversation(models, sampling, system), console)


def _located(
    folder: Path, beside: str | None, client: int | None, base_model: str | None
) -> list[Located]:
    """Return the models that are meant, before any is loaded."""
    from fedloom.models.load import require_reachable
    from fedloom.serving.locate import BASE, base_alone, locate

    first = locate(folder, client, base_model)
    found = [first]
    if beside == BASE and not Path(beside).exists():
        found.append(base_alone(first))
    elif beside is not None:
        whose = client if _is_run(Path(beside)) else None
        found.append(locate(Path(beside), whose, base_model))
    if len(found) == 2 and found[0].folder == found[1].folder:
        raise OutputError(f"{folder} beside itself: give another folder with --beside, or base")
    for one in found:
        require_reachable(one.base)
    return found


def _is_run(path: Path) -> bool:
    from fedloom.storage.run_folder import EXPERIMENT

    return (path / EXPERIMENT).is_file()
