"""What is exported loads in a fresh process with transformers alone, and says the same."""

import json
import subprocess
import sys

import pytest
import torch

import fedloom
from fedloom.data.examples import Labelled
from fedloom.data.loading import LoadedData
from fedloom.errors import ModelError, OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.export import export
from fedloom.runs.saved_models import load_saved

STRANGER = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
for line in sys.stdin:
    folder, task, trust, texts = json.loads(line)
    assert "fedloom" not in sys.modules and "peft" not in sys.modules
    factory = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    model = factory.from_pretrained(folder, trust_remote_code=trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = logits.log_softmax(-1)[0, -1].tolist() if task == "causal" else logits.tolist()
        if task == "causal":
            model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    print(json.dumps(found), flush=True)
"""
TEXTS = ["Ada asks in the kitchen: where is the red cup?", "Ben asks in the garden"]

PARTS = {
    "bottleneck and head": ({"name": "fedpdpo", "bottleneck": 4}, "pdpo"),
    "low-rank head": ({"name": "fedpdpo", "bottleneck": 0, "head_mode": "lowrank"}, "dpo"),
    "adapter of twice the rank": ({"name": "feddpa"}, "dpo"),
}


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Load and run exports in a process where fedloom is not imported."""
    errors = tmp_path_factory.mktemp("stranger") / "stderr"
    with errors.open("w") as stderr, subprocess.Popen(
        [sys.executable, "-c", STRANGER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        text=True,
    ) as process:  # fmt: skip

        def load(folder, task, trust, texts=TEXTS):
            process.stdin.write(json.dumps([str(folder), task, trust, texts]) + "\n")
            process.stdin.flush()
            found = process.stdout.readline()
            assert found, errors.read_text()[-2000:]
            return torch.tensor(json.loads(found))

        yield load
        process.stdin.close()


@pytest.fixture
def run(experiment):
    def make(method, objective):
        own = experiment(
            method=method, objective={"name": objective},
            data={"source": "builtin:opposed", "builtin_rows": 60},
            partition={"kind": "column", "column": "side", "client_test_fraction": 0.2},
            federation={"clients": 2, "rounds": 1}, training={"learning_rate": 1e-2},
        )  # fmt: skip
        return fedloom.run(own)

    return make


def ours(result, client):
    experiment = Experiment.from_toml(result.folder / "experiment.toml")
    encoder, model = load_saved(experiment, (), result.folder / "clients" / f"{client:04d}")
    batch = encoder.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with model.evaluating():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), PARTS.values(), ids=PARTS)
def test_a_client_loads_elsewhere_with_the_same_log_probs(run, strange, method, objective):
    result = run(method, objective)
    written = export(result.folder, client=1)
    assert written.own_code == (method.get("bottleneck", 0) > 0)
    expected = ours(result, 1).logits.log_softmax(-1)[0, -1]
    found = strange(written.folder, "causal", written.own_code)
    assert torch.allclose(found, expected, atol=1e-5)
    other = ours(result, 0).logits.log_softmax(-1)[0, -1]
    assert not torch.allclose(found, other, atol=1e-5)


@pytest.mark.slow
def test_the_reward_model_scores_texts(run, strange):
    result = run({"name": "fedpdpo", "bottleneck": 4}, "pdpo")
    written = export(result.folder, client=0, reward=True)
    found = strange(written.folder, "reward", written.own_code)
    assert found.shape == (2, 1)
    assert torch.allclose(found[:, 0], ours(result, 0).rewards, atol=1e-5)
    assert found[0] != found[1]


def test_a_plain_run_exports_its_global_model(run, strange):
    result = run({"name": "fedavg"}, "dpo")
    written = export(result.folder)
    assert not written.own_code and "trust_remote_code" not in written.loading
    assert strange(written.folder, "causal", False).shape == (320,)
    with pytest.raises(OutputError, match="is not empty"):
        export(result.folder)
    with pytest.raises(OutputError, match=r"has no model of client 1's own"):
        export(result.folder, client=1)
    with pytest.raises(ModelError, match="no explicit reward head"):
        export(result.folder, target=result.folder / "reward", reward=True)


GREEDY = """
import json, sys, torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
assert "fedloom" not in sys.modules
base, adapter, merged, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
ids = tokenizer(text, return_tensors="pt").input_ids
plain = AutoModelForCausalLM.from_pretrained(base)
options = {"max_new_tokens": 24, "do_sample": False}
said = [plain.generate(input_ids=ids, **options)]
said.append(PeftModel.from_pretrained(plain, adapter).generate(input_ids=ids, **options))
assert AutoTokenizer.from_pretrained(merged)(text, return_tensors="pt").input_ids.equal(ids)
said.append(AutoModelForCausalLM.from_pretrained(merged).generate(input_ids=ids, **options))
print(json.dumps([rows[0, ids.shape[1]:].tolist() for rows in said]))
"""


@pytest.mark.slow
def test_an_adapter_and_a_merged_model_say_the_same_in_plain_transformers(experiment, model_folder):
    """And neither what their base says; of an adapter as it is written for the Hub."""
    own = experiment(
        objective={"name": "sft"}, data={"source": "builtin:instructions"},
        federation={"clients": 1, "rounds": 1}, training={"learning_rate": 0.05},
    )  # fmt: skip
    run = fedloom.run(own).folder
    merged, adapter = export(run), export(run, format="adapter", published=True)
    words = [str(model_folder), str(adapter.folder), str(merged.folder), TEXTS[0]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GREEDY, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    base, with_adapter, whole = json.loads(done.stdout)
    assert with_adapter == whole != base and len(whole) == 24


@pytest.mark.slow
def test_what_others_will_read_names_no_folder_of_this_machine(run):
    result = run({"name": "fedavg"}, "dpo")
    for form in ("adapter", "merged"):
        written = export(result.folder, format=form, published=True)
        texts = [
            path.read_text() for path in written.folder.iterdir() if path.suffix != ".safetensors"
        ]
        assert len(texts) > 2
        base = Experiment.from_toml(result.folder / "experiment.toml").model.path
        assert not any(base in text or str(result.folder) in text for text in texts), form
        assert (
            "Preference rows, from `builtin:opposed`. Divided between clients by `column`."
            in (written.folder / "README.md").read_text()
        )
    assert base in (result.folder / "adapter" / "adapter_config.json").read_text()  # it could be


def test_who_there_is_is_said(run):
    result = run({"name": "ditto"}, "dpo")
    with pytest.raises(
        OutputError, match=r"no model of client 7's own; it has models of clients 0, 1"
    ):
        export(result.folder, client=7)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(OutputError):
        export(tmp_path)


class Reviews:
    """A source object with texts of two classes."""

    kind = "labelled"

    def load(self, rng):
        """Return forty texts, eight of them held out."""
        rows = [
            Labelled(i, f"it was {word} at place {i}", word)
            for i, word in enumerate(["fine", "poor"] * 20)
        ]
        return LoadedData(rows[8:], rows[:8], "labelled", "0" * 64)


def test_a_classifier_of_a_source_object_has_its_classes(table, tmp_path):
    """They are in run.json: nobody can make the rows of such a run again."""
    del table["data"]
    table |= {"objective": {"name": "classification"}, "federation": {"rounds": 1, "clients": 2}}
    run = fedloom.run(table, data=Reviews())
    exported = export(run.folder, target=tmp_path / "exported")
    labels = json.loads((exported.folder / "config.json").read_text())["id2label"]
    assert exported.classification and labels == {"0": "fine", "1": "poor"}
