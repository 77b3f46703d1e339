"""A part of a backbone's own experts: the same as a smaller model, and back again."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fedloom.errors import ModelError
from fedloom.models.load import load_backbone
from fedloom.models.submixture import SubMixtureModel, attach_submixture, part_of_experts

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def build(folder):
    return SubMixtureModel(attach_submixture(load_backbone(str(folder), pad_token_id=0)), 0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def test_a_sub_mixture_is_a_smaller_model_that_transformers_loads(mixture_folder, tmp_path):
    model = build(mixture_folder)
    whole = logits(model)
    held = torch.tensor([[0, 2, 5], [1, 2, 3]])
    model.write(part_of_experts(model.read(), model.blocks, held))
    assert {len(p) for p in model.parameters.values()} == {3}
    found = logits(model)
    assert not torch.allclose(found, whole)
    with model.reference():
        assert torch.equal(logits(model), whole)
    assert torch.equal(logits(model), found)
    model.save(tmp_path / "own")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "own"))
    assert again.config.num_local_experts == 3
    with torch.no_grad():
        theirs = again(input_ids=IDS, attention_mask=MASK).logits
    assert torch.allclose(theirs, found, atol=1e-6)
    assert model.model.config.num_local_experts == 6


def test_the_order_of_experts_changes_nothing(mixture_folder):
    model = build(mixture_folder)
    start, whole = model.read(), logits(model)
    shuffled = torch.tensor([[3, 1, 0, 5, 4, 2], [5, 4, 3, 2, 1, 0]])
    model.write(part_of_experts(start, model.blocks, shuffled))
    assert torch.allclose(logits(model), whole, atol=1e-5)


def test_gradients_reach_held_experts_and_their_routers_alone(mixture_folder):
    model = build(mixture_folder)
    model.write(part_of_experts(model.read(), model.blocks, torch.tensor([[0, 1], [4, 5]])))
    model(input_ids=IDS, attention_mask=MASK).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters.values())
    trained = {id(p) for p in model.parameters.values()}
    others = [p for p in model.model.parameters() if id(p) not in trained]
    assert all(p.grad is None for p in others)


def test_use_is_counted_over_real_tokens(mixture_folder):
    model = build(mixture_folder)
    with model.evaluating(), model.counting() as seen:
        model(input_ids=IDS, attention_mask=MASK)
    together = torch.stack(seen)
    assert together.shape == (2, 6) and together.sum(1).tolist() == [2 * 14, 2 * 14]
    apart = torch.zeros_like(together)
    for row, length in ((0, 9), (1, 5)):
        with model.evaluating(), model.counting() as seen:
            ids = IDS[row : row + 1, :length]
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        apart += torch.stack(seen)
    assert torch.equal(apart, together)


def test_flops_are_those_that_torch_counts(mixture_folder):
    model = build(mixture_folder)
    model.model.set_attn_implementation("eager")
    model.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.sum().backward()
    assert model.flops == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_backbones_without_experts_are_refused(model_folder):
    with pytest.raises(ModelError, match=r"Mixtral, Qwen's and OLMoE have; this model is 'llama'"):
        build(model_folder)


def test_what_is_saved_caches_when_it_generates(mixture_folder, tmp_path):
    """It is off while the model is trained, and was off for whoever loaded it too."""
    model = build(mixture_folder)
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    assert model.model.config.use_cache is False
