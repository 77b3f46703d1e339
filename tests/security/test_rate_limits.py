"""Token buckets by hand."""

from fedloom.security.rate_limits import RateLimits, TokenBucket


def test_so_many_at_once_and_so_many_a_second():
    bucket = TokenBucket(rate=0.5, burst=3, since=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(11.9) and bucket.take(12.0) and not bucket.take(12.0)
    assert not bucket.is_full(17.9) and bucket.is_full(18.0)
    assert [bucket.take(1e6) for _ in range(4)] == [True, True, True, False]


def test_each_source_has_its_own_limit_and_idle_ones_are_forgotten():
    limits = RateLimits(rate=1.0, burst=2)
    assert [limits.allows("10.0.0.1", 5.0) for _ in range(3)] == [True, True, False]
    assert limits.allows("10.0.0.2", 5.0) and len(limits) == 2
    limits.forget(
        6.5, is_busy=lambda source: False
    )  # the second's token is back, one of the first's two
    assert (
        len(limits) == 1 and limits.allows("10.0.0.1", 6.5) and not limits.allows("10.0.0.1", 6.5)
    )
    limits.forget(60.0, is_busy=lambda source: source == "10.0.0.1")
    assert len(limits) == 1
    limits.forget(60.0, is_busy=lambda source: False)
    assert len(limits) == 0
