"""The client store: pending until a round ends, and the same after a trip through a checkpoint."""

import torch

from fedloom.storage.client_store import ClientStore


def test_what_a_round_stores_counts_when_it_is_over():
    store = ClientStore()
    store.stage(3, {"adapter": {"w": torch.ones(1)}})
    assert store.slots(3)["adapter"]["w"].item() == 1.0  # the client itself sees it at once
    assert store.flat() == {} and store.changed == set()
    store.finish_round()
    assert store.flat()[3]["adapter|w"].item() == 1.0 and store.changed == {3}


def test_unchanged_slots_are_not_marked():
    store = ClientStore({0: {"adapter|w": torch.ones(1)}})
    store.stage(0, store.slots(0))
    store.finish_round()
    assert store.changed == set()


def test_a_copy_of_the_slots_leaves_the_store_alone():
    store = ClientStore({0: {"adapter|w": torch.ones(1)}})
    store.slots(0)["other"] = {}
    assert list(store.slots(0)) == ["adapter"]


def test_flat_and_back():
    store = ClientStore()
    store.stage(
        1, {"adapter": {"a.b": torch.ones(2)}, "optimizer": {"a.b/step": torch.tensor(3.0)}}
    )
    store.finish_round()
    back = ClientStore(store.flat()).slots(1)
    assert torch.equal(back["adapter"]["a.b"], torch.ones(2))
    assert back["optimizer"]["a.b/step"].item() == 3.0


def test_what_is_undone_is_as_it_was_before_the_exchange():
    store = ClientStore({0: {"adapter|w": torch.zeros(1)}})
    for value in (1.0, 2.0):
        store.begin_exchange()
        for _ in range(2):
            store.stage(0, {"adapter": {"w": torch.full((1,), value)}})
            value += 0.5
    store.discard(0)
    store.discard(0)
    store.discard(5)
    assert store.slots(0)["adapter"]["w"].item() == 1.5
    store.begin_exchange()
    store.discard(0)
    assert store.slots(0)["adapter"]["w"].item() == 1.5
    store.finish_round()
    assert store.changed == {0} and store.flat()[0]["adapter|w"].item() == 1.5


def test_what_was_the_first_of_a_round_is_undone_to_the_round_before():
    store = ClientStore({0: {"adapter|w": torch.zeros(1)}})
    store.begin_exchange()
    store.stage(0, {"adapter": {"w": torch.ones(1)}})
    store.discard(0)
    store.finish_round()
    assert store.changed == set() and store.slots(0)["adapter"]["w"].item() == 0.0
