"""Rate limits: how often something may happen at once, and how often a second from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass
class TokenBucket:
    """A token bucket: each event takes a token; tokens return at a rate, up to a burst.

    Attributes:
        rate: Tokens a second.
        burst: Largest number of tokens, which is also the initial number.
        since: Time in seconds at which ``tokens`` was computed.
        tokens: Tokens at that time.
    """

    rate: float
    burst: float
    since: float
    tokens: float = -1.0

    def __post_init__(self) -> None:
        """Begin full."""
        self.tokens = self.burst

    def take(self, now: float) -> bool:
        """Take a token; return whether there was one."""
        self.tokens = min(self.burst, self._unbounded(now))
        self.since = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True

    def is_full(self, now: float) -> bool:
        """Return whether all tokens are back."""
        return self._unbounded(now) >= self.burst

    def _unbounded(self, now: float) -> float:
        return self.tokens + (now - self.since) * self.rate


class RateLimits:
    """A token bucket for each source of events, such as an address or a client.

    Attributes:
        rate: Events a second, of each source.
        burst: Events at once, of each source.
    """

    def __init__(self, rate: float, burst: float) -> None:
        """Begin without a source."""
        self.rate, self.burst = rate, burst
        self._buckets: dict[Hashable, TokenBucket] = {}

    def __len__(self) -> int:
        """Return how many sources are remembered."""
        return len(self._buckets)

    def allows(self, source: Hashable, now: float) -> bool:
        """Count an event of a source at ``now``, in seconds; return whether it is within the limit."""
        new = TokenBucket(self.rate, self.burst, now)
        return self._buckets.setdefault(source, new).take(now)

    def forget(self, now: float, is_busy: Callable[[Any], bool]) -> None:
        """Forget the sources whose tokens are all back, but for busy ones: memory stays bounded."""
        self._buckets = {
            source: own
            for source, own in self._buckets.items()
            if is_busy(source) or not own.is_full(now)
        }
