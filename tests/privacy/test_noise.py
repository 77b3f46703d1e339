"""The distribution of noise, and that each release has its own."""

import hashlib
import os
import stat
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
