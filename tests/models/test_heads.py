"""A client's own parts: nothing changes at first, the reference stays, folders keep them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedloom.errors import ModelError
from fedloom.models import adapters
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter, load_adapter
from fedloom.models.heads import (
    PersonalModules,
    attach_personal,
    is_head,
    is_own,
    load_personal,
    saved_parts,
)
from fedloom.models.load import load_backbone

EVERYTHING = PersonalModules(bottleneck=5, head_mode="full", reward=True)
LOW_RANK = PersonalModules(bottleneck=5, head_mode="lowrank", head_rank=3, reward=True)
CHOICES = {
    "everything": EVERYTHING,
    "low rank": LOW_RANK,
    "bottleneck": PersonalModules(bottleneck=5),
    "head": PersonalModules(head_mode="full"),
    "low-rank head": PersonalModules(head_mode="lowrank", head_rank=3),
    "reward": PersonalModules(reward=True),
}
IDS = torch.tensor([[5, 9, 2, 7, 11, 4], [8, 3, 6, 1, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def tiny(kind="llama", tied=False):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).requires_grad_(False)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=tied,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def personal(parts=EVERYTHING, backbone=None, rank=2, seed=0):
    model = attach_adapter(backbone or tiny(), AdapterSettings(rank=rank), seed=seed)
    attach_personal(model, parts, seed)
    return AdapterModel(model, pad=0)


def logits(model):
    with model.evaluating():
        return model(input_ids=IDS, attention_mask=MASK).logits


def shake(model):
    torch.manual_seed(1)
    model.write({n: t + 0.1 * torch.randn_like(t) for n, t in model.read().items()})


@pytest.mark.parametrize("parts", CHOICES.values(), ids=CHOICES)
def test_at_first_they_change_nothing_and_the_reward_is_zero(parts):
    plain = tiny()
    with torch.no_grad():
        expected = plain(input_ids=IDS, attention_mask=MASK).logits
    model = personal(parts)
    assert torch.equal(logits(model), expected)
    if parts.reward:
        with model.evaluating():
            assert model(input_ids=IDS, attention_mask=MASK).rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("parts", CHOICES.values(), ids=CHOICES)
def test_the_reference_stays_what_it_was_whatever_is_trained(parts):
    model = personal(parts)
    before = logits(model)
    shake(model)
    if parts != CHOICES["reward"]:
        assert not torch.allclose(logits(model), before)
    with model.reference():
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)
        assert not hasattr(model(input_ids=IDS, attention_mask=MASK), "rewards")


@pytest.mark.parametrize("kind", ["llama tied", "gpt2"])
def test_tied_embeddings_are_untied_by_the_copy(kind):
    backbone = tiny("gpt2") if kind == "gpt2" else tiny(tied=True)
    embeddings = backbone.get_input_embeddings().weight
    assert backbone.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()
    model = personal(backbone=backbone)
    before, kept = logits(model), embeddings.clone()
    own = model.parameters["own.head.weight"]
    assert own.data_ptr() != embeddings.data_ptr()
    shake(model)
    assert torch.equal(embeddings, kept)
    with model.reference():
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)


def test_the_reward_is_read_at_each_rows_last_token():
    model = personal()
    shake(model)
    with model.evaluating():
        both = model(input_ids=IDS, attention_mask=MASK).rewards
        alone = model(input_ids=IDS[1:, :4], attention_mask=MASK[1:, :4]).rewards
        kept = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=3).rewards
    assert both[1].item() == pytest.approx(alone.item(), abs=1e-6)
    assert torch.allclose(both, kept)
    assert both[0] != both[1]


def test_names_tell_whose_a_tensor_is():
    model = personal(LOW_RANK)
    own = [name for name in model.parameters if is_own(name)]
    assert own == [
        "own.bottleneck.down.bias", "own.bottleneck.down.weight", "own.bottleneck.up.bias",
        "own.bottleneck.up.weight", "own.head.down.weight", "own.head.up.weight", "own.reward.weight",
    ]  # fmt: skip
    assert all("lora_" in name for name in model.parameters if not is_own(name))
    assert is_head("base_model.model.score.weight") and not is_head("layers.0.q.lora_A.weight")


def test_the_seed_decides_where_they_start():
    def down(seed):
        return personal(seed=seed).parameters["own.bottleneck.down.weight"]

    assert torch.equal(down(0), down(0))
    assert not torch.equal(down(0), down(1))


@pytest.mark.parametrize("freeze", ["nothing", "own", "lora", "lora_A", "own head"])
@pytest.mark.parametrize("parts", CHOICES.values(), ids=CHOICES)
def test_flops_are_those_torch_counts(model_folder, parts, freeze):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    backbone.set_attn_implementation("eager")
    model = personal(parts, backbone)
    frozen = {
        "nothing": [],
        "own": [n for n in model.parameters if is_own(n)],
        "lora": [n for n in model.parameters if not is_own(n)],
        "lora_A": [n for n in model.parameters if ".lora_A." in n],
        "own head": [n for n in model.parameters if n.startswith("own.head")],
    }[freeze]
    ids = torch.randint(3, 100, (3, 40))
    with model.frozen(frozen), FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=9)
        loss = output.logits.sum() + (output.rewards.sum() if parts.reward else 0)
        if loss.requires_grad:
            loss.backward()
    assert model.flops == counter.get_total_flops()


def test_a_shape_is_read_off_the_modules_once_for_what_is_frozen(monkeypatch):
    model, read = personal(), []
    before, real = model.shape, adapters.model_shape
    monkeypatch.setattr(
        adapters, "model_shape", lambda *of, **how: read.append(1) or real(*of, **how)
    )
    for names in ([], ["own.reward.weight"], [], ["own.reward.weight"], ["own.head.weight"]):
        with model.frozen(names):
            assert (model.shape is before) == (not names)
        assert model.shape is before
    assert len(read) == 2
    model.shape = real(model.model)  # of a model that has changed
    with model.frozen(["own.reward.weight"]):
        assert len(read) == 3


def test_what_is_frozen_stays_and_is_trained_again_afterwards():
    model = personal()
    with model.frozen(["own.reward.weight"]):
        assert "own.reward.weight" not in model.parameters
        output = model(input_ids=IDS, attention_mask=MASK)
        (output.logits.sum() + output.rewards.sum()).backward()
    assert model.parameters["own.reward.weight"].grad is None
    assert model.parameters["own.head.weight"].grad is not None
    assert model.parameters["own.reward.weight"].requires_grad


def test_a_folder_keeps_them(tmp_path):
    model = personal(LOW_RANK)
    shake(model)
    model.save(tmp_path)
    parts = saved_parts(tmp_path)
    assert parts == LOW_RANK
    again = load_adapter(tiny(), tmp_path)
    load_personal(attach_personal(again, parts, 0), tmp_path)
    assert torch.equal(logits(AdapterModel(again, 0)), logits(model))


def test_parts_of_another_backbone_are_refused_with_the_difference(tmp_path):
    personal().save(tmp_path)
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=44,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    head = attach_personal(other, saved_parts(tmp_path), 0)
    with pytest.raises(ModelError, match=r"head\.weight is 40 x 16 there, 44 x 16 here"):
        load_personal(head, tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "personal.safetensors").write_bytes(b"not safe")
    with pytest.raises(ModelError, match=r"personal\.safetensors is damaged"):
        saved_parts(tmp_path)


def test_a_model_without_an_output_layer_of_the_usual_kind_is_refused():
    model = tiny()
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ModelError, match="no linear output layer"):
        attach_personal(model, EVERYTHING, 0)


def test_factors_of_another_rank_may_be_written_and_saved(tmp_path):
    model = personal(PersonalModules(reward=True), rank=2)
    shake(model)
    small, before = model.read(), logits(model)
    twice = {
        n: torch.cat([t, t], 0) if ".lora_A." in n
        else torch.cat([0.25 * t, 0.75 * t], 1) if ".lora_B." in n else t
        for n, t in small.items()
    }  # fmt: skip
    model.write(twice)
    assert torch.allclose(logits(model), before, atol=1e-6)
    model.save(tmp_path)
    again = AdapterModel(load_adapter(tiny(), tmp_path), 0)
    assert torch.allclose(logits(again), before, atol=1e-6)
    model.write(small)
    assert torch.equal(logits(model), before)
