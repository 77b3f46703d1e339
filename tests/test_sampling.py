"""The sample of a commit: the same in every run of it, another one at another commit."""

import sampling


def names(parameters, mark):
    return [p.values for p in parameters if mark in {m.name for m in p.marks}]


def chosen_at(monkeypatch, commit):
    monkeypatch.setattr(sampling, "commit", lambda: commit)
    found = sampling.sampled("abcdefghij", 3)
    assert names(found, "full") == [(letter,) for letter in "abcdefghij"]
    assert names(found, "sample") == names(found, "slow")
    return names(found, "slow")


def test_a_commit_draws_its_own_sample(monkeypatch):
    one, again, other = (chosen_at(monkeypatch, commit) for commit in ("1", "1", "2"))
    assert len(one) == 3 and one == again != other


def test_what_is_tried_less_is_tried_whole_too():
    found = sampling.tries((1, 2), (10, 20))
    assert names(found, "slow") == [(1, 2)] and names(found, "full") == [(10, 20)]
