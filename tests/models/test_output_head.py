"""What a model does with its output layer's product, and when nobody knows."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
)

from fedloom.models.output_head import output_head

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "plain": (GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2), None),
    "scaled": (CohereConfig(**SIZES, logit_scale=0.0625), 0.0625),
    "divided": (GraniteConfig(**SIZES, logits_scaling=7.0), 7.0),
    "capped": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0), 30.0),
}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name][0]).eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_follow_from_states(name):
    model, number = model_of(name), MODELS[name][1]
    head = output_head(model)
    assert head is not None and head.width == 48
    assert (head.change is None) == (number is None)
    if number is not None:  # of two that come to the same, either will do
        assert head.number in (number, 1 / number)
    ids = torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits
    with head.aside() as read:
        small = model(input_ids=ids).logits
    assert small.shape[-1] == 1
    found = head.logits(read[0].flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)  # and all is as before


def test_who_adds_something_of_its_own_is_called(monkeypatch):
    model = model_of("plain")
    real = type(model).forward

    def forward(self, *args, **options):
        output = real(self, *args, **options)
        output.logits = output.logits + torch.arange(48.0)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    assert output_head(model) is None


def test_who_has_no_output_layer_is_called(monkeypatch):
    model = model_of("plain")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert output_head(model) is None
    monkeypatch.setattr(model, "get_output_embeddings", lambda: nn.Linear(16, 48))  # another's
    assert output_head(model) is None


def test_whether_it_is_trained_is_asked_each_time():
    model = model_of("plain")
    head = output_head(model)
    assert not head.trained
    model.lm_head.weight.requires_grad_(True)
    assert head.trained
