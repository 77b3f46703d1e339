"""How often something may happen: so often at once, and so often a second from then on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenBucket:
    """A token bucket: each event takes a token; tokens come back at a rate, up to a burst.

    Attributes:
        rate: Tokens a second.
        burst: Tokens that there are at most, and at first.
        since: The clock, in seconds, when ``tokens`` was right.
        tokens: Tokens there were then.
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
