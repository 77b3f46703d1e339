"""Every causal model type of transformers, as small as its configuration lets it be.

A configuration is made small by the names of its attributes (``SMALL``), which most architectures share;
``SPECIAL`` has what one of them needs beside.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 320
"""Tokens, those of the small tokenizer of the tests."""

WIDTH, HEADS, BLOCKS = 32, 4, 2

CONTEXT = 128

_WIDTHS = (
    "hidden_size", "d_model", "n_embd", "attention_hidden_size", "embedding_size", "word_embed_proj_dim",
    "input_embedding_size", "output_embedding_size", "lru_width", "ple_embed_dim", "emb_dim",
    "backbone_hidden_size", "embedding_dim", "router_hidden_size",
)  # fmt: skip
_INSIDES = (
    "intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner",
    "dff", "dim_ff", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
    "moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size",
    "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads",
    "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
    "swa_num_attention_heads", "index_n_heads", "linear_num_heads", "linear_num_value_heads",
)  # fmt: skip
_GROUPS = (
    "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads",
    "num_query_groups",
)  # fmt: skip
_BLOCKS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_blocks", "depth", "max_window_layers",
)  # fmt: skip
_HEAD_WIDTHS = (
    "head_dim", "kv_channels", "d_head", "dim_head", "attention_head_size", "swa_head_dim",
    "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "v_head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "mamba_head_dim", "mamba_d_head", "mamba_headdim",
    "d_rel",
)  # fmt: skip
_EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num",
)  # fmt: skip
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length",
    "max_target_positions",
)  # fmt: skip

SMALL: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INSIDES, 48),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_GROUPS, 2),
    **dict.fromkeys(_BLOCKS, BLOCKS),
    **dict.fromkeys(_HEAD_WIDTHS, 8),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_CHOSEN, 2),
    **dict.fromkeys(_CONTEXTS, CONTEXT),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "index_topk": 64,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "type_vocab_size": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""Values by the name of an attribute, where a configuration has it and it is not ``None``."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA_4 = {**_SLIDING, "global_head_dim": 8}
_GEMMA_3N = {**_SLIDING, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
             "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
_INDEXER = {"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
            "indexer_compress_ratio": 4}  # fmt: skip
_DOTS_3 = {
    "layer_types": ["full_attention", "sliding_attention"],
    **{
        f"swa_{name}": 8
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    },
    **{"swa_head_dim": 16, "swa_qk_rope_head_dim": 8, "head_dim": 16},
    **{"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS},
}
_DECODER = {"is_decoder": True}
_ZAMBA = {
    "num_hidden_layers": 3,
    "attention_hidden_size": 2 * WIDTH,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 100,
        **{
            f"{part}_config": {
                "vocab_size": 260,
                "num_key_value_heads": HEADS,
                "hidden_size_global": WIDTH,
                "intermediate_size": 48,
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "camembert": _DECODER,
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10_000.0}
            for name in ("sliding_attention", "full_attention")
        },
        **_SLIDING,
    },
    "data2vec-text": _DECODER,
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note": {
        "text_config": _DOTS_3,
        "vision_config": {
            "mlp_layer_types": ["dense", "dense"],
            "pyramid_num_routed": None,
            "per_layer_config": {},
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
        },
        "audio_config": {
            "adapter_input_size": WIDTH,
            "adapter_out_dim": WIDTH,
            "downsample_hidden_size": 8,
        },
    },
    "dots3_note_text": _DOTS_3,
    "emu3": {
        "vq_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
        },
        "vocabulary_map": {"<image>": VOCABULARY - 1},
    },
    "electra": _DECODER,
    "ernie": _DECODER,
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA_3N,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4},
    "gemma4_unified_text": _GEMMA_4,
    "git": {"vision_config": {}},
    "got_ocr2": {
        "vision_config": {
            "output_channels": 8,
            "mlp_dim": 48,
            "global_attn_indexes": [1],
            "window_size": 2,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA_2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID,
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": {"scale_emb": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "megatron-bert": _DECODER,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 8,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        }
    },
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": {**_HYBRID, **_INDEXER}},
    "qwen4_exp_text": {**_HYBRID, **_INDEXER},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "reformer": {
        **_DECODER,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "roformer": _DECODER,
    "xlm": {"causal": True},
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "chunk_size": 64},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""What one model type needs beside."""


UNBUILT = {
    "gemma3n": "its vision tower is a model of timm, which is not installed",
    "gemma4_assistant": "a drafter: all of its blocks read the keys and values of another model",
    "gemma4_unified_assistant": "a drafter: all of its blocks read the keys and values of another model",
    "musicgen": "transformers gives the configuration of the whole to the class of its decoder",
    "musicgen_melody": "transformers gives the configuration of the whole to the class of its decoder",
}
"""What transformers itself does not build as a causal model, and why."""


def small_config(model_type: str, **others: Any) -> Any:
    """Return a configuration with few and narrow blocks, and with ``others`` of its attributes."""
    kind = transformers.CONFIG_MAPPING[model_type]
    return kind(**_merged(_small(kind), {**SPECIAL.get(model_type, {}), **others}))


def small_model(model_type: str, **others: Any) -> Any:
    """Return a random model with weights wide enough that every layer counts, as it is published."""
    torch.manual_seed(0)
    whole = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    factory = (
        transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
    )
    model = factory.from_config(small_config(model_type, **others))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
        else:  # norms, scales and biases, some of which would hide a layer at their first value
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def make_folder(model_type: str, folder: Path, tokenizer: Any, **others: Any) -> None:
    """Write a checkpoint whose configuration has ``others`` too; of what transformers does not build, a configuration and one tensor."""
    tokenizer.save_pretrained(str(folder))
    if model_type in UNBUILT:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    else:
        small_model(model_type, **others).save_pretrained(str(folder))


def _small(kind: Any, default: Any = None) -> dict[str, Any]:
    """Return the small values of the attributes that a kind of configuration has."""
    default = default or kind()
    there = {name: value for name, value in default.to_dict().items() if value is not None}
    fixed = {name for name in there if isinstance(getattr(kind, name, None), property)}
    values = {
        name: value
        for name, value in SMALL.items()
        if kind.attribute_map.get(name, name) in there and name not in fixed
    }
    values |= _tokens(there)
    if "kv_lora_rank" in values or there.get("num_key_value_heads") == 1:
        values["num_key_value_heads"] = HEADS if "kv_lora_rank" in values else 1
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            values[name] = {"model_type": part.model_type, **_small(type(part), part)}
    return values


def _tokens(there: dict[str, Any]) -> dict[str, int]:
    """Return special tokens that the vocabulary has: padding 0, start 1, end 2, others at its end."""
    names = sorted(name for name in there if name.endswith(("_token_id", "_token_index")))
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {name: known.get(name, VOCABULARY - 1 - place) for place, name in enumerate(names)}


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return values with others in their place, section by section."""
    both = values.keys() & others.keys()
    deep = {
        name: _merged(values[name], others[name]) for name in both if isinstance(others[name], dict)
    }
    return {**values, **others, **deep}
