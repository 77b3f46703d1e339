"""Rows that stay in their files: divided, read and counted as rows in memory are."""

import json
import os
import random

import numpy as np
import pytest

from fedloom.data.files import read_file
from fedloom.data.row_files import HubRows, line_ends, row_file
from fedloom.data.stored_rows import StoredRows
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import partition_data


def pairs(count, seed=0):
    rng = random.Random(seed)
    words = ["yes", "no", "maybe", "nïcht", "Ada"]
    rows = []
    for i in range(count):
        prompt = f"Question {rng.randrange(count)}: {rng.choice(words)}?"
        chosen, rejected = (f" {rng.choice(words)} {rng.randrange(9)}" for _ in range(2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "site": f"s{i % 4}"})
    return rows


def write(path, rows):
    """JSON lines with every kind of ending, blank lines, and rows that are none."""
    ends = ["\n", "\r\n", "\r", "\n\n", "\r\n \r\n"]
    lines = ["\ufeff"]
    for i, row in enumerate(rows):
        lines += [json.dumps(row, ensure_ascii=i % 2 == 0), ends[i % len(ends)]]
        if i == 20:
            lines += ['{"prompt": 1', "\n"]
    path.write_bytes("".join(lines).rstrip().encode())
    return path


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=23)
    return path


def experiment(source, streaming, *, kind="preference", objective="dpo", **sections):
    data = {"source": source, "kind": kind, "max_bad_share": 0.1, "streaming": streaming}
    table = {
        "federation": {"clients": 3},
        "objective": {"name": objective},
        **sections,
        "data": {**data, **sections.get("data", {})},
    }
    return Experiment.from_table(table)


def facts(division):
    return (
        {client: list(rows) for client, rows in division.train.items()},
        division.held_out,
        division.test,
        division.classes,
        division.shares,
        division.accounts,
        division.loaded.bad_rows,
        division.loaded.digest,
        division.loaded.places,
    )


def alike(source, **settings):
    loaded = partition_data(experiment(source, False, **settings))
    streamed = partition_data(experiment(source, True, **settings))
    assert all(isinstance(rows, StoredRows) for rows in streamed.train.values())
    assert facts(streamed) == facts(loaded)
    assert loaded.accounts.closes
    return loaded


PARTITIONS = [
    {"kind": "iid"},
    {"kind": "dirichlet", "column": "site"},
    {"kind": "column", "column": "site"},
    {"kind": "size", "sizes": [1.0, 2.0, 3.0]},
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda own: own["kind"])
def test_rows_in_files_are_divided_as_rows_in_memory(tmp_path, partition):
    rows = pairs(90)
    rows[40] = {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}
    found = alike(str(write(tmp_path / "rows.jsonl", rows)), partition=partition)
    assert found.accounts.source.malformed == 1
    assert found.accounts.source.dropped["the same pair is marked both ways"] == 2
    alike(str(parquet(tmp_path / "rows.parquet", rows)), partition=partition)


@pytest.mark.parametrize(
    "data",
    [
        {"group": "site"},
        {"max_rows": 50},
        {"ambiguous": "keep", "only": {"site": ["s1", "s2"]}},
        {"columns": {"prompt": "site"}},
    ],
    ids=lambda own: next(iter(own)),
)
def test_settings_of_rows_are_those_of_rows_in_memory(tmp_path, data):
    alike(str(write(tmp_path / "rows.jsonl", pairs(90))), data=data, federation={"clients": 2})


def test_several_files_and_domains_of_both_kinds(tmp_path):
    write(tmp_path / "a.jsonl", pairs(40))
    parquet(tmp_path / "b.parquet", pairs(40, 1))
    write(tmp_path / "c.jsonl", pairs(40, 2))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")]
    alike(files, partition={"kind": "column", "column": "file"}, federation={"clients": 2})
    alike(str(tmp_path / "*.jsonl"))
    domains = {name: {"source": str(tmp_path / name)} for name in ("a.jsonl", "b.parquet")}
    domains = {name.partition(".")[0]: own for name, own in domains.items()}
    table = {"source": "builtin:preferences", "domains": domains}
    alike("", data=table, partition={"kind": "dirichlet", "column": "domain"})


def test_other_kinds_of_rows(tmp_path):
    rng = random.Random(4)
    texts = [f"text {i} {rng.randrange(99)}" for i in range(60)]
    labelled = [{"text": text, "label": f"c{i % 3}"} for i, text in enumerate(texts)]
    found = alike(
        str(write(tmp_path / "l.jsonl", labelled)),
        kind="labelled",
        objective="classification",
        partition={"kind": "dirichlet", "column": "label"},
    )
    assert found.classes == ("c0", "c1", "c2")
    asked = [{"prompt": text, "completion": f" {i % 7}"} for i, text in enumerate(texts)]
    alike(str(write(tmp_path / "i.jsonl", asked)), kind="instruction", objective="sft")
    judged = [{**row, "label": i % 2 == 0} for i, row in enumerate(asked)]
    alike(str(write(tmp_path / "f.jsonl", judged)), kind="feedback", objective="bco")


