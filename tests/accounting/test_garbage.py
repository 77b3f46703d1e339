"""The search for garbage is put off for a while, and is as it was before afterwards."""

import gc

import pytest

from fedloom.accounting.garbage import without_collection


@pytest.mark.parametrize("collecting", [True, False])
def test_the_search_is_off_within_and_as_before_afterwards(collecting):
    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == collecting
        with pytest.raises(RuntimeError, match="within"), without_collection():
            raise RuntimeError("within")
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
