"""Checkpoints that came out wrong without a word: each is right now, or refused in one line."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedloom.data.batch import Sequences
from fedloom.data.examples import Instruction
from fedloom.data.tokenize import tokenize
from fedloom.errors import ModelError, first_line
from fedloom.evaluation.generate import continue_tokens, load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter, load_adapter
from fedloom.models.architecture import _of_any_expert, switch_dropout_off
from fedloom.models.export import export_causal
from fedloom.models.load import context_of, load_backbone, load_tokenizer
from fedloom.objectives.logps import completion_logps
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def folder_of(model_folder, tmp_path):
    """Write a random model of a configuration, with the small model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model_folder))

    def make(kind, *, factory=transformers.AutoModelForCausalLM, **settings):
        torch.manual_seed(0)
        model = factory.from_config(kind(vocab_size=320, **settings) if callable(kind) else kind)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
        folder = tmp_path / f"{model.config.model_type}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def adapted(folder, *, classes=(), dtype=torch.float32, **settings):
    backbone = load_backbone(folder, pad_token_id=0, classes=classes, dtype=dtype)
    model = attach_adapter(backbone, AdapterSettings(**settings), classification=bool(classes))
    return AdapterModel(model, 0, dtype if dtype == torch.bfloat16 else None)


def rows(*lengths, prompt=3):
    generator = torch.Generator().manual_seed(3)
    ids = [[1, *torch.randint(3, 300, (n,), generator=generator).tolist()] for n in lengths]
    width = max(map(len, ids))
    tokens, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width)
    counted = torch.zeros(len(ids), width, dtype=torch.bool)
    for number, row in enumerate(ids):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)], counted[number, prompt : len(row)] = 1, True
    return Sequences(tokens, mask.long(), counted, prompt)


def trained(model, sequences, steps=3, rate=0.5):
    optimizer = torch.optim.SGD(list(model.parameters.values()), lr=rate)
    for _ in range(steps):
        (-completion_logps(model, sequences).mean() / 20).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with model.evaluating():
        return completion_logps(model, sequences)


def elsewhere(model, sequences):
    """Log-probs of completions by plain transformers and PEFT."""
    with torch.no_grad():
        output = model.eval()(
            input_ids=sequences.input_ids, attention_mask=sequences.attention_mask
        )
    logps = output.logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    return (picked * sequences.completion_mask[:, 1:]).sum(-1)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("rank", [4, 8])
def test_a_mixtures_adapter_is_saved_with_its_own_rank(mixture_folder, tmp_path, rank):
    """Factors of a stack of experts have rows for each of these, and the rank is still one."""
    model, sequences = adapted(str(mixture_folder), rank=rank, alpha=2.0 * rank), rows(12, 9)
    expected = trained(model, sequences)
    model.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 2.0 * rank)
    base = transformers.AutoModelForCausalLM.from_pretrained(str(mixture_folder))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert elsewhere(loaded, sequences) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "flexlora", "hetlora"])
def test_factors_of_a_stack_of_experts_are_not_multiplied(experiment, mixture_folder, method):
    built = experiment(model={"path": str(mixture_folder)}, method={"name": method})
    with pytest.raises(ModelError) as told:
        assemble(built, partition_data(built))
    assert f"method.name = '{method}' multiplies the two factors of linear layers" in str(
        told.value
    )
    assert 'name linear layers as adapter.targets, such as ["q_proj", "v_proj"]' in str(told.value)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (transformers.BertConfig, SMALL),
        (transformers.RobertaConfig, SMALL),
        (transformers.ElectraConfig, {**SMALL, "embedding_size": 32}),
        (transformers.XLNetConfig, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    ],
)
def test_an_encoder_is_no_causal_model(folder_of, kind, settings):
    with pytest.raises(ModelError) as told:
        load_backbone(folder_of(kind, **settings), pad_token_id=0)
    assert "is not a causal language model" in str(told.value) and "Take a decoder" in str(
        told.value
    )


