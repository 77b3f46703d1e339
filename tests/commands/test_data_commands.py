"""``fedloom data stats``, ``check``, ``fingerprint`` and ``overlap`` as their users call them."""

import json
import re
from pathlib import Path

import pytest

from fedloom.data.fingerprints import read_key
from fedloom.data.stored_rows import StoredRows
from fedloom.experiment.experiment import Experiment
from fedloom.runs import data_check

PAGE_TITLES = ("Tokens of training rows", "Labels by client", "Script of most letters", "Clients")


@pytest.fixture
def make(tmp_path, model_folder, monkeypatch):
    """Write rows and an experiment on them; return the experiment's name."""
    monkeypatch.chdir(tmp_path)

    def made(name="e.toml", **data):
        text = "вопрос и ответ" * 3
        rows = [{"text": f"row {i} " + "long " * (i % 40), "label": "ab"[i % 2]} for i in range(60)]
        rows += [{"text": f"{text} {i}", "label": "a"} for i in range(20)]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"source": "x.jsonl", "kind": "labelled", "max_length": 40, **data}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (tmp_path / name).write_text(
            f'[model]\npath = "{model_folder}"\n[objective]\nname = "classification"\n'
            '[federation]\nclients = 3\n[partition]\nkind = "dirichlet"\ncolumn = "label"\nalpha = 0.05\n'
            "minimum = 5\n[data]\n" + "\n".join(lines) + "\n"
        )
        return name

    return made


@pytest.mark.slow
def test_statistics_in_the_terminal_and_on_a_page(call, make, tmp_path):
    code, out = call("data", "stats", make(), "--html", "page.html")
    text = " ".join(out.split())
    assert code == 0 and "x.jsonl: layout text/label" in text
    assert re.search(r"\d+ labelled rows of 3 clients", text)
    assert "tokens of training rows, before truncation" in text and "█" in text
    assert re.search(r"data.max_length = 40 cuts \d+ training rows", text)
    assert "Latin" in text and "Cyrillic" in text
    assert re.search(r"warning: data.max_length = 40 cuts many rows of clients", text), text
    page = (tmp_path / "page.html").read_text()
    assert all(title in page for title in PAGE_TITLES) and page.count("<svg") >= 4
    assert not re.search(r"(src|href)=\"?https?:", page)  # nothing from elsewhere
    code, out = call("data", "stats", "e.toml", "--html", "page.html")
    assert code != 0 and "page.html is there already" in out


def test_a_check_that_finds_nothing_wrong_names_the_layout(call, make):
    code, out = call("data", "check", make(max_length=256))
    assert code == 0 and "ok      x.jsonl: layout text/label; 80 rows" in out
    assert "0 faults" in out


def test_rows_that_stay_in_their_files_are_not_held_by_a_check(call, make, monkeypatch):
    held = []
    add = StoredRows.__init__
    monkeypatch.setattr(StoredRows, "__init__", lambda own, *a: held.append(own) or add(own, *a))
    make(streaming=True, max_length=256)
    found = list(data_check._sources(Experiment.from_toml(Path("e.toml"))))
    assert [own.state for own in found] == ["ok"] and "80 rows" in found[0].text and held


def test_a_check_finds_every_fault_at_once(call, make, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        '{"text": 1, "label": "a"}\n' * 5 + '{"text": "x", "label": "a"}\n'
    )
    make(
        source=["x.jsonl", "gone.jsonl", "bad.jsonl"],
        test_source="nowhere.jsonl",
        decontaminate="drop",
        benchmarks=["none.jsonl"],
    )
    code, out = call("data", "check", "e.toml")
    text = " ".join(out.split())
    assert code == 1 and out.count("FAULT") == 4 and "4 faults" in text
    assert (
        "data file not found: gone.jsonl" in text and "data file not found: nowhere.jsonl" in text
    )
    assert "5 malformed" in text and "bad.jsonl row 1:" in text and "none.jsonl" in text
    assert "ok x.jsonl: layout text/label; 80 rows" in text


def test_rows_of_others_are_refused_by_name(call, make):
    make(source="clients", test_source="x.jsonl")
    for command in ("stats", "check"):
        code, out = call("data", command, "e.toml")
        assert code != 0 and "each sees its own with fedloom client check" in " ".join(out.split())


def test_two_clients_and_the_one_who_compares(call, make, tmp_path):
    make()
    lines = (tmp_path / "x.jsonl").read_text().splitlines(keepends=True)
    for name, own in (("a", lines[:50]), ("b", lines[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(own))
        (tmp_path / f"{name}.toml").write_text(
            f'[data]\nsource = "{name}.jsonl"\nkind = "labelled"\n'
        )
    code, out = call("data", "fingerprint", "a.toml", "--key", "k", "--output", "a.fp", "--new-key")
    assert code == 0 and "50 different rows" in out
    assert call("data", "fingerprint", "b.toml", "--key", "k", "--output", "b.fp")[0] == 0
    code, out = call("data", "overlap", "a.fp", "b.fp")
    assert code == 0 and "10 rows are with 2 of 2 parties" in out
    assert re.search(r"a\.fp\s+50\s+10", out) and re.search(r"b\.fp\s+10\s+40", out)
    code, out = call("data", "fingerprint", "a.toml", "--key", "k", "--output", "k", "--force")
    assert code == 1 and "k is the key, too" in out and len(read_key(tmp_path / "k")) == 32
    (tmp_path / "c.toml").write_text(
        '[data]\nshare = "experiment"\nsource = "x.jsonl"\nkind = "labelled"\n'
    )
    code, out = call("data", "fingerprint", "c.toml", "--key", "k", "--output", "c.fp")
    assert code == 2 and "has the rows of all clients in one source" in " ".join(out.split())
