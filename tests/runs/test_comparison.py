"""Comparisons: one budget for all, nothing done twice, the same bits whatever the workers."""

import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedloom.errors import (
    CheckpointError,
    DataError,
    FedloomError,
    ModelError,
    OutputError,
    SettingsError,
)
from fedloom.reports.comparison_data import read_cells
from fedloom.reports.comparison_page import results, write_comparison
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import versions
from observers import HeardOfComparison

ARMS = {
    "dpo": {"objective": {"name": "dpo"}},
    "ktoo": {"objective": {"name": "kto", "weights": "balanced"}},
    "ktor": {
        "objective": {"name": "kto", "weights": "balanced"},
        "partition": {"feedback": "spread"},
    },
}


@pytest.fixture
def file(table, tmp_path):
    """Write a small comparison; sections of the base and of [compare] may be changed."""

    def write(base=None, **settings):
        del table["output"]
        table["evaluation"] = {"samples": 0}
        table["data"]["builtin_rows"] = 30
        for section, values in (base or {}).items():
            table[section] = {**table.get(section, {}), **values}
        own = {"budget": "steps", "amount": 2, "seeds": [0, 1], "objectives": ARMS}
        table["compare"] = {k: v for k, v in {**own, **settings}.items() if v is not None}
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps(table))
        table["output"] = {}
        return path

    return write


def shas(folder):
    return {
        path.parent.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("runs/*/adapter/adapter_model.safetensors"))
    }


def test_a_grid_is_run_once_and_reported(file, tmp_path):
    once = {"federation": {"clients": 3, "rounds": 1}}
    comparison = read_comparison(file(once, methods=["fedavg", "scaffold"]))
    assert len(comparison.grid_runs) == 3 * 2 * 2
    folder = compare(comparison, tmp_path / "out", workers=1)
    first = shas(folder)
    assert len(first) == 12
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
    compare(comparison, folder, workers=1)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing is done twice

    record, cells = read_cells(folder)
    found = results(record, cells)
    assert {(row["objective"], row["method"]) for row in found["arms"]} == {
        (o, m) for o in ARMS for m in ("fedavg", "scaffold")
    }
    for row in found["did"]:
        assert row["steps"] == {"lowest": 2, "mean": 2, "highest": 2}  # the budget, as it was done
    by_arm = {(r["objective"], r["method"]): r for r in found["arms"]}
    assert by_arm["dpo", "scaffold"]["sent"] == pytest.approx(
        2 * by_arm["dpo", "fedavg"]["sent"], rel=0.2  # control variates travel and are counted
    )  # fmt: skip
    overall = [r for r in found["paired"] if r["of"] == "objectives" and r["method"] is None]
    assert [(r["left"], r["right"], r["units"], r["runs"]) for r in overall] == [
        ("dpo", "ktoo", 2, 4), ("dpo", "ktor", 2, 4), ("ktoo", "ktor", 2, 4)
    ]  # fmt: skip
    for row in found["paired"]:  # two seeds say nothing of others, but of rows there are enough
        assert row["seeds"]["missing"] == "not estimable from 2 seeds: needs at least 5"
        assert row["seeds"]["p"] is None and row["models"]["low"] <= row["models"]["high"]
        assert row["models"]["p"] <= row["models"]["p_adjusted"] <= 1
        assert row["models"]["units"] == 2 * found["held_out_rows"] == 12  # other rows in each seed
    page = write_comparison(folder).read_text()
    assert page.count("<figure>") == 2 + 2  # two scatters and a curve a method
    assert "against bytes sent (measured)" in page and "against client compute (derived)" in page
    assert re.search(r"<td>ktor</td><td>spread</td><td>\d+</td><td>\d+</td>", page)
    assert json.loads((folder / "results.json").read_text())["finished"] == 12
    again = tomllib.loads((folder / "compare.toml").read_text())
    assert again["compare"]["objectives"] == ARMS


@pytest.mark.slow
def test_workers_change_nothing_and_a_stopped_grid_goes_on(file, tmp_path):
    comparison = read_comparison(file(seeds=[3]))
    one = compare(comparison, tmp_path / "one", workers=1)
    two = compare(comparison, tmp_path / "two", workers=2)
    assert shas(one) == shas(two) and len(shas(one)) == 3
    run = one / "runs/dpo-fedavg-s3"  # as if it had been killed after round 1
    (run / "summary.json").unlink()
    for path in sorted(run.glob("checkpoints/round-0002*/*")):
        path.unlink()
    for path in run.glob("checkpoints/round-0002*"):
        path.rmdir()
    compare(comparison, one, workers=1)
    assert shas(one) == shas(two)