def test_a_decoder_of_the_same_family_is_one(folder_of):
    load_backbone(folder_of(transformers.BertConfig, is_decoder=True, **SMALL), pad_token_id=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_added_to_a_tied_output_is_not_added_to_the_embeddings(folder_of, tmp_path, kind):
    folder = folder_of(transformers.LlamaConfig, tie_word_embeddings=True, **SMALL)
    model, sequences = adapted(folder, kind=kind, targets=["lm_head"]), rows(12, 9)
    expected = trained(model, sequences)
    model.save(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert elsewhere(loaded, sequences) == pytest.approx(expected, abs=1e-4)
    export_causal(model, load_tokenizer(folder), tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert not exported.config.tie_word_embeddings
    assert elsewhere(exported, sequences) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full", "ia3"])
@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_what_is_trained_is_float32_whatever_the_backbone(folder_of, kind, classes):
    model = adapted(
        folder_of(transformers.LlamaConfig, **SMALL),
        classes=classes,
        dtype=torch.bfloat16,
        kind=kind,
    )
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}
    if not classes:
        before = model.read()
        trained(model, rows(12, 9), steps=2, rate=1e-5)
        after = model.read()
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_dropout_of_the_backbone_is_off_where_there_is_a_reference(folder_of, experiment):
    """GPT-2's configuration has 0.1; log-ratios before any step are 0, and DPO's loss is log 2."""
    folder = folder_of(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    sequences = rows(12, 9)

    def ratios(objective, **model):
        built = experiment(
            model={"path": folder, **model},
            objective={"name": objective},
            **({"data": {"source": "builtin:instructions"}} if objective == "sft" else {}),
        )
        own = assemble(built, partition_data(built)).model
        with own.reference():
            reference = completion_logps(own, sequences)
        own.model.train()
        torch.manual_seed(0)
        with torch.no_grad():
            return completion_logps(own, sequences) - reference

    assert ratios("dpo").tolist() == [0.0, 0.0]
    assert ratios("sft").abs().min() > 1e-3  # as in TRL, it acts where nothing is compared with
    assert ratios("dpo", dropout=True).abs().min() > 1e-3
    assert ratios("sft", dropout=False).tolist() == [0.0, 0.0]


def test_models_without_the_option_to_keep_few_logits(folder_of):
    config = transformers.xLSTMConfig(vocab_size=320, hidden_size=64, num_blocks=2, num_heads=2)
    folder, sequences = folder_of(config), rows(12)
    model = adapted(folder, targets=["q", "v"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base.config.use_cache = False
    with model.evaluating():
        assert completion_logps(model, sequences) == pytest.approx(
            elsewhere(base, sequences), abs=1e-4
        )


def test_a_router_that_is_a_linear_layer_gets_no_adapter(folder_of):
    config = transformers.Llama4TextConfig(
        vocab_size=320, intermediate_size_mlp=48, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        max_position_embeddings=128, **SMALL,
    )  # fmt: skip
    model, sequences = adapted(folder_of(config)), rows(12, 9)
    assert not any("router" in name for name in model.parameters)
    trained(model, sequences)


def test_what_reads_no_text_gets_no_adapter(folder_of):
    config = transformers.Gemma3Config(
        text_config={**SMALL, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8,
                     "max_position_embeddings": 4096, "sliding_window": 16},
        vision_config={**SMALL, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
    )  # fmt: skip
    folder = folder_of(config)
    model = adapted(folder)
    (-completion_logps(model, rows(12, 9)).mean()).backward()
    assert model.parameters and not any("vision" in name for name in model.parameters)
    assert all(parameter.grad is not None for parameter in model.parameters.values())
    assert context_of(folder) == 4096  # of the text's own section


@pytest.mark.parametrize(
    "config",
    [
        transformers.RwkvConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
            intermediate_size=48, context_length=128,
        ),
        transformers.LlamaConfig(vocab_size=320, max_position_embeddings=128, **SMALL),
    ],
    ids=["rwkv", "llama"],
)  # fmt: skip
def test_an_answer_does_not_depend_on_what_it_was_batched_with(folder_of, config):
    folder = folder_of(config)
    targets = {"targets": ["key", "value"]} if config.model_type == "rwkv" else {}
    model, encoder = adapted(folder, **targets), load_encoder(folder)
    prompts = [own[own > 0].tolist() for own in rows(3, 12, 27).input_ids]
    together = continue_tokens(model, encoder, prompts, 8)
    assert together == [continue_tokens(model, encoder, [own], 8)[0] for own in prompts]


def test_a_checkpoints_classes_in_another_order(folder_of):
    """Its head is for its own classes: with others it starts again, with the same it is kept."""
    config = transformers.LlamaConfig(vocab_size=320, num_labels=2, pad_token_id=0, **SMALL)
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    folder = folder_of(config, factory=transformers.AutoModelForSequenceClassification)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(folder).score.weight
    kept = load_backbone(folder, pad_token_id=0, classes=("no", "yes"))
    anew = load_backbone(folder, pad_token_id=0, classes=("yes", "no"))
    assert torch.equal(kept.score.weight, own)
    assert not torch.equal(anew.score.weight, own) and anew.score.weight.std() < 0.05
    again = load_backbone(folder, pad_token_id=0, classes=("yes", "no"))
    assert torch.equal(anew.score.weight, again.score.weight)


def test_what_peft_puts_no_adapter_on_is_left_out_or_told(folder_of):
    """Fused kernels of Mamba go past a layer; the others have adapters by default."""
    config = transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2)
    folder = folder_of(config)
    names = adapted(folder).parameters
    assert any("in_proj" in name for name in names) and not any(
        "out_proj" in name for name in names
    )
    with pytest.raises(
        ModelError, match=r"'out_proj': an adapter there would not learn .* PEFT refuses it"
    ):
        adapted(folder, targets=["out_proj"])


def without(file, ends):
    """Take the tensors out of a file whose names end so."""
    kept = {n: t for n, t in load_file(file).items() if not n.endswith(ends)}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_checkpoint_without_all_weights_is_refused(folder_of):
    """transformers would make the missing ones up, and say so where nobody looks."""
    folder = folder_of(transformers.LlamaConfig, tie_word_embeddings=False, **SMALL)
    without(f"{folder}/model.safetensors", ("lm_head.weight", "1.mlp.up_proj.weight"))
    with pytest.raises(ModelError) as told:
        load_backbone(folder, pad_token_id=0)
    assert "lack 2 of LlamaForCausalLM's tensors, such as lm_head.weight" in str(told.value)
    with pytest.raises(
        ModelError,
        match=r"lack 1 of LlamaForSequenceClassification.s tensors, such as model\.layers\.1\.mlp\.up",
    ):
        load_backbone(folder, pad_token_id=0, classes=("a", "b"))


def test_an_adapter_without_all_tensors_is_refused(folder_of, tmp_path):
    folder = folder_of(transformers.LlamaConfig, **SMALL)
    adapted(folder).save(tmp_path / "adapter")
    without(tmp_path / "adapter" / "adapter_model.safetensors", ("1.mlp.up_proj.lora_B.weight",))
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*1\.mlp\.up_proj\.lora_B"):
        load_adapter(load_backbone(folder, pad_token_id=0), tmp_path / "adapter")


def test_noise_of_a_router_is_off_where_there_is_a_reference(folder_of):
    """PhiMoE's holds a bound of evaluation too: it may not be set to 0."""
    config = transformers.PhimoeConfig(
        vocab_size=320, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
        router_jitter_noise=0.3, input_jitter_noise=0.3, **SMALL,
    )  # fmt: skip
    backbone = load_backbone(folder_of(config), pad_token_id=0)
    ids = rows(12).input_ids
    with torch.no_grad():
        before = backbone(input_ids=ids).logits
        noisy = backbone.train()(input_ids=ids).logits
        switch_dropout_off(backbone)
        after, training = (
            backbone.eval()(input_ids=ids).logits,
            backbone.train()(input_ids=ids).logits,
        )
    assert torch.equal(after, before) and torch.equal(training, before)
    assert not torch.equal(noisy, before)


def test_targets_that_no_text_passes(folder_of):
    """A decoder's cross-attention has layers of the same names."""
    config = transformers.BartConfig(
        vocab_size=320, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    folder = folder_of(config)
    names = adapted(folder, targets=["k_proj"]).parameters
    assert len(names) == 4 and not any("encoder_attn" in name for name in names)
    with pytest.raises(
        ModelError, match=r"'encoder_attn\.k_proj': an adapter there would not learn"
    ):
        adapted(folder, targets=["encoder_attn.k_proj"])


CLASSES = ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("config", "padding"),
    [
        (transformers.LlamaConfig(vocab_size=320, pad_token_id=3, **SMALL), 0),
        (transformers.LlamaConfig(vocab_size=320, **SMALL), 0),
        (transformers.RobertaConfig(vocab_size=320, pad_token_id=3, **SMALL), 3),
    ],
    ids=["llama", "llama without", "roberta"],
)
def test_a_classifiers_padding_is_named_where_its_head_reads_it(folder_of, config, padding):
    """Llama's reads the last token before padding; RoBERTa counts positions from its own when it is made."""
    config.num_labels = 2
    folder = folder_of(config, factory=transformers.AutoModelForSequenceClassification)
    model = load_backbone(folder, pad_token_id=0, classes=CLASSES)
    assert model.config.pad_token_id == padding
    sequences = rows(12, 9)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, config=model.config
    )
    ids, mask = sequences.input_ids, sequences.attention_mask
    with torch.no_grad():
        together = again(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :10]).logits
    assert torch.allclose(together[1:], alone, atol=1e-5)


def test_a_classifiers_padding_is_named_in_the_section_of_the_text(folder_of):
    config = transformers.Gemma3Config(
        text_config={**SMALL, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 3},
        vision_config={**SMALL, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4, num_labels=2,
    )  # fmt: skip
    folder = folder_of(config, factory=transformers.AutoModelForSequenceClassification)
    model = load_backbone(folder, pad_token_id=0, classes=CLASSES)
    assert model.config.text_config.pad_token_id == 0


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_an_encoder_decoder_that_does_not_say_where_it_starts(folder_of, kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=0, decoder_start_token_id=0, num_labels=2,
    )  # fmt: skip
    folder = folder_of(config, factory=transformers.AutoModelForSequenceClassification)
    names = adapted(folder, classes=CLASSES).parameters
    assert any("decoder" in name for name in names)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder_start_token_id": None}))
    with pytest.raises(ModelError) as told:
        load_backbone(folder, pad_token_id=0, classes=CLASSES)
    assert str(told.value) == (
        f"{kind}ForSequenceClassification cannot be trained: its configuration does not say with which "
        "token its decoder starts; set decoder_start_token_id in its config.json (T5's is its pad_token_id)"
    )
    with pytest.raises(ModelError) as told:
        load_backbone(folder, pad_token_id=0)
    assert str(told.value) == (
        f"{folder} is a {kind.lower()!r}, of which transformers has no causal language model "
        "(AutoModelForCausalLM); take another model"
    )


def test_of_experts_that_are_modules_a_row_passes_some():
    """Other lists have parts that are never used, such as those of each block in a shared one."""
    assert _of_any_expert("model.layers.1.experts.3.up") == _of_any_expert(
        "model.layers.1.experts.0.up"
    )
    assert _of_any_expert("model.layers.1.experts.3.up") != _of_any_expert(
        "model.layers.0.experts.3.up"
    )
    assert _of_any_expert("layers.1.up_list.1.0") != _of_any_expert("layers.1.up_list.0.0")


def test_the_first_line_of_an_error_says_something():
    assert first_line(ValueError("Validation of 'x':\n    it must be 0\nmore")) == (
        "Validation of 'x': it must be 0"
    )
    assert first_line(ValueError("short\nlong")) == "short"
    assert first_line(ValueError()) == "ValueError"


def test_a_tokenizer_without_an_end_token_ends_answers_as_the_model_does(folder_of):
    folder = folder_of(transformers.LlamaConfig, eos_token_id=2, **SMALL)
    file = Path(folder) / "tokenizer_config.json"
    own = {**json.loads(file.read_text()), "eos_token": None}
    file.write_text(json.dumps(own))
    encoder = load_encoder(folder)
    assert encoder.tokenizer.eos_token_id is None
    assert tokenize([Instruction(0, "Tom.", " He ran.")], encoder, 64).tokens[-1] == 2
