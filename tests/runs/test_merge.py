"""Merging finished adapters: what PEFT makes of the result, whose rows weigh, and what is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fedloom
from fedloom.aggregation.merging import Merging
from fedloom.errors import ModelError, OutputError
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.merge import merge_adapters

MEAN = Merging("task_arithmetic", space="product")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def site(model_folder, tmp_path_factory):
    """Write an adapter with random factors, as PEFT saves it."""

    def write(name, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), **settings):
        folder = tmp_path_factory.mktemp("sites") / name
        torch.manual_seed(sum(name.encode()))
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
            **settings,
        )
        model = peft.get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def three(site):
    """Three sites with other ranks and scales, the last with a scale by the rank's root."""
    return [site("a"), site("b", rank=3, alpha=3.0), site("c", rank=1, alpha=8)]


def changes(folder, model_folder):
    """What PEFT adds to each layer's weights."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.PeftModel.from_pretrained(base, folder)
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_peft_adds_the_weighted_mean_of_what_the_sites_add(three, model_folder, tmp_path):
    found = merge_adapters(three, tmp_path / "merged", MEAN, [1, 2, 1], rank=6)
    own = [changes(folder, model_folder) for folder in three]
    merged = changes(tmp_path / "merged", model_folder)
    assert found.rank_error < 1e-6 and merged.keys() == own[0].keys()
    for name, tensor in merged.items():
        whole = own[0][name] / 4 + own[1][name] / 2 + own[2][name] / 4
        assert torch.allclose(tensor, whole, atol=1e-6)


def test_a_smaller_rank_loses_what_is_said(three, model_folder, tmp_path):
    found = merge_adapters(three, tmp_path / "merged", MEAN, [1, 1, 1])
    assert found.inputs.rank == 3
    own = [changes(folder, model_folder) for folder in three]
    merged = changes(tmp_path / "merged", model_folder)
    lost = whole = 0.0
    for name, tensor in merged.items():
        mean = sum(change[name] for change in own) / 3
        lost += float((tensor - mean).square().sum())
        whole += float(mean.square().sum())
    assert found.rank_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert (
        json.loads((tmp_path / "merged" / "merge.json").read_text())["rank_error"]
        == found.rank_error
    )


def test_its_card_says_that_it_was_merged(three, tmp_path):
    merge_adapters(three, tmp_path / "merged", MEAN, [1, 1, 1])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "merged by `task_arithmetic` from 3 adapters" in card and "0 rounds" not in card


def test_scales_by_the_root_of_the_rank(site, model_folder, tmp_path):
    folders = [
        site(name, alpha=2.0, use_rslora=True, rank=rank) for name, rank in (("d", 4), ("e", 2))
    ]
    merge_adapters(folders, tmp_path / "merged", MEAN, [1, 1], rank=6)
    own = [changes(folder, model_folder) for folder in folders]
    for name, tensor in changes(tmp_path / "merged", model_folder).items():
        assert torch.allclose(tensor, (own[0][name] + own[1][name]) / 2, atol=1e-6)


def test_the_same_bits_again_and_for_dare_by_the_seed(three, tmp_path):
    rule = Merging("dare", 0.5, space="product")
    found = [
        merge_adapters(three, tmp_path / name, rule, [1, 1, 1], seed=seed).folder
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    one, again, other = ((own / "adapter_model.safetensors").read_bytes() for own in found)
    assert one == again != other


@pytest.mark.slow
def test_runs_weigh_by_their_rows_and_the_result_is_evaluated(experiment, tmp_path):
    runs = [
        fedloom.run(
            experiment(
                federation={"clients": 1, "rounds": 1}, method={"name": "centralised"},
                data={"builtin_rows": rows}, output={"folder": str(tmp_path / f"site{rows}"), "verify": False},
                training={"local_steps": 1}, evaluation={"samples": 0},
            )
        )
        for rows in (30, 60)
    ]  # fmt: skip
    folders = [run.adapter_path.parent for run in runs]
    found = merge_adapters(folders, tmp_path / "merged", Merging("ties", 0.5, space="product"))
    rows = [
        json.loads((folder / "partition.json").read_text())["clients"][0]["train"]
        for folder in folders
    ]
    assert found.inputs.weights == tuple(map(float, rows)) and rows[0] < rows[1]
    scores = evaluate_adapter(experiment(), found.folder, lambda *_: lambda *_: None)
    assert 0 <= scores.metrics["preference_accuracy"] <= 1
    # a PEFT folder outside a run has no rows
    found = merge_adapters([found.folder, folders[0]], tmp_path / "again", MEAN)
    assert found.inputs.weights == (1.0, 1.0)
    assert "all adapters weigh alike" in found.inputs.doubts[0]


def changed(folder, target, **record):
    """Copy an adapter with another configuration."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | record))
    save_file(load_file(folder / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"base_model_name_or_path": "other/model"}, "different base models: .*'other/model'"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', and merging is of LORA"),
        ({"use_dora": True}, "made with use_dora = True: it is more than a product"),
        ({"bias": "all"}, "made with other settings: bias is 'none' and 'all'"),
        ({"r": 7}, "not those of factors of rank 7"),
        ({"r": "2"}, "r = '2' is no rank of LoRA"),
        ({"lora_alpha": -1}, "lora_alpha = -1 is not above 0"),
        ({"init_lora_weights": "pissa"}, "changes the frozen weights"),
    ],
)
def test_what_does_not_fit_is_refused(three, tmp_path, record, words):
    other = changed(three[0], tmp_path / "other", **record)
    with pytest.raises(ModelError, match=words):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    assert not (tmp_path / "merged").exists()


def test_tensors_that_do_not_fit_are_refused(site, three, tmp_path):
    with pytest.raises(ModelError, match=r"not on the same layers: .*q_proj"):
        merge_adapters([site("f", targets=["down_proj"]), three[0]], tmp_path / "merged", MEAN)
    other = changed(three[0], tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    (other / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="is damaged"):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    with pytest.raises(ModelError, match="--space factors needs adapters of one rank"):
        merge_adapters(three, tmp_path / "merged", Merging("ties"))
    with pytest.raises(ModelError, match="given twice"):
        merge_adapters([three[0], three[0]], tmp_path / "merged", MEAN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        merge_adapters(three, tmp_path / "full", MEAN)


def test_the_command(call, three, tmp_path):
    code, said = call("merge", *three, "--rule", "knots", "--output", "merged", "--density", "0.5")
    assert code == 0 and "weight 0.3333" in said and "% of their norm" in said
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
    for arguments, words in (
        (["--rule", "tise"], "it is one of task_arithmetic, ties, dare, knots"),
        (["--rule", "ties", "--density", "2"], "above 0 and at most 1"),
        (["--density", "0.5"], "task_arithmetic keeps all"),
        (["--rule", "knots", "--space", "factors"], "knots has products alone"),
        (["--weights", "1,2"], "2 numbers for 3 adapters"),
        (["--weights", "1,nan,1"], "weights are from 0 to"),
        (["--weights", "a"], "give numbers with commas"),
        (["--scale", "0"], "above 0 and at most 100"),
    ):
        code, said = call("merge", *three, "--output", "other", *arguments)
        assert code == 2 or words in said, said
        assert words in " ".join(said.replace("│", " ").split()), said
        assert "Traceback" not in said and not (tmp_path / "other").exists()
    code, said = call("merge", three[0], "nothing", "--output", "other")
    assert code != 0 and "nothing is not an adapter" in said
