"""A token bucket by hand."""

from fedloom.security.token_bucket import TokenBucket


def test_so_many_at_once_and_so_many_a_second():
    bucket = TokenBucket(rate=0.5, burst=3, since=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(11.9) and bucket.take(12.0) and not bucket.take(12.0)
    assert not bucket.is_full(17.9) and bucket.is_full(18.0)
    assert [bucket.take(1e6) for _ in range(4)] == [True, True, True, False]
