"""LoRA: our tensors are PEFT's, the start is the base model, wrong targets are told the right ones."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter, load_adapter
from fedloom.models.load import load_backbone

IDS = torch.arange(3, 15)[None]


def build(folder, seed=0, classes=(), **settings):
    backbone = load_backbone(str(folder), pad_token_id=0, classes=classes)
    adapter = attach_adapter(
        backbone, AdapterSettings(**settings), classification=bool(classes), seed=seed
    )
    return AdapterModel(adapter, 0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def perturbed(model):
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.read().items()}


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_names_and_values_are_those_of_peft(model_folder, tmp_path, classes):
    model = build(model_folder, classes=classes)
    model.write(perturbed(model))
    model.save(tmp_path)
    saved, ours = load_file(tmp_path / "adapter_model.safetensors"), model.read()
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in ours)
    backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes)
    again = peft.PeftModel.from_pretrained(backbone, str(tmp_path))
    with torch.no_grad():
        found = again(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(found, logits(model))


def test_saving_twice_gives_the_same_bytes(model_folder, tmp_path):
    for name in ("a", "b"):
        build(model_folder).save(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_the_start_is_the_base_model_and_comes_from_the_seed(model_folder):
    model = build(model_folder)
    with model.reference():
        base = logits(model)
    assert torch.equal(logits(model), base)
    model.write(perturbed(model))
    assert not torch.equal(logits(model), base)
    with model.reference():
        assert torch.equal(logits(model), base)
    first, again, other = (build(model_folder, seed).read() for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_what_is_read_is_a_copy(model_folder):
    model = build(model_folder)
    before = model.read()
    kept = {n: t.clone() for n, t in before.items()}
    model.write(perturbed(model))
    assert all(torch.equal(before[n], kept[n]) for n in before)


def test_targets_that_match_nothing_are_told_what_would(model_folder):
    with pytest.raises(
        ModelError, match=r"'query' matches no linear layer .*q_proj.*v_proj.*all-linear"
    ):
        build(model_folder, targets=["q_proj", "query"])


def test_a_folder_that_is_no_adapter_or_another_models(model_folder, tmp_path):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    with pytest.raises(ModelError, match="no adapter_config"):
        load_adapter(backbone, tmp_path)
    build(model_folder, rank=4).save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 2'))
    with pytest.raises(ModelError, match="does not fit this model"):
        load_adapter(backbone, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="does not fit this model: Error while deserializing"):
        load_adapter(load_backbone(str(model_folder), pad_token_id=0), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_adapter(backbone, tmp_path)


KINDS = {
    "lora in the last block": {"layers": 1},
    "lora in the first": {"layers": [0], "targets": ["q_proj", "v_proj"]},
    "full": {"kind": "full", "layers": [1]},
    "ia3": {"kind": "ia3"},
    "ia3 in the last block": {"kind": "ia3", "layers": 1},
    "prompt": {"kind": "prompt", "virtual_tokens": 5},
    "prompt from text": {"kind": "prompt", "virtual_tokens": 5, "initial_text": "Answer:"},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 5, "encoder_width": 24},
}


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")], ids=["causal", "classification"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_loaded_and_trained_by_peft(model_folder, tmp_path, kind, classes):
    prompts = kind.startswith("p")
    if classes and prompts:
        with pytest.raises(ModelError, match="needs a causal objective"):
            build(model_folder, classes=classes, **KINDS[kind])
        return
    model = build(model_folder, classes=classes, **KINDS[kind])
    start = logits(model)
    with model.reference():
        base = logits(model)
    if not prompts:
        assert torch.allclose(start, base, atol=1e-6)
    model.write(perturbed(model))
    assert not torch.allclose(logits(model), start)
    model.save(tmp_path)
    again = load_adapter(
        load_backbone(str(model_folder), pad_token_id=0, classes=classes), tmp_path
    )
    with torch.no_grad():
        found = again(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(found, logits(model))


def test_only_the_chosen_blocks_are_adapted(model_folder):
    blocks = {
        kind: {name.split("layers.")[1][0] for name in build(model_folder, **settings).parameters}
        for kind, settings in KINDS.items()
        if kind != "ia3" and not kind.startswith("p")
    }
    assert blocks == {
        "lora in the last block": {"1"},
        "lora in the first": {"0"},
        "full": {"1"},
        "ia3 in the last block": {"1"},
    }
    whole = build(model_folder, kind="full", layers=[1], targets=["q_proj"])
    assert [tuple(p.shape) for p in whole.parameters.values()] == [(32, 32)]


@pytest.mark.parametrize("layers", [3, [2], [0, 7]])
def test_blocks_that_are_not_there_are_named(model_folder, layers):
    with pytest.raises(ModelError, match="this model has 2 blocks, 0 to 1"):
        build(model_folder, layers=layers)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "ia3", "rank": 4}, "adapter.rank is a setting of lora"),
        ({"kind": "lora", "virtual_tokens": 3}, "adapter.virtual_tokens is a setting of prompt"),
        ({"kind": "prompt", "layers": 1}, "prompt chooses no layers"),
        ({"kind": "ptuning", "targets": ["q_proj"]}, "ptuning chooses no layers"),
        ({"kind": "prompt", "encoder_width": 8}, "adapter.encoder_width is a setting of ptuning"),
        ({"kind": "ptuning", "initial_text": "x"}, "adapter.initial_text is a setting of prompt"),
        ({"layers": 0}, "from 1"),
        ({"layers": []}, "from 0"),
        ({"layers": [-1]}, "from 0"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    (complaint,) = AdapterSettings(**settings).contradictions()
    assert words in complaint


def test_ia3_chooses_its_own_layers_of_architectures_it_knows(model_folder):
    with pytest.raises(ModelError, match="chooses its own layers"):
        build(model_folder, kind="ia3", targets=["q_proj"])
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    backbone.config.model_type = "unheard-of"
    with pytest.raises(ModelError, match="knows the layers of llama, mistral"):
        attach_adapter(backbone, AdapterSettings(kind="ia3"))


def test_parties_in_turn_hold_parameters_of_their_own(model_folder):
    """A graph made with one party's parameters is still right after another's have been held."""
    model = build(model_folder)
    own, other = (model.parameters_of(t) for t in (perturbed(model), model.read()))
    model.hold(own)
    loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().sum()
    model.hold(other)
    loss.backward()
    assert all(p.grad is None for p in other.values())
    again = {n: p.grad.clone() for n, p in own.items()}
    for parameter in own.values():
        parameter.grad = None
    model.hold(own)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().sum().backward()
    assert all(torch.equal(again[n], p.grad) for n, p in own.items())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_on_a_tied_output_layer_is_untied_when_it_is_loaded(
    model_folder, tmp_path, kind
):
    """Merged into the output layer, it would be in the embeddings too."""
    ids = torch.tensor([[1, 5, 9, 7]])
    settings = AdapterSettings(kind=kind, targets=["lm_head"])
    model = AdapterModel(
        attach_adapter(load_backbone(str(model_folder), pad_token_id=0), settings), 0
    )
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    model.save(tmp_path)
    loaded = load_adapter(load_backbone(str(model_folder), pad_token_id=0), tmp_path)
    with torch.no_grad():
        before = loaded(input_ids=ids).logits
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, before, atol=1e-4)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize(
    "inside",
    [
        lambda model: model.reference(),
        lambda model: model.reference(model.read()),
        lambda model: model.evaluating(),
    ],
    ids=["base model", "start", "evaluation"],
)
def test_a_pass_that_fails_leaves_the_model_as_it_was(model_folder, inside):
    """Where memory does not suffice, smaller passes follow, and then training goes on."""
    model = build(model_folder)
    model.write(perturbed(model))
    model.model.train()
    shape, held, said = model.shape, model.parameters, logits(model)
    training = []

    def run_out():
        with inside(model):
            training.append(model.model.training)
            raise MemoryError

    with pytest.raises(MemoryError):
        run_out()
    assert training == [False] and model.model.training
    assert model.shape == shape and model.parameters == held
    assert torch.equal(logits(model), said)
