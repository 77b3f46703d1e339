"""Tokens on disk: what is read is what was written, or it is written again."""

import os
import random

import numpy as np
import pytest

from fedloom.data import tokenize as module
from fedloom.data.examples import Instruction, Preference
from fedloom.data.token_file import read_tokens
from fedloom.data.token_set import ARRAYS
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder

PAIRS = [Preference(i, f"Q{i}:", " yes" * (i % 5 + 1), " no") for i in range(1, 30)]
PAIRS.insert(7, Preference(99, "Q:", " a", ""))  # nothing of it is left


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(str(model_folder))


def equal(left, right):
    names = ("tokens", "trained", *ARRAYS)
    same = [np.array_equal(getattr(left, name), getattr(right, name)) for name in names]
    return all(same) and left.dropped == right.dropped and left.width == right.width


def test_a_file_holds_what_was_tokenised_and_is_mapped(encoder, tmp_path, monkeypatch):
    plain = tokenize(PAIRS, encoder, 40)
    assert len(plain.dropped) == 1
    monkeypatch.setattr(module, "TOGETHER", 4)  # several parts
    made = tokenize(PAIRS, encoder, 40, (), tmp_path)
    (file,) = tmp_path.iterdir()
    found = read_tokens(file, mapped=True)
    assert equal(made, plain) and equal(found, plain)
    assert made.tokens.flags.owndata and not found.tokens.flags.writeable
    assert file.stat().st_mode & 0o777 == 0o600


def test_of_a_part_that_is_written_no_token_stays_in_memory(encoder):
    """2 GB of rows grew to more than that, a part's tokens after another's, each held by a slice of none."""
    part = tokenize(PAIRS, encoder, 40)
    bare = part.without_tokens()
    arrays = (bare.tokens, bare.trained, *(getattr(bare, name) for name in ARRAYS))
    for array in arrays:
        assert not np.shares_memory(array, part.tokens) and array.base is not part.tokens
        assert array.base is None or array.base.nbytes <= 2 * array.nbytes


def test_what_is_known_of_sequences_is_what_their_tokens_say(encoder):
    from dataclasses import replace

    found = tokenize(PAIRS, encoder, 40)
    bare = replace(found, counted=None, common=None, largest=None)
    assert np.array_equal(bare.completion_lengths, found.completion_lengths)
    assert np.array_equal(bare.common_starts, found.common_starts)
    assert bare.largest_token == found.largest_token == found.tokens.max()
    single = tokenize([Instruction(1, "Q:", " yes yes")], encoder, 40)
    assert single.common_starts.tolist() == [len(single.tokens) - 1]


@pytest.mark.parametrize("positions", [[4, 5, 6, 7], [7, 2, 20], [], [0]])
def test_some_examples_are_those(encoder, tmp_path, positions):
    whole = tokenize(PAIRS, encoder, 40, (), tmp_path)
    some = whole.take(np.array(positions, np.int64))
    assert some.rows.tolist() == [whole.rows[place] for place in positions]
    numbers = [2 * place + side for place in positions for side in (0, 1)]
    for own, number in enumerate(numbers):
        assert some.sequence(own)[0].tolist() == whole.sequence(number)[0].tolist()
        assert some.mask(own).tolist() == whole.mask(number).tolist()
    assert some.completion_lengths.tolist() == [whole.completion_lengths[n] for n in numbers]


@pytest.mark.parametrize("damage", ["torn", "longer", "empty", *range(6)])
def test_a_damaged_file_is_written_again(encoder, tmp_path, damage):
    made = tokenize(PAIRS, encoder, 40, (), tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "torn":
        content = content[: len(content) // 2]
    elif damage == "longer":
        content += b"\0" * 8
    elif damage == "empty":
        content = b""
    else:
        content[random.Random(damage).randrange(len(content))] ^= 1 << damage
    file.write_bytes(content)
    assert read_tokens(file) is None
    assert equal(tokenize(PAIRS, encoder, 40, (), tmp_path), made)
    assert equal(read_tokens(file), made)


def test_other_rows_settings_or_a_column_are_another_file(encoder, tmp_path):
    tokenize(PAIRS, encoder, 40, (), tmp_path)
    tokenize(PAIRS, encoder, 41, (), tmp_path)
    tokenize(PAIRS, encoder, 40, (), tmp_path, keep_alike=True)
    tokenize(PAIRS[1:], encoder, 40, (), tmp_path)
    tokenize([*PAIRS[1:], PAIRS[0]], encoder, 40, (), tmp_path)
    tokenize(PAIRS, encoder, 40, (), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_cache_has_a_bound_and_what_was_read_longest_ago_goes_first(
    encoder, tmp_path, monkeypatch
):
    first = tokenize(PAIRS, encoder, 40, (), tmp_path)
    (oldest,) = tmp_path.iterdir()
    tokenize(PAIRS, encoder, 41, (), tmp_path)
    other = next(file for file in tmp_path.iterdir() if file != oldest)
    os.utime(oldest, (1, 1))
    os.utime(other, (2, 2))
    tokenize(PAIRS, encoder, 40, (), tmp_path)  # read now: the other is the one of longest ago
    monkeypatch.setattr(module, "MOST_BYTES", 2 * oldest.stat().st_size + 100)
    tokenize(PAIRS, encoder, 42, (), tmp_path)
    assert oldest.exists() and not other.exists()
    monkeypatch.setattr(module, "MOST_BYTES", 100)  # less than the file itself
    assert equal(tokenize(PAIRS, encoder, 40, (), tmp_path), first)
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_to_write_tokens_are_the_same(encoder, tmp_path):
    (tmp_path / "taken").write_text("a file")
    made = tokenize(PAIRS, encoder, 40, (), tmp_path / "taken" / "tokens")
    assert equal(made, tokenize(PAIRS, encoder, 40))
