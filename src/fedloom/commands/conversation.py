"""A conversation on a terminal, or by lines of the standard input; what models say is never markup."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedloom.commands.terminal import make_text
from fedloom.display.untrusted_text import visible
from fedloom.errors import DataError, first_line

if TYPE_CHECKING:
    from fedloom.serving.conversation import Conversation

HELP = """/reset        forget what was said
/system TEXT  give other instructions (none: /system alone), and forget what was said
/save FILE    write the conversation as JSONL, a line for each model
/quit         leave; so does Ctrl-D
A question that begins with a slash is written with two."""

COLUMNS = 60
"""Columns of a terminal from which two answers stand beside each other."""

PROMPT = "> "


def converse(conversation: Conversation, console: Console) -> None:
    """Ask and answer until the input ends or ``/quit``.

    Commands are what somebody types; every line of a file or a pipe is a question, as it stands there.

    Raises:
        KeyboardInterrupt: Ctrl-C, where the lines are of a file or a pipe.
    """
    _configure_input()
    typed = sys.stdin.isatty()
    talking, told = typed and console.is_terminal, False
    if talking:
        names = " and ".join(ready.name for ready in conversation.models.all)
        _tell(
            console,
            f"{names}: {conversation.models.all[0].format.words}; {_sampling(conversation)}.",
        )
        _tell(console, "/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    for line in _lines(talking):
        question = line.strip()
        if not typed and question.startswith("/") and not told:
            _tell(console, "commands are for a terminal: lines with a slash are questions here")
            told = True
        if typed and question.startswith("//"):
            question = question.removeprefix("/")
        elif typed and question.startswith("/"):
            if not _command(question, conversation, console):
                return
            continue
        if question and not _answer(conversation, question, console, talking) and not typed:
            raise KeyboardInterrupt


def _configure_input() -> None:
    """Have lines edited where the system can, and bytes that are no text replaced."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is imported
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _lines(talking: bool) -> Iterator[str]:
    """Yield what is typed, line by line; Ctrl-C drops the line on a terminal."""
    if not talking:
        yield from sys.stdin
        return
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        yield line


def _command(text: str, conversation: Conversation, console: Console) -> bool:
    """Carry a command out; return whether the conversation goes on."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    match name:
        case "/quit" | "/exit" | "/bye":
            return False
        case "/help" | "/?":
            _tell(console, HELP)
        case "/reset" | "/clear":
            conversation.reset()
            _tell(console, "what was said is forgotten")
        case "/system":
            conversation.system = rest
            conversation.reset()
            _tell(console, f"instructions: {rest}" if rest else "no instructions")
        case "/save":
            _save(Path(rest) if rest else None, conversation, console)
        case _:
            _tell(console, f"there is no command {name}; /help lists them")
    return True


def _save(path: Path | None, conversation: Conversation, console: Console) -> None:
    if path is None:
        return _tell(console, "name a file: /save talk.jsonl")
    try:
        conversation.save(path)
    except FileExistsError:
        return _tell(console, f"{path} is there already: name another file")
    except (OSError, ValueError) as error:
        return _tell(console, f"cannot write {path}: {first_line(error)}")
    return _tell(console, f"wrote {path}")


def _answer(conversation: Conversation, question: str, console: Console, talking: bool) -> bool:
    """Show every model's answer to a question as it is generated, and keep all that was said.

    After Ctrl-C what was said so far is kept; a model that had not begun said nothing.

    Returns:
        Whether it was not stopped by Ctrl-C.
    """
    count = len(conversation.models.all)
    texts = [""] * count
    show: _Columns | _Lines = _Lines(conversation, console, talking)
    if count > 1 and talking and console.width >= COLUMNS:
        show = _Columns(conversation, console)
    stopped = False
    try:
        with show:
            for number in range(count):
                prompt, left_out = conversation.prompt(number, question)
                show.begin(number, left_out)

                def tell(piece: str, number: int = number) -> None:
                    texts[number] += piece
                    show.add(number, piece)

                answer = conversation.ask(number, prompt, tell)
                show.end(number, "" if answer.reason == "stop" else "[cut: --max-tokens]")
    except KeyboardInterrupt:
        stopped = True
        _tell(console, "[stopped]")
    except DataError as error:
        _tell(console, str(error))
        return True
    if not stopped or any(texts):
        conversation.keep(question, texts)
    return not stopped


class _Lines:
    """Answers one after the other, each under the name of its model where there are several."""

    def __init__(self, conversation: Conversation, console: Console, talking: bool) -> None:
        self.names = [ready.name for ready in conversation.models.all]
        self.console, self.talking = console, talking

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is not None:
            print(flush=True)

    def begin(self, number: int, left_out: int) -> None:
        if left_out:
            _tell(self.console, _left_out(left_out))
        if len(self.names) > 1:
            print(f"{visible(self.names[number])}: ", end="", flush=True)

    def add(self, number: int, piece: str) -> None:
        print(visible(piece), end="", flush=True)

    def end(self, number: int, note: str) -> None:
        print(f" {note}" if note and self.talking else "", flush=True)


class _Columns:
    """Two answers beside each other, redrawn as they grow."""

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.names = [ready.name for ready in conversation.models.all]
        self.texts = [""] * len(self.names)
        self.live = Live(console=console, refresh_per_second=8, get_renderable=self._table)

    def __enter__(self) -> _Columns:
        self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.live.stop()

    def begin(self, number: int, left_out: int) -> None:
        if left_out:
            _tell(self.live.console, f"{self.names[number]}: {_left_out(left_out)}")

    def add(self, number: int, piece: str) -> None:
        self.texts[number] += piece

    def end(self, number: int, note: str) -> None:
        self.texts[number] += f" {note}" if note else ""

    def _table(self) -> Table:
        table = Table(expand=True)
        for name in self.names:
            table.add_column(make_text(name), ratio=1, overflow="fold")
        table.add_row(*map(make_text, self.texts))
        return table


def _sampling(conversation: Conversation) -> str:
    own = conversation.sampling
    if not own.temperature:
        return "greedy (--temperature 0)"
    return f"temperature {own.temperature:g}, top-p {own.top_p:g}, seed {own.seed}"


def _left_out(count: int) -> str:
    return f"({count} earlier messages do not fit the model's context and are left out)"


def _tell(console: Console, text: str) -> None:
    """Say what is no answer: on the terminal, or on standard error where answers are piped."""
    if console.is_terminal:
        console.print(make_text(text), style="dim")
    else:
        print(visible(text), file=sys.stderr)
