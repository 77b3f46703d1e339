"""A backbone in 8 bits: small error, a quarter of the memory, KTO and DPO train on it."""

import hashlib
import importlib
import json

import pytest
import torch

import fedloom
from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.flop_shape import model_shape
from fedloom.models.load import load_backbone
from fedloom.models.quantize import check_quantization, loading_options
from fedloom.runs.adapter_scores import evaluate_adapter
from sampling import every

pytest.importorskip("torchao")
CPU = torch.device("cpu")
IDS = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(model_folder):
    def load(quantization):
        backbone = load_backbone(str(model_folder), pad_token_id=0, quantization=quantization)
        return attach_adapter(backbone, AdapterSettings(rank=2))

    return load


def test_logits_and_gradients_are_those_of_full_precision_up_to_the_quantisation(build):
    results = {}
    for kind in ("none", "int8"):
        model = build(kind)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.02, generator=torch.Generator().manual_seed(1)
                )
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
        output.loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        results[kind] = (output.logits.detach(), torch.cat(gradients))
    for whole, small in zip(*results.values(), strict=True):
        error = ((whole - small).norm() / whole.norm()).item()
        assert 0 < error < 0.02


def test_the_linear_layers_take_a_quarter_and_are_still_counted(build):
    sizes, shapes = {}, {}
    for kind in ("none", "int8"):
        model = build(kind)
        weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        parts = (
            [getattr(weight, name, None) for name in ("qdata", "scale")]
            if kind == "int8"
            else [weight]
        )
        sizes[kind] = sum(part.numel() * part.element_size() for part in parts)
        shapes[kind] = model_shape(model)
        head = model.base_model.model.lm_head.weight
        assert type(head) is torch.nn.Parameter
    assert sizes["int8"] < 0.4 * sizes["none"]  # 32 columns: 1 byte each and a scale a row
    assert shapes["int8"] == shapes["none"]
    assert (
        AdapterModel(build("int8"), 0).parameters.keys()
        == AdapterModel(build("none"), 0).parameters.keys()
    )


@pytest.mark.parametrize("objective", every(2, ["dpo", "kto"]))
def test_dpo_and_kto_train_on_it_and_the_adapter_scores_the_same(experiment, tmp_path, objective):
    built = experiment(objective={"name": objective}, model={"quantization": "int8"})
    result = fedloom.run(built)
    assert result.metrics != result.metrics_before
    assert evaluate_adapter(built, result.adapter_path).metrics == dict(result.metrics)
    again = fedloom.run(
        experiment(
            objective={"name": objective},
            model={"quantization": "int8"},
            output={"folder": str(tmp_path / "b")},
        )
    )
    digests = [
        hashlib.sha256((r.adapter_path / "adapter_model.safetensors").read_bytes()).hexdigest()
        for r in (result, again)
    ]
    assert digests[0] == digests[1]
    assert json.loads((result.folder / "run.json").read_text())["model"]["trainable"] > 0


def test_what_a_device_cannot_do_is_said_before_anything_is_loaded(experiment):
    with pytest.raises(ModelError, match=r"int4.* needs a GPU"):
        fedloom.run(experiment(model={"quantization": "int4"}))
    with pytest.raises(ModelError, match="works on cuda and cpu, not on mps"):
        check_quantization("int8", torch.device("mps"))


@pytest.mark.parametrize(("device", "package"), [("cpu", "torchao"), ("cuda", "bitsandbytes")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, device, package):
    real = importlib.import_module

    def absent(name):
        if name.startswith(package):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModelError, match=rf"needs {package}.*fedloom\[quantization\]"):
        check_quantization("int8", torch.device(device))


def test_on_a_gpu_transformers_quantises_while_it_loads():
    pytest.importorskip("bitsandbytes")
    device = torch.device("cuda")
    eight = loading_options("int8", device)["quantization_config"]
    four = loading_options("int4", device)["quantization_config"]
    assert eight.load_in_8bit and not eight.load_in_4bit
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert loading_options("int8", CPU) == loading_options("none", device) == {}
