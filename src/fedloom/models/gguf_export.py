"""A merged model as one GGUF file, which llama.cpp and what is built on it load.

llama.cpp's package ``gguf`` writes the file and quantises; its converter script is not part of the
package, so what is converted here are models of the Llama architecture with byte-level BPE tokenizers.
Others are refused: llama.cpp's ``convert_hf_to_gguf.py`` takes the merged folder.

Source: llama.cpp, ``convert_hf_to_gguf.py`` (class ``LlamaModel``) and ``gguf-py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from fedloom.errors import ModelError
from fedloom.models.load import configuration_of, load_tokenizer, stop_tokens

OutType = Literal["f32", "f16", "bf16", "q8_0"]
"""Types of the matrices; vectors are always float32. Names are llama.cpp's."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer splits texts."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF."""

ELSEWHERE = "convert the merged folder (--format merged) with llama.cpp's convert_hf_to_gguf.py"


def require_gguf() -> Any:
    """Return llama.cpp's package.

    Raises:
        ModelError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "llama.cpp's package gguf is missing: pip install 'fedloom[gguf]'"
        ) from None
    return gguf


def require_convertible(path: str, revision: str | None = None) -> None:
    """Check, by its files alone, that a model can be written as GGUF.

    Args:
        path: Folder or Hub name, of the base or of the merged model.
        revision: On the Hub.

    Raises:
        ModelError: It is not of the Llama architecture, or has another kind of tokenizer.
    """
    require_gguf()
    config = configuration_of(path, revision)
    _require_llama(path, config)
    _pre_tokenizer(path, json.loads(load_tokenizer(path, revision).backend_tokenizer.to_str()))


def write_gguf(folder: Path, file: Path, out_type: OutType, name: str) -> None:
    """Write a merged model as a GGUF file.

    Args:
        folder: In Hugging Face layout, with its tokenizer.
        file: Where to.
        out_type: Of the matrices; where a row is no multiple of 32 wide, q8_0 is f16 there.
        name: What the file calls the model.

    Raises:
        ModelError: It cannot be written as GGUF.
        OSError: The file cannot be written.
    """
    gguf = require_gguf()
    require_convertible(str(folder))
    config = configuration_of(str(folder))
    writer = gguf.GGUFWriter(str(file), "llama", use_temp_file=True)
    writer.add_name(name)
    _add_shape(gguf, writer, config, out_type)
    _add_tokenizer(writer, str(folder), int(config.vocab_size))
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(config.num_hidden_layers))
    for own, tensor in _tensors(folder, config):
        there = known.get_name(own, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ModelError(f"{folder}: llama.cpp knows no tensor {own}; {ELSEWHERE}")
        data, kind = _typed(gguf, tensor, out_type)
        writer.add_tensor(there, data, raw_dtype=kind)
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """Return what rotary frequencies are divided by, ``(head size / 2,)``; none where by nothing.

    Source: Llama 3.1, as transformers has it (``rope_type = "llama3"``).

    Args:
        config: Of the model.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    size, theta = _head_size(config), float(rope["rope_theta"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    found = []
    for i in range(0, size, 2):
        turns = old * theta ** (-i / size) / (2 * math.pi)  # within the context of pretraining
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - share) / factor + share))
    return np.array(found, np.float32)


def _require_llama(path: str, config: Any) -> None:
    kind = config.model_type
    window = getattr(config, "sliding_window", None)
    if kind not in ("llama", "mistral") or window is not None:
        what = f"{kind!r}" if window is None else f"{kind!r} with a sliding window"
        raise ModelError(
            f"GGUF is written of models of the Llama architecture; {path} is {what}: {ELSEWHERE}"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "llama3"):
        raise ModelError(f"{path}: rotary positions of type {rope!r} are not written: {ELSEWHERE}")
    if config.hidden_act != "silu":
        raise ModelError(
            f"{path}: llama.cpp's Llama has silu, not {config.hidden_act!r}: {ELSEWHERE}"
        )


def _head_size(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _add_shape(gguf: Any, writer: Any, config: Any, out_type: OutType) -> None:
    types = gguf.LlamaFileType
    kinds = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16,
             "q8_0": types.MOSTLY_Q8_0}  # fmt: skip
    size = _head_size(config)
    writer.add_file_type(kinds[out_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)


def _tensors(folder: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a folder, query and key in the order of llama.cpp's rotary positions."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                tensor = content.get_tensor(name).float()
                if (count := heads.get(name.split(".")[-2])) is not None:
                    tensor = _reordered(tensor, int(count))
                yield name, tensor


def _reordered(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows with the two halves of each head in turns, not one behind the other."""
    rows, rest = tensor.shape[0], tensor.shape[1:]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(tensor.shape)


def _typed(gguf: Any, tensor: torch.Tensor, out_type: OutType) -> tuple[NDArray[Any], Any]:
    """Return a tensor's numbers in the type that it is written in, and that type."""
    types = gguf.GGMLQuantizationType
    data = tensor.contiguous().numpy()
    kind = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[out_type]
    if tensor.ndim == 1:
        kind = types.F32
    elif kind == types.Q8_0 and tensor.shape[-1] % 32:
        kind = types.F16
    return gguf.quants.quantize(data, kind), kind


def _add_tokenizer(writer: Any, path: str, rows: int) -> None:
    """Write the vocabulary as llama.cpp's byte-level BPE reads it.

    Args:
        writer: Of the file.
        path: The model's folder.
        rows: Of its embeddings.
    """
    tokenizer = load_tokenizer(path)
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(path, record))
    names = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for name, number in record["model"]["vocab"].items():
        names[number], kinds[number] = name, NORMAL
    for token in record["added_tokens"]:
        number = token["id"]
        names[number] = token["content"]
        kinds[number] = CONTROL if token["special"] else USER_DEFINED
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    pairs = record["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    begins = tokenizer("x")["input_ids"][:1]
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    for token in stop_tokens(path):
        if token != tokenizer.eos_token_id:
            writer.add_eot_token_id(token)
            break
    writer.add_add_bos_token(begins == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(path: str, record: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how a tokenizer splits texts before it merges bytes.

    Raises:
        ModelError: It is none that is known here, or no byte-level BPE.
    """
    found = record.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    if record["model"].get("type") == "BPE" and record.get("normalizer") is None:
        match [_step(own) for own in steps]:
            case [("ByteLevel", True)]:
                return "gpt-2"
            case [("Digits", True), ("ByteLevel", True)]:
                return "smollm"
            case [("Split", own), ("ByteLevel", False)] if own == LLAMA3:
                return "llama-bpe"
    raise ModelError(
        f"GGUF is written of byte-level BPE tokenizers that split as GPT-2's, SmolLM's or Llama 3's; "
        f"that of {path} does not: {ELSEWHERE}"
    )


def _step(own: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a step of a pre-tokenizer with what matters of it."""
    kind = str(own.get("type"))
    if kind == "ByteLevel" and not own.get("add_prefix_space"):
        return kind, bool(own.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(own.get("individual_digits"))
    if kind == "Split" and own.get("behavior") == "Isolated" and not own.get("invert"):
        return kind, (own.get("pattern") or {}).get("Regex")
    return kind, None
