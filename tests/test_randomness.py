"""Seeds depend on all four arguments and on nothing else."""

from fedloom.randomness import derive_seed, generator


def test_known_value_never_changes():
    # sha256("fedloom|0|batches|1|2"), first 8 bytes, big endian, shifted right by one
    import hashlib

    digest = hashlib.sha256(b"fedloom|0|batches|1|2").digest()
    assert derive_seed(0, "batches", 1, 2) == int.from_bytes(digest[:8], "big") >> 1


def test_each_argument_matters():
    seeds = {
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 0),
        derive_seed(0, "a", -1, 0),
        derive_seed(0, "a", 1, 0),
        derive_seed(0, "a", 0, 1),
    }
    assert len(seeds) == 7


def test_generators_repeat():
    assert generator(3, "x", 1).integers(1 << 60) == generator(3, "x", 1).integers(1 << 60)
