"""Tokens: what is kept when a text is too long, what is dropped, and that TRL would agree."""

import numpy as np
import pytest

from fedloom.data.examples import Feedback, Instruction, Labelled, Preference
from fedloom.data.tokenize import NOTHING_LEFT, tokenize
from fedloom.data.truncation import truncate
from fedloom.evaluation.generate import load_encoder


@pytest.fixture
def encoder(model_folder):
    return load_encoder(str(model_folder))


def text(encoder, tokens, number, part):
    sequence, prompt = tokens.sequence(number)
    return encoder.tokenizer.decode(sequence[:prompt] if part == "prompt" else sequence[prompt:])


def test_a_completion_ends_with_the_end_token_and_the_prompt_begins_with_the_start(encoder):
    tokens = tokenize([Instruction(3, "Ada asks:", " here it is.")], encoder, 100)
    assert text(encoder, tokens, 0, "prompt") == "<s>Ada asks:"
    assert text(encoder, tokens, 0, "completion") == " here it is.</s>"
    assert tokens.rows.tolist() == [3]


def test_both_sides_of_a_pair_share_the_prompt(encoder):
    tokens = tokenize([Preference(0, "Q:", " yes yes yes", " no")], encoder, 100)
    assert tokens.width == 2 and len(tokens) == 1
    (chosen, p), (rejected, q) = tokens.sequence(0), tokens.sequence(1)
    assert p == q and chosen[:p].tolist() == rejected[:q].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "bos", "expected"),
    [
        (5, 3, None, (5, 3)),  # fits in 8
        (9, 3, None, (5, 3)),  # the prompt loses its start
        (9, 20, None, (1, 7)),  # the completion loses its end, one prompt token stays
    ],
)
def test_truncation(prompt, completion, bos, expected):
    left, (right,) = truncate(list(range(100, 100 + prompt)), [list(range(completion))], 8, bos)
    assert (len(left), len(right)) == expected
    assert left == list(range(100, 100 + prompt))[-len(left) :]
    assert right == list(range(completion))[: len(right)]


def test_a_start_token_survives_truncation():
    assert truncate([1, 5, 6, 7, 8], [[20, 21]], 5, 1) == ([1, 7, 8], [[20, 21]])


def test_pairs_are_cut_alike():
    prompt, (chosen, rejected) = truncate([5, 6, 7, 8], [[1, 2, 3], [4]], 5, None)
    assert prompt == [7, 8] and chosen == [1, 2, 3] and rejected == [4]


def test_an_empty_completion_is_dropped_and_counted(encoder):
    tokens = tokenize([Feedback(0, "Q:", "", True), Feedback(1, "Q:", " a", False)], encoder, 50)
    assert [(lost.row, lost.reason) for lost in tokens.dropped] == [(0, NOTHING_LEFT)]
    assert tokens.rows.tolist() == [1] and tokens.index.tolist() == [1]
    assert tokens.labels.tolist() == [0]


def test_an_empty_prompt_still_has_a_token_before_the_completion(encoder):
    tokens = tokenize([Instruction(0, "", "a text alone")], encoder, 50)
    assert tokens.prompts.tolist() == [1]
    assert text(encoder, tokens, 0, "completion") == "a text alone</s>"


def test_chat_messages_go_through_the_template(encoder):
    prompt = ({"role": "user", "content": "hi"},)
    answer = ({"role": "assistant", "content": "hello"},)
    tokens = tokenize([Instruction(0, prompt, answer)], encoder, 50)
    assert text(encoder, tokens, 0, "prompt") == "<s>user: hi\nassistant:"
    assert text(encoder, tokens, 0, "completion") == " hello</s>"


def test_labels_are_ids_in_the_order_of_the_classes(encoder):
    tokens = tokenize([Labelled(0, "a", "x"), Labelled(1, "b", "y")], encoder, 50, ("x", "y"))
    assert tokens.labels.tolist() == [0, 1]


def test_take_keeps_rows_together(encoder):
    pairs = [Preference(i, f"Q{i}:", f" a{i}", f" b{i}") for i in range(5)]
    tokens = tokenize(pairs, encoder, 50).take(np.array([3, 1]))
    assert tokens.rows.tolist() == [3, 1]
    assert text(encoder, tokens, 3, "completion") == " b1</s>"


def test_the_cache_gives_the_same_and_survives_damage(encoder, tmp_path):
    rows = [Preference(i, f"Q{i}:", f" a{i}", f" b{i}") for i in range(5)]
    first = tokenize(rows, encoder, 50, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_ino
    again = tokenize(rows, encoder, 50, cache=tmp_path)
    assert file.stat().st_ino == written
    file.write_bytes(file.read_bytes()[:40])
    mended = tokenize(rows, encoder, 50, cache=tmp_path)
    for other in (again, mended):
        for name in ("index", "rows", "tokens", "starts", "prompts", "labels"):
            assert np.array_equal(getattr(first, name), getattr(other, name))
    tokenize(rows, encoder, 49, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another length is another entry


def test_a_part_is_what_its_rows_are_one_by_one_and_nothing_of_it_is_copied(encoder):
    pairs = [Preference(row, f"Q{row}:" * (row + 1), " yes" * row, " no no") for row in range(5)]
    tokens = tokenize(pairs, encoder, 20)
    part, again = tokens.part(1, 4), tokens.take(np.array([3, 2, 1])).take(np.array([2, 1, 0]))
    for name in ("index", "rows", "tokens", "trained", "starts", "prompts", "cut", "escaped", "labels"):  # fmt: skip
        np.testing.assert_array_equal(getattr(part, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(tokens.take(np.arange(1, 4)), name), getattr(part, name))  # fmt: skip
    assert len(part) == 3 and np.shares_memory(part.tokens, tokens.tokens)
    assert len(tokens.part(4, 4)) == 0 == len(tokens.part(0, 0).tokens)
