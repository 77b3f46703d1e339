"""Contamination: shared passages by hand, templates, benchmarks, and the account of what is dropped."""

import json

import pytest

from fedloom.data.contamination import contaminated
from fedloom.data.examples import Instruction
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import partition_data

FOX = "the quick brown fox jumps over the lazy dog while seven wizards watch"  # 13 words


def rows(*texts):
    return [Instruction(i, text, "yes") for i, text in enumerate(texts, 1)]


def test_thirteen_words_in_a_row_without_case_and_punctuation_and_not_twelve():
    train = rows(
        f"Once: {FOX.upper()}!",
        f"well {FOX.rpartition(' ')[0]} sleep",  # 12 of them
        "The quick, brown fox -- jumps over the lazy dog (while seven wizards watch).",
        "something else",
    )
    held_out = rows(f"a story: {FOX}, and so on")
    found = contaminated(train, held_out, [], 13)
    assert found.rows == (0, 2) and found.first == (1, FOX)
    assert contaminated(train, held_out, [], 12).rows == (0, 1, 2)
    assert found.warnings(True)[0].startswith("2 of 4 training rows share a passage of 13 words")


def test_a_shorter_text_counts_as_a_whole_and_a_label_never():
    train = rows("What is two plus two?", "what is two plus two, please", "what", "yes")
    found = contaminated(train, [], ["What is two plus two?", "what", "yes", "two plus"], 13)
    assert found.rows == (0,)


def test_characters_of_chinese_are_words():
    text = "今天天气很好我们一起去公园散步吧"  # 16
    assert contaminated(rows(f"他说{text}"), rows(f"{text}好不好"), [], 13).rows == (0,)


def test_a_templates_passages_are_no_contamination():
    template = (
        "below is an instruction that describes a task write a response that completes the request"
    )
    train = rows(*(f"{template} number {i}" for i in range(30)), f"{template} {FOX}")
    held_out = rows(*(f"{template} judged {i}" for i in range(3)), f"{template} so {FOX}")
    found = contaminated(train, held_out, [], 13)
    assert found.rows == (30,) and found.common > 0
    assert "a template's" in found.warnings(False)[1]


def experiment(tmp_path, **data):
    path = tmp_path / "x.jsonl"
    own = [
        {"prompt": f"question {i} about {i * 7}", "completion": f"answer {i}"} for i in range(60)
    ]
    own += [
        {"prompt": f"repeat: {FOX}", "completion": "ok"},
        own[0],
        {**own[1], "completion": "ANSWER  1"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    data = {"source": str(path), "kind": "instruction", **data}
    return Experiment.from_table(
        {"data": data, "objective": {"name": "sft"}, "federation": {"clients": 2}}
    )


def benchmark(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"q": {"text": [f"Say {FOX} twice"]}, "a": 4}) + "\n")
    return [str(path)]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_benchmark_has_is_dropped_counted_and_told(tmp_path, streaming):
    more = {"benchmarks": benchmark(tmp_path), "streaming": streaming, "test_fraction": 0.1}
    found = partition_data(experiment(tmp_path, decontaminate="drop", **more))
    reason = "shares 13 words with a held-out row or a benchmark"
    assert found.accounts.closes and found.accounts.source.dropped[reason] == 1
    assert all(FOX not in row.prompt for rows in found.train.values() for row in rows)
    told = partition_data(experiment(tmp_path, decontaminate="report", **more))
    assert reason not in told.accounts.source.dropped
    assert any("a passage of 13 words" in text for text in told.accounts.warnings)


@pytest.mark.parametrize("streaming", [False, True])
def test_duplicates_are_dropped_and_counted_whoever_would_have_had_them(tmp_path, streaming):
    found = partition_data(experiment(tmp_path, deduplicate=True, streaming=streaming))
    assert found.accounts.closes
    assert found.accounts.source.dropped["same text as an earlier row (data.deduplicate)"] == 2
    every = [row.prompt for rows in found.train.values() for row in rows]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"benchmarks": ["x.jsonl"]}, "data.benchmarks is for data.decontaminate"),
        ({"decontamination_words": 8}, "data.decontamination_words is for data.decontaminate"),
        ({"decontaminate": "yes"}, "report"),
        (
            {"source": "clients", "decontaminate": "drop", "test_source": "t.jsonl"},
            "each client says",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, given, told):
    with pytest.raises(SettingsError, match=told):
        experiment(tmp_path, **given)


def test_a_benchmark_that_cannot_be_read_is_one_error(tmp_path):
    with pytest.raises(DataError, match="not found"):
        partition_data(experiment(tmp_path, decontaminate="drop", benchmarks=["/nowhere/b.jsonl"]))
    (tmp_path / "empty.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="holds no text"):
        partition_data(
            experiment(tmp_path, decontaminate="drop", benchmarks=[str(tmp_path / "empty.jsonl")])
        )
