"""GGUF files: what llama.cpp's reader reads, and what transformers' own loader makes of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.errors import ModelError
from fedloom.models.gguf_export import (
    LLAMA3,
    _pre_tokenizer,
    _reordered,
    require_convertible,
    rope_factors,
    write_gguf,
)

gguf = pytest.importorskip("gguf", reason="an extra")


@pytest.fixture(scope="module")
def grouped(model_folder, tmp_path_factory):
    """A Llama whose heads share keys and values, with an output layer of its own and biases."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf") / "grouped"
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=5000.0, rms_norm_eps=1e-5, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_file_says_what_the_folder_says(grouped, tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(grouped, file, "f32", "wishes")
    reader = gguf.GGUFReader(str(file))
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama" and value["general.name"] == "wishes"
    shape = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4,
             "attention.head_count_kv": 2, "context_length": 128, "feed_forward_length": 96,
             "rope.dimension_count": 16, "rope.freq_base": 5000.0}  # fmt: skip
    assert {name: value[f"llama.{name}"] for name in shape} == shape
    record = json.loads((grouped / "tokenizer.json").read_text())
    assert value["tokenizer.ggml.tokens"] == sorted(
        record["model"]["vocab"], key=record["model"]["vocab"].get
    )
    assert value["tokenizer.ggml.pre"] == "gpt-2" and value["tokenizer.ggml.add_bos_token"] is True
    assert value["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert "add_generation_prompt" in value["tokenizer.chat_template"]
    assert len(reader.tensors) == 3 + 2 * 9


@pytest.mark.slow
@pytest.mark.parametrize("out_type", ["f32", "f16", "q8_0"])
def test_transformers_reads_the_same_model(grouped, tmp_path, out_type):
    """Its loader undoes the order of queries and keys by itself.

    q8_0 rounds to 1/127 of the largest of 32 numbers, and that scale to f16, which has 11 bits.
    """
    from transformers import AutoModelForCausalLM

    write_gguf(grouped, tmp_path / "m.gguf", out_type, "wishes")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(grouped, dtype=torch.float32)
    weights = found.state_dict()
    for name, there in own.state_dict().items():
        bound = {"f32": 0.0, "f16": 2.0**-11, "q8_0": 0.5 / 127 + 2.0**-11}[out_type]
        bound = 0.0 if there.ndim == 1 else bound * float(there.abs().max())
        assert (weights[name] - there).abs().max() <= bound, name
    ids = torch.arange(3, 23)[None]
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    if out_type == "f32":
        assert torch.equal(own.generate(**options), found.generate(**options))


def test_rows_of_a_head_take_turns():
    """Two heads of four rows: of halves (a, b) and (c, d) become a, c, b, d."""
    assert _reordered(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_3s_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    assert np.allclose(plain / rope_factors(config), expected.numpy(), rtol=1e-5)
    assert rope_factors(config).max() == 8 and rope_factors(config).min() == 1
    assert rope_factors(SimpleNamespace(rope_parameters={"rope_type": "default"})) is None


BYTES = {"type": "ByteLevel", "add_prefix_space": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": LLAMA3}}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{**BYTES, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES], "smollm"),
        ([SPLIT, {**BYTES, "use_regex": False}], "llama-bpe"),
        ([SPLIT, BYTES], None),
        ([{**SPLIT, "pattern": {"Regex": r"\w+"}}, {**BYTES, "use_regex": False}], None),
        ([{**BYTES, "add_prefix_space": True}], None),
        ([{"type": "Digits", "individual_digits": False}, BYTES], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_how_texts_are_split_is_known_or_refused(steps, name):
    record = {
        "model": {"type": "BPE"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
    if name is None:
        with pytest.raises(ModelError, match="convert_hf_to_gguf"):
            _pre_tokenizer("m", record)
        return
    assert _pre_tokenizer("m", record) == name
    for other in ({"model": {"type": "Unigram"}}, {"normalizer": {"type": "NFC"}}):
        with pytest.raises(ModelError):
            _pre_tokenizer("m", {**record, **other})


def test_other_architectures_are_refused(mixture_folder):
    with pytest.raises(ModelError, match=r"'mixtral': convert the merged folder"):
        require_convertible(str(mixture_folder))
