"""How fast to ask a server that announces its limits."""

import asyncio
import math
import re
import time
from collections.abc import Mapping


class Pace:
    """Spaces requests out when the limits that a server announces (x-ratelimit-* headers) come near."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._gap = self._next = 0.0
        self._tokens = 1000.0  # of a usual request

    def heard(self, headers: Mapping[str, str], tokens: int) -> None:
        """Take in the headers of a reply that used so many tokens."""
        self._tokens += (tokens - self._tokens) / 20
        gap = 0.0
        for kind, each in (("requests", 1.0), ("tokens", self._tokens)):
            limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
            if not limit:
                continue
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
            reset = _seconds(headers.get(f"x-ratelimit-reset-{kind}"))
            rate = limit / 60
            if reset and left is not None and left < limit:
                # Used slots come back one by one until `reset`, or all of them then: the faster is right.
                rate = max(limit - left, left) / reset
            if left is None or left < each * self._workers:
                gap = max(gap, each / rate)
        self._gap = min(gap, 60.0)  # a server that means an hour by its headers will say so with 429

    async def turn(self) -> None:
        """Wait for this request's turn."""
        now = time.monotonic()
        self._next = max(now, self._next + self._gap)
        if self._next > now:
            await asyncio.sleep(self._next - now)


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds(value: str | None) -> float | None:
    """Duration as OpenAI writes it: 6m0s, 120ms, 1h2m3.5s, or plain seconds."""
    parts = re.findall(r"([\d.]+)(ms|h|m|s)", value or "")
    if not parts:
        return _number(value)
    return sum((_number(number) or 0.0) * {"h": 3600, "m": 60, "s": 1, "ms": 0.001}[unit] for number, unit in parts)
