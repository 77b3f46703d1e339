"""The public names are complete, sorted and loaded late; methods and README keep their promises."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.methods import METHODS
from fedloom.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_public_names():
    assert fedloom.__all__ == [
        *("ComparisonResult", "Experiment", "FedloomError", "HeldOutScores", "Method", "Objective"),
        *("Result", "__version__", "compare", "evaluate", "export", "partition"),
        *("report", "resume", "run"),
    ]  # what is promised: a name that goes breaks the code of others
    assert set(dir(fedloom)) == set(fedloom.__all__) == set(fedloom._MODULES) | {"__version__"}
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Experimnt'"):
        _ = fedloom.Experimnt


def test_import_is_light():
    code = "import fedloom, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_source_and_is_tested(name):
    settings, method = METHODS[name]
    module = sys.modules[method.__module__]
    assert module.__name__.startswith("fedloom.methods.") and settings().name == name
    if name in ("local_only", "centralised"):  # tests/runs/test_run.py runs all
        return
    assert "https://" in module.__doc__
    tests = "".join(path.read_text() for path in ROOT.glob("tests/methods/test_*.py"))
    assert f'"{name}"' in tests or f"{method.__name__}(" in tests


def test_every_federated_method_has_a_recipe():
    recipes = "".join(path.read_text() for path in ROOT.glob("recipes/*.toml"))
    for name in METHODS.keys() - {
        "centralised"
    }:  # an upper bound to compare with, not a federation
        assert f'"{name}"' in recipes, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_test_of_its_name(name):
    assert (ROOT / f"tests/objectives/test_{name}.py").is_file()


def test_files_named_in_the_readme_exist():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:recipes|examples|docs|benchmarks|src)/[^` ]+)`", README
    )
    assert named
    for name in named:
        if not name.startswith("http"):
            assert (ROOT / name).exists(), name


def test_commands_in_the_readme_are_commands(monkeypatch, tmp_path):
    """Every `make` target exists; every `fedloom` command is one, with options it knows."""
    import typer

    from fedloom.commands import main

    known = typer.main.get_command(main.app).commands
    makefile = (ROOT / "Makefile").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.strip()]
    assert [f for f in found if f[0] == "make"] == [["make", "demo"], ["make", "test"]]
    for command in found:
        if command[0] == "make":
            assert f"\n{command[1]}:" in makefile
        elif command[0] == "fedloom":
            own = known[command[1]]
            own = getattr(own, "commands", {}).get(command[2], own)
            options = {o for p in own.params for o in p.opts}
            assert {word for word in command[2:] if word.startswith("-")} <= options


def test_python_in_the_readme_runs(experiment, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.toml").write_text(experiment().to_toml())
    exec(compile(code, "README.md", "exec"), {})


PAGES = ("README.md", "docs/privacy.md", "docs/secure_aggregation.md", "docs/wire.md")


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_shows_are_an_experiment(page):
    import tomllib

    from fedloom.deployment.policy import PolicySettings
    from fedloom.experiment.experiment import Experiment

    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for text in blocks:
        table = tomllib.loads(text)
        if "policy" in table:  # of a client's own file
            PolicySettings.model_validate(table.pop("policy"))
        Experiment.from_table(table)
