"""Batches: order, padding, and the mismatched completions of KTO."""

import numpy as np
import pytest
import torch

from fedloom.data.batching import collate, epoch_batches
from fedloom.data.client_rows import TokenShare, _next_others, mismatch
from fedloom.data.examples import Feedback, Preference, unpair
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder

CPU = torch.device("cpu")


@pytest.fixture
def encoder(model_folder):
    return load_encoder(str(model_folder))


def feedback(encoder, count):
    rows = [Feedback(i, f"Q{i}:", f" answer {i}" * (i % 3 + 1), i % 2 == 0) for i in range(count)]
    return tokenize(rows, encoder, 100)


def test_every_epoch_sees_every_row_once_in_another_order():
    batches = list(epoch_batches(10, 4, np.random.default_rng(0), epochs=2, steps=None))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10)) and list(first) != list(second)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_steps_end_wherever_they_fall_in_an_epoch(steps):
    batches = list(epoch_batches(10, 4, np.random.default_rng(0), steps=steps))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4][:steps]


def test_collate_pads_right_and_marks_the_completion(encoder):
    pairs = [Preference(7, "Q:", " yes yes yes", " no"), Preference(9, "A long one:", " a", " b c")]
    share = TokenShare(tokenize(pairs, encoder, 100))
    batch = collate(share, np.array([0, 1]), 0, CPU)
    assert batch.rows == (7, 9) and len(batch) == 2
    sequences = batch.sequences
    assert sequences.input_ids.shape[0] == 4  # chosen, chosen, rejected, rejected
    for row, number in enumerate((0, 2, 1, 3)):
        tokens, prompt = share.tokens.sequence(number)
        assert sequences.input_ids[row, : len(tokens)].tolist() == tokens.tolist()
        assert sequences.attention_mask[row].sum() == len(tokens)
        assert sequences.completion_mask[row].sum() == len(tokens) - prompt
        assert not sequences.completion_mask[row, :prompt].any()
    assert sequences.first_completion == share.tokens.prompts.min()
    assert batch.tokens == len(share.tokens.tokens)


def test_mismatched_rows_keep_their_prompt_and_take_each_completion_once(encoder):
    tokens = feedback(encoder, 12)
    mixed = mismatch(tokens, np.random.default_rng(0), 100, 1)
    own = [tokens.sequence(i) for i in range(12)]
    completions = [bytes(s[p:]) for s, p in own]
    taken = []
    for i in range(12):
        sequence, prompt = mixed.sequence(i)
        assert sequence[:prompt].tolist() == own[i][0][: own[i][1]].tolist()
        taken.append(completions.index(bytes(sequence[prompt:])))
        assert taken[-1] != i
    assert sorted(taken) == list(range(12))


def test_the_other_answer_to_the_same_prompt_is_no_mismatch(encoder):
    pairs = [Preference(i, f"Q{i}:", f" good {i}", f" bad {i}") for i in range(6)]
    tokens = tokenize(unpair(pairs), encoder, 100)
    mixed = mismatch(tokens, np.random.default_rng(0), 100, 1)
    for i in range(12):
        sequence, prompt = mixed.sequence(i)
        assert str(i // 2) not in encoder.tokenizer.decode(sequence[prompt:])


@pytest.mark.parametrize(
    ("prompts", "others"),
    [
        ("aaba", [2, 2, 3, 2]),
        ("abbc", [1, 3, 3, 0]),
        ("aabb", [2, 2, 0, 0]),
        ("aaaa", [1, 2, 3, 0]),  # of prompts all alike just the next row
    ],
)
def test_the_next_row_with_another_prompt(prompts, others):
    keys = [prompt.encode() for prompt in prompts]
    assert _next_others(np.arange(4), keys) == others
    cycle = np.array([2, 0, 3, 1])  # the same round, of rows with other numbers
    moved = [keys[place] for place in np.argsort(cycle)]
    assert _next_others(cycle, moved) == [cycle[place] for place in others]


def test_of_prompts_all_alike_each_is_looked_at_twice():
    class Counted(bytes):
        compared = 0

        def __ne__(self, other):
            Counted.compared += 1
            return bytes(self) != bytes(other)

        __hash__ = bytes.__hash__

    _next_others(np.arange(100), [Counted(b"a") for _ in range(100)])
    assert Counted.compared == 200


def test_one_row_has_no_mismatch(encoder):
    assert mismatch(feedback(encoder, 1), np.random.default_rng(0), 100, 1) is None


def test_taken_rows_keep_what_was_computed_about_them(encoder):
    pairs = [Preference(i, f"Q{i}:", f" yes {i}", f" no {i}") for i in range(5)]
    tokens = tokenize(pairs, encoder, 100)
    logps = torch.arange(10.0)  # of the chosen and the rejected answer of each row in turn
    share = TokenShare(tokens, reference_logps=logps).take(np.array([3, 1]))
    assert share.reference_logps.tolist() == [6.0, 7.0, 2.0, 3.0]
    assert share.tokens.rows.tolist() == [3, 1]
    single = feedback(encoder, 4)
    mismatched = mismatch(single, np.random.default_rng(0), 100, None)
    own = TokenShare(single, mismatched, torch.arange(4.0), 10 + torch.arange(4.0))
    taken = own.take(np.array([2, 0]))
    assert taken.reference_logps.tolist() == [2.0, 0.0]
    assert taken.mismatched_reference_logps.tolist() == [12.0, 10.0]
    assert taken.mismatched.sequence(0)[0].tolist() == mismatched.sequence(2)[0].tolist()
