"""Write ``errors.md``: a section for every error that a user can cause, by its first words.

The same sections, as ``fedloom explain`` shows them, go into the package.

Messages are collected from the code, so that none is missing and none is there that is no longer raised:
what is given to a class of ``fedloom.errors`` or to a wrong option, what a check of settings raises, and
the lines that checks between settings return. Of messages that do not say what to do themselves,
``errors.toml`` does, by their first words. ``python docs/errors.py`` writes the page; a test compares it
with the code and fails where a message has no way out.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "fedloom"

EXPLANATIONS = SOURCE / "commands" / "explanations.jsonl"

LONGEST_HEADING, LONGEST_NAME = 70, 40
"""Characters of a heading, and of the name of a section, about."""

PAGE = """# Every error by its first words

<!-- written by docs/errors.py from the code and docs/errors.toml -->

Search this page for the first words of a message, or run `fedloom explain NAME` with the name that the
terminal gives below it, which shows its section; what is filled in (names, numbers, paths) is an ellipsis
here. The most frequent errors are explained at more length in
[Errors and what to do](troubleshooting.md). The exit code of a command is that of the error's class.

"""

AREAS = {
    "Commands and options": ("commands",),
    "Settings": ("experiment", "settings"),
    "Data": ("data",),
    "Models and adapters": ("models",),
    "Methods and objectives": ("methods", "objectives", "aggregation", "training"),
    "Rounds, clients and compression": ("federation", "wire", "engines"),
    "Privacy": ("privacy",),
    "Evaluation, judges and rewards": ("evaluation", "rewards"),
    "Runs, records and pages": ("runs", "storage", "reports", "accounting", "display", "errors.py"),
    "Chat and serving": ("serving",),
    "Between machines": ("deployment", "security"),
}
"""Part of the page to folders of the package."""

FROM_MACHINES = ("MessageError", "SumRefused", "OutOfStepError")
"""Classes that are of messages of other machines: the user who reads one has not caused it."""

VERBS = (
    "add|allow|ask|choose|copy|correct|create|delete|export|give|go on|have|install|leave|let|look|lower|"
    "make|mend|merge|move|name|pip install|put|raise|resize|resume|revoke|run|save|say|set|shorten|"
    "start|stop|take|train|try|unset|use|wait|write"
)
FIRST_LETTER_OF_ANY_CASE = "|".join(f"(?i:{verb[0]}){verb[1:]}" for verb in VERBS.split("|"))
WAY_OUT = re.compile(
    rf"(?:^|(?<=[;:,.?] )|(?<=; )and )(?=(?:{FIRST_LETTER_OF_ANY_CASE}|`fedloom \w)\b)"
)
"""Where a message begins to say what to do: ``name`` and ``Name`` are verbs, ``NAME`` is not."""

FEWEST_WORDS = 2
"""Words of a way out beside what is filled in: ``use …`` says nothing."""


@dataclass(frozen=True)
class Message:
    """A message of the code.

    Attributes:
        text: As it is written, with an ellipsis for what is filled in.
        kind: The class of ``fedloom.errors``.
        place: The file below ``src/fedloom``.
    """

    text: str
    kind: str
    place: str

    @property
    def words(self) -> str:
        """The first words, by which its section is found."""
        first = re.split(r"(?<=[^ ]{2})(?:; |: )", self.text, maxsplit=1)[0]
        first = first if len(first.replace("…", "").strip()) >= 24 else self.text
        if len(first) <= LONGEST_HEADING:
            return first.strip(" :;,")
        return first[:LONGEST_HEADING].rpartition(" ")[0].strip(" :;,") + " …"


def classes() -> set[str]:
    """Return the names of the classes of ``fedloom.errors``."""
    tree = ast.parse((SOURCE / "errors.py").read_text(encoding="utf-8"))
    return {
        own.name
        for own in tree.body
        if isinstance(own, ast.ClassDef) and own.bases and own.name != "Refusal"
    }


def texts_of(node: ast.expr | None) -> Iterator[str]:
    """Yield the texts that an expression may be; of what is filled in, an ellipsis."""
    match node:
        case ast.Constant(str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        case ast.BinOp(left, ast.Add(), right):
            for first in list(texts_of(left)) or ["…"]:
                for second in list(texts_of(right)) or ["…"]:
                    yield first + second
        case ast.IfExp(_, body, orelse):
            yield from texts_of(body)
            yield from texts_of(orelse)
        case ast.List(elements) | ast.Tuple(elements):
            for own in elements:
                yield from texts_of(own)
        case ast.Starred(value):
            yield from texts_of(value)


CHECKS = re.compile(r"contradictions|problems|complaints|check|refus|mistakes|_lines$|faults|lacks")
"""Names of functions that return or yield mistakes, one line each."""

LINES = re.compile(r"(list|Iterator)\[str\]")
"""What they return."""


def collected() -> list[Message]:
    """Return every message, in the order of files and of lines, each once."""
    kinds = classes()
    found: dict[str, Message] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        place = str(path.relative_to(SOURCE))
        checks = [] if place.startswith(("reports/", "deployment/health")) else _of_checks(nodes)
        for text, kind in [*_raised(nodes, kinds), *checks]:
            shown = re.sub("…+", "…", " ".join(text.replace("``", "`").split()))
            if len(re.findall(r"[A-Za-z]{2,}", shown)) >= 2 and "in all)" not in shown:
                found.setdefault(shown, Message(shown, kind, place))
    return list(found.values())


def _raised(nodes: list[ast.AST], kinds: set[str]) -> Iterator[tuple[str, str]]:
    others = {"BadParameter": "usage", "_NotReadError": "SettingsError"}
    for node in nodes:
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in kinds or name in others:
                for text in texts_of(node.args[0]):
                    yield text, others.get(name, name)


def _of_checks(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Yield what functions return that check settings, and what validators of settings raise."""
    for function in nodes:
        if not isinstance(function, ast.FunctionDef):
            continue
        validator = any("validator" in ast.dump(own) for own in function.decorator_list)
        lines = function.returns is not None and CHECKS.search(function.name)
        if not validator and not (lines and LINES.search(ast.unparse(function.returns))):
            continue
        for node in ast.walk(function):
            match node:
                case ast.Raise(ast.Call(_, [told, *_])) if validator:
                    found = texts_of(told)
                case _:
                    found = _told(node) if lines else iter(())
            for text in found:
                yield text, "SettingsError"


