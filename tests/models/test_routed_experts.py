"""Mixtures with a matrix of logits: gates by hand, the layer against a loop, folders."""

import pytest
import torch

from fedloom.models.adapters import AdapterSettings
from fedloom.models.experts import ExpertModel, attach_experts, load_experts
from fedloom.models.load import load_backbone
from fedloom.models.routed_experts import slot_gates

SETTINGS = AdapterSettings(kind="experts", router="linear", rank=2, alpha=4.0, experts=3)
IDS = torch.tensor([[5, 9, 2, 7, 11, 4], [8, 3, 6, 1, 2, 2]])


def build(folder, **settings):
    own = SETTINGS.model_copy(update=settings)
    return ExpertModel(attach_experts(load_backbone(str(folder), pad_token_id=0), own), own, 0)


def shaken(model):
    drawn = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=drawn) for n, t in model.read().items()}


def test_gates_by_hand():
    """Two experts, the first the client's own: slots are own, other, own again."""
    found = slot_gates(torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]))
    assert found[:, 0].tolist() == pytest.approx([1.0, 0.0])
    assert found[:, 1].tolist() == pytest.approx([0.26894142, 0.73105858])
    kept = torch.tensor([1.0, 2.0, 0.0]).softmax(0)[:2]  # what they were without adding up to 1
    assert kept.tolist() == pytest.approx([0.24472847, 0.66524096])
    assert slot_gates(torch.tensor([[3.0, -7.0]])).tolist() == [[1.0, 1.0]]


def test_other_names_of_the_others_change_nothing():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    swapped = logits[[0, 2, 1, 3, 4]]
    assert torch.allclose(slot_gates(swapped), slot_gates(logits)[[0, 2, 1]])
    assert torch.allclose(slot_gates(logits).sum(0), torch.ones(20))


def test_the_layer_is_the_loop_forward_and_backward(model_folder):
    model = build(model_folder)
    model.write(shaken(model))
    name, layer = next(iter(model.layers.items()))
    parts = {n: t.requires_grad_() for n, t in layer.read().items()}
    x = torch.randn(7, layer.inputs, generator=torch.Generator().manual_seed(2))
    rows = []
    for token in x:
        gates = slot_gates((parts["router"] @ token)[:, None])[:, 0]
        y = layer.base_layer(token)
        for i in range(3):
            up = parts[f"experts.{i}.B"] @ (parts[f"experts.{i}.A"] @ token)
            y = y + gates[i] * 2.0 * up
        rows.append(y)
    expected, found = torch.stack(rows), layer(x)
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    _, down, up = layer.stacked({n: t.grad for n, t in parts.items()})
    assert torch.allclose(layer.down.grad, down, atol=1e-4), name
    assert torch.allclose(layer.up.grad, up, atol=1e-4), name


def test_one_expert_is_lora(model_folder):
    model = build(model_folder)
    one = {n: t[:1] if n.endswith("router") else t for n, t in shaken(model).items()}
    model.write({n: t for n, t in one.items() if ".experts.1." not in n and ".experts.2." not in n})
    layer = next(iter(model.layers.values()))
    parts = layer.read()
    x = torch.randn(3, layer.inputs, generator=torch.Generator().manual_seed(2))
    beside = 2.0 * x @ parts["experts.0.A"].T @ parts["experts.0.B"].T
    assert torch.allclose(layer(x), layer.base_layer(x) + beside, atol=1e-5)
    assert model.penalty() is None


def test_a_folder_loads_to_the_same_model(model_folder, tmp_path):
    model = build(model_folder)
    model.write(shaken(model))
    model.save(tmp_path / "out")
    loaded, settings = load_experts(load_backbone(model_folder, pad_token_id=0), tmp_path / "out")
    again, mask = ExpertModel(loaded, settings, 0), torch.ones_like(IDS)
    assert settings.router == "linear"
    with model.evaluating(), again.evaluating():
        found = [own(input_ids=IDS, attention_mask=mask).logits for own in (model, again)]
    assert torch.equal(*found)
