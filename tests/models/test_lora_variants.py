"""DoRA, rsLoRA, PiSSA, OLoRA, modules trained whole and layers by pattern: plain PEFT computes the same."""

import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter, load_adapter
from fedloom.models.cut_factors import beside_whole
from fedloom.models.load import load_backbone

IDS = torch.arange(3, 15)[None]

CUT = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": CUT[0],
    "olora": CUT[1],
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "pissa and rslora": {"use_rslora": True, **CUT[0]},
    "pissa and dora": {"use_dora": True, **CUT[0]},
    "output layer whole": {
        "modules_to_save": ["lm_head"],
        "targets": ["q_proj", "k_proj", "v_proj"],
    },
    "embeddings and norm whole": {"modules_to_save": ["embed_tokens", "model.norm"]},
    "pissa and a norm whole": {"modules_to_save": ["model.norm"], **CUT[0]},
}


def build(folder, seed=0, **settings):
    backbone = load_backbone(str(folder), pad_token_id=0)
    adapter = attach_adapter(backbone, AdapterSettings(**{"rank": 4, **settings}), seed=seed)
    return AdapterModel(adapter, 0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def perturbed(model):
    generator = torch.Generator().manual_seed(1)
    return {
        n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in model.read().items()
    }


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_is_the_model_in_plain_peft(model_folder, tmp_path, variant):
    model = build(model_folder, **VARIANTS[variant])
    plain = load_backbone(str(model_folder), pad_token_id=0).eval()
    with model.reference():
        base = logits(model)
    torch.testing.assert_close(base, plain(input_ids=IDS).logits, rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=2e-6)
    model.write(perturbed(model))
    found = logits(model)
    assert (found - base).abs().max() > 1e-3
    with model.reference():
        torch.testing.assert_close(logits(model), base, rtol=0, atol=2e-6)
    assert torch.equal(logits(model), found)
    model.save(tmp_path)
    saved, ours = load_file(tmp_path / "adapter_model.safetensors"), model.read()
    assert saved.keys() == ours.keys()
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        again = theirs(input_ids=IDS).logits
    torch.testing.assert_close(again, found, rtol=0, atol=5e-6)


@pytest.mark.parametrize("settings", CUT, ids=["pissa", "olora"])
def test_first_factors_and_the_rest_are_those_of_peft(model_folder, settings):
    model = build(model_folder, alpha=8.0, **settings)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    theirs = peft.get_peft_model(load_backbone(str(model_folder), pad_token_id=0), config)
    for (name, mine), (_, other) in zip(
        model.model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name
    # of the largest singular directions: the rest has none longer than the next one
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    whole = load_backbone(str(model_folder), pad_token_id=0).get_submodule(
        name.removeprefix("base_model.model.")
    )
    rest = model.model.get_submodule(f"{name}.base_layer").weight
    if settings == CUT[0]:
        values, left = torch.linalg.svdvals(whole.weight), torch.linalg.svdvals(rest)
        torch.testing.assert_close(left[:4], values[4:8], rtol=1e-4, atol=1e-5)


def test_the_qr_start_of_ilora(model_folder):
    """https://arxiv.org/abs/2511.16069: W = Q R, B = Q[:, :r], A = R[:r], and the rest is W - s B A."""
    q, r = torch.linalg.qr(torch.tensor([[3.0, 1.0], [4.0, 2.0]]))  # Q (0.6, 0.8), R (5, 2.2)
    torch.testing.assert_close(q[:, :1] @ r[:1], torch.tensor([[3.0, 1.32], [4.0, 1.76]]))
    model = build(model_folder, alpha=8.0, init_lora_weights="olora")
    name = "model.layers.0.self_attn.q_proj"
    whole = load_backbone(str(model_folder), pad_token_id=0).get_submodule(name).weight
    q, r = torch.linalg.qr(whole)
    near = model.model.get_submodule(f"base_model.model.{name}")
    product = near.lora_B["default"].weight @ near.lora_A["default"].weight
    torch.testing.assert_close(product, q[:, :4] @ r[:4])
    torch.testing.assert_close(near.base_layer.weight, whole - 2 * q[:, :4] @ r[:4])


def test_factors_beside_the_whole_weight_by_hand():
    a, b = "x.lora_A.weight", "x.lora_B.weight"
    now = {a: torch.tensor([[1.0, 2.0]]), b: torch.tensor([[3.0], [1.0]]), "m": torch.ones(2)}
    first = {a: torch.tensor([[1.0, 0.0]]), b: torch.tensor([[2.0], [0.0]])}
    found = beside_whole(now, first)
    # B A = [[3, 6], [1, 2]], B0 A0 = [[2, 0], [0, 0]]
    assert torch.equal(found[b] @ found[a], torch.tensor([[1.0, 6.0], [1.0, 2.0]]))
    assert len(found[a]) == 2 and torch.equal(found["m"], now["m"])


def test_scaling_of_rslora_is_kept_with_the_rank(model_folder):
    model = build(model_folder, use_rslora=True, alpha=8.0)
    assert model.scaling == 4.0  # 8 / sqrt(4)
    settings = AdapterSettings(rank=4, alpha=8.0, use_rslora=True)
    assert settings.alpha_at(1) == 4.0  # 4 / sqrt(1) = 4 as well
    assert AdapterSettings(rank=4, alpha=8.0).alpha_at(1) == 2.0
    layer = model.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert math.isclose(layer.scaling["default"], 4.0)


def test_dora_starts_at_the_norms_of_the_weights(model_folder):
    model, plain = (
        build(model_folder, use_dora=True),
        load_backbone(str(model_folder), pad_token_id=0),
    )
    names = [name for name in model.parameters if name.endswith("lora_magnitude_vector")]
    assert len(names) == 14
    for name in names:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        norms = plain.get_submodule(layer).weight.norm(dim=1)
        torch.testing.assert_close(model.parameters[name].detach(), norms)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("variant", ["dora", "pissa", "output layer whole"])
def test_operations_are_those_that_torch_counts(model_folder, variant, dropout):
    model = build(model_folder, **VARIANTS[variant], dropout=dropout)
    model.model.train()
    model.model.config._attn_implementation = "eager"  # the counter knows no fused attention here
    model.flops = 0.0
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        out.float().sum().backward()
    assert model.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_layers_by_a_regular_expression(model_folder, tmp_path):
    model = build(model_folder, targets=r".*\.[1]\..*\.(q|up)_proj")
    layers = {name.partition(".lora_")[0] for name in model.parameters}
    opening = "base_model.model.model.layers.1."
    assert layers == {f"{opening}self_attn.q_proj", f"{opening}mlp.up_proj"}
    model.write(perturbed(model))
    model.save(tmp_path)
    again = load_adapter(load_backbone(str(model_folder), pad_token_id=0), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, logits(model))
    with pytest.raises(ModelError, match=r"matches no linear layer .* whole name, such as model\."):
        build(model_folder, targets="q_.*")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["head"]}, r"'head' matches no module .* it has: .*lm_head"),
        ({"modules_to_save": ["mlp"]}, r"'mlp' is trained whole, and .*gate_proj in it would get"),
        ({"modules_to_save": ["act_fn"]}, "matches no module of this model that has weights"),
    ],
)
def test_what_cannot_be_trained_whole_is_named(model_folder, settings, message):
    with pytest.raises(ModelError, match=message):
        build(model_folder, **settings)


