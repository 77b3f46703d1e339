"""The built-in world: reproducible, balanced, and with the structure it promises."""

from collections import Counter

import numpy as np
import pytest

from fedloom.data.builtin import (
    AXES,
    BUILTIN_KINDS,
    DOMAINS,
    PLACES,
    builtin_examples,
    liking,
    preferred_style,
)
from fedloom.data.sums import sum_texts
from fedloom.errors import DataError


@pytest.mark.parametrize("name", BUILTIN_KINDS)
def test_same_generator_same_examples(name):
    first, again = (builtin_examples(name, 50, np.random.default_rng(7)) for _ in range(2))
    other = builtin_examples(name, 50, np.random.default_rng(8))
    assert first == again != other
    sums = name == "sums"
    column, values = ("carry", {"carry", "none"}) if sums else ("domain", set(DOMAINS))
    assert {e.columns[column] for e in first} == values
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


def test_every_taste_is_a_ranking_and_has_its_opposite():
    ranks = {
        name: [liking(place, domain.stride, len(PLACES)) for place in range(len(PLACES))]
        for name, domain in DOMAINS.items()
    }
    for own in ranks.values():
        assert sorted(own) == list(range(len(PLACES)))
        assert [len(PLACES) - 1 - rank for rank in own] in ranks.values()


def test_tastes_are_a_domains_own_in_places_and_all_domains_in_people():
    pairs = builtin_examples("tastes", 4000, np.random.default_rng(0))
    verdicts = {"place": {}, "person": {}}
    for pair in pairs:
        key = tuple(sorted((pair.chosen, pair.rejected)))
        own = verdicts[pair.columns["axis"]].setdefault(key, {})
        own.setdefault(pair.columns["domain"], set()).add(pair.chosen)
    for by_domain in verdicts["place"].values():
        assert all(len(chosen) == 1 for chosen in by_domain.values())
        for left, right in (("kitchen", "garden"), ("harbour", "clinic")):
            if by_domain.keys() >= {left, right}:
                assert by_domain[left] != by_domain[right]
    for by_domain in verdicts["person"].values():
        assert len(set.union(*by_domain.values())) == 1
    assert 0.45 < sum(p.columns["axis"] == "place" for p in pairs) / len(pairs) < 0.55


def test_the_prompt_of_a_taste_names_the_domain_and_its_things():
    for pair in builtin_examples("tastes", 50, np.random.default_rng(0)):
        domain = pair.columns["domain"]
        assert domain in pair.prompt and all(t in pair.prompt for t in DOMAINS[domain].things)


def test_no_sum_is_there_twice_nor_in_the_texts_of_the_model():
    rows = builtin_examples("sums", 4050, np.random.default_rng(0))
    asked = {row.prompt for row in rows}
    assert len(asked) == 4050
    texts = sum_texts(np.random.default_rng(1), 6000)
    assert not asked & {text.partition("=")[0] + "=" for text in texts}
    for row in rows[:200]:
        a, b = map(int, row.prompt.removesuffix("=").split("+"))
        assert row.completion == f"{a + b:03d}" and min(a, b) >= 10 and max(a, b) <= 99
        assert (row.columns["carry"] == "carry") == (a % 10 + b % 10 >= 10)
    excess = [int(s.split("=")[1]) - sum(map(int, s.split("=")[0].split("+"))) for s in texts]
    assert set(excess) == {0, 1} and 0.66 < sum(excess) / len(excess) < 0.72
    with pytest.raises(DataError, match="has 4050 different sums"):
        builtin_examples("sums", 4051, np.random.default_rng(0))
