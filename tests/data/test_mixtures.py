"""Mixtures: the draws are those of datasets.interleave_datasets, and every row is accounted for."""

import json
from collections import Counter

import numpy as np
import pytest

from fedloom.data.mixtures import NOT_DRAWN, REPEATED, drawn_counts, mixed_positions
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import partition_data

STRATEGIES = ("first_exhausted", "all_exhausted")


@pytest.mark.slow  # datasets is imported for it
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_draws_are_those_of_datasets(strategy):
    from datasets import Dataset, interleave_datasets

    sizes, weights = [300, 40, 700], [0.6, 0.1, 0.3]
    sets = [Dataset.from_dict({"of": [i] * size}) for i, size in enumerate(sizes)]
    theirs = interleave_datasets(sets, weights, seed=5, stopping_strategy=strategy)
    ours = drawn_counts(sizes, weights, strategy, np.random.default_rng(5))
    assert ours == [Counter(theirs["of"])[i] for i in range(3)]


def test_by_hand_each_row_is_drawn_equally_often_but_for_one():
    owners = np.array([0, 0, 1, 1, 1, 0])
    rng = np.random.default_rng(0)
    positions, counts = mixed_positions(owners, {"a": 1, "b": 9}, "all_exhausted", rng)
    assert counts["a"] == 3 and counts["b"] > 3 and len(positions) == sum(counts.values())
    times = Counter(positions.tolist())
    assert [times[i] for i in (0, 1, 5)] == [1, 1, 1]  # what ends it is drawn exactly once
    assert max(times[i] for i in (2, 3, 4)) - min(times[i] for i in (2, 3, 4)) <= 1
    assert positions.tolist() == sorted(positions.tolist())


def test_a_weight_that_repeats_the_others_without_end_is_refused():
    owners = np.array([0] * 50 + [1] * 50)
    with pytest.raises(DataError, match=r"domains.rare.weight = 1e-09 .* more than 100 times"):
        mixed_positions(owners, {"rare": 1e-9, "b": 1}, "all_exhausted", np.random.default_rng(0))


def experiment(tmp_path, *, sizes=(200, 100), weights=(1, 3), streaming=False, **data):
    domains = {}
    for name, size, weight in zip(("chat", "code"), sizes, weights, strict=True):
        path = tmp_path / f"{name}.jsonl"
        rows = ({"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(size))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        domains[name] = {"source": str(path), **({"weight": weight} if weight else {})}
    table = {"kind": "instruction", "domains": domains, "streaming": streaming, **data}
    return Experiment.from_table(
        {"data": table, "objective": {"name": "sft"}, "federation": {"clients": 3}}
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_row_is_accounted_for_and_streams_alike(tmp_path, strategy):
    found = partition_data(experiment(tmp_path, stopping_strategy=strategy))
    assert found.accounts.closes
    own = found.accounts.source
    assert own.rows == 300 and own.dropped.get(NOT_DRAWN, 0) + own.made.get(REPEATED, 0) > 0
    held = [row.prompt for rows in found.held_out.values() for row in rows]
    assert len(held) == len(set(held))  # nobody is judged twice by a row
    trained = {row.prompt for rows in found.train.values() for row in rows}
    assert not trained & set(held) and not trained & {row.prompt for row in found.test}
    for prompt in trained:  # all copies are one client's
        assert sum(any(row.prompt == prompt for row in rows) for rows in found.train.values()) == 1
    streamed = partition_data(experiment(tmp_path, stopping_strategy=strategy, streaming=True))
    assert {c: list(rows) for c, rows in streamed.train.items()} == found.train
    assert any(line.startswith(f"mixture ({strategy})") for line in found.loaded.layouts)


def test_shares_of_the_mixture_are_the_weights(tmp_path):
    found = partition_data(experiment(tmp_path, sizes=(900, 900), weights=(1, 3)))
    by_domain = Counter(row.columns["domain"] for row in found.loaded.train)
    judged = Counter(row.columns["domain"] for row in found.test)
    assert (
        by_domain["code"] == 900 - judged["code"]
    )  # all that is not held out: it ends the mixture
    assert by_domain["chat"] / by_domain.total() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"weights": (1, None)}, r"data.domains.code.weight is missing: all domains"),
        ({"weights": (1, -1)}, "greater than 0"),
        (
            {"weights": (None, None), "stopping_strategy": "all_exhausted"},
            "stopping_strategy needs",
        ),
        ({"stopping_strategy": "never"}, "first_exhausted"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, given, told):
    with pytest.raises(SettingsError, match=told):
        experiment(tmp_path, **given)


def test_a_weight_without_domains_is_refused():
    with pytest.raises(SettingsError, match=r"data.weight is for \[data.domains.NAME\]"):
        Experiment.from_table({"data": {"source": "builtin:instructions", "weight": 2}})