def test_a_held_out_set_of_its_own_takes_the_same_rows_out(tmp_path):
    rows = pairs(80)
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:12])
    alike(str(tmp_path / "rows.jsonl"), data={"test_source": str(tmp_path / "test.jsonl")})


def test_a_local_set_of_the_hub(tmp_path, monkeypatch):
    """A builder of ``datasets`` on files of this machine, in place of one that would be downloaded."""
    import datasets

    path = parquet(tmp_path / "rows.parquet", pairs(50))
    build = datasets.load_dataset

    def load_dataset(name, subset, *, data_dir, split, revision, trust_remote_code):
        assert (name, revision, trust_remote_code) == ("somebody/pairs", None, False)
        cache = str(tmp_path / "arrow")
        return build("parquet", data_files=str(path), split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    alike("somebody/pairs")
    numbers = np.array([3, 4, 50])
    assert [row for _, row in HubRows("somebody/pairs", "train").at(numbers)] == [
        pairs(50)[number - 1] for number in numbers
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 2**22])
def test_lines_end_where_reading_ends_them(tmp_path, monkeypatch, size):
    monkeypatch.setattr("fedloom.data.row_files.CHUNK", size)
    content = b"a\nb\r\nc\rd\r\r\n\n\re"
    path = tmp_path / "lines.jsonl"
    for text in (content, content + b"\n", content + b"\r", b"", b"\n"):
        path.write_bytes(text)
        with path.open("rb") as file:
            ends = [int(end) for part in line_ends(file) for end in part]
        with path.open(newline="") as file:
            lengths = [len(line) for line in file]
        assert ends == np.cumsum(lengths).tolist()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_any_rows_are_read_again_by_their_numbers(tmp_path, ending):
    make = write if ending == "jsonl" else parquet
    path = make(tmp_path / f"rows.{ending}", pairs(70))
    file = row_file(path, tmp_path)
    known = dict(file.rows())
    assert known == dict(read_file(path)) or ending == "jsonl"  # a RowError equals itself alone
    sound = [number for number, row in known.items() if isinstance(row, dict)]
    for seed in range(5):
        drawn = sorted(random.Random(seed).sample(sound, 9))
        assert list(file.at(np.array(drawn))) == [(number, known[number]) for number in drawn]


def touched(path):
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, (1, 1))


def shorter(path):
    path.write_bytes(path.read_bytes()[:-200])


def other_text_same_time(path):
    found = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Question", b"Answered"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, shorter, other_text_same_time, os.unlink])
def test_a_file_that_changes_under_way_is_noticed(tmp_path, change):
    path = write(tmp_path / "rows.jsonl", pairs(60))
    division = partition_data(experiment(str(path), True))
    change(path)
    with pytest.raises(DataError, match=r"rows\.jsonl.* (has changed|is gone)"):
        list(division.train[0])


def test_what_needs_all_rows_is_refused_by_name(tmp_path):
    write(tmp_path / "rows.jsonl", pairs(60))
    source = str(tmp_path / "rows.jsonl")

    def refused(words, own=source, **settings):
        with pytest.raises(SettingsError) as error:
            experiment(own, True, **settings)
        assert words in str(error.value) and "data.streaming = true" in str(error.value)

    refused("is generated in memory", "builtin:preferences")
    refused("not found without reading those before it", str(tmp_path / "rows.jsonl.gz"))
    refused("not found without reading those before it", str(tmp_path / "rows.csv"))
    refused("data.near_duplicates compares all rows", data={"near_duplicates": 0.8})
    refused("'kto' joins each prompt with the completion of another row", objective="kto")
    refused("'bco' makes two single answers of each pair", objective="bco")
    refused("'distillation' draws its public rows", method={"name": "distillation"})
    refused(
        'partition.kind = "files"',
        [source, source, source],
        partition={"kind": "files"},
        data={"test_source": source},
    )


def test_files_of_a_pattern_that_are_not_streamed_are_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(DataError, match=r"data.streaming = true: .*a\.csv: a row of such a file"):
        partition_data(experiment(str(tmp_path / "a*"), True))


def test_nothing_is_left_of_an_index(tmp_path, cache):
    partition_data(experiment(str(write(tmp_path / "rows.jsonl", pairs(60))), True))
    assert list((cache / "rows").iterdir()) == []


def test_too_many_malformed_rows_are_the_same_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, pairs(10)), *["broken"] * 5]))
    told = []
    for streaming in (False, True):
        with pytest.raises(DataError) as error:
            partition_data(experiment(str(path), streaming))
        told.append(str(error.value))
    assert told[0] == told[1] and "5 of 15 rows" in told[0]
