"""Reading files: every format, every kind of damage, one clear error each."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedloom import run
from fedloom.data.loading import load_examples
from fedloom.data.sources import DataSettings
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "site": "AB"[i % 2]} for i in range(10)]
OTHERS = [{**row, "prompt": f"other {row['prompt']}"} for row in ROWS]


def load(source, **settings):
    settings = {"kind": "instruction", **settings}
    return load_examples(DataSettings(source=str(source), **settings), np.random.default_rng(0))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gz(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "x.jsonl": write_jsonl,
    "x.jsonl.gz": write_gz,
    "x.json": write_json,
    "x.csv": write_csv,
    "x.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    data = load(tmp_path / name)
    assert len(data.train) == 8 and len(data.test) == 2
    rows = sorted(
        (e.row, e.prompt, e.completion, e.columns["site"]) for e in data.train + data.test
    )
    assert rows == [(i + 1, f"p{i}", f"c{i}", "AB"[i % 2]) for i in range(10)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert len(load(tmp_path / name).train) == 8


def test_nested_parquet_messages_are_read(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_parquet(tmp_path / "x.parquet", [{"messages": messages}] * 4)
    other = [{**messages[0], "content": "other"}, messages[1]]
    write_parquet(tmp_path / "y.parquet", [{"messages": other}])
    data = load(tmp_path / "x.parquet", test_source=str(tmp_path / "y.parquet"))
    assert data.train[0].completion == (messages[1],)


def test_the_same_seed_holds_out_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert load(tmp_path / "x.jsonl") == load(tmp_path / "x.jsonl")


def test_a_test_source_leaves_all_rows_for_training(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    write_jsonl(tmp_path / "y.jsonl", OTHERS[:3])
    data = load(tmp_path / "x.jsonl", test_source=str(tmp_path / "y.jsonl"), max_rows=6)
    assert len(data.train) == 6 and len(data.test) == 3


def test_several_files_become_one_set_with_the_file_as_a_column(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "b.jsonl", ROWS[5:])
    data = load(tmp_path / "*.jsonl")
    rows = data.train + data.test
    assert sorted(e.columns["file"] for e in rows) == ["a"] * 5 + ["b"] * 5
    assert len({e.row for e in rows}) == 10
    with pytest.raises(DataError, match="no data file matches"):
        load(tmp_path / "*.csv")


def test_few_bad_rows_are_left_out_and_told_with_their_numbers(tmp_path):
    lines = [json.dumps(row) for row in ROWS * 10]
    lines[4] = "{not json"
    lines[7] = json.dumps({"prompt": "p", "completion": 3})
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    data = load(tmp_path / "x.jsonl")
    assert [(b.number, b.reason) for b in data.bad_rows][1] == (8, "completion must be text, got 3")
    assert data.bad_rows[0].number == 5 and "not JSON" in data.bad_rows[0].reason
    assert len(data.train) + len(data.test) == 98


def test_too_many_bad_rows_stop_the_run_before_it_starts(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS + [{"prompt": "p", "completion": None}] * 7)
    with pytest.raises(
        DataError, match=r"7 of 17 rows of x\.jsonl are malformed \(41\.2%\)"
    ) as caught:
        load(tmp_path / "x.jsonl")
    assert "row 11: completion must be text, got None" in str(caught.value)
    assert "and 2 more" in str(caught.value)


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": "a0"} for i in range(10)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    data = load(tmp_path / "x.jsonl", kind="preference")
    assert data.dropped == {"chosen equals rejected": 1} and not data.bad_rows


def test_an_incomplete_pair_among_the_held_out_rows_is_dropped_whatever_becomes_of_others(tmp_path):
    def pair(i, rejected):
        return {"prompt": f"p{i}", "chosen": "a", "rejected": rejected}

    write_jsonl(tmp_path / "x.jsonl", [pair(i, "b" if i else "") for i in range(4)])
    write_jsonl(tmp_path / "t.jsonl", [pair(i, "b" if i > 11 else "") for i in range(10, 15)])
    data = load(
        tmp_path / "x.jsonl",
        kind="preference",
        test_source=str(tmp_path / "t.jsonl"),
        incomplete_pairs="feedback",
    )
    assert [type(row).__name__ for row in data.train] == ["Feedback", *["Preference"] * 3]
    assert [(type(row).__name__, row.row) for row in data.test] == [
        ("Preference", 3), ("Preference", 4), ("Preference", 5),
    ]  # fmt: skip
    assert data.test_account.dropped == {"rejected missing": 2}
    assert data.test_account.difference == 0


@pytest.mark.parametrize(
    ("prepare", "name", "message"),
    [
        (
            lambda p: write_jsonl(p / "rows.jsonl", ROWS),
            "row.jsonl",
            r"not found: .*did you mean .*rows\.jsonl",
        ),
        (lambda p: None, "nowhere/x.jsonl", "there is no folder"),
        (lambda p: (p / "x.jsonl").write_text(""), "x.jsonl", "is empty"),
        (lambda p: (p / "x.jsonl").write_text("\n\n"), "x.jsonl", "is empty"),
        (lambda p: (p / "x.csv").write_text("prompt,completion\n"), "x.csv", "is empty"),
        (lambda p: (p / "x.json").write_text("[1,"), "x.json", "is not JSON"),
        (lambda p: (p / "x.jsonl.gz").write_bytes(b"no gzip"), "x.jsonl.gz", "is not compressed"),
        (
            lambda p: (p / "x.parquet").write_bytes(b"no parquet"),
            "x.parquet",
            "is not a Parquet file",
        ),
        (lambda p: (p / "x.jsonl").write_bytes(b'{"prompt": "\xff"}'), "x.jsonl", "not UTF-8"),
        (lambda p: None, "./x.txt", "unknown ending"),
        (
            lambda p: write_jsonl(
                p / "x.jsonl", [{"promt": "a", "completion": f"b{i}"} for i in range(9)]
            ),
            "x.jsonl",
            None,
        ),
    ],
)
def test_bad_files(tmp_path, monkeypatch, prepare, name, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    if message is None:  # a prompt is optional: with a completion alone the row is a text to learn
        assert load(tmp_path / name).train[0].prompt == ""
        return
    source = name if name.startswith(".") else tmp_path / name
    with pytest.raises(DataError, match=message):
        load(source)


def test_an_absent_column_names_those_there_are_and_how_to_map(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answers": "b"}] * 5)
    with pytest.raises(
        DataError, match=r"no column 'answer'; did you mean 'answers'\? it has: answers, question"
    ) as caught:
        load(tmp_path / "x.jsonl", columns={"completion": "answer"})
    assert 'Map yours with data.columns, such as { completion = "answers" }.' in str(caught.value)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "x.jsonl", kind="feedback")
    first, how, other, *layouts = str(caught.value).splitlines()
    assert first == "x.jsonl has no column 'label'; it has: answers, question."
    assert (
        how == 'Map yours with data.columns, such as { label = "YOUR COLUMN" }.'
    )  # no word of prompts
    assert other == (
        'These columns read as instruction data (question/answers): data.kind = "instruction"'
    )
    assert layouts[:2] == ["Layouts of feedback data:", "  PROMPT + completion + LABEL"]
    assert layouts[-1] == "  LABEL: label, kto_tag, final_label, feedback, thumbs, rating, score"


def test_a_file_without_a_usable_row_tells_what_was_dropped_of_it_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": i % 3} for i in range(9)])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": 7}] * 4)
    own = DataSettings(
        source=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        kind="instruction",
        choices=["no", "yes"],
    )
    with pytest.raises(DataError) as caught:
        load_examples(own, np.random.default_rng(0))
    assert str(caught.value) == (
        f"{tmp_path}/b.jsonl holds no usable row (dropped: 4 the completion is a number that counts none of "
        "data.choices)"
    )


def test_a_name_with_the_signs_of_a_pattern_is_a_file_where_there_is_one(tmp_path):
    write_jsonl(tmp_path / "data[1].jsonl", ROWS)
    assert len(load(tmp_path / "data[1].jsonl").train) == 8
    write_jsonl(tmp_path / "data2.jsonl", ROWS[:5])
    assert len(load(tmp_path / "data[2].jsonl").train) == 4
    with pytest.raises(DataError, match="not found: ~nobody-has-this-name/x"):
        load("~nobody-has-this-name/x.jsonl")


def test_one_row_cannot_be_split(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="too few to hold out"):
        load(tmp_path / "x.jsonl")


def test_a_hub_name_without_a_network_points_to_a_local_copy():
    with pytest.raises(DataError, match=r"cannot be had from the Hub(.|\n)*--set data.source=FILE"):
        load("nobody/nothing")


def test_a_hub_set_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, subset, data_dir, split, revision, trust_remote_code):
        assert trust_remote_code is False
        calls.append((name, subset, data_dir, split, revision))
        return datasets.Dataset.from_list(ROWS if split == "train" else OTHERS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("someone/something", subset="en", test_split="validation", revision="v2")
    assert calls == [
        ("someone/something", "en", None, "train", "v2"),
        ("someone/something", "en", None, "validation", "v2"),
    ]
    assert len(data.train) == len(data.test) == 10


def test_several_sources_and_row_numbers_of_their_own(tmp_path):
    for name in ("a", "b"):
        rows = [*ROWS[:5], {"prompt": "x", "completion": None}, *ROWS[5:]]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    data = load_examples(
        DataSettings(
            source=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            kind="instruction",
            max_bad_share=0.2,
        ),
        np.random.default_rng(0),
    )
    numbers = [example.row for example in data.train + data.test]
    assert len(numbers) == len(set(numbers)) == 20  # a bad row shifts nothing onto another's number


def test_json_by_client_gives_a_column_of_clients(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"ann": ROWS[:4], "bob": ROWS[4:]}))
    data = load(tmp_path / "x.json")
    clients = [example.columns["client"] for example in data.train + data.test]
    assert (clients.count("ann"), clients.count("bob")) == (4, 6)


# --- parts of sets, several answers, domains ----------------------------------------------------


def pairs_file(path, rows=20, **columns):
    write_jsonl(
        path,
        [
            {
                "q": f"why {i}",
                "good": f"so {i}; or {i}",
                "bad": [f"no {i}", f"never {i}"],
                **columns,
            }
            for i in range(rows)
        ],
    )
    return str(path)


PAIRS = {
    "columns": {"chosen": "good", "rejected": "bad"},
    "template": "Q: {q}\nA: ",
    "answers_between": "; ",
}


def test_of_several_answers_the_first_is_taken(tmp_path):
    data = load(pairs_file(tmp_path / "x.jsonl"), kind="preference", **PAIRS)
    first = min(data.train, key=lambda row: row.row)
    i = first.row - 1
    assert (first.prompt, first.chosen, first.rejected) == (
        f"Q: why {i}\nA: ",
        f"so {i}",
        f"no {i}",
    )


def test_only_some_values_of_a_column(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    data = load(tmp_path / "x.jsonl", only={"site": ["B"]})
    assert {row.columns["site"] for row in [*data.train, *data.test]} == {"B"}
    assert data.dropped == {"not among data.only": 5}
    with pytest.raises(DataError, match=r"has no column 'sight'; did you mean 'site'\?"):
        load(tmp_path / "x.jsonl", only={"sight": ["B"]})
    with pytest.raises(DataError, match="holds no usable row"):
        load(tmp_path / "x.jsonl", only={"site": ["C"]})


def test_only_some_of_what_is_built_in():
    settings = DataSettings(builtin_rows=60, only={"domain": ["kitchen", "garden"]})
    data = load_examples(settings, np.random.default_rng(0))
    rows = [*data.train, *data.test]
    assert {row.columns["domain"] for row in rows} == {"kitchen", "garden"} and len(rows) < 60
    with pytest.raises(DataError, match=r"data\.only leaves no row of 'builtin:preferences'"):
        load_examples(
            DataSettings(builtin_rows=60, only={"domain": ["moon"]}), np.random.default_rng(0)
        )


def domains(tmp_path, **more):
    reviews = [
        {"text": " ".join(f"{label}{i}w{w}" for w in range(40)), "label": label}
        for i in range(12)
        for label in ("pos", "neg")
    ]
    write_jsonl(tmp_path / "films.jsonl", reviews)
    return {
        "why": {"source": pairs_file(tmp_path / "why.jsonl"), **PAIRS, "max_rows": 15},
        "films": {
            "source": str(tmp_path / "films.jsonl"),
            "continuations": {"chosen": "pos", "rejected": "neg", "words": 5},
        },
        **more,
    }


def read(**settings):
    return load_examples(
        DataSettings(**{"kind": "preference", **settings}), np.random.default_rng(0)
    )


def test_each_domain_is_read_in_its_own_way(tmp_path):
    data = read(domains=domains(tmp_path))
    rows = [*data.train, *data.test]
    counts = {name: sum(r.columns["domain"] == name for r in rows) for name in ("why", "films")}
    assert counts == {"why": 15, "films": 12}
    assert len({row.row for row in rows}) == 27  # row numbers tell all of them apart
    film = next(row for row in rows if row.columns["domain"] == "films")
    assert film.columns["prefers"] == "pos" and len(film.chosen.split()) == 5
    assert read(domains=domains(tmp_path)).digest == data.digest


def test_where_domains_make_and_lose_as_many_examples_the_account_closes(tmp_path):
    films = domains(tmp_path)["films"]
    texts = {
        "source": films["source"],
        "continuations": {**films["continuations"], "prompt_words": 5},
    }
    twice = {**texts, "continuations": {**texts["continuations"], "passages": 3}}
    # of 24 texts 12 pairs (-12); of 24 texts 3 passages, 36 pairs (+12)
    data = read(domains={"few": texts, "many": twice})
    assert (data.account.rows, data.account.made, data.account.difference) == (48, {}, 0)
    assert len(data.train) + len(data.test) == 48 - sum(data.dropped.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "x {q}"}, "data.template is said by each of data.domains"),
        ({"test_split": "test"}, "the held-out set is drawn from them"),
        ({"kind": None}, "data.kind is missing: is what the domains hold"),
        ({"kind": "instruction"}, "data.domains.films.continuations makes pairs"),
    ],
)
def test_settings_that_do_not_go_with_domains(tmp_path, settings, message):
    own = DataSettings(**{"kind": "preference", "domains": domains(tmp_path), **settings})
    assert any(message in text for text in own.contradictions())


def test_a_domain_without_a_file_of_its_own(tmp_path):
    own = DataSettings(kind="preference", domains=domains(tmp_path, third={"max_rows": 3}))
    (problem,) = own.contradictions()
    assert problem == "data.domains.third.source: a domain's rows come from files or the Hub"


def test_a_written_experiment_with_domains_is_read_again(tmp_path):
    own = Experiment.from_table({"data": {"kind": "preference", "domains": domains(tmp_path)}})
    path = tmp_path / "again.toml"
    path.write_text(own.to_toml())
    assert Experiment.from_toml(path).data == own.data


def test_choices_become_a_column_and_others_are_malformed(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(
        path, [{"prompt": f"p{i}", "completion": "yes" if i else "perhaps"} for i in range(9)]
    )
    with pytest.raises(DataError, match=r"row 1: the completion is not among data.choices"):
        load(path, choices=["yes", "no"])
    data = load(path, choices=["yes", "no"], max_bad_share=0.5)
    assert {row.columns["completion"] for row in data.train} == {"yes"}
    assert "completion" not in load(path).train[0].columns


def test_choices_by_number(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"prompt": f"p{i}", "completion": i % 3 - 1} for i in range(30)])
    data = load(path, choices=["no", "yes"])
    rows = sorted([*data.train, *data.test], key=lambda row: row.row)
    assert [row.completion for row in rows] == ["no", "yes"] * 10
    assert data.dropped == {"the completion is a number that counts none of data.choices": 10}


def test_choices_by_number_in_a_table_are_digits(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [{"prompt": f"p{i}", "completion": i} for i in range(12)])
    data = load(path, choices=["no", "yes"])
    rows = sorted([*data.train, *data.test], key=lambda row: row.row)
    assert [row.completion for row in rows] == ["no", "yes"]
    assert data.dropped == {"the completion is a number that counts none of data.choices": 10}
    write_csv(path, [{"prompt": f"p{i}", "completion": 1 + i % 2} for i in range(12)])
    data = load(path, choices=["1", "2"])  # digits that are choices themselves count none
    rows = sorted([*data.train, *data.test], key=lambda row: row.row)
    assert [row.completion for row in rows] == ["1", "2"] * 6


def test_choices_by_number_in_a_layout_that_is_recognised(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"question": f"q{i}", "answer": i % 2} for i in range(10)])
    data = load(path, choices=["no", "yes"])
    rows = sorted([*data.train, *data.test], key=lambda row: row.row)
    assert [row.completion for row in rows] == ["no", "yes"] * 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "instruction", "choices": ["yes", "yes"]}, "at least two different completions"),
        ({"kind": "preference", "choices": ["a", "b"]}, "completions of instructions"),
    ],
)
def test_choices_that_are_none(settings, words):
    (complaint,) = DataSettings(source="x.jsonl", **settings).contradictions()
    assert words in complaint


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "builtin:preferences"}, 'judged_by = "rouge_l" is for instructions, not pref'),
        (
            {"source": "x.jsonl", "kind": "instruction", "choices": ["a", "b"]},
            "data.choices are judged by accuracy",
        ),
    ],
)
def test_rouge_is_for_free_answers(data, words):
    name = "sft" if "kind" in data else "dpo"
    table = {"data": data, "objective": {"name": name}, "evaluation": {"judged_by": "rouge_l"}}
    with pytest.raises(SettingsError, match=words):
        Experiment.from_table(table)


@pytest.mark.slow
def test_a_run_is_judged_by_choices_and_by_rouge(tmp_path, model_folder):
    rows = [
        {
            "prompt": f"{i} is odd:",
            "completion": ["no", "never"] if i % 2 else ["yes"],
            "site": str(i % 2),
        }
        for i in range(60)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    table = {
        "data": {
            "source": str(tmp_path / "x.jsonl"),
            "kind": "instruction",
            "choices": ["yes", "no"],
        },
        "model": {"path": str(model_folder)},
        "objective": {"name": "sft"},
        "partition": {"kind": "dirichlet", "column": "completion", "alpha": 10.0},
        "federation": {"clients": 2, "rounds": 1},
        "evaluation": {"max_new_tokens": 3},
    }
    found = {}
    for name in ("choice", "answer"):
        table["output"] = {"folder": str(tmp_path / name)}
        found[name] = run(Experiment.from_table(table)).metrics
        table["data"].pop("choices", None)
        table["partition"]["column"] = "site"
        table["evaluation"]["judged_by"] = "rouge_l"
    assert 0 <= found["choice"]["accuracy"] <= 1
    assert 0 <= found["answer"]["rouge_l"] <= 1
    partition = json.loads((tmp_path / "choice" / "partition.json").read_text())
    assert partition["values"] == ["no", "yes"]
    summary = json.loads((tmp_path / "answer" / "summary.json").read_text())
    assert summary["metric"] == "rouge_l" and len(summary["clients_after"]["each"]) == 2
