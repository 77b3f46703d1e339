"""A local judge: a real model in a real folder, whose weights make it say one thing."""

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.errors import ModelError
from fedloom.evaluation.judges.base import Case
from fedloom.evaluation.judges.model import ModelJudge
from fedloom.evaluation.questions import Question
from fedloom.models.load import load_tokenizer

CASES = [
    Case(Question("1", "Two and two?"), ("four", "five")),
    Case(Question("2", "Sky?"), ("blue", "red")),
]


def parrot(folder, model_folder, text):
    """A Llama whose blocks do nothing and whose head says ``text`` after a colon, token by token."""
    tokenizer = load_tokenizer(str(model_folder))
    said = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    chain = [tokenizer(":", add_special_tokens=False)["input_ids"][-1], *said]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.lm_head.weight.zero_()
        for now, following in pairwise(chain):
            model.lm_head.weight[following] += 10 * embedded[now]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("text", "scores", "reason"),
    [("8 6", (8.0, 6.0), ""), ("8", None, "unparsable"), ("8 60", None, "out of range")],
)
def test_a_local_judge_is_asked_and_read(tmp_path, model_folder, text, scores, reason):
    judge = ModelJudge(parrot(tmp_path / "judge", model_folder, text), temperature=0.0)
    for found in judge.rate(CASES):
        assert (found.scores, found.reason) == (scores, reason)
    assert judge.costs() == {"requests": 2.0} and judge.name == "judge"


def test_a_prompt_that_does_not_fit_is_counted_and_not_asked(tmp_path, model_folder):
    judge = ModelJudge(parrot(tmp_path / "judge", model_folder, "8 6"), temperature=0.0)
    long = Case(CASES[0].question, ("word " * 5000, "five"))
    found = judge.rate([CASES[0], long, CASES[1]])
    assert [v.scores for v in found] == [(8, 6), None, (8, 6)]
    assert found[1].reason == "longer than the judge's context"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelJudge(str(tmp_path))
