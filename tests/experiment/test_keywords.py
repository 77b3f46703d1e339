"""An experiment as Python gives it: tables and keywords are what a file and --set are."""

import pytest

import fedloom
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.experiment.keywords import read_experiment


@pytest.fixture
def file(experiment, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(experiment().to_toml())
    return path


def test_a_table_and_keywords_run_as_a_file_with_set(table, file, tmp_path):
    small = {"samples": 0}
    first = fedloom.run(file, rounds=1, evaluation=small, output={"folder": str(tmp_path / "a")})
    second = fedloom.run(
        table, rounds=1, evaluation=small, output={"folder": str(tmp_path / "b")}, name="mine"
    )
    assert first.metrics == second.metrics and second.folder == tmp_path / "b"
    saved = [Experiment.from_toml(tmp_path / name / "experiment.toml") for name in ("a", "b")]
    assert [(own.federation.rounds, own.name) for own in saved] == [(1, "experiment"), (1, "mine")]


def test_keywords_are_what_stands_after_set(file):
    given = read_experiment(file, {"rounds": 7, "rank": 3, "training": {"batch_size": 2}})
    after_set = ["federation.rounds=7", "adapter.rank=3", "training.batch_size=2"]
    assert given == Experiment.from_toml(file, after_set)
    assert read_experiment(given, {"rounds": 2}).federation.rounds == 2
    assert read_experiment(given, {}) is given


def test_a_new_name_starts_its_section_anew():
    table = {"objective": {"name": "dpo", "beta": 0.3}, "method": {"name": "fedprox", "mu": 0.5}}
    changed = read_experiment(table, {"objective": {"name": "ipo"}, "mu": 0.25})
    assert changed.objective.name == "ipo" and changed.method.mu == 0.25
    assert changed == Experiment.from_table(
        {"objective": {"name": "ipo"}, "method": {"name": "fedprox", "mu": 0.25}}
    )


@pytest.mark.parametrize(
    ("given", "keywords", "words"),
    [
        (3, {}, "an experiment is a TOML file, a table of sections (a dictionary) or an Experiment, not int"),
        ({}, {"round": 2}, "round: unknown setting; did you mean 'rounds'? give settings by name, or"),
        ({}, {"batch_size": 2}, "batch_size is a setting of several sections: training={'batch_size': ...} or"),
        ({}, {"federation": 3}, "federation = 3: give the section as a dictionary"),
        ({}, {"rounds": "two"}, "federation.rounds = 'two'"),
        ({"federation": 3}, {"rounds": 2}, "[federation] must be a section, not 3"),
        ({"x": {}}, {}, "[x]: unknown section"),
        ("gone.toml", {"rounds": 2}, "file not found: gone.toml"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(given, keywords, words):
    with pytest.raises(SettingsError) as caught:
        read_experiment(given, keywords)
    assert words in str(caught.value)