@pytest.mark.parametrize(("budget", "amount"), [("examples", 16), ("tokens", 300)])
@pytest.mark.slow
def test_other_budgets_hold_for_pairs_and_single_answers_alike(file, tmp_path, budget, amount):
    base = {"training": {"batch_size": 4}}
    folder = compare(read_comparison(file(base, budget=budget, amount=amount, seeds=[0])), tmp_path / "out", workers=1)  # fmt: skip
    for row in results(*read_cells(folder))["did"]:
        assert amount <= row[budget]["lowest"]
        assert row[budget]["highest"] <= amount + 8 * (1 if budget == "examples" else 80)
    steps = {r["objective"]: r["steps"]["mean"] for r in results(*read_cells(folder))["did"]}
    assert steps["dpo"] < steps["ktoo"]  # a pair is two answers


@pytest.mark.slow
def test_as_set_leaves_the_arms_their_own_work_and_says_so(file, tmp_path):
    folder = compare(
        read_comparison(
            file(
                {"training": {"total_epochs": 3.0}, "data": {"builtin_rows": 60}},
                budget="as_set", amount=None, seeds=[0],
            )
        ),
        tmp_path / "out", workers=1,
    )  # fmt: skip
    steps = {r["objective"]: r["steps"]["mean"] for r in results(*read_cells(folder))["did"]}
    assert steps["ktoo"] == pytest.approx(2 * steps["dpo"], rel=0.2)  # the published confound
    assert "the budget is not equal" in write_comparison(folder).read_text()


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_kept(file, tmp_path):
    rates = {
        "learning_rate": 1e30,
        "max_grad_norm": 0.0,
        "optimizer": "sgd",
    }  # NaN at the second step
    arms = {**ARMS, "broken": {"objective": {"name": "dpo"}, "training": rates}}
    comparison = read_comparison(file(objectives=arms, seeds=[0]))
    with pytest.raises(FedloomError, match=r"1 of 4 runs failed \(broken-fedavg-s0\)"):
        compare(comparison, tmp_path / "out", workers=1)
    assert len(shas(tmp_path / "out")) == 3


