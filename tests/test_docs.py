"""The documentation: reference pages are the code's, commands exist, quoted messages are raised somewhere."""

import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer

from fedloom.commands.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize(
    "page", ["settings", "commands", "methods", "choose_method", "other_tools"]
)
def test_reference_pages_are_what_the_code_says(page):
    written = runpy.run_path(str(DOCS / "reference.py"))[f"{page}_page"]()
    assert (DOCS / f"{page}.md").read_text() == written, "run: python docs/reference.py"


def test_every_setting_says_what_it_is():
    rows = re.findall(r"^\| `(\w+)` \|.*\| *(.*?) *\|$", (DOCS / "settings.md").read_text(), re.M)
    assert len(rows) > 200
    assert [name for name, words in rows if not words] == []


@cache
def top_command():
    """The command line, which takes a tenth of a second to make."""
    return typer.main.get_command(app)


def commands_in(page):
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fedloom"]:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_a_page_exist_with_their_options(page):
    for words in commands_in(page):
        command, rest = top_command(), words[1:]
        while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert given <= known, (words, given - known)


@pytest.mark.slow
def test_python_on_the_page_about_the_command_line_runs(experiment, tmp_path, monkeypatch):
    import fedloom

    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.toml").write_text(experiment().to_toml())
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "command-line.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "command-line.md", "exec"), {"fedloom": fedloom})


def test_messages_that_are_explained_are_messages_of_the_code():
    quoted = re.findall(r"^\| (`.*?`) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    source = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that go over several lines
    messages = [text for cell in quoted for text in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) >= 20
    assert [text for text in messages if text not in source] == []


@pytest.fixture(scope="module")
def errors():
    own = runpy.run_path(str(DOCS / "errors.py"))
    return own | {"messages": own["collected"](), "written": own["known"]()}


@pytest.mark.slow
def test_every_message_of_the_code_has_a_section_with_cause_and_way_out(errors):
    written, messages = errors["written"], errors["messages"]
    own = [message for message in messages if message.kind not in errors["FROM_MACHINES"]]
    assert len(own) > 600
    assert [m.text for m in own if not errors["explained"](m, written)[1]] == [], "docs/errors.toml"
    assert (DOCS / "errors.md").read_text() == errors["errors_page"](messages), (
        "run: python docs/errors.py"
    )
    assert errors["EXPLANATIONS"].read_text() == errors["explanations"](messages)
    folders = {folder for area in errors["AREAS"].values() for folder in area}
    assert {message.place.split("/")[0] for message in messages} <= folders


@pytest.mark.slow
def test_what_is_written_about_messages_is_of_messages_that_there_are(errors):
    written, messages = errors["written"], errors["messages"]
    texts, places = [m.text for m in messages], {m.place for m in messages}
    gone = [
        e["words"] for e in written["error"] if not any(t.startswith(e["words"]) for t in texts)
    ]
    assert gone == [] and set(written["files"]) <= places


@pytest.mark.parametrize(
    ("text", "cause", "way"),
    [
        ("it is there; name another", "it is there", "name another"),
        ("it is there. Name another", "it is there.", "Name another"),
        ("there is no key, NAME.pub, in …", "there is no key, NAME.pub, in …", "of the class"),
        ("the file … lacks a line `task: NAME`", "the file … lacks a line `task: NAME`", "of the class"),
        ("the key is refused; set …", "the key is refused; set …", "of the class"),
        ("… and … have one weight; use another", "… and … have one weight", "use another"),
        ("it is too much: use … or less", "it is too much", "use … or less"),
    ],
)  # fmt: skip
def test_what_a_message_says_to_do_is_a_verb_with_what_to_do(text, cause, way):
    page = runpy.run_path(str(DOCS / "errors.py"))
    written = {"error": [], "files": {}, "classes": {"DataError": "of the class"}}
    message = page["Message"](text, "DataError", "data/file.py")
    assert page["explained"](message, written) == (cause, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "run --resume gone",
        "run good.toml --engine flowr",
        "run good.toml --set data.source=./gone.csv --set data.kind=preference",
        "run good.toml --set adapter.kind=ia3 --set adapter.alpha=3.0",
        "run good.toml --set federation.clients_per_round=9 --set federation.clients=3",
        "merge gone --rule knot --output new",
        "serve gone",
        "members allow amy gone.pub",
    ],
)
def test_what_a_command_says_is_found_on_the_page(
    errors, call, experiment, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.toml").write_text(experiment().to_toml())
    code, out = call(*words.split())
    said = " ".join(out.replace("│", " ").split())
    patterns = [
        ".*?".join(re.escape(part) for part in message.text.split("…"))
        for message in errors["messages"]
        if len(re.findall(r"\w\w+", message.text)) > 3
    ]
    assert code != 0 and any(re.search(pattern, said) for pattern in patterns), said


def test_package_and_citation_say_one_version():
    problems = runpy.run_path(str(ROOT / "tests" / "release.py"))["problems"]()
    assert [text for text in problems if not text.startswith("CHANGELOG")] == []
