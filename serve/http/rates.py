"""Requests and tokens per minute of each key: token buckets, full at the start. Each gateway has its own."""

import math
import time
from dataclasses import dataclass

from serve.database.keys import ApiKey
from serve.http.errors import ApiError

_MINUTE = 60.0


@dataclass
class _Bucket:
    left: float
    filled: float
    """When, in seconds of the monotonic clock."""

    def refill(self, per_minute: int, now: float) -> None:
        self.left = min(per_minute, self.left + per_minute * (now - self.filled) / _MINUTE)
        self.filled = now


class Rates:
    """Raises `ApiError` 429 with `retry-after` for a key that asks more often than it may."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def check_request(self, key: ApiKey) -> None:
        """Count a request. Its tokens are counted by `reserve_tokens`, once they are known."""
        now = time.monotonic()
        if key.tokens_per_minute is not None:
            self._check(key, "tokens", key.tokens_per_minute, now)
        if key.requests_per_minute is not None:
            self._check(key, "requests", key.requests_per_minute, now).left -= 1

    def reserve_tokens(self, key: ApiKey | None, at_most: int) -> None:
        """Count all tokens that a request may take, before it is answered: so requests at once cannot exceed the rate.

        A key may go into debt by one request, as that may be larger than the rate.
        """
        if key is not None and key.tokens_per_minute is not None:
            self._check(key, "tokens", key.tokens_per_minute, time.monotonic()).left -= at_most

    def settle_tokens(self, key: ApiKey | None, reserved: int, used: int) -> None:
        """Give back what a request has reserved and not used."""
        if key is not None and key.tokens_per_minute is not None:
            self._bucket(key, "tokens", key.tokens_per_minute, time.monotonic()).left += reserved - used

    def _check(self, key: ApiKey, what: str, per_minute: int, now: float) -> _Bucket:
        bucket = self._bucket(key, what, per_minute, now)
        if bucket.left < 1:
            seconds = math.ceil((1 - bucket.left) / per_minute * _MINUTE)
            message = f"The key {key.name!r} may use {per_minute} {what} a minute. Try again in {seconds} seconds."
            raise ApiError(429, message, "rate_limit_exceeded", retry_after=seconds)
        return bucket

    def _bucket(self, key: ApiKey, what: str, per_minute: int, now: float) -> _Bucket:
        bucket = self._buckets.setdefault((key.id, what), _Bucket(per_minute, now))
        bucket.refill(per_minute, now)
        return bucket
