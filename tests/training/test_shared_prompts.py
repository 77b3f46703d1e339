"""Pairs whose prompt is read once: which token sees which, and which models may read so."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MambaConfig, MistralConfig

from fedloom.data.batching import collate, read_once
from fedloom.data.client_rows import TokenShare
from fedloom.data.token_set import TokenSet
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.objectives.logps import completion_logps
from fedloom.training.layout import Budget, group_places, groups, row_costs, saves
from fedloom.training.shared_prompts import shares_prompts

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "num_hidden_layers": 2}
WIDTHS = {"hidden_size": 16, "num_attention_heads": 2}
KNOWN = {
    "mistral": MistralConfig(
        **SIZES, **WIDTHS, intermediate_size=32, num_key_value_heads=1, sliding_window=12
    ),
    "gpt2": GPT2Config(vocab_size=64, n_layer=2, n_embd=16, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "bloom": BloomConfig(vocab_size=64, n_layer=2, hidden_size=16, n_head=2),
    "mamba": MambaConfig(**SIZES, hidden_size=16, state_size=4),
}  # fmt: skip


def pairs(*rows):
    """Return pairs, each ``(prompt, chosen, rejected)`` of token ids."""
    sequences = [[*prompt, *own] for prompt, *answers in rows for own in answers]
    prompts = [len(prompt) for prompt, *answers in rows for _ in answers]
    count = len(rows)
    lengths = [len(own) for own in sequences]
    return TokenSet(
        2, np.arange(count), np.arange(count), np.concatenate(sequences).astype(np.int32),
        np.concatenate([np.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)]),
        np.concatenate([[0], np.cumsum(lengths)]), np.array(prompts), np.zeros((2 * count, 2), np.int64),
        np.zeros(count, bool), np.full(count, -1), (),
    )  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(KNOWN[name]).requires_grad_(False)
    backbone.config.use_cache = False
    targets = ["in_proj"] if name == "mamba" else "all-linear"
    return AdapterModel(attach_adapter(backbone, AdapterSettings(rank=2, targets=targets)), 0)


def test_what_is_read_and_which_token_sees_which():
    # the answers begin alike: 7 is read once too
    tokens = pairs(([4, 5], [7, 8], [7, 9, 10]), ([6], [11], [12]))
    assert tokens.common_starts.tolist() == [3, 1]
    assert tokens.costs().tolist() == [10, 4] and tokens.costs(shared_prompts=True).tolist() == [
        6,
        3,
    ]
    reading = read_once(tokens, [np.array([0]), np.array([1])], pad=0)
    assert reading.input_ids.tolist() == [[4, 5, 7, 8, 9, 10], [6, 11, 12, 0, 0, 0]]
    assert reading.position_ids.tolist() == [[0, 1, 2, 3, 3, 4], [0, 1, 1, 0, 0, 0]]
    assert reading.branches.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, -1, -1, -1]]
    assert reading.attention_mask.sum(-1).tolist() == [6, 3]
    # chosen: 7 after 5, 8 after 7; chosen of the second; rejected: 7 after 5, 9 after 7, 10 after 9
    assert reading.sources.tolist() == [1, 2, 6, 1, 2, 4, 6]
    assert reading.ends.tolist() == [3, 7, 5, 8]
    assert reading.seen()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]


def answers(*rows):
    """Return single answers, each ``(prompt, answer)`` of token ids."""
    both = pairs(*[(prompt, own, own) for prompt, own in rows])
    lengths = np.diff(both.starts)[::2]
    kept = np.concatenate(
        [np.arange(both.starts[2 * i], both.starts[2 * i + 1]) for i in range(len(rows))]
    )
    return replace(
        both, width=1, tokens=both.tokens[kept], trained=both.trained[kept],
        starts=np.concatenate([[0], np.cumsum(lengths)]), prompts=both.prompts[::2], cut=both.cut[::2],
    )  # fmt: skip


def test_answers_to_one_prompt_are_read_after_it():
    tokens = answers(([4, 5], [7]), ([6], [7]), ([4, 5], [8, 9]), ([4, 5], [7, 3]))
    assert tokens.prompt_numbers.tolist() == [0, 1, 0, 0]
    reading = read_once(tokens, [np.array([0, 2, 3]), np.array([1])], pad=0)
    assert reading.input_ids.tolist() == [[4, 5, 7, 8, 9, 7, 3], [6, 7, 0, 0, 0, 0, 0]]
    assert reading.branches.tolist() == [[0, 0, 1, 2, 2, 3, 3], [0, 1, -1, -1, -1, -1, -1]]
    assert reading.position_ids[0].tolist() == [0, 1, 2, 2, 3, 2, 3]
    # of rows 0, 2, 3, 1: the token before each that counts
    assert reading.sources.tolist() == [1, 1, 3, 1, 5, 7]
    assert reading.ends.tolist() == [2, 4, 6, 8]


def test_rows_and_their_mismatched_completions_are_two_sequences_of_an_example():
    tokens = answers(([4, 5], [7]), ([6], [8, 9]))
    both = tokens.paired(answers(([4, 5], [8, 9]), ([6], [7])))
    assert (both.width, len(both)) == (2, 2)
    assert [both.sequence(i)[0].tolist() for i in range(4)] == [
        [4, 5, 7],
        [4, 5, 8, 9],
        [6, 8, 9],
        [6, 7],
    ]
    assert both.mask(1).tolist() == [False, False, True, True] and both.prompts.tolist() == [
        2,
        2,
        1,
        1,
    ]
    assert both.common_starts.tolist() == [2, 1]


def grouped(tokens, budget=Budget(9, 100), attention=0.0, context=100, rows=None):  # noqa: B008
    rows = np.arange(len(tokens)) if rows is None else np.array(rows)
    return [own.tolist() for own in groups(tokens, rows, budget, attention, context)]


def test_which_answers_are_read_after_one_prompt():
    prompt = [3] * 8
    tokens = answers((prompt, [7, 8]), ([3], [9]), (prompt, [9, 9]), ([3], [8]), (prompt, [5]))
    # 13 places of 31; a prompt of one token saves 1 of 4, but that is worth reading once too
    assert grouped(tokens) == [[0, 2, 4], [1, 3]]
    assert grouped(tokens, rows=[4, 3, 0]) == [[4, 0], [3]]
    assert group_places(tokens, np.array([0, 2, 4])) == 13
    assert group_places(tokens, np.array([1, 3])) == 3
    assert grouped(tokens, Budget(9, 12)) == [
        [0, 2],
        [1, 3],
        [4],
    ]  # 12 places a pass, 13 would not do
    assert grouped(tokens, Budget(9, 5)) == [
        [0],
        [1, 3],
        [2],
        [4],
    ]  # no more than the longest row, 10
    assert grouped(tokens, Budget(2)) == [[0, 2], [1, 3], [4]]  # two examples a pass
    assert grouped(tokens, context=12) == [[0, 2], [1, 3], [4]]
    # where attention is all that costs, 12 x 12 places of two rows are 0.72 of twice 10 x 10, and 13 x 13 of
    # all three 0.75 of 12 x 12 + 9 x 9; in the other rows 3 x 3 are more than 0.9 of twice 2 x 2
    assert grouped(tokens, attention=1e6) == [[0, 2, 4], [1], [3]]


def test_prompts_are_read_once_where_that_saves_something():
    tokens = pairs(([3] * 8, [7, 8], [9, 10]), ([3], [7] * 9, [8] * 9))
    assert row_costs(TokenShare(tokens), shared_prompts=True).tolist() == [12, 19]
    assert saves(20, 18) and not saves(20, 19)


@pytest.mark.parametrize(("name", "shares"), [("mistral", True), ("gpt2", True), ("bloom", False), ("mamba", False)])  # fmt: skip
def test_a_model_is_asked_once_whether_it_may(name, shares):
    model = model_of(name)
    before = model.flops, model.model.training
    assert shares_prompts(model, 12) is shares and model.shared_prompts is shares
    assert (model.flops, model.model.training) == before
    model.shared_prompts = not shares  # not asked again
    assert shares_prompts(model, 12) is not shares


def test_no_sequence_is_beyond_a_window():
    model = model_of("mistral")
    assert shares_prompts(model, 12) and not shares_prompts(model, 13)
    tokens = pairs((list(range(3, 12)), [20, 21, 22], [23, 24, 25]))
    for longest in (True, False):
        own = tokens if longest else pairs((list(range(3, 14)), [20, 21, 22], [23, 24, 25]))
        plain, shared = (
            completion_logps(model, collate(TokenShare(own), np.array([0]), 0, CPU, groups=read).sequences)
            for read in (None, [np.array([0])])
        )  # fmt: skip
        assert bool((plain - shared).abs().max() < 1e-5) is longest


def test_experts_with_a_balance_term_read_each_sequence_by_itself():
    model = model_of("gpt2")
    model.alone = True
    assert not shares_prompts(model, 4)


def test_a_wrong_mask_is_noticed(monkeypatch):
    model = model_of("gpt2")
    causal = torch.ones(1, 1, 14, 14).tril().bool()
    monkeypatch.setattr(
        AdapterModel, "_attended", lambda self, reading: causal.expand(2, 1, 14, 14)
    )
    assert not shares_prompts(model, 12)
