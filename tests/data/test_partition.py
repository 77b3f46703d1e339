"""Partitions hand out every row once, whatever the kind; what cannot be dealt is refused."""

import numpy as np
import pytest

from fedloom.data.examples import Labelled, Preference, unpair
from fedloom.data.partition import PartitionSettings, partition, shares
from fedloom.errors import DataError


def labelled(count, classes=5, seed=0):
    drawn = np.random.default_rng(seed).integers(classes, size=count)
    return [Labelled(i, "t", f"c{k}", {"site": f"s{k % 2}"}) for i, k in enumerate(drawn)]


def deal(rows, clients, seed=0, **settings):
    return partition(rows, PartitionSettings(**settings), clients, np.random.default_rng(seed))


KINDS = [
    {"kind": "iid"},
    {"kind": "dirichlet", "column": "label", "alpha": 0.1, "minimum": 2},
    {"kind": "dirichlet", "column": "label", "alpha": 100.0},
    {"kind": "column", "column": "label"},
    {"kind": "column", "column": "site"},
    {"kind": "size", "sizes": [1, 2, 3, 4]},
]


@pytest.mark.parametrize("settings", KINDS)
def test_every_row_goes_to_exactly_one_client(settings):
    for seed in range(30):
        rows = labelled(60 + seed, seed=seed)
        dealt = deal(rows, 4, seed, **settings)
        assert len(dealt) == 4
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(rows)))
        assert min(map(len, dealt)) >= settings.get("minimum", 1)
        assert all((np.diff(part) > 0).all() for part in dealt)


@pytest.mark.parametrize("settings", KINDS)
def test_the_same_generator_gives_the_same_deal(settings):
    first, again = (deal(labelled(80), 4, 5, **settings) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_iid_shares_differ_by_one_row_at_most():
    sizes = [len(part) for part in deal(labelled(62), 4, kind="iid")]
    assert max(sizes) - min(sizes) <= 1


def test_sizes_are_in_proportion():
    assert [len(p) for p in deal(labelled(100), 4, kind="size", sizes=[1, 2, 3, 4])] == [
        10,
        20,
        30,
        40,
    ]


def test_small_alpha_gives_few_values_and_large_alpha_all():
    rows = labelled(1000)

    def evenness(alpha):
        dealt = deal(rows, 5, kind="dirichlet", column="label", alpha=alpha)
        held = [[rows[i] for i in own] for own in dealt]
        counts = np.array(shares(held, PartitionSettings(column="label")).counts, float)
        return (counts / counts.sum(1, keepdims=True)).max(1).mean()

    assert evenness(0.05) > 0.6 > 0.3 > evenness(1000)


def test_by_column_each_value_stays_whole_while_clients_are_few():
    rows = labelled(100)
    dealt = deal(rows, 3, kind="column", column="label")
    holders = {}
    for client, part in enumerate(dealt):
        for i in part:
            holders.setdefault(rows[i].label, set()).add(client)
    assert all(len(clients) == 1 for clients in holders.values())


def test_by_column_the_largest_value_left_goes_to_the_smallest_client():
    rows = [Labelled(i, "t", label) for i, label in enumerate("aaaaabbbbcccddd")]
    dealt = deal(rows, 2, kind="column", column="label")
    assert [{rows[i].label for i in own} for own in dealt] == [{"a", "d"}, {"b", "c"}]


def test_values_that_differ_in_a_nul_alone_are_two():
    rows = [Labelled(i, "t", label) for i, label in enumerate(["a", "a\0", "a", "a\0"])]
    dealt = deal(rows, 2, kind="column", column="label")
    assert [own.tolist() for own in dealt] == [[0, 2], [1, 3]]


def test_by_column_with_more_clients_than_values_each_client_has_one_value():
    rows = labelled(100)
    dealt = deal(rows, 5, kind="column", column="site")
    assert all(len({rows[i].columns["site"] for i in part}) == 1 for part in dealt)


def test_the_halves_of_a_pair_stay_together():
    rows = unpair([Preference(i, "p", f"a{i}", f"b{i}", {"d": str(i % 3)}) for i in range(40)])
    for settings in ({"kind": "iid"}, {"kind": "dirichlet", "column": "d"}):
        for part in deal(rows, 4, **settings):
            numbers = [rows[i].row for i in part]
            assert all(numbers.count(n) == 2 for n in numbers)


def test_groups_are_dealt_whole_and_their_rows_evenly():
    sizes = [9, 1, 1, 4, 3, 2, 2, 2]  # 24 rows
    users = [f"u{n}" for n, size in enumerate(sizes) for _ in range(size)]
    rows = [Labelled(i, "t", "c", {"user": user}) for i, user in enumerate(users)]
    for seed in range(20):
        for settings, shares_ in (
            ({}, [9, 8, 7]),
            ({"kind": "size", "sizes": [1, 2, 3]}, [4, 8, 12]),
        ):
            dealt = partition(
                rows, PartitionSettings(**settings), 3, np.random.default_rng(seed), "user"
            )
            assert sorted(np.concatenate(dealt).tolist()) == list(range(24))
            held = [{users[i] for i in own} for own in dealt]
            assert sum(map(len, held)) == len(sizes)
            assert sorted(map(len, dealt)) == sorted(shares_)


def test_groups_too_large_for_the_minimum_are_refused():
    users = ["a"] * 18 + ["b"] * 2
    rows = [Labelled(i, "t", "c", {"user": user}) for i, user in enumerate(users)]
    with pytest.raises(DataError) as caught:
        partition(rows, PartitionSettings(minimum=5), 2, np.random.default_rng(0), "user")
    assert str(caught.value) == (
        "data.group = 'user': dealt whole, the groups leave client 1 with 2 rows, partition.minimum is 5; "
        "use fewer clients or a finer column"
    )


@pytest.mark.parametrize(
    ("rows", "clients", "settings", "message"),
    [
        (3, 4, {}, "federation.clients = 4 is more than the 3 training rows"),
        (30, 4, {"minimum": 10}, "need 40 training rows, there are 30"),
        (
            30,
            4,
            {"kind": "column", "column": "sight"},
            "'sight' is not in the data; did you mean 'site'",
        ),
        (30, 4, {"kind": "dirichlet", "column": "zzz"}, "there are: site, label"),
    ],
)
def test_what_cannot_be_dealt_is_refused(rows, clients, settings, message):
    with pytest.raises(DataError, match=message):
        deal(labelled(rows), clients, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dirichlet"}, "needs partition.column"),
        ({"kind": "size"}, "needs partition.sizes"),
        ({"kind": "size", "sizes": [1.0]}, "has 1 numbers, federation.clients is 3"),
        ({"kind": "iid", "sizes": [1.0, 1.0, 1.0]}, 'is of kind "size"'),
        ({"kind": "size", "sizes": [1.0, 0.0, 1.0]}, "must all be above 0"),
    ],
)
def test_contradictions(settings, message):
    assert message in "\n".join(PartitionSettings(**settings).contradictions(3))
