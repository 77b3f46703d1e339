"""lm-eval on a local task with an adapter that a run has left."""

import json

import pytest
import torch

import fedloom
from fedloom.errors import DataError, ModelError
from fedloom.evaluation import harness
from fedloom.evaluation.harness import TaskScores, run_harness
from fedloom.models.adapters import load_adapter
from fedloom.models.load import load_backbone, load_tokenizer

pytest.importorskip("lm_eval")

ROWS = [
    {"q": f"Colour {i}?", "choices": ["red", "a deep sea blue", "green"], "gold": i % 3}
    for i in range(6)
]


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "colours.yaml"
    file.write_text(
        f"""task: fedloom_colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
    )
    return str(file)


def by_hand(model, tokenizer):
    """Share of rows whose gold choice has the highest log-likelihood after the question."""
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(f"{row['q']} Answer:")["input_ids"]
            whole = torch.tensor([tokenizer(f"{row['q']} Answer: {choice}")["input_ids"]])
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=whole).logits.float(), -1)
            kept = range(len(prompt), whole.shape[1])
            scores.append(sum(logps[0, i - 1, whole[0, i]].item() for i in kept))
        right += max(range(3), key=lambda i: scores[i]) == row["gold"]
    return right / len(ROWS)


def test_results_have_intervals_where_their_rows_are_known():
    """3 of 6: Wilson .188 to .812; a mean of 2 +- .1 over 10 rows: t(9) = 2.262."""
    metrics = {"acc": 0.5, "acc_stderr": 0.2, "bleu,x": 2.0, "bleu_stderr,x": 0.1, "f1": 0.25}
    found = TaskScores(metrics, 6).intervals()
    assert list(found) == ["acc", "bleu,x", "f1"]
    assert (found["acc"].low, found["acc"].high) == pytest.approx((0.18761, 0.81239), abs=1e-5)
    own = TaskScores(metrics, 10).intervals()["bleu,x"]
    assert (own.low, own.high) == pytest.approx((2 - 0.226216, 2 + 0.226216), abs=1e-6)
    assert found["f1"].missing == "not estimable without a standard error"
    assert TaskScores(metrics, 4).intervals()["bleu,x"].missing.startswith("not estimable from 4")
    assert {own.missing for own in TaskScores(metrics, None).intervals().values()} == {
        "n not known"
    }


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_computed_by_hand(experiment, task, model_folder, capsys):
    result = fedloom.run(experiment(federation={"rounds": 1}))
    found = run_harness(result.adapter_path, str(model_folder), [task])
    tokenizer = load_tokenizer(str(model_folder))
    model = load_adapter(
        load_backbone(str(model_folder), pad_token_id=0), result.adapter_path
    ).eval()
    assert found["fedloom_colours"].metrics["acc"] == pytest.approx(by_hand(model, tokenizer))
    assert "acc_stderr" in found["fedloom_colours"].metrics
    assert found["fedloom_colours"].rows == 6
    limited = run_harness(None, str(model_folder), [task], limit=2)
    assert limited["fedloom_colours"].metrics["acc"] in (0.0, 0.5, 1.0)
    assert limited["fedloom_colours"].rows == 2


@pytest.mark.slow  # lm-eval reads its thousands of tasks for it
def test_a_name_near_a_task_of_lm_evals_is_told(model_folder):
    with pytest.raises(DataError, match="no task 'arc_eesy'; did you mean arc_easy"):
        run_harness(None, str(model_folder), ["arc_eesy"])


def test_what_is_no_task(task, model_folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no task 'colours'; did you mean colour"):
        harness._check_known(["colours"], ["colour", "shape"])
    with pytest.raises(DataError, match="cannot be read"):
        run_harness(None, str(model_folder), [str(tmp_path / "no.yaml")])
    with pytest.raises(DataError, match=r"cannot run fedloom_colours on .*nowhere"):
        run_harness(None, str(tmp_path / "nowhere"), [task])
    (tmp_path / "bad.yaml").write_text("dataset_path: json\n")
    with pytest.raises(DataError, match="names no task"):
        run_harness(None, str(model_folder), [str(tmp_path / "bad.yaml")])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ModelError, match=r"fedloom\[harness\]"):
        harness.run_harness(None, str(model_folder), ["arc_easy"])
