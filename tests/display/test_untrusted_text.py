"""Words of others on terminals, pages and figures: all of them visible, none of them obeyed."""

import io
import json
import os
import re
import sys
import time
import xml.etree.ElementTree

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.commands import main
from fedloom.commands.terminal import Bars, LiveTerminal, PlainConsole, Terminal, make_text
from fedloom.display.untrusted_text import (
    HIDDEN,
    label,
    message,
    named,
    placed,
    quoted,
    short,
    visible,
)
from fedloom.errors import ModelError, first_line
from fedloom.experiment.experiment import Experiment
from fedloom.models.device import choose_device
from fedloom.reports import figures
from fedloom.runs.partition_table import show_partition
from fedloom.runs.records import partition_table

STRANGE = {
    "escape": ("\x1b[2J\x1b]0;mine\x07", r"\x1b[2J\x1b]0;mine\x07"),
    "c1": ("\x9b31m", r"\x9b31m"),
    "nul": ("a\x00b\x7f", r"a\x00b\x7f"),
    "return": ("done\rgone", r"done\rgone"),
    "override": ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    "marks": ("\u200fa\u200e\u061c", r"\u200fa\u200e\u061c"),
    "surrogate": ("\ud800\udc41", r"\ud800\udc41"),
    "line": ("a\u2028b\u2029", r"a\u2028b\u2029"),
    "unseen": ("\ufeffa\u200b\U000e0041\uffff", r"\ufeffa\u200b\U000e0041\uffff"),
    "markup": ("[/nope] [red]x[/red] :smile:", "[/nope] [red]x[/red] :smile:"),
    "formula": (r"$\frac{0$", r"$\frac{0$"),
    "html": ("<img src=x>&amp;", "<img src=x>&amp;"),
    "letters": ("héß 漢 عربى \U0001f600\u200d\U0001f525", "héß 漢 عربى \U0001f600\u200d\U0001f525"),
}


@pytest.mark.parametrize(("text", "shown"), STRANGE.values(), ids=STRANGE)
def test_what_is_hidden_is_shown_as_an_escape(text, shown):
    assert visible(text) == shown.replace(r"\r", "\\x0d") and not HIDDEN.search(visible(text))
    assert visible(f"a\tb\r\n{text}\n") == f"a\tb\n{visible(text)}\n"
    visible(text).encode()


def test_values_and_places_are_short():
    assert quoted("x" * 38, 40) == f"'{'x' * 38}'" and quoted("x" * 39, 40) == f"'{'x' * 36}..."
    assert placed("a\nb.jsonl", 7) == "a\\nb.jsonl row 7"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n  one \n two"), "one"),
        (RuntimeError(""), "RuntimeError"),
        (OSError(" \n "), "OSError"),
    ],
)
def test_of_an_error_the_first_line_is_told(error, line):
    assert first_line(error) == line


def test_a_device_that_fails_without_a_word_is_an_error_and_no_traceback(monkeypatch):
    def fail(*words, **named):
        raise RuntimeError

    monkeypatch.setattr("fedloom.models.device.torch.zeros", fail)
    with pytest.raises(ModelError, match=r"training\.device .cpu.: RuntimeError"):
        choose_device("cpu")


def test_a_file_whose_name_has_two_lines_is_told_on_one(tmp_path, rows_file):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)]
    source = rows_file(rows, "two\nlines.jsonl")
    data = {"source": source, "kind": "instruction"}
    experiment = Experiment.from_table({"data": data, "objective": {"name": "sft"}})
    shown = show_partition(experiment, tmp_path / "x.svg")
    console = Console(width=400, file=io.StringIO())
    console.print(shown.tables)
    assert "two\\nlines.jsonl: layout" in console.file.getvalue()


def test_names_are_one_line_and_messages_are_bounded():
    assert named("a\nb\tc\x1b") == r"a\nb\tc\x1b"
    assert (
        short("a \n  b", 5) == "a b"
        and short("x" * 9, 5) == "xxxx…"
        and short("x" * 5, 5) == "x" * 5
    )
    assert short(" " * 100 + "x", 5) == "…"
    assert label("_hidden") == " _hidden" and label("x" * 90) == "x" * 59 + "…"
    assert message("a\r\nb\x1b") == "a\nb\\x1b"
    assert message("x" * 1003) == "x" * 1000 + "... (3 more)"
    lines = message("\n".join(["x"] * 1062)).split("\n")
    assert len(lines) == 61 and lines[-1] == "... and 1,002 more lines"


@pytest.mark.parametrize(("text", "shown"), STRANGE.values(), ids=STRANGE)
def test_a_console_obeys_nothing(text, shown):
    shown = shown.replace(r"\r", "\\x0d")
    out = io.StringIO()
    console = PlainConsole(file=out, width=300, force_terminal=True, color_system=None)
    table = Table(text, title=text, box=None)
    table.add_row(text)
    for words in (text, make_text(text), table):
        console.print(words, highlight=False)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines == [shown] * 5
    console.print(Text(text))
    assert not HIDDEN.search(out.getvalue())


