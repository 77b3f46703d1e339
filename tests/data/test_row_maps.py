"""data.map and data.filter: computed columns, kept rows, and what is told where they do not fit."""

import json

import numpy as np
import pytest

from fedloom.data.loading import load_examples
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.data_check import _sources
from fedloom.runs.partitioning import partition_data

ROWS = [
    {
        "q": f" Question {i} ",
        "a": f"answer {i}",
        "lang": "en" if i % 3 else "de",
        "url": f"s{i % 2}/x",
    }
    for i in range(60)
]
MAP = {"prompt": "q.strip() + '?'", "completion": "a", "site": "url.split('/')[0]"}


def experiment(tmp_path, rows=ROWS, **data):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "data": {"source": str(path), "kind": "instruction", **data},
        "objective": {"name": "sft"},
        "federation": {"clients": 2},
        "partition": {"kind": "column", "column": "site"},
    }
    return Experiment.from_table(table)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_computed_and_rows_kept_and_counted(tmp_path, streaming):
    found = partition_data(
        experiment(tmp_path, map=MAP, filter="lang == 'en' and site != 's2'", streaming=streaming)
    )
    own = found.accounts.source
    assert found.accounts.closes and own.rows == 60
    assert own.dropped["data.filter is not true of it"] == 20
    every = [row for rows in found.train.values() for row in rows]
    assert all(row.prompt.startswith("Question") and row.prompt.endswith("?") for row in every)
    assert {row.columns["site"] for row in found.train[0]} == {"s0"}  # computed, and dealt by


def test_a_column_that_no_row_has_is_named_with_the_nearest(tmp_path):
    with pytest.raises(
        DataError, match=r"no column 'lnag', which data.filter = .*did you mean lang"
    ):
        partition_data(experiment(tmp_path, map=MAP, filter="lnag == 'en'"))


def test_rows_without_a_value_are_malformed_and_bounded(tmp_path):
    odd = [{**row, "lang": None} if i < 2 else row for i, row in enumerate(ROWS)]
    found = partition_data(experiment(tmp_path, odd, map=MAP, filter="lang.lower() == 'en'"))
    assert found.accounts.closes and found.accounts.source.malformed == 2
    assert "a text is needed, got None" in found.loaded.bad_rows[0].reason
    with pytest.raises(DataError, match=r"malformed .*max_bad_share allows"):
        partition_data(experiment(tmp_path, map=MAP, filter="lang > 3"))


def test_a_filter_that_keeps_nothing_is_an_error_that_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no usable row \(dropped: 60 data.filter is not true"):
        partition_data(experiment(tmp_path, map=MAP, filter="lang == 'fr'"))


def test_all_wrong_expressions_are_told_at_once_before_anything_is_read(tmp_path):
    with pytest.raises(SettingsError) as raised:
        experiment(tmp_path, map={"prompt": "open('x')", "completion": "a"}, filter="lang =")
    text = str(raised.value)
    assert "data.map.prompt = \"open('x')\" calls 'open'" in text
    assert "data.filter = 'lang =' is no expression" in text


def test_more_columns_than_may_be_computed_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.map computes 33 columns, at most 32"):
        experiment(tmp_path, map={f"c{i}": "q" for i in range(33)})


@pytest.mark.parametrize(
    "data",
    [
        {"filter": "file == 'a'"},
        {"columns": {"prompt": "file", "completion": "a"}},
        {"template": "{file}: {q}", "columns": {"completion": "a"}},
        {"map": {"completion": "a", "prompt": "row.get('file') + file"}, "filter": "file == 'b'"},
    ],
)
def test_columns_that_a_pattern_gives_are_there_in_a_run_and_in_a_check(tmp_path, data):
    for name in "ab":
        rows = [{"prompt": f"p{i}", "completion": "c", **row} for i, row in enumerate(ROWS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "out").mkdir()
    made = experiment(tmp_path / "out", source=str(tmp_path / "[ab].jsonl"), **data)
    found = list(_sources(made))
    assert [own.state for own in found] == ["ok", "ok"], found
    assert "a.jsonl" in found[0].text and "60 rows" in found[1].text
    table = made.data.model_copy(update={"test_fraction": 0.2})
    assert load_examples(table, np.random.default_rng(0)).train


def test_a_domain_is_a_column_that_expressions_may_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own = {"source": str(path), "map": {"prompt": "q + domain", "completion": "a"}}
    data = {"kind": "instruction", "domains": {"chat": own}}
    made = Experiment.from_table({"data": data, "objective": {"name": "sft"}})
    rows = load_examples(made.data, np.random.default_rng(0)).train
    assert all(row.prompt.endswith(" chat") for row in rows)
