"""The package as a script or notebook uses it, with nothing but its public names."""

import pytest

import fedloom

TABLE = {
    "model": {"path": "tiny"},
    "data": {"source": "builtin:preferences", "builtin_rows": 60, "test_fraction": 0.2},
    "partition": {"kind": "iid"},
    "objective": {"name": "dpo"},
    "federation": {"clients": 2, "rounds": 2},
    "training": {"local_steps": 1, "batch_size": 4},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    rounds, evaluations = [], []
    result = fedloom.run(
        TABLE,
        output={"folder": str(folder)},
        on_round=lambda record: rounds.append(record.round),
        on_evaluation=lambda round, evaluation: evaluations.append((round, evaluation.metrics)),
    )
    return result, rounds, evaluations


def test_functions_are_called_with_rounds_and_evaluations(result):
    result, rounds, evaluations = result
    assert isinstance(result, fedloom.Result) and rounds == [0, 1, 2]
    assert evaluations[0] == (0, result.metrics_before)
    assert evaluations[-1] == (2, result.metrics)


def test_what_a_function_raises_ends_a_run_that_goes_on(tmp_path, result):
    class Enough(Exception):
        pass

    def stop(record):
        if record.round == 1:
            raise Enough

    folder, again = tmp_path / "run", []
    with pytest.raises(Enough):
        fedloom.run(TABLE, output={"folder": str(folder)}, on_round=stop)
    resumed = fedloom.resume(folder, on_round=lambda record: again.append(record.round))
    assert again == [2] and resumed.metrics == result[0].metrics


def test_a_run_is_scored_and_shown(result, tmp_path):
    folder = result[0].folder
    scores = fedloom.evaluate(folder)
    assert scores.metrics["loss"] == pytest.approx(result[0].metrics["loss"], abs=1e-6)
    before = fedloom.evaluate(folder, adapter="base")
    assert before.metrics["loss"] == pytest.approx(result[0].metrics_before["loss"], abs=1e-6)


def test_a_table_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = {**TABLE, "name": "two", "compare": {"objectives": ["dpo"], "seeds": [0], "amount": 1}}
    done = fedloom.compare(table, workers=1, rounds=1, compare={"methods": ["fedavg", "fedprox"]})
    assert done.folder.resolve() == tmp_path / "comparisons/two" and done.page.is_file()
    assert [arm["method"] for arm in done.results["arms"]] == ["fedavg", "fedprox"]
    with pytest.raises(fedloom.FedloomError, match=r"\[compare\] is missing"):
        fedloom.compare(TABLE)


def test_progress_is_shown_when_asked_for(tmp_path, capsys):
    fedloom.run(TABLE, rounds=1, output={"folder": str(tmp_path / "run")}, progress=True)
    assert "round 1/1" in capsys.readouterr().out


def test_a_page_is_made_of_a_run(result, tmp_path):
    folder = result[0].folder
    assert fedloom.report(folder) == folder / "report.html"
    several = fedloom.report(folder, str(folder), to=tmp_path / "both.html")
    assert several == tmp_path / "both.html" and "<html" in several.read_text()
    with pytest.raises(fedloom.FedloomError, match="give a run folder"):
        fedloom.report()
