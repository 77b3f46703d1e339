"""A run starts from an adapter that exists: settings, base, tensors, reference, resumption and comparison."""

import json
import math
import shutil
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedloom
from fedloom.data.batching import collate
from fedloom.data.client_rows import TokenShare
from fedloom.errors import CheckpointError, ModelError, OutputError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import load_backbone
from fedloom.objectives.logps import completion_logps
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.assembly import assemble
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.forget import forget_client
from fedloom.runs.initial_adapter import find_start, kept_start, with_adapter_settings
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.settings.toml import write_toml
from fedloom.storage.run_folder import RunFolder
from fedloom.training.layout import scoring_budget
from fedloom.training.references import add_reference_logps
from observers import Heard

SFT = {"data": {"source": "builtin:instructions", "builtin_rows": 30}, "objective": {"name": "sft"}}
ADAPTER = {"rank": 4, "alpha": 12.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture
def build(table, tmp_path):
    """Make a small experiment; each section is set as given."""

    def make(name, **sections):
        table["data"]["builtin_rows"] = 30
        table["training"] |= {"local_steps": 2, "learning_rate": 1e-2}
        table["evaluation"] = {"samples": 0}
        own = {**table, "output": {"folder": str(tmp_path / name)}, **sections}
        return Experiment.from_table(own)

    return make


@pytest.fixture
def sft(build, once, tmp_path_factory):
    """Folder of a run of supervised fine-tuning, which no test changes."""

    def make():
        folder = tmp_path_factory.mktemp("start") / "sft"
        fedloom.run(build("sft", adapter=ADAPTER, **SFT, output={"folder": str(folder)}))
        return folder

    return once("sft", make)


@pytest.fixture
def copied(sft, tmp_path):
    """The same as a copy that may be changed."""
    shutil.copytree(sft, tmp_path / "sft")
    return tmp_path / "sft"


def begun(experiment):
    start = find_start(experiment)
    experiment = with_adapter_settings(experiment, start)
    return assemble(experiment, partition_data(experiment), start=start)


def text_of(caught):
    return str(caught.value)


def test_dpo_starts_from_what_sft_made_and_its_reference_is_that(build, sft, tmp_path):
    heard = Heard()
    experiment = build("dpo", adapter={"start": str(sft)})
    result = run_experiment(experiment, observer=heard)
    place = heard.stages.index(f"starting from the adapter {sft}")
    assert heard.stages[place + 1] == f"reference: the adapter it starts from, {sft}"
    # before any step every log-ratio is 0: the loss is log 2 and no margin is other than 0
    assert result.metrics_before["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert result.metrics_before["reward_margin"] == 0
    told = Experiment.from_toml(result.folder / "experiment.toml").adapter
    assert (told.rank, told.alpha, told.targets) == (4, 12.0, ["q_proj", "v_proj"])
    kept = json.loads((result.folder / "run.json").read_text())["start"]
    assert kept["name"] == str(sft) and kept["reference"] == "start"
    assert kept["run"] == json.loads((sft / "run.json").read_text())["id"]
    before, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (result.folder / "start", result.folder)
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


SLOW = ("ipo", "kto", "bco", "pdpo", "pkto")


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_every_log_ratio_is_exactly_0_before_any_step(build, sft, name):
    method = {"name": "fedpdpo" if name in ("pdpo", "pkto") else "fedavg"}
    experiment = build("x", adapter={"start": str(sft)}, objective={"name": name}, method=method)
    parts = begun(experiment)
    own = parts.local.resources[1]
    parts.local.add_reference(1, 1)
    share = parts.local.shares[1]
    own.model.write(own.initial)
    budget = scoring_budget(experiment.training, own.model)
    scored = add_reference_logps(
        own.model, TokenShare(share.tokens, share.mismatched), budget, own.model.read()
    )
    assert torch.equal(share.reference_logps, scored.reference_logps)
    batch = collate(share, np.arange(len(share)), own.model.pad, own.model.device)
    with own.model.reference(own.reference):
        reference = completion_logps(own.model, batch.sequences)
    policy = completion_logps(own.model, batch.sequences)
    assert torch.equal(policy, reference) and policy.requires_grad
    with own.model.reference():
        base = completion_logps(own.model, batch.sequences)
    assert (policy - base).abs().max() > 1e-3


@pytest.mark.slow
def test_reference_base_is_what_peft_computes_without_the_adapter(build, sft, model_folder):
    experiment = build(
        "x", adapter={"start": str(sft)}, objective={"name": "dpo", "reference": "base"}
    )
    parts = begun(experiment)
    parts.local.add_reference(1, 0)
    share = parts.local.shares[0]
    model = parts.local.resources[0].model
    model.write(parts.initial)
    batch = collate(share, np.arange(len(share)), model.pad, model.device)
    backbone = load_backbone(str(model_folder), pad_token_id=model.pad)
    plain = peft.PeftModel.from_pretrained(backbone, str(sft / "adapter")).eval()
    with torch.no_grad():
        on = completion_logps(plain, batch.sequences)
        with plain.disable_adapter():
            off = completion_logps(plain, batch.sequences)
        ours = completion_logps(model, batch.sequences)
    assert torch.allclose(ours, on, atol=1e-4)
    order = [n for pair in (range(0, 2 * len(share), 2), range(1, 2 * len(share), 2)) for n in pair]
    assert torch.allclose(share.reference_logps[order], off, atol=1e-4)
    assert (on - off).abs().max() > 1e-2


def test_what_is_trained_is_the_same_object_after_the_reference(build, sft):
    parts = begun(build("x", adapter={"start": str(sft)}))
    model, before = parts.model, dict(parts.model.parameters)
    moved = {name: tensor + 1 for name, tensor in parts.initial.items()}
    model.write(moved)
    with model.reference(parts.initial):
        assert all(torch.equal(t, parts.initial[n]) for n, t in model.read().items())
    assert all(model.parameters[name] is own for name, own in before.items())
    assert all(torch.equal(t, moved[n]) for n, t in model.read().items())


def test_settings_that_differ_are_named_with_both_values(build, sft):
    asked = build("x", adapter={"start": str(sft), "rank": 8, "alpha": 12.0})
    with pytest.raises(SettingsError) as caught:
        fedloom.run(asked)
    assert f"adapter.start = {str(sft)!r} has rank = 4 and adapter.rank is 8" in text_of(caught)
    assert "set adapter.rank = 4, or leave it out" in text_of(caught)
    assert "alpha" not in text_of(caught)
    with pytest.raises(SettingsError, match=r'set adapter\.kind = "lora"'):
        fedloom.run(build("x", adapter={"start": str(sft), "kind": "ia3"}))
    same = {"start": str(sft), "rank": 4, "alpha": 12.0, "targets": ["v_proj", "q_proj"]}
    assert begun(build("x", adapter=same)).initial  # layers are compared as layers
    other = build("x", adapter={"start": str(sft), "targets": "all-linear"})
    with pytest.raises(ModelError, match=r"it lacks base_model.*leave adapter.targets"):
        begun(other)


@pytest.mark.slow
def test_another_base_is_refused_and_an_unknown_one_warned_of(build, sft, model_folder, tmp_path):
    from safetensors.torch import load_file as load

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load(other / "model.safetensors")
    save_file({n: 2 * t for n, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for start in (sft, sft / "adapter"):
        asked = build("x", adapter={"start": str(start)}, model={"path": str(other)})
        with pytest.raises(ModelError, match=r"was made for the model .*, which is another"):
            fedloom.run(asked)
    assert not (tmp_path / "x").exists()
    moved = tmp_path / "adapter"
    shutil.copytree(sft / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/model"})
    )
    heard = Heard()
    run_experiment(build("y", adapter={"start": str(moved)}), observer=heard)
    assert any("right only if both are the same weights" in text for text in heard.warnings)
    (moved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(model_folder)})
    )
    heard = Heard()
    run_experiment(build("z", adapter={"start": str(moved)}), observer=heard)
    assert not any("same weights" in text for text in heard.warnings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "does not fit: it lacks"),  # the magnitudes
        ({"init_lora_weights": "pissa"}, "changes the frozen weights"),
        ({"peft_type": "LOHA"}, "its peft_type is 'LOHA'"),
        ({"r": "4"}, "adapter.rank"),
        ({"r": 10**9}, "has rank"),
        ({"lora_alpha": float("inf")}, "adapter.alpha"),
        ({"something_new": 3}, "something_new = 3, here it is None"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
    ],
)
def test_what_would_be_another_function_of_the_tensors_is_refused(
    build, sft, tmp_path, change, says
):
    folder = tmp_path / "changed"
    shutil.copytree(sft / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    rank = {"rank": 4} if change == {"r": 10**9} else {}
    with pytest.raises((ModelError, SettingsError)) as caught:
        begun(build("x", adapter={"start": str(folder), **rank}))
    assert says in text_of(caught) and "\n" not in text_of(caught).split("mistake:\n")[-1]


def damaged(folder, how):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    if how == "infinite":
        tensors[first][0, 0] = math.inf
    elif how == "missing":
        del tensors[first]
    elif how == "extra":
        tensors["base_model.model.other.lora_A.weight"] = torch.zeros(2)
    elif how == "shape":
        tensors[first] = torch.zeros(3, 3)
    elif how == "huge":
        tensors[first] = torch.zeros(4096, 64)
    elif how == "integers":
        tensors[first] = tensors[first].int()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:100])
        return
    elif how == "pickled":
        path.rename(folder / "adapter_model.bin")
        return
    elif how == "no json":
        (folder / "adapter_config.json").write_text("{")
        return
    elif how == "long json":
        (folder / "adapter_config.json").write_text(" " * (2 << 20))
        return
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("infinite", "not finite"),
        ("missing", "it lacks"),
        ("extra", "which is not here"),
        ("shape", "is 3 x 3 there, 4 x 32"),
        ("huge", "is 4096 x 64, and not 4 x 32"),
        ("integers", "torch.int32"),
        ("cut", "is damaged"),
        ("pickled", "pickled weights are not read"),
        ("no json", "is not a configuration of an adapter"),
        ("long json", "more than 1048576 bytes"),
    ],
)
def test_a_folder_is_not_trusted(build, sft, tmp_path, how, says):
    folder = tmp_path / "changed"
    shutil.copytree(sft / "adapter", folder)
    damaged(folder, how)
    with pytest.raises(ModelError) as caught:
        begun(build("x", adapter={"start": str(folder)}))
    assert says in text_of(caught) and "adapter.start" in text_of(caught)