@pytest.mark.parametrize("kind", [Console, PlainConsole])
@pytest.mark.parametrize(("text", "shown"), STRANGE.values(), ids=STRANGE)
def test_what_watches_a_run_obeys_nothing_on_any_console(kind, text, shown):
    out = io.StringIO()
    console = kind(file=out, width=300)
    terminal = Terminal(console)
    terminal.stage(text)
    terminal.warning(text)
    with Bars(console) as bars:
        bars.begin(text, 3)
    live = LiveTerminal(console, rows=[{"round": "1/2", "missing": text}])
    console.print(live._table())
    assert out.getvalue().count(shown.replace(r"\r", "\\x0d")) == 4
    assert not HIDDEN.search(out.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shown"), STRANGE.values(), ids=STRANGE)
def test_a_figure_of_any_name_can_be_drawn_and_read(text, shown):
    shown = shown.replace(r"\r", "\\x0d")
    lines = {text: ([1, 2], [0, 1]), f"_{text}": ([1, 2], [1, 0])}
    ranges = {text: (1, 0, 2), "b": (2, 1, 3)}
    record = {
        "column": text,
        "values": [text, "_b"],
        "clients": [{"counts": {text: 1, "_b": 2}}, {"counts": {text: 1}}],
    }
    many = {**record, "values": [text, *"bcdefghij"]}
    drawn = {
        "lines": figures.line_chart(lines, text, text),
        "scatter": figures.scatter_chart({text: (1, 1), "b": (2, 2)}, text, text),
        "grid": figures.grid_scatter([(text, text, 1, 1), ("b", "b", 2, 2)], text, text),
        "pareto": figures.pareto_scatter(
            [(text, text, 1, 1, True), ("b", "b", 2, 2, True)], "x", "y"
        ),
        "interval": figures.interval_chart(ranges, text),
        "strip": figures.strip_chart({text: ([1, 2], 1.5)}, "x"),
        "matrix": figures.matrix_chart([[1, 0], [0, 1]], [text, "b"], text),
        "bars": figures.bar_chart(ranges, text, text),
        "before": figures.before_after_chart({text: 1}, {text: 2}, "x"),
        "partition": figures.partition_svg(record),
        "heat map": figures.partition_svg(many, standalone=True),
    }
    for name, svg in drawn.items():
        assert not HIDDEN.search(svg), name
        tree = xml.etree.ElementTree.fromstring(svg)
        words = " ".join("".join(tree.itertext()).split())
        assert " ".join(shown.replace("_", " ").split()) in words.replace("_", " "), name


def test_a_class_of_any_length_is_shown_at_once():
    long = "x" * 200_000
    record = {"kind": "iid", "column": long, "values": [long, "b"], "clients": []}
    counts = {long: 1, "b": 2}
    record["clients"].append({"client": 0, "train": 3, "held_out": 0, "counts": counts})
    many = {**record, "values": [*"bcdefghij", long]}
    many["clients"] = [
        {**record["clients"][0], "counts": {**dict.fromkeys(many["values"], 1), long: 9}}
    ]
    for one in (record, many):
        out = io.StringIO()
        started = time.monotonic()
        PlainConsole(file=out, width=200).print(partition_table(one), long[:60])
        assert "x" * 59 + "…" in out.getvalue() and "x" * 61 not in out.getvalue()
        PlainConsole(file=out, width=200).print(long)
        figures.partition_svg(one)
        assert time.monotonic() - started < 5


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend():
    svg = figures.partition_svg(
        {"column": "c", "values": ["_a", "b"], "clients": [{"counts": {"_a": 1, "b": 1}}]}
    )
    assert re.findall(r">\s*(_a|b)\s*</text>", svg) == ["_a", "b"]


CLASSES = [STRANGE[name][0] for name in ("markup", "formula", "override", "escape")]


@pytest.fixture
def strange_rows(rows_file):
    """A file of labelled rows whose classes, columns and name are strange, and one row that is none."""
    rows = [
        {"text": f"text {i} {'so ' * (i % 4)}", "label": CLASSES[i % 4], "[b]\x1b[1m": "\u202e[/x]"}
        for i in range(48)
    ]
    path = rows_file(rows, "[red]\x1b[31m.jsonl")
    with open(path, "a") as file:
        file.write('{"text": "\\ud800", "label": "a"}\n')
    return path


def test_rows_of_any_content_are_divided_trained_on_and_reported(
    experiment, strange_rows, call, tmp_path
):
    built = experiment(
        data={
            "source": strange_rows.replace("[", "[[]", 1),
            "kind": "labelled",
            "max_bad_share": 0.1,
        },
        objective={"name": "classification"},
        partition={"kind": "dirichlet", "column": "label", "alpha": 100.0},
    )
    file, picture = tmp_path / "x.toml", tmp_path / "p.svg"
    file.write_text(built.to_toml(), encoding="utf-8")
    code, out = call("partition", file, "--picture", picture)
    assert code == 0 and not HIDDEN.search(out)
    for words in ("[/nope]", r"$\frac{0$", r"\u202egnp", r"\x1b[2J"):
        assert words in out
    drawn = picture.read_text(encoding="utf-8")
    xml.etree.ElementTree.fromstring(drawn)
    assert r"$\frac{0$" in drawn and "[/nope]" in drawn and r"\x1b[2J" in drawn
    code, out = call(
        "partition",
        file,
        "--picture",
        picture,
        "--force",
        "--set",
        r"partition.column='[b]\u001b[1m'",
    )
    assert code == 3 and "did you mean" in out and not HIDDEN.search(out)
    code, out = call("run", file)
    assert code == 0 and "Traceback" not in out and not HIDDEN.search(out)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "half of a pair of surrogates" in json.dumps(record)
    code, out = call("report", tmp_path / "run", "--to", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert code == 0 and not HIDDEN.search(page)
    assert "[/nope]" in page and r"$\frac{0$" in page and r"\u202egnp" in page
    code, out = call("evaluate", file)
    assert code == 0 and "accuracy = " in out and not HIDDEN.search(out)


@pytest.mark.parametrize("text", ["", "# rows\n\n", 'name = "x"\n'])
@pytest.mark.parametrize("command", ["run", "partition", "evaluate", "advise"])
def test_a_file_without_a_section_is_no_experiment(call, tmp_path, text, command):
    (tmp_path / "x.toml").write_text(text)
    code, out = call(command, tmp_path / "x.toml", "--set", "federation.rounds=1")
    assert code == 2 and out == (
        f"fedloom: {tmp_path}/x.toml has 1 mistake:\n"
        "  - it has no section, so it describes no experiment; `fedloom init FILE` writes one\n"
        "more: fedloom explain it-has-no-section-so-it-describes-no\n"
    )


def test_an_unknown_section_alone_is_told(call, tmp_path):
    (tmp_path / "x.toml").write_text("[nothing]\n")
    code, out = call("run", tmp_path / "x.toml")
    assert code == 2 and "[nothing]: unknown section; " in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = " + b"[" * 5000, "not TOML: nested too deeply"),
        (b"a = " + b"9" * 5000, "not TOML: Exceeds the limit (4300 digits) for integer string"),
        (b"[" + b"a." * 3000 + b"a]", "not TOML: nested too deeply"),
        (b"a." * 32 + b"a = 1", "not TOML: nested too deeply"),
        (b"a = " + b"[" * 32 + b"1" + b"]" * 32, "not TOML: nested too deeply"),
        (b'[output]\nfolder = "a\\u0000b"', "holds the character NUL; leave it out"),
        (b"[data]\nsource = '\xff'", "not TOML: byte 18 is not UTF-8; save the file in UTF-8"),
        (b"\xff\xfe[\0d\0", "not TOML: byte 1 is not UTF-8; save the file in UTF-8"),
        (b"# " + b"x" * 2**24, "larger than 16 MiB, as no settings are"),
        (b'[data]\n"\\u001b[2J" = 1', r"data.\x1b[2J: unknown key"),
    ],
)
def test_a_file_that_is_no_toml_is_one_message(call, tmp_path, content, words):
    (tmp_path / "x.toml").write_bytes(content)
    code, out = call("run", tmp_path / "x.toml")
    assert code == 2 and words in out and "Traceback" not in out and not HIDDEN.search(out)


def test_the_mark_before_a_text_in_utf8_is_no_mistake(call, tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf[nothing]\n")
    code, out = call("run", tmp_path / "x.toml")
    assert code == 2 and "[nothing]: unknown section; " in out


def test_a_path_that_is_too_long_is_told_with_its_reason(call, tmp_path, experiment):
    (tmp_path / "x.toml").write_text(experiment().to_toml())
    code, out = call("run", tmp_path / "x.toml", "--set", f"output.folder={'a' * 5000}")
    assert code == 1 and "File name too long; choose another output.folder" in out


@pytest.mark.parametrize("words", [["report"], ["run", "--resume"], ["run"], ["compare"]])
def test_a_path_that_the_system_refuses_is_one_message(call, words):
    code, out = call(*words, "a" * 5000)
    assert code == 1 and "File name too long; write a shorter path" in out
    assert "Traceback" not in out and len(out) < 500


def test_bytes_of_the_command_line_that_are_no_text(call, tmp_path, experiment):
    path = tmp_path / "x.toml"
    path.write_text(experiment().to_toml().replace('name = "experiment"\n', ""))
    code, out = call("run", path, "--set", "data.source=\udcff.jsonl")
    assert code == 2 and r"--set 'data.source=\udcff.jsonl': write it in UTF-8" in out
    strange = path.rename(os.fsdecode(bytes(tmp_path) + b"/\xff.toml"))
    code, out = call("partition", strange)
    assert code == 2 and r"the name '\udcff' cannot be written; rename the file, or set name" in out


def test_a_terminal_without_the_letters_is_shown_escapes(tmp_path, monkeypatch, experiment):
    path = tmp_path / "x.toml"
    path.write_text(experiment().to_toml())
    words = ["fedloom", "partition", str(path), "--picture", str(tmp_path / "p.svg")]
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main.main()
    out.flush()
    assert stop.value.code == 0 and rb"\u2588" in out.buffer.getvalue()
