"""Notebooks run from their first cell to their last, in a folder of their own; what they show is safe HTML.

Cells are run as IPython runs them, as far as the notebooks go: Python, lines of ``!`` for the shell, and the
last expression of a cell, which is shown by its ``_repr_html_``.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.display.notebook import table
from fedloom.runs.result import Result
from pages import environment

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ["start", "compare_methods", "private_deployment"]

RUNNER = """
import ast, json, subprocess, sys

def shell(line):
    subprocess.run(line, shell=True, check=True)

space = {"__name__": "__main__", "_shell": shell}
for code in json.load(open(sys.argv[1], encoding="utf-8")):
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
        if shown is not None:
            print(getattr(shown, "_repr_html_", lambda: repr(shown))())
"""


def cells(name):
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(own["cell_type"], "".join(own["source"]), own) for own in book["cells"]]


def run(name, folder):
    """Run a notebook's cells in one process; return what it printed and showed."""
    codes = [re.sub(r"^!(.*)$", lambda line: f"_shell({line[1]!r})", text, flags=re.M)
             for kind, text, _ in cells(name) if kind == "code"]  # fmt: skip
    (folder / "cells.json").write_text(json.dumps(codes))
    (folder / "runner.py").write_text(RUNNER)
    done = subprocess.run(
        [sys.executable, "runner.py", "cells.json"],
        cwd=folder,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_they_are_stripped_and_have_cells_that_are_python():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        assert len(cells(name)) > 5
        for kind, text, cell in cells(name):
            if kind == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None
                ast.parse(re.sub(r"^!.*$", "pass", text, flags=re.M))
        assert '"pip", "install"' in cells(name)[1][1]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_first_cell_installs(name, tmp_path, monkeypatch):
    """Nothing where fedloom is installed; else a wheel in the folder, else the clone that it is."""
    code, asked = cells(name)[1][1], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words, check: asked.append(words[-1]))
    exec(code, {})
    assert asked == []
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda own: None if own == "fedloom" else there(own)
    )
    with pytest.raises(SystemExit, match="upload fedloom-VERSION-py3-none-any"):
        exec(code, {})
    assert asked == []
    (tmp_path / "pyproject.toml").touch()
    exec(code, {})
    (tmp_path / "fedloom-0.1.0-py3-none-any.whl").touch()
    exec(code, {})
    assert asked == [".[flower,privacy]", "fedloom-0.1.0-py3-none-any.whl[flower,privacy]"]


@pytest.mark.full
def test_the_first_one_runs_and_shows_what_it_says(tmp_path):
    said = run("start", tmp_path)
    assert "did you mean 'rounds'?" in said
    assert "Experiment notebook" in said and '<td style="text-align:left">partition</td>' in said
    assert "Global held-out set" in said and "sent by clients" in said
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


@pytest.mark.full
def test_the_one_that_compares_runs(tmp_path):
    said = run("compare_methods", tmp_path)
    assert "sft fedavg" in said and "sft scaffold" in said
    assert list(tmp_path.glob("comparisons/notebook/*.html"))


@pytest.mark.full
def test_the_one_of_a_deployment_runs(tmp_path):
    said = run("private_deployment", tmp_path)
    assert "north" in said and "Global held-out set" in said
    assert (tmp_path / "runs" / "private" / "adapter" / "adapter_config.json").is_file()


HOSTILE = '<script>alert("x")</script>\u202e\x1b[31m'


def test_text_in_a_table_is_escaped_visible_and_short():
    shown = table(HOSTILE, (HOSTILE, "b"), [(HOSTILE, "y" * 5000)])
    assert "<script" not in shown and "\u202e" not in shown and "\x1b" not in shown
    assert (
        "&lt;script&gt;alert(&quot;x&quot;)" in shown and "\\u202e" in shown and len(shown) < 1500
    )
    assert set(re.findall(r"</?(\w+)", shown)) == {
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }


def test_an_experiment_shows_what_is_not_at_its_default(experiment):
    shown = experiment(
        federation={"rounds": 7}, data={"columns": {"prompt": HOSTILE}}
    )._repr_html_()
    assert ">rounds</td>" in shown and ">7</td>" in shown
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert ">quorum</td>" not in shown


def test_a_result_shows_metrics_and_costs():
    costs = {"bytes_up": 2048.0, "seconds": 3.0}
    metrics = {"accuracy": 0.875, HOSTILE: 1.0}
    shown = Result(Path("runs/<b>"), metrics, {"accuracy": 0.5}, None, costs, "")._repr_html_()
    assert ">accuracy</td>" in shown and ">0.875</td>" in shown and ">0.5</td>" in shown
    assert ">2.05 kB</td>" in shown and ">3.00 s</td>" in shown and "<script" not in shown
    assert "one of each client" in shown and "runs/&lt;b&gt;" in shown
