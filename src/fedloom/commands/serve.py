"""``fedloom serve``."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import Quiet, app, begin_loading, say
from fedloom.commands.chat import BaseModel
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import ConnectionFailed, SettingsError, first_line

if TYPE_CHECKING:
    from fedloom.serving.locate import Located

KEY = "FEDLOOM_API_KEY"
"""The variable that holds the key which clients send."""

SHORTEST_KEY = 16
"""Characters of a key where other machines can reach the server."""


@app.command()
def serve(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Run folders, saved adapters or models.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address; others' machines need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    client: Annotated[
        int | None, typer.Option(help="Whose model of the run (default: the global one).", min=0)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Serve the base model as well.")] = False,
    base_model: BaseModel = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.", min=1)] = 1024,
    waiting: Annotated[
        int, typer.Option(help="Requests that wait while one is answered.", min=0, max=64)
    ] = 8,
    seed: Annotated[
        int, typer.Option(help="Of the draws of requests that name no seed.", min=0)
    ] = 0,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A site whose pages may ask. May be repeated.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that the server is called by. May be repeated.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Serve trained models by OpenAI's HTTP API, on this machine, to try them in other programs.

    (fedloom server is the coordinator of a federation.) The variable FEDLOOM_API_KEY has the key that
    clients must send; without it none is asked for, and other machines are not let in.
    """
    key = os.environ.get(KEY, "")
    _require_key(host, key)
    refuse_early(lambda: _located(folders, client, base_model, base))
    begin_loading(quiet=True)
    from fedloom.commands.terminal import PlainConsole, working
    from fedloom.serving.access import Access
    from fedloom.serving.answers import Answers
    from fedloom.serving.http_server import ModelServer, serve_until_stopped
    from fedloom.serving.models import ReadyModels

    found = _located(folders, client, base_model, base)
    with working(PlainConsole(stderr=True), "loading the model") as stage:
        models = ReadyModels(found, stage)
    access = Access(key, frozenset(name.lower() for name in allow_host or ()), allow_origin or ())
    answers = Answers(models, waiting, max_tokens, seed)
    log = (lambda text: None) if quiet else say
    with _listening(host, port):
        server = ModelServer(host, port, answers, access, log)
    at = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
    names = ", ".join(ready.name for ready in models.all)
    say(f"serving {names} at http://{at}:{server.server_port}/v1 (Ctrl-C stops)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve_until_stopped(server)
    say("stopped")


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    """Name the address where a server cannot listen.

    Raises:
        ConnectionFailed: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise ConnectionFailed(
            f"cannot listen at {host}, port {port}: {first_line(error)}; choose others with --host and "
            "--port"
        ) from error


def _require_key(host: str, key: str) -> None:
    """Refuse to let other machines in without a key that cannot be guessed.

    Raises:
        SettingsError: The address can be reached from other machines, and there is no such key.
    """
    import ipaddress

    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not key.isascii() or any(letter.isspace() for letter in key):
        raise SettingsError([f"{KEY} has blanks or letters that no header holds"], "the command")
    if not local and len(key) < SHORTEST_KEY:
        raise SettingsError(
            [
                f"--host {host} lets other machines in: set {KEY} to a key of at least {SHORTEST_KEY} "
                "letters (python -c 'import secrets; print(secrets.token_urlsafe())'), or leave --host "
                "out"
            ],
            "the command",
        )


def _located(
    folders: list[Path], client: int | None, base_model: str | None, base: bool
) -> list[Located]:
    """Return the models that are meant, before any is loaded."""
    from fedloom.models.load import require_reachable
    from fedloom.serving.locate import base_alone, locate

    found = [locate(folder, client, base_model) for folder in folders]
    if base:
        found.append(base_alone(found[0]))
    for one in found:
        require_reachable(one.base)
    return found
