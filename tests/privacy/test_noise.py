"""The distribution of noise, and that each release has its own."""

import hashlib
import os
import stat
from decimal import Context, Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from fedloom.errors import CheckpointError, OutputError
from fedloom.privacy import noise
from fedloom.privacy.noise import NoiseSource

KEY = bytes(range(32))
SOURCE = NoiseSource(KEY, "run")
DRAWS = 1_000_000


def test_a_million_normal_draws_pass_the_test_of_kolmogorov_and_smirnov():
    drawn = SOURCE.stream("sum", 1, -1).normal(DRAWS)
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    assert abs(drawn.var() - 1) < 0.01 and np.isfinite(drawn).all()


def test_a_million_discrete_draws_are_whole_and_normal_on_a_fine_grid():
    sigma = 1.3e6
    drawn = SOURCE.stream("sum", 1, -1).discrete_gaussian(sigma, DRAWS)
    assert drawn.dtype == np.int64 and drawn.shape == (DRAWS,)
    assert stats.kstest(drawn / sigma, "norm").pvalue > 0.01
    assert abs(drawn.var() / sigma**2 - 1) < 0.01


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 7.25])
def test_coarse_discrete_draws_have_the_probabilities_of_the_definition(sigma):
    drawn = SOURCE.stream("coarse", 1, -1).discrete_gaussian(sigma, 200_000)
    reach = int(5 * sigma) + 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    expected = 200_000 * weights / weights.sum()
    counted = np.bincount(drawn + reach, minlength=2 * reach + 1)
    often = expected > 10
    rest = [counted[~often].sum() + 1e-9, expected[~often].sum() + 1e-9]
    observed = np.append(counted[often], rest[0])
    predicted = np.append(expected[often], rest[1])
    statistic = ((observed - predicted) ** 2 / predicted)[:-1].sum()
    assert stats.chi2.sf(statistic, often.sum() - 1) > 0.001


def test_exact_arithmetic_decides_as_float64_does_where_that_is_sure(monkeypatch):
    quick = SOURCE.stream("sum", 1, -1).discrete_gaussian(12.7, 300)
    monkeypatch.setattr(noise, "MARGIN", 2.0)  # every coin is tossed exactly
    assert (SOURCE.stream("sum", 1, -1).discrete_gaussian(12.7, 300) == quick).all()


def test_the_same_release_has_the_same_noise_and_any_other_has_fresh_noise():
    digest = hashlib.sha256(b"sum").digest()
    streams = [
        SOURCE.stream("sum", 1, -1, digest),
        SOURCE.stream("cohort", 1, -1, digest),
        SOURCE.stream("sum", 2, -1, digest),
        SOURCE.stream("sum", 1, 3, digest),
        SOURCE.stream("sum", 1, -1, hashlib.sha256(b"other").digest()),
        NoiseSource(KEY, "other run").stream("sum", 1, -1, digest),
        NoiseSource(bytes(32), "run").stream("sum", 1, -1, digest),
        SOURCE.stream("sum1", 1, -1, digest),
    ]
    drawn = [stream.discrete_gaussian(1e9, 100) for stream in streams]
    for one, other in pairwise(drawn):
        assert (one != drawn[0]).mean() > 0.9 or one is drawn[0]
        assert (one != other).mean() > 0.9
    again = SOURCE.stream("sum", 1, -1, digest)
    assert (again.discrete_gaussian(1e9, 100) == drawn[0]).all()
    assert (again.discrete_gaussian(1e9, 100) != drawn[0]).mean() > 0.9  # it goes on


def test_uniform_numbers_fill_the_interval():
    drawn = SOURCE.stream("cohort", 1, -1).uniform(100_000)
    assert stats.kstest(drawn, "uniform").pvalue > 0.01
    assert drawn.min() >= 0 and drawn.max() < 1


def test_sources_of_the_system_differ_and_those_of_a_seed_do_not():
    def first(source):
        return source.stream("sum", 1, -1).words(1)[0]

    assert first(NoiseSource.fresh("run")) != first(NoiseSource.fresh("run"))
    assert first(NoiseSource.seeded(7, "run")) == first(NoiseSource.seeded(7, "run"))
    assert first(NoiseSource.seeded(7, "run")) != first(NoiseSource.seeded(8, "run"))


def test_a_key_is_kept_where_its_owner_alone_reads_it(tmp_path):
    path = tmp_path / "keys" / "run"
    source = NoiseSource.kept(path, "run", create=True)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    again = NoiseSource.kept(path, "run", create=False)
    assert again.commitment == source.commitment
    assert bytes.fromhex(path.read_text()).hex() not in source.commitment
    with pytest.raises(OutputError, match="cannot write"):
        NoiseSource.kept(path, "run", create=True)
    path.write_text("no key")
    with pytest.raises(CheckpointError, match="start a new run"):
        NoiseSource.kept(path, "run", create=False)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        NoiseSource(b"short", "run")
    for sigma in (-1.0, 2.0**60, float("nan")):
        with pytest.raises(ValueError, match="sigma must be"):
            SOURCE.stream("sum", 1, -1).discrete_gaussian(sigma, 3)
    assert (SOURCE.stream("sum", 1, -1).discrete_gaussian(0, 3) == 0).all()


def test_a_key_and_a_release_have_the_same_noise_in_every_version():
    """A run that is resumed by a later version draws again what it drew: these numbers may not change."""
    stream = SOURCE.stream("sum", 1, -1, b"digest")
    assert stream.words(2).tolist() == [9198796236003885884, 8120357137412323785]
    assert stream.uniform(2).tolist() == [0.5031283295063614, 0.7378463681668241]
    assert stream.normal(2).tolist() == pytest.approx([1.2756638753886569, 0.4121644464195343])
    assert stream.discrete_gaussian(12.7, 9).tolist() == [15, 5, 23, 4, -7, 10, 9, -3, -23]
    assert stream.discrete_gaussian(2.0**30, 3).tolist() == [-925206110, 857518656, 428636675]
    assert SOURCE.commitment[:16] == "0254664e7a425b95"
    assert NoiseSource.seeded(7, "run").commitment[:16] == "976623704c1d7c5e"
    assert (
        SOURCE.digest([b"a", b"b"]).hex()[:16]
        == "d231d990d05c0259"
        == SOURCE.digest([b"ab"]).hex()[:16]
    )


def test_a_coin_in_exact_arithmetic_by_hand():
    """exp(-1/3) is 0.716531310574: words on either side of it decide, and 64 more bits where one is equal."""
    stream, third = SOURCE.stream("sum", 1, -1), Fraction(1, 3)
    words = [0, int(0.7165313105 * 2**64), int(0.7165313106 * 2**64), 2**64 - 1]
    assert [stream._exact_coin(word, third) for word in words] == [True, True, False, False]
    assert stream._exact_coin(2**64 - 1, Fraction(0))
    near = int(Decimal(2**64) * (Decimal(-1) / 3).exp(Context(prec=60)))
    tossed = {stream._exact_coin(near, third) for _ in range(40)}
    assert tossed == {True, False}  # what follows the first 64 bits decides
    assert not stream._exact_coin(near + 1, third) and stream._exact_coin(near - 1, third)


def test_the_largest_noise_that_is_drawn():
    drawn = SOURCE.stream("sum", 1, -1).discrete_gaussian(2.0**48, 2000)
    assert 0.9 < drawn.std() / 2.0**48 < 1.1
    with pytest.raises(ValueError, match="from 0 to 2\\^48"):
        SOURCE.stream("sum", 1, -1).discrete_gaussian(np.nextafter(2.0**48, np.inf), 1)
