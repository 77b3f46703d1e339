"""Derived FLOPs against torch's own counter on tiny models of many architectures, with LoRA everywhere."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.flop_shape import model_shape, uncounted

SIZE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
OLDER = {"vocab_size": 320, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
TEXT = {**GROUPED, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 16}

EXACT = {
    "tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "wide heads": ("Llama", {**GROUPED, "head_dim": 16}),
    "gpt2": ("GPT2", OLDER),
    "opt": ("OPT", {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"vocab_size": 320, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "attention beside the MLP, fused": ("Falcon", {**SIZE, "multi_query": True}),
    "attention beside the MLP, two norms": ("GPTNeoX", SIZE),
    "attention beside the MLP": ("GPTJ", {**OLDER, "rotary_dim": 4}),
    "mpt": ("Mpt", {"vocab_size": 320, "d_model": 32, "n_layers": 3, "n_heads": 4}),
    "windows": ("Gemma2", {**GROUPED, "head_dim": 16}),
    "output registered before inputs": ("Phi3", GROUPED),
    "experts": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "narrow experts": ("Qwen3Moe", {**GROUPED, "head_dim": 16, "num_experts": 4, **EXPERTS}),
    "latent attention": (
        "DeepseekV3",
        {
            **SIZE,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
        },
    ),
    "experts that get no adapter": ("GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 4}),
    "every expert on every token": (
        "Llama4Text",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    ),
    "granite": ("GraniteMoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "a section for text": (
        "Gemma3",
        {
            "text_config": TEXT,
            "vision_config": {**SIZE, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
}
POOLED = {
    "bert": ("Bert", SIZE),
    "two layers behind": ("Roberta", SIZE),
    "narrow embeddings": ("Electra", {**SIZE, "embedding_size": 16}),
    "relative": ("DebertaV2", SIZE),
}
RECURRENT = {
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "use_mamba_kernels": False,
        },
        ["Conv1d", "JambaMambaMixer"],
    ),
    "griffin": (
        "RecurrentGemma",
        {**SIZE, "lru_width": 32},
        ["Conv1d", "RecurrentGemmaRglru"],
    ),
    "rwkv": (
        "Rwkv",
        {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 128},
        ["RwkvFeedForward", "RwkvSelfAttention"],
    ),
}
QUICK = {"a section for text", "experts", "attention beside the MLP, fused", "bert"}


def some_quick(cases):
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in cases]


def backbone(kind, settings, factory=transformers.AutoModelForCausalLM):
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = factory.from_config(config).requires_grad_(False)
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter knows no grouped products
    return model


def counted(model, **options):
    """Return derived and counted FLOPs of a forward pass, then of one with its backward pass."""
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        forward = counter.get_total_flops()
        output.logits.sum().backward()
    both = model.flops
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return (model.flops - both, both), (forward, counter.get_total_flops())


@pytest.mark.parametrize("name", some_quick(EXACT))
def test_causal_models(name):
    base = backbone(*EXACT[name])
    base.set_attn_implementation("eager")  # the counter sees its two products apart
    assert uncounted(base) == []
    model = AdapterModel(attach_adapter(base, AdapterSettings(rank=4)), 0)
    derived, seen = counted(model, logits_to_keep=9)
    assert derived == pytest.approx(seen, rel=1e-6)


@pytest.mark.parametrize("name", some_quick(POOLED))
def test_classifiers_whose_head_reads_one_position(name):
    base = backbone(*POOLED[name], transformers.AutoModelForSequenceClassification)
    base.set_attn_implementation("eager")
    model = attach_adapter(base, AdapterSettings(rank=4), classification=True)
    derived, seen = counted(AdapterModel(model, 0))
    assert derived == pytest.approx(seen, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_no_matrix_product_is_named(name):
    kind, settings, classes = RECURRENT[name]
    assert uncounted(backbone(kind, settings)) == classes


@pytest.mark.parametrize("name", ["a section for text", "experts"])
def test_a_model_without_weights_has_the_same_shape(name):
    """By which a run is counted before it begins."""
    shapes = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            base = backbone(*EXACT[name])
        shapes.append(model_shape(attach_adapter(base, AdapterSettings(rank=4))))
    assert shapes[0] == shapes[1]