@pytest.fixture
def begun(file, tmp_path, rows_file):
    """A comparison of two seeds on a file of rows, of which the first was run; and what was heard."""

    rows = [{"prompt": f"Q{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(20)]
    source = rows_file(rows)
    own = {"source": source, "kind": "preference", "builtin_rows": 30}
    base = {"data": own, "federation": {"clients": 2, "rounds": 1}}
    path = file(base, objectives={"dpo": {}}, seeds=[0])
    compare(read_comparison(path), tmp_path / "out", workers=1)
    two = read_comparison(path, ["compare.seeds=[0, 1]"])
    return two, tmp_path / "out", Path(source)


def test_two_comparisons_do_not_write_into_one_folder(begun):
    comparison, folder, _ = begun
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del before[folder / ".lock"]
    code = (
        "import sys; from pathlib import Path; from fedloom.storage.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('there', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "there\n"
            said = rf"{folder} is being written by process {other.pid} on .*; wait until it has"
            with pytest.raises(OutputError, match=said):
                compare(comparison, folder, workers=1)
        finally:
            other.kill()  # its lock is stale then, and stops nobody
    assert {path: path.read_bytes() for path in before} == before
    assert len(shas(compare(comparison, folder, workers=1))) == 2


def test_other_versions_and_rows_than_of_what_is_done_are_told(begun, monkeypatch):
    comparison, folder, source = begun
    real = versions()
    heard = HeardOfComparison()
    text = source.read_text()
    source.write_text(text.replace("Yes 3.", "Maybe."))
    run = folder / "runs" / "dpo-fedavg-s0"
    what = "the data of configuration dpo-fedavg changed since"
    said = rf"{what} {run} was run \(SHA-256 [0-9a-f]{{12}}, now "
    with pytest.raises(CheckpointError, match=said):
        compare(comparison, folder, workers=1, observer=heard)
    source.write_text(text)
    monkeypatch.setattr("fedloom.runs.comparison.versions", lambda: {**real, "torch": "9.9"})
    monkeypatch.setattr("fedloom.runs.records.versions", lambda: {**real, "torch": "9.9"})
    monkeypatch.setattr("fedloom.runs.run.versions", lambda: {**real, "torch": "9.9"})
    compare(comparison, folder, workers=1, observer=heard)
    assert heard.warnings == [
        "1 of 2 runs were made with other versions than those that are left will be: torch 9.9 (it was "
        f"{real['torch']}); configurations may differ for that alone"
    ]
    assert heard.far == [(0, 2), (2, 2)]  # an evaluation of the start and a round
    compare(comparison, folder, workers=1, observer=heard)
    assert len(heard.warnings) == 1  # nothing is left to be run otherwise
    record, _ = read_cells(folder)
    assert record["doubts"] == [
        "the runs were not made with the same torch, and may differ for that: "
        f"{real['torch']} (dpo-fedavg-s0); 9.9 (dpo-fedavg-s1)"
    ]


def test_another_model_than_of_what_is_done_is_told(begun, monkeypatch):
    comparison, folder, _ = begun
    monkeypatch.setattr("fedloom.runs.comparison.fingerprint", lambda path: "0" * 64)
    said = (
        r"the model of configuration dpo-fedavg changed .* now 000000000000\), and runs that differ in "
        r"that"
    )
    with pytest.raises(CheckpointError, match=said):
        compare(comparison, folder, workers=1)


def test_data_and_model_are_looked_at_before_anything_runs(file, tmp_path):
    arms = {**ARMS, "broken": {"objective": {"name": "dpo"}, "data": {"source": "builtin:nothing"}}}
    with pytest.raises(DataError, match="builtin:nothing"):
        compare(read_comparison(file(objectives=arms)), tmp_path / "out", workers=1)
    with pytest.raises(ModelError, match="is not a folder"):
        compare(
            read_comparison(file({"model": {"path": "./nowhere"}})), tmp_path / "out", workers=1
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_other_runs_is_not_touched(file, tmp_path):
    compare(read_comparison(file(seeds=[0])), tmp_path / "out", workers=1)
    other = read_comparison(file({"training": {"learning_rate": 0.5}}, seeds=[0]))
    with pytest.raises(OutputError, match=r"other settings in \[training\]; give another folder"):
        compare(other, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amount": None}, "compare.budget = 'steps' needs a compare.amount"),
        ({"budget": "as_set"}, "compare.budget = 'as_set' takes no compare.amount"),
        ({"budget": "step"}, "did you mean 'steps'?"),
        ({"seeds": [1, 1]}, "compare.seeds must be different"),
        ({"methods": ["fedavgg"]}, "compare.methods 'fedavgg': did you mean 'fedavg'?"),
        ({"objectives": {}}, "needs objectives or scenarios"),
        ({"seeds": []}, "must not be empty"),
        ({"objectives": {"a/b": {}}}, "configuration 'a/b' names a folder"),
        (
            {
                "objectives": {
                    "x": {"objective": {"name": "dpo"}, "partition": {"feedback": "spread"}}
                }
            },
            "configuration x-fedavg: partition.feedback",
        ),
    ],
)
def test_mistakes_are_said_before_anything_runs(file, settings, message):
    with pytest.raises(SettingsError) as caught:
        read_comparison(file(**settings))
    assert message in str(caught.value)


def test_a_split_model_is_compared_on_the_same_rows(file):
    """Its clients hold nothing out, so the others' must not either."""
    arms = {"plain": {"objective": {"name": "sft"}}}
    base = {"data": {"source": "builtin:instructions"}}
    own = {"objectives": arms, "methods": ["fedavg", "split"], "seeds": [0]}
    with pytest.raises(SettingsError) as caught:
        read_comparison(file(base, **own))
    assert caught.value.problems == (
        "configuration plain-split: clients of a split model are judged by no rows of their own and "
        "train on all, "
        "and those of plain-fedavg hold some out: set evaluation.per_client = false for all "
        "configurations",
    )


@pytest.mark.parametrize(
    "base",
    [
        {"evaluation": {"per_client": False}},
        {"partition": {"client_test_fraction": 0.0}},
    ],
    ids=str,
)
def test_arms_that_hold_nothing_out_are_alike(file, base):
    arms = {"plain": {"objective": {"name": "sft"}}}
    own = {"objectives": arms, "methods": ["fedavg", "split"], "seeds": [0]}
    base["data"] = {"source": "builtin:instructions"}
    comparison = read_comparison(file(base, **own))
    divided = [partition_data(cell.experiment).train for cell in comparison.grid_runs]
    assert divided[0] == divided[1]


def test_a_comparison_is_no_experiment_and_the_other_way_round(file, tmp_path):
    from fedloom.experiment.experiment import Experiment

    path = file()
    with pytest.raises(SettingsError, match="run it with fedloom compare"):
        Experiment.from_toml(path)
    (tmp_path / "x.toml").write_text("[federation]\nrounds = 1\n")
    with pytest.raises(SettingsError, match=r"\[compare\] is missing"):
        read_comparison(tmp_path / "x.toml")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_said_and_the_grid_goes_on(file, tmp_path):
    comparison = read_comparison(file({"federation": {"rounds": 8, "clients": 3}}, seeds=[0]))

    def kill_one():
        while not list((tmp_path / "out").glob("runs/*/rounds.jsonl")):
            time.sleep(0.1)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(FedloomError, match="a worker was killed"):
        compare(comparison, tmp_path / "out", workers=2)
    killer.join()
    assert len(shas(compare(comparison, tmp_path / "out", workers=1))) == 3
