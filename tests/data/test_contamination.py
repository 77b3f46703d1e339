"""Contamination: shared passages by hand, templates, benchmarks, and the account of what is dropped."""

import json

import pytest

from fedloom.data.contamination import contaminated
from fedloom.data.examples import Instruction
from fedloom.data.loading import LoadedData
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
    found = contaminated(train, [], [["What is two plus two?", "what", "yes", "two plus"]], 13)
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


def test_a_passage_of_one_held_out_row_is_no_templates_however_often_it_is_trained_on():
    train = rows(*(f"it reads {FOX} by night {i}" for i in range(12)), *map(str, range(586)))
    held_out = rows(f"so {FOX} by day")  # in its prompt, and so in its whole text too
    assert contaminated(train, held_out, [], 13).rows == tuple(range(12))
    columns = [[f"so {FOX} by day", f"say {FOX}"]]
    assert contaminated(train, [], columns, 13).rows == tuple(range(12))
    # a benchmark that is the held-out set too makes no template of its rows
    assert contaminated(train, held_out, [[held_out[0].prompt]], 13).rows == tuple(range(12))


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
    (tmp_path / "torn.jsonl").write_text('{"q": "one"}\n{"q": "tw\n')
    with pytest.raises(DataError, match=r"torn.jsonl row 2: .*mend it"):
        partition_data(
            experiment(tmp_path, decontaminate="drop", benchmarks=[str(tmp_path / "torn.jsonl")])
        )
    (tmp_path / "empty.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="holds no text"):
        partition_data(
            experiment(tmp_path, decontaminate="drop", benchmarks=[str(tmp_path / "empty.jsonl")])
        )


def files_of_clients(tmp_path, how, **data):
    passage = {"prompt": f"repeat: {FOX}", "completion": "ok"}
    paths = []
    for name in ("a", "b", "test"):
        own = [{"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(20)]
        own += [passage] if name == "a" else []
        own += [{"prompt": f"once more: {FOX}", "completion": "no"}] if name == "test" else []
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in own))
    first, second, test = map(str, paths)
    data = {"source": [first, second], "kind": "instruction", "decontaminate": how, **data}
    return Experiment.from_table(
        {
            "data": {"test_source": test, **data},
            "objective": {"name": "sft"},
            "federation": {"clients": 2},
            "partition": {"kind": "files"},
        }
    )


@pytest.mark.parametrize("where", ["test_source", "benchmarks"])
def test_each_clients_own_file_is_compared_with_what_is_judged_and_with_benchmarks(tmp_path, where):
    more = {}
    if where == "benchmarks":
        (tmp_path / "other.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 2)
        more = {"benchmarks": benchmark(tmp_path), "test_source": str(tmp_path / "other.jsonl")}
    reason = "shares 13 words with a held-out row or a benchmark"
    found = partition_data(files_of_clients(tmp_path, "drop", **more))
    assert found.accounts.closes and found.accounts.source.dropped[reason] == 1
    assert found.accounts.clients[0].dropped[reason] == 1
    assert reason not in found.accounts.clients[1].dropped
    assert all(FOX not in row.prompt for row in found.train[0])
    told = partition_data(files_of_clients(tmp_path, "report", **more))
    assert reason not in told.accounts.source.dropped
    assert any(
        text.startswith("client 0: 1 of 21 training rows share") for text in told.accounts.warnings
    )
    assert told.loaded.digest != found.loaded.digest


@pytest.mark.parametrize(
    "given",
    [{"deduplicate": True}, {"decontaminate": "drop"}, {"filter": "a > 1"}, {"map": {"x": "a"}}],
)
def test_a_source_of_ones_own_leaves_nothing_undone_in_silence(tmp_path, given):
    class Own:
        def load(self, rng):
            return LoadedData(rows("a", "b"), rows("c"), "instruction", "own")

    with pytest.raises(DataError, match=f"data.{next(iter(given))}: .* a source of your own"):
        partition_data(experiment(tmp_path, **given), Own())