def _told(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Yield(value) | ast.Return(value) | ast.AugAssign(_, ast.Add(), value):
            yield from texts_of(value)
        case ast.Call(ast.Attribute(_, "append"), [value]):
            yield from texts_of(value)


def known() -> dict[str, Any]:
    """Return what ``errors.toml`` says: of messages, of files and of classes."""
    return tomllib.loads((HERE / "errors.toml").read_text(encoding="utf-8"))


def explained(message: Message, written: dict[str, Any]) -> tuple[str, str]:
    """Return the cause and the way out of a message; the latter is empty where nothing says it."""
    own = next((e for e in written["error"] if message.text.startswith(e["words"])), {})
    found = WAY_OUT.search(message.text)
    cause, way = message.text, ""
    if found and len(re.findall(r"\w+", message.text[found.start() :])) >= FEWEST_WORDS:
        cause, way = message.text[: found.start()].rstrip(" ;:,"), message.text[found.start() :]
    elif " needs " in message.text or "must" in message.text:
        way = "Give what the message says is needed."
    way = own.get("do") or way or written["files"].get(message.place, "")
    return own.get("cause", cause), way or written["classes"].get(message.kind, "")


def errors_page(messages: list[Message] | None = None) -> str:
    """Return the page, of messages that were collected."""
    written, messages = known(), messages or collected()
    codes = exit_codes()
    lines: list[str] = []
    for title, sections in by_area(messages).items():
        lines += [f"## {title}", ""]
        for words, alike in sections.items():
            lines += [f"### {_code(words.replace('`', ''))}", ""]
            for message in alike:
                cause, way = explained(message, written)
                lines += [f"- Cause: {_sentence(cause or 'what it asks for is not there')}"]
                lines += [f"- What to do: {_sentence(way)} (Exit code {codes[message.kind]}.)", ""]
    others = [message for message in messages if message.kind in FROM_MACHINES]
    lines += ["## Messages of other machines", "", " ".join(written["machines"].split()), ""]
    lines += [f"- {_code(message.text)}" for message in others]
    return PAGE + "\n".join(lines).rstrip() + "\n"


def by_area(messages: list[Message]) -> dict[str, dict[str, list[Message]]]:
    """Return the messages that users cause, by part of the page and by first words."""
    return {
        title: _by_words(
            [
                message
                for message in messages
                if message.place.split("/")[0] in folders and message.kind not in FROM_MACHINES
            ]
        )
        for title, folders in AREAS.items()
    }


def explanations(messages: list[Message]) -> str:
    """Return what ``fedloom explain`` reads: of each section its name, first words and messages."""
    written, codes = known(), exit_codes()
    found: dict[str, list[Message]] = {}
    for sections in by_area(messages).values():
        for words, alike in sections.items():
            found.setdefault(words, []).extend(alike)
    names: set[str] = set()
    lines = []
    for words, alike in found.items():
        names.add(name := _name(words, names))
        told = []
        for message in alike:
            cause, way = explained(message, written)
            texts = _plain(cause or "what it asks for is not there"), _plain(way)
            told.append([message.text, *texts, codes[message.kind]])
        lines.append(json.dumps([name, words, told], ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _name(words: str, taken: set[str]) -> str:
    """Return a name of small letters, digits and hyphens for first words, other than those taken."""
    parts = re.findall(r"[a-z0-9]+", words.lower())
    kept = parts[:2]
    while len(kept) < len(parts) and len("-".join([*kept, parts[len(kept)]])) <= LONGEST_NAME:
        kept.append(parts[len(kept)])
    name = "-".join(kept)
    if name not in taken:
        return name
    return next(own for n in range(2, 99) if (own := f"{name}-{n}") not in taken)


def exit_codes() -> dict[str, int]:
    """Return the exit code of each class of ``fedloom.errors``."""
    from fedloom import errors

    found = {name: getattr(errors, name).exit_code for name in classes()}
    return {**found, "usage": 2, "FedloomError": errors.FedloomError.exit_code}


def _by_words(messages: list[Message]) -> dict[str, list[Message]]:
    found: dict[str, list[Message]] = {}
    for message in messages:
        found.setdefault(message.words, []).append(message)
    return dict(sorted(found.items(), key=lambda own: own[0].lower().lstrip("… :'`-")))


def _code(text: str) -> str:
    """Return a text as code that may hold backticks."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _plain(text: str) -> str:
    """Return a text of ``errors.toml`` or of a message as a sentence, links as their words alone."""
    return _ended(re.sub(r"\[([^\]]*)\]\((\w+\.md)\)", r"\1 (docs/\2)", text))


def _ended(text: str) -> str:
    """Return a text as a sentence: with a capital, unless it begins with code, and a full stop."""
    first = text.partition(" ")[0]
    shown = text[:1].upper() + text[1:] if first.isalpha() and first != "pip" else text
    return shown + ("" if shown.endswith((".", "?")) else ".")


def _sentence(text: str) -> str:
    """Return a message as a sentence of the page, in which nothing is markup but code and links."""
    parts = re.split(r"(`[^`]*`|\[[^\]]*\]\(\w+\.md\))", text)
    shown = "".join(
        part if place % 2 else re.sub(r"([*_<>\[\]|])", r"\\\1", part)
        for place, part in enumerate(parts)
    )
    return _ended(shown)


if __name__ == "__main__":
    found = collected()
    (HERE / "errors.md").write_text(errors_page(found), encoding="utf-8")
    EXPLANATIONS.write_text(explanations(found), encoding="utf-8")
