"""The built-in world: reproducible, balanced, and with the structure it promises."""

from collections import Counter

import numpy as np
import pytest

from fedloom.data.builtin import AXES, BUILTIN_KINDS, DOMAINS, builtin_examples, preferred_style
from fedloom.errors import DataError


@pytest.mark.parametrize("name", BUILTIN_KINDS)
def test_same_generator_same_examples(name):
    first, again = (builtin_examples(name, 50, np.random.default_rng(7)) for _ in range(2))
    other = builtin_examples(name, 50, np.random.default_rng(8))
    assert first == again != other
    assert {e.columns["domain"] for e in first} == set(DOMAINS)
    assert [e.row for e in first] == list(range(50))


def test_the_contested_axes_are_preferred_either_way_in_half_the_domains():
    for axis in range(1, len(AXES)):
        assert sum(preferred_style(domain)[axis] for domain in DOMAINS) == len(DOMAINS) / 2


def test_pairs_differ_in_a_word_or_a_phrase_and_length_tells_nothing():
    pairs = builtin_examples("preferences", 2000, np.random.default_rng(0))
    longer = Counter(np.sign(len(p.chosen) - len(p.rejected)) for p in pairs)
    decided = longer[1] + longer[-1]
    assert 0.4 < longer[1] / decided < 0.6
    for pair in pairs:
        chosen, rejected = pair.chosen.split(), pair.rejected.split()
        assert pair.chosen != pair.rejected and set(chosen) & set(rejected)


def test_prompts_seldom_repeat():
    pairs = builtin_examples("preferences", 1000, np.random.default_rng(0))
    assert len({p.prompt for p in pairs}) > 900


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(DataError, match="did you mean 'builtin:preferences'"):
        builtin_examples("preference", 5, np.random.default_rng(0))
