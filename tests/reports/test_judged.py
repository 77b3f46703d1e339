"""What pages say of figures: how sure they are, of how many rows, and what counts once."""

import json
import shutil

import pytest

import fedloom
from fedloom.commands.terminal import results_table
from fedloom.reports.comparison_page import write_comparison
from fedloom.reports.judged import difference_over_rows, duplicates, outcome
from fedloom.reports.run_data import read_run
from fedloom.reports.run_page import write_report
from fedloom.storage.run_folder import RunFolder


@pytest.fixture
def folder(experiment, once, tmp_path):
    built = experiment(partition={"kind": "dirichlet", "column": "domain"})
    made = once("run", lambda: fedloom.run(built).folder)
    return shutil.copytree(made, tmp_path / "copy")


def rewrite(folder, rows, before, after, losses=(0.693, 0.741), keep_rows=True):
    """As if the run had been judged by so many rows and had won those it says."""
    rounds = RunFolder(folder).read_lines("rounds.jsonl")
    for record, value, loss in (
        (rounds[0], before, losses[0]),
        (rounds[-1], after, losses[1]),
    ):
        own = record["evaluation"]
        own["global"] |= {"preference_accuracy": sum(value) / rows, "loss": loss}
        own.pop("interval", None)
        own["rows"] = {"metric": "preference_accuracy", "bounds": [0, 1], "totals": value}
        if not keep_rows:
            del own["rows"]
    (folder / "rounds.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (rounds[0], rounds[-1]))
    )
    run = json.loads((folder / "run.json").read_text())
    run["data"] |= {"global_held_out": rows, "held_out_rows": [str(i) for i in range(rows)]}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_a_run_says_how_sure_it_is(folder):
    """What a run writes down is what its page and its last line say."""
    summary = json.loads((folder / "summary.json").read_text())
    found = outcome(read_run(folder))
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (summary["after_interval"]["low"], summary["after_interval"]["high"])
    )
    assert found.gain.low == pytest.approx(summary["change"]["low"], abs=1e-5)
    names = read_run(folder).run["data"]["held_out_rows"]
    assert len(names) == len(set(names)) == found.rows == summary["change"]["units"]
    page = write_report([folder]).read_text()
    assert f"{found.rows} rows; 95 % over rows: {found.interval.low:.3f} to" in page
    assert "What these figures mean" in page and "<td>preference accuracy</td>" in page
    assert "r(y+) &gt; r(y-), ties count half" in page and "Bonett and Price" in page


def test_a_headline_has_colour_only_where_the_change_is_shown(folder):
    """0.500 to 0.527 of 400 rows: .479 to .576, and the loss rose; the worst client has three rows."""
    rewrite(folder, 400, [0.5] * 400, [1.0] * 211 + [0.0] * 189)
    rounds = RunFolder(folder).read_lines("rounds.jsonl")
    for own in rounds[-1]["evaluation"]["clients"]["each"].values():
        own |= {"preference_accuracy": 0.0, "examples": 3}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
    page = write_report([folder]).read_text()
    assert "by 3 rows of its own; 95 % over rows: 0.000 to 0.561" in page
    assert "95 % over clients: not estimable from 3 clients: needs at least 5" in page
    assert "400 rows; 95 % over rows: 0.479 to 0.576. Change +0.028 (" in page
    assert "): no change is shown</span>" in page
    assert 'class="gain"' not in page and 'class="loss"' not in page
    assert (
        "Preference accuracy and loss disagree: 0.500 to 0.527 is better, 0.693 to 0.741 is worse."
        in page
    )
    rewrite(folder, 400, [0.5] * 400, [1.0] * 300 + [0.0] * 100, losses=(0.7, 0.6))
    page = write_report([folder]).read_text()
    assert '<span class="gain">0.750</span>' in page and "): better</span>" in page
    assert "disagree" not in page
    rewrite(folder, 400, [0.5] * 400, [1.0] * 100 + [0.0] * 300)
    assert outcome(read_run(folder)).verdict == "worse"


def test_runs_of_earlier_versions_have_what_their_number_of_rows_gives(folder):
    rewrite(folder, 6, [0.5] * 6, [0.0] * 6, keep_rows=False)
    found = outcome(read_run(folder))
    assert found.interval.high == pytest.approx(0.39033, abs=1e-5) and found.verdict == ""
    assert found.gain.missing.startswith("not estimable: no scores of single rows")


@pytest.mark.slow
def test_what_is_given_twice_counts_once(folder, tmp_path):
    said = []
    copy = shutil.copytree(folder, tmp_path / "again")
    page = write_report([folder, folder, copy], tmp_path / "all.html", said.append).read_text()
    assert said == [
        f"{folder} is given 2 times and counts once",
        "again has the seed and settings of copy: they count as one run",
    ]
    assert "Over seeds" not in page and f"{said[1]}." in page and "2 runs compared" in page
    own = copy / "experiment.toml"
    own.write_text(own.read_text().replace("seed = 0", "seed = 7"))
    assert duplicates([read_run(folder), read_run(copy)]) == {
        1: "again has the very adapter of copy"
    }


def test_arms_that_were_judged_by_other_rows_are_not_paired(folder, tmp_path):
    copy = rewrite(shutil.copytree(folder, tmp_path / "other"), 8, [0.5] * 8, [1.0] * 8)
    pair = [(read_run(folder), read_run(copy))]
    assert difference_over_rows(pair, 0.1).missing == (
        "not estimable: the configurations were judged by different rows"
    )


def test_comparisons_of_few_seeds_say_what_is_missing(folder, tmp_path):
    """One run that stands for two seeds is one seed, on every page of a comparison."""
    cells = [
        {"name": f"a-m_x-s{seed}", "objective": "a", "method": "m_x", "seed": seed}
        for seed in (0, 1)
    ]
    for cell in cells:
        shutil.copytree(folder, tmp_path / "grid/runs" / cell["name"])
    record = {"name": "grid", "budget": "as_set", "amount": None, "seeds": [0, 1], "links": {}}
    record |= {"objectives": ["a"], "methods": ["m_x"], "cells": cells}
    files = RunFolder(tmp_path / "grid")
    note = "a-m_x-s1 has the seed and settings of a-m_x-s0: they count as one seed."
    for kind in ("objectives", "personal", "scenarios"):
        files.write_json("comparison.json", {**record, "kind": kind})
        page = write_comparison(files.path).read_text()
        assert note in page and "What these figures mean" in page
        assert "m_x" in page and "m x" not in page  # a name is written as in the file
        assert "not estimable from 1 seed: needs at least 5" in page and "±" not in page
        found = files.read_json("results.json")
        assert (found["finished"], found["planned"]) == (2, 2)
        assert "95 %" in str(results_table(files.path).title)
    found = found["arms"][0]["over_rows"]
    assert 0 <= found["low"] < found["estimate"] < found["high"] <= 1
