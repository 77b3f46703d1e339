"""A page of a folder whose files somebody changed: as good as it can be, or one message, never a traceback."""

import json
import shutil

import pytest

import fedloom
from fedloom.errors import FedloomError, OutputError
from fedloom.reports.choose import write_page_of
from sampling import drawn

FILES = (
    "rounds.jsonl",
    "costs.jsonl",
    "run.json",
    "partition.json",
    "samples.json",
    "summary.json",
)
VALUES = (None, True, -1, 0, 1e308, float("nan"), "", "x" * 1000, "\x1b[2J", [], {}, [[[]]], 2**70)


@pytest.fixture
def folder(experiment, once, tmp_path):
    """A copy of the folder of a run."""
    made = once("damaged", lambda: fedloom.run(experiment(evaluation={"samples": 1})).folder)
    return shutil.copytree(made, tmp_path / "copy")


def write(folder):
    return write_page_of([folder], None, lambda warning: None)


def read(path):
    text = path.read_text()
    return (
        [json.loads(line) for line in text.splitlines()]
        if "jsonl" in path.name
        else json.loads(text)
    )


def put(path, value):
    lines = map(json.dumps, value) if "jsonl" in path.name else [json.dumps(value)]
    path.write_text("".join(f"{line}\n" for line in lines))


def trained(costs):
    return next(cost for cost in costs if cost["phase"] == "train")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("costs.jsonl", lambda own: own[3].update(flops="7"), "line 4: flops = '7' is not what a run"),
        ("costs.jsonl", lambda own: own[0].update(round=True), "line 1: round = True is not what a run"),
        ("costs.jsonl", lambda own: trained(own).pop("steps"), "wrote (KeyError: 'steps'); put its files back"),
        ("rounds.jsonl", lambda own: own.insert(1, 7), "rounds.jsonl, line 2: 7 is no record"),
        ("rounds.jsonl", lambda own: own[1].update(offences=1.5), "wrote (TypeError: 'float' object is"),
        ("summary.json", None, "summary.json is not what a run wrote, it holds [7]: put it"),
        ("run.json", lambda own: own.pop("threads"), "(UndefinedError: 'dict object' has no attribute"),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_one_message(folder, name, damage, words):
    content = [7]
    if damage is not None:
        damage(content := read(folder / name))
    put(folder / name, content)
    with pytest.raises(OutputError) as told:
        write(folder)
    assert words in str(told.value)


def test_a_setting_that_is_no_toml(folder):
    (folder / "experiment.toml").write_text("[data\n")
    with pytest.raises(OutputError, match="a record there is not what a run wrote"):
        write(folder)


def changed(value, rng):
    """Replace or remove something within a value, however deep."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.1:
        del value[place]
    else:
        value[place] = changed(value[place], rng)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_whatever_was_changed(folder, name):
    rng, whole, told = drawn("damage", name), (folder / name).read_bytes(), []
    for _ in range(5):
        content = changed(read(folder / name), rng)
        put(
            folder / name,
            content if isinstance(content, list) or "jsonl" not in name else [content],
        )
        try:
            assert write(folder).stat().st_size > 10_000
        except FedloomError as error:
            told.append(str(error))
        (folder / name).write_bytes(whole)
    assert all(str(folder) in message for message in told)