def test_what_is_no_adapter_is_said_to_be_none(build, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        fedloom.run(build("x", adapter={"start": str(tmp_path / "empty")}))
    with pytest.raises(ModelError, match="is not a folder: give a run folder"):
        fedloom.run(build("x", adapter={"start": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="is not a folder here and cannot be had from the Hub"):
        fedloom.run(build("x", adapter={"start": "nobody/nothing"}))
    with pytest.raises(SettingsError, match="set that too"):
        build("x", objective={"name": "dpo", "reference": "start"})
    for method in ("flora", "fedamole", "fedmoe"):
        with pytest.raises(
            SettingsError, match=rf"adapter\.start: method\.name = '{method}' cannot"
        ):
            build("x", adapter={"start": "a"}, method={"name": method})


def test_an_adapter_from_the_hub(build, sft, tmp_path, monkeypatch):
    asked = []

    def cached(name, file, revision=None):
        asked.append((name, file, revision))
        return str(sft / "adapter" / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    parts = begun(build("x", adapter={"start": "somebody/adapter@v1"}))
    assert all(
        torch.equal(t, parts.initial[n])
        for n, t in load_file(cached("", "adapter_model.safetensors")).items()
    )
    assert asked[:2] == [
        ("somebody/adapter", "adapter_config.json", "v1"),
        ("somebody/adapter", "adapter_model.safetensors", "v1"),
    ]


class Stop(Exception):
    pass


class Stopping(Silent):
    def round_done(self, record):
        if record.round == 1:
            raise Stop


@pytest.mark.slow
def test_a_resumed_run_depends_on_its_own_copy_alone(build, copied, tmp_path):
    fedloom.run(build("whole", adapter={"start": str(copied)}))
    asked = build("cut", adapter={"start": str(copied)})
    with pytest.raises(Stop):
        run_experiment(asked, observer=Stopping())
    shutil.rmtree(copied)
    folder = tmp_path / "cut"
    file = folder / "start" / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"adapter, which this run started from, has changed"):
        resume_run(folder)
    file.unlink()
    shutil.rmtree(folder / "start")
    with pytest.raises(CheckpointError, match=r"which this run started from, is gone"):
        resume_run(folder)
    shutil.copytree(tmp_path / "whole" / "start", folder / "start")
    resume_run(folder)
    one, two = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_evaluation_has_the_same_reference(build, sft):
    experiment = build("dpo", adapter={"start": str(sft)})
    result = fedloom.run(experiment)
    own = Experiment.from_toml(result.folder / "experiment.toml")
    again = evaluate_adapter(own, result.adapter_path).metrics
    for name, value in result.metrics.items():
        assert again[name] == pytest.approx(value, abs=1e-4)
    at_start = evaluate_adapter(own, sft / "adapter").metrics
    assert at_start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluate_adapter(own, None).metrics["reward_margin"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedper", "ditto", "local_only", "fedsa_lora"])
def test_clients_start_from_what_is_their_own(build, tmp_path, method):
    own = {"method": {"name": method}}
    first = fedloom.run(build("first", adapter=ADAPTER, **SFT, **own))
    parts = begun(build("second", adapter={"start": str(first.folder)}, **own))
    engine = parts.local
    digests = set()
    for client, equipment in engine.resources.items():
        assert equipment.own_start
        saved = load_file(first.folder / "clients" / f"{client:04d}" / "adapter_model.safetensors")
        assert all(torch.equal(t, equipment.initial[n]) for n, t in saved.items())
        seen = engine.client(client, 1)
        payload = fedloom.wire.messages.Payload(
            parts.method.sent_for_evaluation(parts.method.initial_state(parts.initial)) or {}
        )
        parts.method.load(seen, payload)
        digests.add(seen.model.digest())
        held = seen.model.read()
        assert all(torch.equal(t, equipment.initial[n]) for n, t in held.items())
    assert len(digests) == 3
    second = fedloom.run(build("second", adapter={"start": str(first.folder)}, **own))
    assert sorted(p.name for p in (second.folder / "start" / "clients").iterdir()) == [
        "0000",
        "0001",
        "0002",
    ]
    record = json.loads((second.folder / "rounds.jsonl").read_text().splitlines()[0])
    each = record["evaluation"]["clients"]["each"].values()
    assert all(metrics["reward_margin"] == 0 for metrics in each)
    # what a client started from is forgotten with the rest, and the run can still be gone on with
    forget_client(second.folder, 1)
    assert not (second.folder / "start" / "clients" / "0001").exists()
    again, folder = (
        Experiment.from_toml(second.folder / "experiment.toml"),
        RunFolder(second.folder),
    )
    assert kept_start(again, folder, folder.read_json("run.json")).clients.keys() == {0, 2}


@pytest.mark.slow
def test_a_run_without_a_global_adapter_needs_a_method_that_has_none(build):
    first = fedloom.run(build("first", adapter=ADAPTER, **SFT, method={"name": "local_only"}))
    with pytest.raises(ModelError, match=r"has no global adapter.*clients/0000"):
        fedloom.run(build("x", adapter={"start": str(first.folder)}))
    one = build("x", adapter={"start": str(first.folder / "clients" / "0001")})
    assert fedloom.run(one).metrics_before["reward_margin"] == 0


@pytest.mark.slow
def test_a_client_s_own_model_of_another_shape_is_told_with_a_way_out(build):
    method = {
        "method": {"name": "feddpa"}
    }  # a client's own are two adapters as one of twice the rank
    first = fedloom.run(build("first", adapter=ADAPTER, **SFT, **method)).folder
    with pytest.raises(ModelError, match=r"client 0' does not fit.*leaves clients' own models out"):
        begun(build("x", adapter={"start": str(first)}, **method))
    assert begun(build("x", adapter={"start": str(first / "adapter")}, **method)).initial


@pytest.mark.slow
def test_moved_weights_are_started_from_as_whole_layers(build):
    moved = fedloom.run(build("moved", adapter=ADAPTER, **SFT, method={"name": "flora"})).folder
    with pytest.raises(SettingsError, match=r"has kind = 'full' and adapter.kind is 'lora'"):
        fedloom.run(build("x", adapter={"start": str(moved), "kind": "lora"}))
    result = fedloom.run(build("y", adapter={"start": str(moved)}))
    assert Experiment.from_toml(result.folder / "experiment.toml").adapter.kind == "full"
    assert result.metrics_before["reward_margin"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "ia3", "prompt", "experts"])
def test_adapters_of_other_kinds_are_started_from(build, kind):
    adapter = {"kind": kind, **({"experts": 3, "rank": 2} if kind == "experts" else {})}
    first = fedloom.run(build("first", adapter=adapter, **SFT)).folder
    result = fedloom.run(build("second", adapter={"start": str(first)}))
    assert result.metrics_before["reward_margin"] == 0
    assert result.metrics_before["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert Experiment.from_toml(result.folder / "experiment.toml").adapter.kind == kind


@pytest.mark.slow
def test_p_tuning_cannot_be_gone_on_from(build):
    first = fedloom.run(build("first", adapter={"kind": "ptuning"}, **SFT)).folder
    with pytest.raises(ModelError, match="the embeddings alone, not the MLP"):
        fedloom.run(build("second", adapter={"start": str(first)}))


@pytest.mark.parametrize("method", ["flexlora", "hetlora"])
def test_clients_of_smaller_rank_start_from_their_part(build, sft, method):
    groups = {"groups": {"small": {"clients": [1], "rank": 2}}}
    method = {"name": method}
    parts = begun(build("x", adapter={"start": str(sft)}, clients=groups, method=method))
    whole, small = (parts.local.resources[client].initial for client in (0, 1))
    name = next(name for name in whole if ".lora_A." in name)
    assert torch.equal(small[name], whole[name][:2])
    with pytest.raises(SettingsError, match=r"leave clients.groups.small.rank out"):
        build("x", adapter={"start": str(sft)}, clients=groups, method={"name": "local_only"})


@pytest.mark.slow
def test_a_comparison_starts_every_arm_and_notices_a_changed_start(build, copied, table, tmp_path):
    table |= {"adapter": {"start": str(copied)}, "federation": {"rounds": 1, "clients": 2}}
    del table["output"]
    table["data"]["builtin_rows"] = 30
    table["evaluation"] = {"samples": 0, "per_client": False}
    arms = {"start": {}, "base": {"objective": {"name": "dpo", "reference": "base"}}}
    table["compare"] = {"budget": "steps", "amount": 1, "objectives": arms, "seeds": [0]}
    file = tmp_path / "compare.toml"
    file.write_text(write_toml(table))
    folder = compare(read_comparison(file), tmp_path / "all", workers=1)
    margins = {}
    for arm in arms:
        line = (folder / "runs" / f"{arm}-fedavg-s0" / "rounds.jsonl").read_text().splitlines()[0]
        margins[arm] = json.loads(line)["evaluation"]["global"]["reward_margin"]
    assert margins["start"] == 0 and margins["base"] != 0
    compare(read_comparison(file), tmp_path / "all", workers=1)
    damaged(copied / "adapter", "infinite")
    with pytest.raises(OutputError, match="as it was before it changed"):
        compare(read_comparison(file), tmp_path / "all", workers=1)


@pytest.mark.slow
def test_trl_has_the_same_loss_and_gradients(build, sft, model_folder, tmp_path):
    """TRL's own trainer, given the adapter, takes a copy of it for the reference (its name there: ref)."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    parts = begun(build("x", adapter={"start": str(sft)}))
    parts.local.add_reference(1, 0)
    share, model = parts.local.shares[0], parts.model
    batch = collate(share, np.arange(4), model.pad, model.device)
    moved = {n: t + 0.01 * torch.randn(t.shape) for n, t in sorted(parts.initial.items())}
    model.write(moved)
    loss, _ = parts.objective.loss(model, batch, None)
    loss.backward()

    backbone = load_backbone(str(model_folder), pad_token_id=model.pad)
    plain = peft.PeftModel.from_pretrained(backbone, str(sft / "adapter"), is_trainable=True)
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL itself sets
        trainer = DPOTrainer(
            plain,
            args=DPOConfig(str(tmp_path / "trl"), use_cpu=True, beta=0.1, bf16=False),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(str(model_folder)),
        )
    assert "ref" in trainer.model.peft_config
    named = {
        n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if "default" in n
    }
    with torch.no_grad():
        for name, tensor in moved.items():
            named[name].copy_(tensor)
    sequences = batch.sequences
    inputs = {
        "input_ids": sequences.input_ids,
        "attention_mask": sequences.attention_mask,
        "completion_mask": sequences.completion_mask.long(),
    }
    expected = trainer.compute_loss(trainer.model.eval(), inputs)
    expected.backward()
    assert abs(loss.item() - math.log(2)) > 1e-4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.parameters.items():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-5)
