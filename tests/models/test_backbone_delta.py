"""Frozen weights that are moved: exact, taken back without a trace, saved as what they are."""

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter, load_adapter
from fedloom.models.backbone_delta import MOVED, products
from fedloom.models.load import load_backbone

IDS = torch.arange(3, 15)[None]
SETTINGS = AdapterSettings(rank=2, alpha=6.0)


def build(folder, classes=()):
    backbone = load_backbone(str(folder), pad_token_id=0, classes=classes)
    return AdapterModel(attach_adapter(backbone, SETTINGS, classification=bool(classes)), 0)


def logits(model):
    with model.evaluating():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def perturbed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.read().items()}


def without(adapter):
    return {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in adapter.items()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, model_folder, gpt2):
    return model_folder if request.param == "llama" else gpt2


def test_a_product_in_the_weights_is_the_product_beside_them(folder):
    model = build(folder)
    adapter = perturbed(model)
    model.write(adapter)
    beside = logits(model)
    changes = products(adapter, model.scaling)
    assert all(name.startswith(MOVED) for name in changes) and model.scaling == 3.0
    model.write({**without(adapter), **changes})
    assert torch.allclose(logits(model), beside, atol=1e-5)


def test_moving_back_and_the_reference_are_bit_for_bit(folder):
    model = build(folder)
    start = model.read()
    base, digest = logits(model), model.digest()
    changes = products(perturbed(model), model.scaling)
    model.write({**start, **changes})
    assert not torch.equal(logits(model), base) and model.digest() != digest
    moved = logits(model)
    with model.reference():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), moved)
    twice = products(perturbed(model, 2), model.scaling)
    model.write({**start, **twice})
    model.write({**start, **changes})
    assert torch.equal(logits(model), moved)
    model.write(start)
    assert torch.equal(logits(model), base) and model.digest() == digest


def test_training_moves_nothing_that_is_frozen(model_folder):
    model = build(model_folder)
    model.write({**model.read(), **products(perturbed(model), model.scaling)})
    layer = next(m for m in model.model.modules() if hasattr(m, "lora_A")).get_base_layer()
    before = layer.weight.detach().clone()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().mean().backward()
    assert layer.weight.grad is None
    assert all(p.grad is not None for p in model.parameters.values())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("model_folder", ()), ("model_folder", ("a", "b", "c")), ("gpt2", ())],
)
def test_a_saved_folder_holds_the_moved_layers_and_loads_as_any(request, tmp_path, kind, classes):
    folder = request.getfixturevalue(kind)
    model = build(folder, classes)
    adapter = perturbed(model)
    model.write({**adapter, **products(perturbed(model, 2), model.scaling)})
    model.save(tmp_path)
    backbone = load_backbone(str(folder), pad_token_id=0, classes=classes, seed=5)
    theirs = peft.PeftModel.from_pretrained(backbone, str(tmp_path)).eval()
    with torch.no_grad():
        found = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(found, logits(model), atol=1e-5)
    again = load_backbone(str(folder), pad_token_id=0, classes=classes, seed=5)
    ours = AdapterModel(load_adapter(again, tmp_path), 0)
    assert torch.allclose(logits(ours), logits(model), atol=1e-5)
