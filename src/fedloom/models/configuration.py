"""What a configuration says of a model's text part, whatever it calls it and however deep it lies."""

from __future__ import annotations

from typing import Any

UNLIMITED = 1 << 30
"""Tokens that a model reads whose configuration names no limit: recurrent ones, and those of ALiBi."""

CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "context_length",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "seq_length",
)
"""Names of the number of tokens that a model reads at most."""

STRETCHED = ("linear", "dynamic")
"""Kinds of rotary scaling that read ``factor`` times what the configuration names."""

BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTH = ("hidden_size", "n_embd", "d_model")

PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Lists that have an entry for each block."""


def text_part(config: Any) -> Any:
    """Return the configuration of what reads text: its own section, or the whole."""
    return config.get_text_config(decoder=True)


def number(config: Any, names: tuple[str, ...], default: int) -> int:
    """Return the first of these numbers that a configuration has and that is above 0."""
    given = (getattr(config, name, None) for name in names)
    return next((int(own) for own in given if isinstance(own, int) and own > 0), default)


def context(config: Any) -> int:
    """Return how many tokens a model reads at most, by its configuration.

    :data:`UNLIMITED` where it names no limit. Rotary embeddings that are stretched read more than the
    positions that they were trained with.
    """
    text = text_part(config)
    named = number(text, CONTEXT, UNLIMITED)
    rotary = getattr(text, "rope_parameters", None) or {}
    factor = rotary.get("factor")
    if not isinstance(factor, int | float) or factor <= 1 or named == UNLIMITED:
        return named
    before = rotary.get("original_max_position_embeddings")
    kind = rotary.get("rope_type")
    if kind in STRETCHED or (kind == "yarn" and before):
        return max(named, int(factor * (before or named)))
    return named


def vocabulary(config: Any, default: int) -> int:
    """Return the number of tokens that a model knows, by its configuration."""
    return number(text_part(config), ("vocab_size",), default)


def keep_blocks(config: Any, blocks: range) -> None:
    """Change a configuration to that of a model that has only these of its blocks."""
    text = config.get_text_config()
    text.num_hidden_layers = len(blocks)
    for name in PER_BLOCK:
        if getattr(text, name, None):
            setattr(text, name, [getattr(text, name)[block] for block in blocks])
