"""Configuration, model and tokenizer that do not say the same: told, or refused, before any training."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.configuration import UNLIMITED, context, keep_blocks
from fedloom.models.consistency import disagreements, length_warnings, require_tokens
from fedloom.models.load import context_length, load_backbone, load_tokenizer
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}
IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def change(folder, name, **values):
    file = Path(folder) / name
    own = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**own, **values}))


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("Llama", {"max_position_embeddings": 96}, 96),
        ("Gemma3", {"text_config": {"max_position_embeddings": 96}}, 96),
        ("Mamba", {}, UNLIMITED),
        ("Bloom", {}, UNLIMITED),
        ("Bloom", {"seq_length": 96}, 96),
        ("XLNet", {}, UNLIMITED),  # says -1
        ("Mpt", {"max_seq_len": 96}, 96),
        ("Whisper", {"max_target_positions": 96}, 96),
        # 4 times 96; of a window, each token reads as many and the model the whole text
        (
            "Llama",
            {
                "max_position_embeddings": 96,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            384,
        ),
        (
            "Qwen2",
            {
                "max_position_embeddings": 96,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 96,
                    "rope_theta": 1e4,
                },
            },
            384,
        ),
        ("Mistral", {"max_position_embeddings": 96, "sliding_window": 16}, 96),
    ],
)
def test_the_context_by_a_configuration(kind, settings, expected):
    assert context(getattr(transformers, f"{kind}Config")(**settings)) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            "Roberta",
            {"max_position_embeddings": 66},
            64,
        ),  # counts from the number of padding, 1, on
        ("GPT2", {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}, 64),
        ("OPT", {"max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}, 64),
    ],
)
def test_the_context_is_what_the_table_of_positions_has_room_for(kind, settings, expected):
    small = {} if kind == "GPT2" else SMALL
    config = getattr(transformers, f"{kind}Config")(**{**small, "vocab_size": 320, **settings})
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    assert context_length(model) == expected
    ids = torch.full((1, expected), 7)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 2)


def test_virtual_tokens_take_places(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    before = context_length(backbone)
    model = attach_adapter(backbone, AdapterSettings(kind="prompt", virtual_tokens=5))
    assert context_length(model) == before - 5


def test_blocks_are_kept_in_the_text_part():
    config = transformers.Gemma3Config(
        text_config={"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    )
    keep_blocks(config, range(1))
    assert config.text_config.num_hidden_layers == 1
    assert config.text_config.layer_types == ["full_attention"]


def test_blocks_that_share_their_weights_cannot_be_chosen_from():
    config = transformers.AlbertConfig(**SMALL, embedding_size=16)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match=r"2 blocks by its configuration and 1 with layers of"):
        attach_adapter(model, AdapterSettings(layers=1), classification=True)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(experiment, copy):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    backbone = load_backbone(str(copy), pad_token_id=0)
    rows = len(backbone.get_input_embeddings().weight)
    tokenizer.add_tokens([f"[new {i}]" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(copy)
    built = experiment(model={"path": str(copy)})
    with pytest.raises(ModelError) as told:
        assemble(built, partition_data(built))
    assert f"is number {rows}, the model embeds {rows} (1 such tokens)" in str(told.value)
    assert f"resize_token_embeddings({rows + 1})" in str(told.value)


@pytest.mark.slow
def test_a_control_token_beyond_is_refused_only_where_a_row_has_it(experiment, copy):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    backbone = load_backbone(str(copy), pad_token_id=0)
    rows = len(backbone.get_input_embeddings().weight)
    more = [f"<picture {i}>" for i in range(rows - len(tokenizer) + 1)]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    require_tokens(backbone, tokenizer, "here")
    tokenizer.save_pretrained(copy)
    built = experiment(model={"path": str(copy)})
    assemble(built, partition_data(built))
    tokenizer.chat_template = more[-1] + (tokenizer.chat_template or "{{ messages[0].content }}")
    tokenizer.save_pretrained(copy)
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in roles]} for i in range(20)]
    file = copy / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = experiment(
        model={"path": str(copy)},
        data={"source": str(file), "kind": "instruction"},
        objective={"name": "sft"},
    )
    with pytest.raises(ModelError, match=r"a row has the token '<picture \d+>' \(\d+\), and the"):
        assemble(built, partition_data(built))


def test_tokens_that_end_and_begin_texts(copy):
    tokenizer = load_tokenizer(str(copy))
    backbone = load_backbone(str(copy), pad_token_id=0)
    assert disagreements(backbone, tokenizer, str(copy)) == []
    change(copy, "generation_config.json", eos_token_id=9)
    change(copy, "config.json", bos_token_id=7)
    end, *begin = disagreements(backbone, tokenizer, str(copy))
    own = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})"
    other = f"{tokenizer.convert_ids_to_tokens(9)!r} (9)"
    assert f"ends an answer with {own}, the model's files stop at {other}" in end
    writes = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert len(begin) == writes


def test_padding_of_a_tokenizer_that_has_none_is_the_configurations(copy):
    change(copy, "tokenizer_config.json", pad_token=None)
    change(copy, "config.json", pad_token_id=5)
    assert load_tokenizer(str(copy)).pad_token_id == 5
    change(copy, "config.json", pad_token_id=None)
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_lengths_that_cannot_be_had(copy, experiment):
    built = experiment(model={"path": str(copy)}, data={"max_length": 8192})
    (told,) = [t for t in assemble(built, partition_data(built)).accounts.warnings if "8192" in t]
    reads = context_length(load_backbone(str(copy), pad_token_id=0))
    assert told.startswith(f"data.max_length = 8192: {copy} reads {reads} tokens at most")
    tokenizer = load_tokenizer(str(copy))
    tokenizer.model_max_length = 32
    assert length_warnings({"data.max_length": 16}, 64, tokenizer, "here") == []
    (told,) = length_warnings({"data.max_length": 48}, 64, tokenizer, "here")
    assert "reads 32 tokens (model_max_length), the model's configuration 64" in told


def test_weights_that_a_checkpoint_lacks_are_not_made_up(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack 1 of LlamaForCausalLM's tensors, such as {lost}"):
        load_backbone(str(copy), pad_token_id=0)
    with pytest.raises(ModelError, match="they would be random"):
        load_backbone(str(copy), pad_token_id=0, classes=("a", "b"))
    save_file({**tensors, lost: tensors[lost][:8].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight is 8 x 32 in the file and 64 x 32 by"):
        load_backbone(str(copy), pad_token_id=0)


@pytest.fixture
def classifier(tmp_path):
    def make(kind="Llama", factory=transformers.AutoModelForSequenceClassification, **settings):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
        factory.from_config(config).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


def test_a_classifier_for_other_classes_begins_anew(classifier, model_folder):
    tokenizer = load_tokenizer(str(model_folder))
    folder = classifier(num_labels=3, problem_type="regression")
    model = load_backbone(folder, pad_token_id=0, classes=("a", "b"))
    assert model.score.weight.shape == (2, 32)
    assert model.config.problem_type == "single_label_classification"
    told, padding = disagreements(model, tokenizer, folder, classes=("a", "b"))
    assert "is for 3 classes (LABEL_0, LABEL_1, LABEL_2), the rows have 2 (a, b)" in told
    assert f"set model.config.pad_token_id = {tokenizer.pad_token_id}" in padding


def test_a_classifier_with_two_orders_of_its_classes(classifier):
    folder = classifier(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    change(folder, "config.json", label2id={"no": 1, "yes": 0})
    with pytest.raises(ModelError, match=r"id2label says 0 is 'no', label2id that 'no' is 1"):
        load_backbone(folder, pad_token_id=0, classes=("no", "yes"))
    load_backbone(folder, pad_token_id=0, classes=("yes", "no"))  # the head starts again


LONG_HEADS = {
    "DebertaV2": {},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "Bert": {},
    "Albert": {"embedding_size": 16},
    "ModernBert": {"cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2, "eos_token_id": 2},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "Bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "DebertaV2")) for k in LONG_HEADS]
)
@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_all_of_a_head_that_begins_anew_is_trained_and_saved(classifier, tmp_path, kind, adapter):
    """A base checkpoint has no pooler either: one that is not saved is another one elsewhere."""
    folder = classifier(kind, transformers.AutoModel, **LONG_HEADS[kind])
    backbone = load_backbone(folder, pad_token_id=0, classes=("a", "b"))
    settings = AdapterSettings(kind=adapter, **({"rank": 4} if adapter == "lora" else {}))
    model = AdapterModel(attach_adapter(backbone, settings, classification=True), 0)
    ids = IDS.clone()
    ids[:, -1] = 2  # what BART reads
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.SGD(list(model.parameters.values()), lr=0.5)
    for _ in range(2):
        logits = model(**options).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).backward()
        assert all(own.grad is not None for own in model.parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    with model.evaluating():
        expected = model(**options).logits
    model.save(tmp_path / "adapter")
    torch.manual_seed(99)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**options).logits, expected, atol=1e-4)
