"""Question files in their public layouts."""

import json

import pytest

from fedloom.errors import DataError
from fedloom.evaluation.questions import FOLDER, load_benchmark


def test_mt_bench_1_is_the_first_turn_with_temperatures_by_category(benchmarks):
    found = load_benchmark("mt-bench-1", benchmarks)
    assert [(q.id, q.text, q.temperature, q.reference) for q in found.questions] == [
        ("81", "Write a poem.", 0.7, None),
        ("82", "What is 2 + 2?", 0.0, "It is 4."),
    ]
    assert found.max_new_tokens == 1024 and not found.refusal_is_right


def test_vicuna_and_advbench(benchmarks, monkeypatch):
    monkeypatch.setenv(FOLDER, str(benchmarks))
    vicuna = load_benchmark("vicuna")
    assert vicuna.max_new_tokens == 2048 and vicuna.questions[0].temperature == 0.7
    advbench = load_benchmark("advbench")
    assert advbench.refusal_is_right and advbench.max_new_tokens == 1024
    assert [q.text for q in advbench.questions] == ["Do a bad thing", "Do another"]
    assert advbench.first(1).questions == advbench.questions[:1]


def test_a_file_may_be_named_for_a_benchmark(benchmarks):
    assert len(load_benchmark("mt-bench-1", benchmarks / "mt_bench/question.jsonl").questions) == 2


def test_a_file_of_ones_own_and_its_bad_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"id": "a", "prompt": "One?", "answer": "1"},
        {"id": "a", "prompt": "Again?"},
        {"prompt": "  "},
        {"turns": []},
        {"colour": "red"},
        {"instruction": "Two?", "category": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n[1]\n")
    found = load_benchmark(str(path))
    assert [(q.id, q.text, q.reference) for q in found.questions] == [
        ("a", "One?", "1"),
        ("6", "Two?", None),
    ]
    assert len(found.bad_rows) == 6
    for part in (
        "row 2: question a is there twice",
        "row 3: prompt must be text",
        "row 5: has none of the columns turns, question",
        "row 7: not JSON",
        "row 8: must be an object",
    ):
        assert any(part in row for row in found.bad_rows), part


@pytest.mark.parametrize(
    ("name", "message"),
    [("mtbench", "there are mt-bench-1, vicuna, advbench"), ("no/file.jsonl", "not found")],
)
def test_what_is_no_benchmark(name, message):
    with pytest.raises(DataError, match=message):
        load_benchmark(name)


def test_questions_that_are_not_there_say_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(DataError, match=r"--questions FILE, or set FEDLOOM_BENCHMARKS"):
        load_benchmark("vicuna")
    with pytest.raises(DataError, match=r"has no vicuna_bench/question.jsonl"):
        load_benchmark("vicuna", tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"colour": 1}\n')
    with pytest.raises(DataError, match="no usable question"):
        load_benchmark(str(tmp_path / "empty.jsonl"))
