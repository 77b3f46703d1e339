"""``fedloom explain``: every error that is printed leads to its section, and nothing depends on it."""

import re

import pytest

from fedloom.commands import explain
from fedloom.commands.explain import FEWEST, Section, fits, hints, section_of, sections


def test_a_template_holds_words_in_their_order_with_anything_between():
    assert fits("no run folder at …", "no run folder at runs/x; more")
    assert fits("… of … rows are malformed", "3 of 7 rows are malformed: a")
    assert not fits("… of … rows are malformed", "3 rows of 7 are malformed")
    assert not fits("no run folder at …", "there is no run folder at x")


def test_of_two_that_fit_the_one_that_says_more_is_meant():
    known = [
        Section("one", "data … is missing", (("data … is missing", "", "", 1),)),
        Section("two", "data file … is missing", (("data file … is missing", "", "", 1),)),
        Section("little", "… at …", (("… at …", "", "", 1),)),
    ]
    assert section_of("data file\n  rows.csv is missing here", known) == known[1]
    assert section_of("data rows.csv is missing", known) == known[0]
    assert section_of("a at b", known) is None  # any text with " at " fits it


@pytest.mark.slow
def test_every_message_leads_to_its_section_and_every_name_to_one():
    known = sections()
    names = [section.name for section in known]
    assert len(known) > 700 and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    elsewhere = []
    for section in known:
        for template, cause, way, code in section.messages:
            assert cause and way and code > 0
            if len(template.replace("…", "")) < FEWEST:
                continue
            found = section_of(template.replace("…", "x 1"), known)
            assert found is not None, template
            elsewhere += [template] * (found != section)
    assert elsewhere == []


def test_a_name_and_words_show_the_same_section(call):
    code, by_name = call("explain", "no-run-folder-at")
    assert (code, by_name) == (0, call("explain", "no", "run", "folder", "at", "runs/x")[1])
    assert by_name == (
        "no run folder at …\n  Cause: No run folder at ….\n"
        "  What to do: Give the folder that `fedloom run` printed, by default runs/NAME. (Exit code 1.)\n"
    )
    code, out = call("explain", "run folder")
    assert code == 0 and "errors have these words" in out and "  no-run-folder-at  " in out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("run --resume gone", "no-run-folder-at"),
        ("run gone.toml", "file-not-found"),
        ("run good.toml --from-round 2", "from-round-and-fresh-client-go-with"),
    ],
)
def test_an_error_ends_with_the_line_that_explains_it(call, experiment, tmp_path, words, name):
    (tmp_path / "good.toml").write_text(experiment().to_toml())
    code, out = call(*words.split())
    assert code != 0 and out.splitlines()[-1] == f"more: fedloom explain {name}"
    assert call("explain", name)[0] == 0


def test_of_many_mistakes_three_are_named_each_once():
    told = "x.toml has 3 mistakes:\n  - no run folder at a\n  - no run folder at b\n  - nothing like this"
    assert hints(told) == ["more: fedloom explain no-run-folder-at"]
    others = [section.messages[0][0] for section in sections()[:6]]
    assert len(hints("\n  - ".join(["x has 6 mistakes:", *others]))) == 3


@pytest.mark.parametrize("spoilt", [None, b"", b"[1]\n", b"{", b"\xff\xfe", b'["a", "b", 3]\n'])
def test_without_its_file_an_error_is_what_it_was(call, tmp_path, monkeypatch, spoilt):
    file = tmp_path / "explanations.jsonl"
    monkeypatch.setattr(explain, "FILE", file)
    if spoilt is not None:
        file.write_bytes(spoilt)
    code, out = call("run", "--resume", "gone")
    assert (code, out) == (1, "fedloom: no run folder at gone\n")
    code, out = call("explain", "no-run-folder-at")
    assert code == 2 and "no error has the name or the words" in out


def test_nothing_is_read_where_nothing_fails(call, monkeypatch):
    monkeypatch.setattr(explain, "sections", lambda: pytest.fail("it was read"))
    assert call("--version")[0] == 0
