"""``fedloom label``: a run's selectors vote on pairs, and DPO is trained on what they say."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedloom
from fedloom.data.token_set import Untokenized
from fedloom.data.tokenize import NO_PROMPT, NOTHING_LEFT
from fedloom.data.unlabelled_pairs import read_pairs
from fedloom.errors import DataError, ModelError
from fedloom.runs import labelling
from fedloom.runs.labelling import label_pairs, selectors_of

ROWS = [
    {"prompt": f"Ada asks {n}: where is the cup?", "response_a": " Here.", "response_b": f" Gone {n}."}
    for n in range(6)
]  # fmt: skip

LABELLED = [
    {"prompt": r["prompt"], "chosen": r["response_a"], "rejected": r["response_b"]} for r in ROWS
]


def test_pairs_are_read_under_common_names(rows_file):
    several = {"instruction": "Say it.", "input": "Now.", "responses": ["a", "b", "a"]}
    labelled = {"prompt": "p", "chosen": "x", "rejected": "y"}
    found = read_pairs(Path(rows_file([ROWS[0], several, labelled])))
    assert [(own.row, own.first, own.second, own.labelled) for own in found] == [
        (1, " Here.", " Gone 0.", False),
        (2, "a", "b", False),
        (2, "b", "a", False),  # two that are the same are no pair
        (3, "x", "y", True),
    ]
    assert found[1].prompt == "Say it.\n\nNow.\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "response_a": 1, "response_b": "b"}, "row 1: an answer is 1, and must be"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "row 1: the prompt is '', and must be"),
        ({"prompt": "p", "answer": "a"}, "row 1: it has prompt, answer; a row needs a prompt"),
        ({"prompt": "p", "responses": "a"}, "row 1: its answers are 'a', and must be a list"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "has no pair of answers that differ"),
    ],
)
def test_what_is_no_pair_is_one_error(rows_file, row, said):
    with pytest.raises(DataError) as told:
        read_pairs(Path(rows_file([row])))
    assert said in str(told.value)


def test_a_run_that_selects_nothing_is_refused(experiment, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment.toml").write_text('[objective]\nname = "dpo"\n')
    with pytest.raises(ModelError) as told:
        selectors_of(folder)
    assert "objective.name = 'dpo'" in str(told.value) and "selector" in str(told.value)


@pytest.fixture
def run(tmp_path):
    """A run folder of three selectors that ended, as far as labelling looks before it loads."""
    folder = tmp_path / "run"
    for number in range(3):
        (folder / "adapters" / f"selector-{number:03d}").mkdir(parents=True)
    (folder / "experiment.toml").write_text(
        '[objective]\nname = "selector"\n[method]\nname = "fedbiscuit"\n[federation]\nrounds = 5\n'
    )
    (folder / "summary.json").write_text("{}")
    return folder


def test_a_run_that_was_cut_off_does_not_vote(run):
    assert len(selectors_of(run)[1]) == 3
    (run / "adapters" / "selector-002").rmdir()
    with pytest.raises(ModelError, match=r"adapters has 2 of method\.selectors = 3 adapters"):
        selectors_of(run)
    (run / "summary.json").unlink()
    with pytest.raises(ModelError, match=r"has not ended.*fedloom run --resume"):
        selectors_of(run)


def test_what_is_left_out_is_counted_by_its_reason(run, rows_file, monkeypatch, tmp_path):
    reasons = [(1, NOTHING_LEFT), (2, NO_PROMPT), (4, "no place for a system prompt")]
    dropped = tuple(Untokenized(place, place + 1, why) for place, why in reasons)

    class Tokens(SimpleNamespace):
        def __len__(self):
            return len(self.index)

    tokens = Tokens(index=np.array([0, 3, 5]), dropped=dropped)
    margins = torch.tensor([[1.0, -1.0, 2.0], [1.0, -1.0, 2.0]])
    model = SimpleNamespace(model=None, evaluating=nullcontext)
    for name, own in {
        "load_saved": lambda *own: (None, model), "context_length": lambda model: 64,
        "tokenize": lambda *own, **options: tokens, "TokenShare": lambda own: own,
        "tokens_per_pass": lambda *own: 1,
        "HeldOut": lambda *own, **options: SimpleNamespace(margins=lambda model: margins),
    }.items():  # fmt: skip
        monkeypatch.setattr(labelling, name, own)
    found = label_pairs(run, Path(rows_file(ROWS, "pairs.jsonl")), tmp_path / "out.jsonl")
    assert (found.pairs, found.labelled, found.too_long, found.unreadable) == (6, 3, 1, 2)


@pytest.mark.slow
def test_from_selectors_to_dpo(experiment, rows_file, call, tmp_path):
    own = experiment(
        method={"name": "fedbiscuit", "selectors": 2},
        objective={"name": "selector"},
        federation={"rounds": 3},
        data={"builtin_rows": 30},
        training={"local_steps": 2},
    )
    run = tmp_path / "run"
    assert "selection_accuracy" in fedloom.run(own).metrics
    assert sorted(path.name for path in (run / "adapters").iterdir()) == [
        "selector-000",
        "selector-001",
    ]
    pairs, out = rows_file(ROWS, "pairs.jsonl"), tmp_path / "labelled.jsonl"
    code, said = call("label", run, pairs, "--out", out)
    assert code == 0 and "6 pairs, each asked of 2 selectors in both orders" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:  # a pair without a majority is in none
        assert row["votes"] in ("2:0", "1:0")
        asked = next(one for one in ROWS if one["prompt"] in row["prompt"])
        assert {row["chosen"], row["rejected"]} == {asked["response_a"], asked["response_b"]}
    turned = [{**r, "response_a": r["response_b"], "response_b": r["response_a"]} for r in ROWS]
    found = label_pairs(run, Path(rows_file(turned, "turned.jsonl")), tmp_path / "turned-out.jsonl")
    other = [json.loads(line) for line in (tmp_path / "turned-out.jsonl").read_text().splitlines()]
    assert found.labelled == len(rows) and found.labelled + found.ties == 6
    assert [(r["chosen"], r["votes"]) for r in other] == [(r["chosen"], r["votes"]) for r in rows]
    code, said = call("label", run, pairs, "--out", out)
    assert code != 0 and "is there already" in said
    if rows:
        trained = fedloom.run(
            experiment(
                data={
                    "source": str(out),
                    "kind": "preference",
                    "test_source": rows_file(LABELLED, "test.jsonl"),
                },
                federation={"rounds": 1, "clients": 1},
                evaluation={"per_client": False, "max_examples": 4},
                output={"folder": str(tmp_path / "dpo")},
            )
        )
        assert "preference_accuracy" in trained.metrics
