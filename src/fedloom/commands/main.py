"""The command line: all commands, and the handling of errors."""

from __future__ import annotations

import errno
import io
import sys
from typing import NoReturn

import typer

from fedloom.commands.app import app
from fedloom.display.untrusted_text import message, short
from fedloom.errors import FedloomError

# In the order in which help lists them.
# isort: off
from fedloom.commands import run
from fedloom.commands import data
from fedloom.commands import evaluate
from fedloom.commands import compare
from fedloom.commands import advise
from fedloom.commands import tune
from fedloom.commands import export
from fedloom.commands import merge
from fedloom.commands import chat
from fedloom.commands import serve
from fedloom.commands import label
from fedloom.commands import keys
from fedloom.commands import members
from fedloom.commands import server
from fedloom.commands import client
from fedloom.commands import status
from fedloom.commands import audit
from fedloom.commands import watch
from fedloom.commands import report
from fedloom.commands import explain

# isort: on

COMMANDS = (
    run,
    data,
    evaluate,
    compare,
    advise,
    tune,
    export,
    merge,
    chat,
    serve,
    label,
    keys,
    members,
    server,
    client,
    status,
    audit,
    watch,
    report,
    explain,
)
"""Files whose import adds their commands to ``app``."""


def main() -> NoReturn:
    """Run the command line; a fedloom error is one message and its exit code, never a traceback.

    Where nobody reads the output any more (``| head``), the exit code is 141 and nothing is said.
    """
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # characters that the terminal's encoding lacks are shown as escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="fedloom", standalone_mode=False)
    except FedloomError as error:
        typer.secho(message(f"fedloom: {error}"), fg=typer.colors.RED, err=True)
        _hint(str(error))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("flwr", "cryptography", "uvicorn"):
            raise
        text = f"fedloom: {error.name} is missing: federations between machines are an extra"
        typer.secho(f"{text}; pip install 'fedloom[flower]'", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        typer.secho("fedloom: stopped; nothing was started that could be resumed", err=True)
        sys.exit(130)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # as of a program that SIGPIPE ends
            sys.exit(141)
        raise
    except Exception as error:
        if told := _out_of_memory(error) or _of_path(error) or _of_plugin(error):
            typer.secho(message(f"fedloom: {told}"), fg=typer.colors.RED, err=True)
            sys.exit(1)
        _usage_error(error)
    sys.exit(code or 0)  # of typer.Exit


def _usage_error(error: Exception) -> NoReturn:
    """Print a mistake in the command line as typer would; let anything else through."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    if "Did you mean" in str(
        getattr(error, "message", "")
    ):  # typer's hint, which click's would repeat
        error.__dict__["possibilities"] = None
    show()
    _hint(str(getattr(error, "message", "")))
    sys.exit(int(getattr(error, "exit_code", 2)))


def _hint(text: str) -> None:
    """Print how `fedloom explain` has more about an error, where it has."""
    for line in explain.hints(text):
        typer.secho(line, dim=True, err=True)


def _of_plugin(error: Exception) -> str:
    """Return what to say of an error in a class that is not fedloom's, empty for any other error."""
    from fedloom.settings.plugins import plugin_error

    return str(plugin_error(error) or "")


WAYS_OUT = {
    errno.ENAMETOOLONG: "write a shorter path",
    errno.EACCES: "give this user the right to it, or name another path",
    errno.EPERM: "give this user the right to it, or name another path",
    errno.ELOOP: "its links lead in a circle; name what they are meant to lead to",
    errno.ENOSPC: "the disk is full; make room, or name a path on another",
    errno.EROFS: "nothing can be written there; name another path",
}
"""What to do about what the system says of a path."""


def _of_path(error: Exception) -> str:
    """Return what the system says of a path that nobody expected, empty for any other error."""
    if not isinstance(error, OSError) or error.errno not in WAYS_OUT or error.filename is None:
        return ""
    path = short(str(error.filename), 200)
    return f"the system refuses {path!r}: {error.strerror}; {WAYS_OUT[error.errno]}"


def _out_of_memory(error: Exception) -> str:
    """Return the message where memory does not suffice, empty for any other error."""
    if not isinstance(error, MemoryError | RuntimeError):
        return ""
    from fedloom.training.memory import asked_for, is_out_of_memory

    if not is_out_of_memory(error):
        return ""
    return (
        f"memory does not suffice{asked_for(error)}: set a smaller training.batch_size (or "
        "training.tokens_per_pass, with the same results), evaluation.batch_size or data.max_length, or "
        "take a smaller model; of a run, the rounds that were over are saved: fedloom run --resume FOLDER"
    )
