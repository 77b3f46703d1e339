"""Eight public sets, trained as they lie there, each from at most twelve lines of settings.

The texts stay where they are: what is expected is made of the file's own first row, and counted by hand.
"""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fedloom import run
from fedloom.data.examples import Feedback, Instruction, Labelled, Preference
from fedloom.data.loading import load_examples
from fedloom.experiment.experiment import Experiment
from fedloom.settings.toml import parse_toml

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="the public sets are not here: ../shared/data"),
]

TRAINED = """
model.path = "MODEL"
data.source = "DATA/{source}"
data.kind = "{kind}"
data.max_rows = 48
data.max_length = 96
objective.name = "{objective}"
federation.clients = 2
federation.rounds = 2
training.local_steps = 2
evaluation.max_examples = 12
"""

XSTEST = 'data.values = { desirable = ["1_full_compliance"], undesirable = ["2_full_refusal"] }\n'


def hh(row):
    """The last answer of either side; what both have before it is the prompt."""
    sides = [row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected")]
    assert sides[0][0] == sides[1][0]
    return Preference(1, sides[0][0] + sides[0][1], sides[0][2], sides[1][2])


def personas(row):
    return Preference(
        1, row["question"], row["answer_matching_behavior"], row["answer_not_matching_behavior"]
    )


def gsm8k(row):
    return Instruction(1, row["question"] + "\n", row["answer"])


def xstest(row):
    assert row["final_label"] == "1_full_compliance"
    return Feedback(1, row["prompt"], row["completion"], True)


def banking(row):
    return Labelled(1, row["text"], row["category"])


def clinc(row):
    return Labelled(1, row["text"], row["intent"])


def natural(row):
    return Instruction(1, row["input"] + "\n", row["output"][0], accepted=tuple(row["output"][1:]))


def panda(row):
    assert [row[f"annotator{i}"] for i in (1, 2, 3)] == [2, 2, 2]
    prompt = f"{row['instruction']}\n\n{row['input']}\n"
    return Preference(1, prompt, row["response2"], row["response1"])


SETS = {
    # name: source, kind, objective, first example, layout, rows read, dropped, further settings
    "hh_rlhf": (
        "preference/hh_rlhf/harmless-base.jsonl.gz",
        ("preference", "dpo"),
        hh,
        "chosen/rejected",
        (1850, {}),
    ),
    "personas": (
        "preference/personas/personas.jsonl.gz",
        ("preference", "dpo"),
        personas,
        "question/answer_matching_behavior/answer_not_matching_behavior",
        (7994, {"the same pair is marked both ways": 6}),
    ),
    "gsm8k": ("gsm8k/train.jsonl.gz", ("instruction", "sft"), gsm8k, "question/answer", (2000, {})),
    "xstest": (
        "unary/xstest_completions.jsonl.gz",
        ("feedback", "kto"),
        xstest,
        "prompt/completion/final_label",
        (1659, {"label is not among data.values": 141}),
    ),
    "banking77": (
        "banking77/train.csv",
        ("labelled", "classification"),
        banking,
        "text/category",
        (10003, {}),
    ),
    "clinc150": (
        "clinc150/train.jsonl.gz",
        ("labelled", "classification"),
        clinc,
        "text/intent",
        (15000, {}),
    ),
    "natural_instructions": (
        "natural_instructions/instances.jsonl.gz",
        ("instruction", "sft"),
        natural,
        "input/output",
        (11939, {}),
    ),
    "pandalm": (
        "preference/pandalm/testset-v1.jsonl.gz",
        ("preference", "dpo"),
        panda,
        "instruction/input/response1/response2/annotator1/annotator2/annotator3",
        # 795 rows: 6 answers are no text, 75 majorities find a tie, in 52 an answer is empty
        (662, {"tie between the answers": 75, "rejected missing": 51, "chosen missing": 1}),
    ),
}


def settings(name, model):
    source, (kind, objective), *_ = SETS[name]
    text = TRAINED.format(source=source, kind=kind, objective=objective)
    text += XSTEST if name == "xstest" else ""
    assert len(text.strip().splitlines()) <= 12
    return parse_toml(text.replace("MODEL", str(model)).replace("DATA", str(DATA)), name)


def first_row(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file)) if path.suffix == ".csv" else json.loads(next(file))


def said(example):
    return {name: value for name, value in vars(example).items() if name != "columns"}


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_as_it_is(name, model_folder):
    source, _, expected, layout, (rows, dropped) = SETS[name]
    own = Experiment.from_table(settings(name, model_folder)).data
    read = own.model_copy(update={"max_rows": None})
    data = load_examples(read, np.random.default_rng(0))
    found = [*data.train, *data.test]
    assert data.layouts == (f"{Path(source).name}: layout {layout}",)
    assert (len(found), data.dropped) == (rows, dropped)
    first = next(example for example in found if example.row == 1)
    assert said(first) == said(expected(first_row(DATA / source)))


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_trained_as_it_is(name, model_folder, tmp_path):
    table = settings(name, model_folder) | {"output": {"folder": str(tmp_path / name)}}
    result = run(Experiment.from_table(table))
    lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    assert len(losses) == 3  # before training, and two rounds
    assert all(np.isfinite(value) for value in result.metrics.values())
