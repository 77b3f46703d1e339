"""What is said of figures that may not be relied on: of a run by itself, and of runs side by side."""

import json
import pathlib
import shutil
from collections import Counter

import pytest

import fedloom
from fedloom.reports.comparison_page import write_comparison
from fedloom.reports.doubts import all_doubts
from fedloom.reports.run_data import Run, read_run
from fedloom.reports.run_page import render, write_report
from fedloom.storage.run_folder import RunFolder


def made(label, *, torch="2.5.1", fedloom="0.1.0", rows="aaaa", model="mmmm", seed=0, **more):
    run = {
        "fedloom": fedloom,
        "versions": {"torch": torch, "python": "3.11.7"},
        "seed": seed,
        "data": {"source": "rows.jsonl", "digest": rows, "kind": "preference"},
        "model": {"name": "tiny", "sha256": model},
    }
    return Run(label, run, {}, [], [], [], None, '[data]\nsource = "rows.jsonl"\n', **more)


def test_runs_that_are_alike_are_not_doubted():
    assert all_doubts([made("a"), made("b", seed=1, rows="bbbb")]) == []


def test_records_that_are_not_what_was_written():
    assert all_doubts([made("a", doubts=["costs.jsonl is missing", "x"])]) == [
        "the figures of a are not to be relied on, as its records are not what was written: "
        "costs.jsonl is missing; x"
    ]


def test_a_run_that_was_resumed_with_other_versions():
    begun = {"versions": {"torch": "2.5.1", "fedloom": "0.1.0"}}
    other = {"versions": {"torch": "2.6.0", "fedloom": "0.1.0"}}
    assert all_doubts([made("a", starts=[begun, begun])]) == []
    assert all_doubts([made("a", starts=[begun, other, other])]) == [
        "a was resumed with other versions than it was begun with: torch 2.6.0 (it was 2.5.1); its "
        "results may differ from those of a run without a break"
    ]


def test_runs_side_by_side_that_differ_in_what_no_setting_says():
    assert all_doubts([made("a"), made("b"), made("c", torch="2.6.0", fedloom="0.2.0")]) == [
        "the runs were not made with the same fedloom, and may differ for that: 0.1.0 (a, b); 0.2.0 (c)",
        "the runs were not made with the same torch, and may differ for that: 2.5.1 (a, b); 2.6.0 (c)",
    ]
    assert all_doubts([*(made(name) for name in "abcde"), made("f", rows="bbbb")]) == [
        "the rows of rows.jsonl were not the same in all runs, which differences may come from "
        "(SHA-256): aaaa (a, b, c and 2 more); bbbb (f)"
    ]
    assert all_doubts([made("a"), made("b", seed=1, model="nnnn")]) == [
        "the model tiny was not the same in all runs, which differences may come from (SHA-256): "
        "mmmm (a); nnnn (b)"
    ]


@pytest.fixture
def folder(experiment, once, tmp_path):
    made = once("run", lambda: fedloom.run(experiment(federation={"rounds": 1})).folder)
    return shutil.copytree(made, tmp_path / "copy")


def test_every_comparison_shows_and_tells_them(folder, tmp_path, call):
    """A changed record, and a run of another release, on each kind of page and on one line each."""
    cells = [
        {"name": f"a-m-s{seed}", "objective": "a", "method": "m", "seed": seed} for seed in (0, 1)
    ]
    for cell in cells:
        own = shutil.copytree(folder, tmp_path / "grid/runs" / cell["name"])
    text = (own / "experiment.toml").read_text().replace("seed = 0", "seed = 1")
    (own / "experiment.toml").write_text(text)
    run, summary = (json.loads((own / name).read_text()) for name in ("run.json", "summary.json"))
    summary["adapter"]["sha256"] = "0" * 64  # a seed of its own, not the same run twice
    run |= {"fedloom": "0.0.9", "seed": 1}
    RunFolder(own).write_json("run.json", run)
    RunFolder(own).write_json("summary.json", summary)
    record = {"name": "grid", "budget": "as_set", "amount": None, "seeds": [0, 1], "links": {}}
    record |= {"objectives": ["a"], "methods": ["m"], "cells": cells}
    files = RunFolder(tmp_path / "grid")
    for kind in ("objectives", "personal", "scenarios"):
        files.write_json("comparison.json", {**record, "kind": kind})
        said = []
        page = write_comparison(files.path, warn=said.append).read_text()
        assert said[0].startswith("the figures of a-m-s1 are not to be relied on, as its records")
        assert "run.json was changed" in said[0] or "run.json has" in said[0]
        assert said[1].startswith("a-m-s1 was resumed with other versions than it was begun with")
        assert said[2].startswith("the runs were not made with the same fedloom, and may differ")
        for text in said:
            assert f'<p class="note">{text[:1].upper()}{text[1:]}.</p>' in page
        assert files.read_json("results.json")["doubts"] == said
        code, printed = call("report", files.path)
        assert code == 0
        assert [line for line in printed.splitlines() if line.startswith("warning: ")] == [
            f"warning: {text}" for text in said
        ]


def test_a_page_reads_each_record_once(folder, monkeypatch):
    """The records are checked by the bytes that are shown; the adapter's weights are checked alone."""
    opened, real = Counter(), pathlib.Path.open

    def counted(path, *arguments, **keywords):
        opened[path.name] += 1
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(pathlib.Path, "open", counted)
    run = read_run(folder)
    assert run.doubts == [] and len(run.rounds) == 2 and len(run.starts) == 1
    assert "_bytes" not in repr(RunFolder(folder))
    assert {name: count for name, count in opened.items() if count > 1} == {}
    assert {"rounds.jsonl", "costs.jsonl", "run.json", "experiment.toml"} <= set(opened)


def test_a_run_that_was_resumed_elsewhere_says_so_on_its_page(folder, tmp_path):
    log = (folder / "audit.jsonl").read_text().splitlines()
    again = json.loads(log[0])
    again["versions"]["torch"] = "1.0"
    (folder / "audit.jsonl").write_text("\n".join([*log, json.dumps(again), '{"event": "began"']))
    said = []
    page = write_report([folder], warn=said.append).read_text()
    assert len(said) == 1 and "copy was resumed with other versions" in said[0]
    assert (
        "This run was resumed with other versions than it was begun with: torch 1.0 (it was" in page
    )
    assert "other versions" in render([read_run(folder)])
