"""What a group is sent is encoded once; the nearest group, and a warm-up's rounds, by hand."""

import pytest
import torch

from fedloom.aggregation.rules import AggregationSettings
from fedloom.methods.bases.client_groups import group_requests, nearest_group, warm_up_rounds
from fedloom.wire.messages import Payload, decode
from fedloom.wire.schema import Schema


def test_members_of_a_group_are_sent_the_same_bytes_which_are_encoded_once():
    asked = []

    def payload(group):
        asked.append(group)
        return Payload({"w": torch.full((2,), float(group))})

    schema = Schema.of({"w": torch.zeros(2)})
    found = group_requests({5: 1, 2: 0, 9: 1}, payload, schema)
    assert asked == [0, 1] and list(found) == [5, 2, 9]
    assert found[5] is found[9]
    sent = {client: decode(own, schema).tensors["w"].tolist() for client, own in found.items()}
    assert sent == {5: [1.0, 1.0], 2: [0.0, 0.0], 9: [1.0, 1.0]}


@pytest.mark.parametrize(
    ("distances", "group"),
    [
        ({0: 1.0, 1: 3.0, 2: 2.5, 3: 0.0}, 0),  # 2 against 2.5; of client 3 no group is known
        ({0: 1.0, 1: 3.0, 2: 1.5}, 7),
        ({0: 1.0, 1: 3.0, 2: 2.0}, 0),  # equally near: the first
    ],
)
def test_the_nearest_group_is_that_of_the_least_mean_distance(distances, group):
    assert nearest_group(distances, {0: 0, 1: 0, 2: 7}) == group


def test_a_warm_up_is_a_share_of_the_rounds_and_so_many_at_least():
    assert [warm_up_rounds(0.25, rounds) for rounds in (1, 4, 6, 10)] == [1, 1, 2, 3]  # 1.5 and 2.5
    assert warm_up_rounds(0.25, 8, least=3) == 3 and warm_up_rounds(1.0, 5) == 5


@pytest.mark.parametrize(
    ("rule", "bad", "clients", "cohort", "right"),
    [
        ("trimmed_mean", 1, 9, 9, True),  # 3 of each of 3 groups
        ("trimmed_mean", 1, 8, 8, False),
        ("trimmed_mean", 1, 9, 8, False),  # a group may have two
        ("krum", 0, 9, 9, True),
        ("krum", 1, 14, 14, False),  # 5 of each
        ("median", 0, 3, 1, True),
    ],
)
def test_rules_that_need_clients_need_them_in_each_group(rule, bad, clients, cohort, right):
    settings = AggregationSettings(rule=rule, bad=bad)
    found = settings.contradictions_of_groups("method.selectors", 3, clients, cohort)
    assert (not found) == right
    assert right or f"have all of {3 * settings.needed} clients or more take part" in found[0]