def test_cut_factors_need_weights_of_their_own_in_float32(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0, dtype=torch.bfloat16)
    settings = AdapterSettings(init_lora_weights="pissa")
    with pytest.raises(ModelError, match=r"is torch.bfloat16, in which the rest would be rounded"):
        attach_adapter(backbone, settings)
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    first, second = (backbone.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(ModelError, match="up_proj have theirs in common"):
        attach_adapter(backbone, settings)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_no_more_factors_are_cut_out_than_a_weight_has(kind):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    backbone = LlamaForCausalLM(config)
    settings = {"init_lora_weights": kind, "alpha": 5.0}
    message = r"model\.layers\.0\.self_attn\.k_proj is 4 x 8, .*of rank 5; use a rank of at most 4"
    with pytest.raises(ModelError, match=message):
        attach_adapter(backbone, AdapterSettings(rank=5, **settings))
    model = attach_adapter(backbone, AdapterSettings(rank=4, **settings))
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if ".lora_A." in n}
    assert shapes == {(4, 8), (4, 12)}


def test_stacks_of_experts_have_no_factors_cut_out(mixture_folder):
    with pytest.raises(ModelError, match=r"MixtralExperts.*; name other layers as adapter.targets"):
        build(mixture_folder, init_lora_weights="pissa")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ia3", "use_dora": True}, "adapter.use_dora is a setting of lora"),
        ({"kind": "full", "modules_to_save": ["lm_head"]}, "adapter.modules_to_save is a setting"),
        ({"init_lora_weights": "pissa", "start": "x"}, "adapter.start gives trained ones"),
        ({"targets": "(q"}, "is not a regular expression: missing"),
        ({"targets": "q{99999999999}.*"}, "the repetition number is too large"),
        ({"targets": "[[q]*(?:)"}, "is not a regular expression: Possible nested set"),
        ({"targets": ".*q", "kind": "experts"}, "takes names of layers"),
    ],
)
def test_settings_that_cannot_both_be_meant(settings, message):
    assert any(message in text for text in AdapterSettings(**settings).contradictions())
