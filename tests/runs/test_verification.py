"""At its end a run loads what it saved, as a colleague would, and compares it with what it trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedloom
from fedloom.deployment.error_report import Sentence
from fedloom.errors import VerificationError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.runs import export as exporting
from fedloom.runs import verification
from fedloom.runs.export import export
from fedloom.runs.run import resume_run
from fedloom.security.audit_log import events
from fedloom.wire.envelope import ReplyHeader

ON = {"verify": True}
QUICK = {"federation": {"rounds": 1, "clients": 2}, "training": {"learning_rate": 1e-2}}


def change(folder, name, alter):
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    save_file(alter(load_file(folder / name)), folder / name, metadata=metadata)


def without_change(folder):
    def zero(tensors):
        return {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}

    change(folder, "adapter_model.safetensors", zero)


def with_another_scale(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))


def with_names_of_another_model(folder):
    def renamed(tensors):
        return {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}

    change(folder, "adapter_model.safetensors", renamed)


def of_another_rank(folder):
    def cut(tensors):
        return {n: t[:1].clone() if "lora_A" in n else t for n, t in tensors.items()}

    change(folder, "adapter_model.safetensors", cut)


def with_another_head(folder):
    change(folder, "personal.safetensors", lambda tensors: {n: t * 1.1 for n, t in tensors.items()})


@pytest.fixture
def damage(monkeypatch):
    """Have folders of a name come out wrong when they are saved; return how that is undone."""

    def start(alter, *names):
        saved = AdapterModel.save

        def save(model, folder):
            saved(model, folder)
            if folder.name in names:
                alter(folder)

        monkeypatch.setattr(AdapterModel, "save", save)
        return lambda: monkeypatch.setattr(AdapterModel, "save", saved)

    return start


def outcome(folder):
    return json.loads((folder / "summary.json").read_text())["verified"]


def test_a_sound_run_says_so(experiment):
    result = fedloom.run(experiment(output=ON, method={"name": "fedper"}, **QUICK))
    found = outcome(result.folder)
    assert found["folders"] == 3 and found["rows"] == 8 and found["rows_are"] == "held-out rows"
    assert found["loaded_by"] == ["transformers and PEFT", "fedloom's loader"]
    assert found["difference"] <= 1e-5 and found["allowed"] == 1e-4 and found["moved"] > 0.01
    line = next(own for own in result.summary_text.splitlines() if own.startswith("verified: "))
    assert "the 3 models that were saved, loaded by transformers and PEFT and by fedloom's" in line
    assert "on 8 held-out rows: log-probs differ by" in line and "(0.0001 allowed; training" in line


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (
            without_change,
            r"is not the model that was trained: its log-probs of held-out row \d+ differ",
        ),
        pytest.param(with_another_scale, "is not the model", marks=pytest.mark.slow),
        pytest.param(with_names_of_another_model, "is not the model", marks=pytest.mark.slow),
        pytest.param(of_another_rank, "does not load", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_that_came_out_wrong_is_an_error_and_stays(experiment, damage, alter, told):
    made = experiment(output=ON, **QUICK)
    mend = damage(alter, "adapter")
    with pytest.raises(VerificationError, match=told) as error:
        fedloom.run(made)
    folder = Path(made.output.folder)
    assert str(folder / "adapter") in str(error.value) and "\n" not in str(error.value)
    assert "The folder is kept, but do not use it" in str(error.value)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "summary.json").exists()
    mend()
    resume_run(folder)
    assert outcome(folder)["difference"] <= 1e-5


@pytest.mark.slow
def test_it_is_the_check_that_finds_it(experiment, damage):
    damage(without_change, "adapter")
    result = fedloom.run(experiment(output={"verify": False}, **QUICK))
    assert outcome(result.folder) == {"left_out": "output.verify = false"}
    assert "not verified: output.verify = false" in result.summary_text


@pytest.mark.parametrize(
    ("method", "alter"),
    [
        ("fedper", with_another_head),
        pytest.param("ditto", without_change, marks=pytest.mark.slow),
    ],
)
def test_a_clients_own_model_that_came_out_wrong_is_named(experiment, damage, method, alter):
    damage(alter, "0001")
    with pytest.raises(VerificationError, match=r"clients/0001 is not the model that was trained"):
        fedloom.run(experiment(output=ON, method={"name": method}, **QUICK))


@pytest.mark.slow
def test_where_memory_does_not_suffice_that_is_said(experiment, monkeypatch):
    monkeypatch.setattr(verification, "_free_bytes", lambda device: 10)
    result = fedloom.run(experiment(output=ON, **QUICK))
    (line,) = [own for own in result.summary_text.splitlines() if "not verified" in own]
    assert line.startswith("not verified: a second copy of the model takes 1")
    assert line.endswith("and 10 B of memory are free on cpu")


@pytest.mark.slow
def test_a_classifier_is_loaded_with_its_classes(experiment):
    made = experiment(
        output=ON,
        objective={"name": "classification"},
        data={"source": "builtin:labelled"},
        **QUICK,
    )
    assert outcome(fedloom.run(made).folder)["difference"] <= 1e-5


def test_an_export_is_compared_with_what_was_merged(experiment, monkeypatch):
    made = experiment(output=ON, adapter={"targets": ["lm_head"]}, **QUICK)
    folder = fedloom.run(made).folder
    written = export(folder)  # the model's embeddings are tied to its output layer
    assert written.verified.startswith("verified: what was saved, loaded by transformers, against")
    assert "on 8 rows of drawn tokens" in written.verified

    def damaged(model, tokenizer, target):
        own_code = merged(model, tokenizer, target)
        change(target, "model.safetensors", lambda t: {n: own * 1.01 for n, own in t.items()})
        return own_code

    merged = exporting.export_causal
    monkeypatch.setattr(exporting, "export_causal", damaged)
    with pytest.raises(VerificationError, match="log-probs of drawn row"):
        export(folder, target=folder / "again")
    assert (folder / "again" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_deployed_client_compares_what_it_wrote(deployed):
    run = deployed(clients=2, method={"name": "fedper"}, output=ON)
    for number in range(2):
        (line,) = events(run.federation.home(number).path / "audit.jsonl", "verified")
        assert line["client"] == number and line["difference"] <= 1e-5 and line["rows"] > 0
        (model,) = run.federation.home(number).path.glob("runs/*/model")
        assert (model / "README.md").read_text().startswith("---\n")


def test_a_deployed_client_says_that_its_model_came_out_wrong(deployed, damage):
    damage(with_another_head, "model")
    run = deployed(clients=2, method={"name": "fedper"}, output=ON)
    (line,) = events(run.federation.home(0).path / "audit.jsonl", "differs")
    assert "is not the model that was trained" in line["reason"]
    last = dict(run.mail.pulled)
    replies = {node: envelope.read(ReplyHeader).error for node, envelope in last.items()}
    assert set(replies.values()) == {Sentence.UNVERIFIED.value}


def test_without_any_rows_drawn_tokens_are_compared(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    model = AdapterModel(attach_adapter(backbone, AdapterSettings()), 0)
    rows, again = (verification.drawn_rows(model, 3) for _ in range(2))
    assert rows == again and len(rows.ids) == 8 and {len(own) for own in rows.ids} == {32}
    assert torch.tensor(rows.ids).max() < 320 and rows.name == "rows of drawn tokens"
