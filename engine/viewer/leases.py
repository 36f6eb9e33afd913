"""Who may use the server: a lease for each client, which ends when its user does nothing or its program is gone.

Touched by the event loop's thread alone, but for a lease's content, which is used under its lock.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.viewer.request import Refusal
from engine.viewer.segmentation import Segmentation

ALIVE_SECONDS = 60.0  # without any request, the heartbeat included, a client is gone


@dataclass(eq=False)
class Lease:
    """One client's: when it was heard of and last at work, its object, and as what numbers it wants masks."""

    token: str
    heard: float
    worked: float
    segmentation: Segmentation | None = None
    dtype: np.dtype | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a request is answered


class Leases:
    """At most `most` at a time, each for `idle_seconds` without work; times are `clock`'s."""

    def __init__(self, most: int, idle_seconds: float, clock: Callable[[], float]):
        self.most, self.idle_seconds, self.clock = most, idle_seconds, clock
        self.alive_seconds = min(ALIVE_SECONDS, idle_seconds)
        self.held: dict[str, Lease] = {}

    def claim(self) -> str:
        """The token of a new one; Refusal (503) where all are taken."""
        self.sweep()
        if len(self.held) >= self.most:
            raise Refusal(503, f"all {self.most} sessions are taken", {"Retry-After": "10"})
        token = secrets.token_hex(16)
        self.held[token] = Lease(token, self.clock(), self.clock())
        return token

    def find(self, token: str) -> Lease:
        """Refusal (410) where there is none, or no longer. The client has been heard of."""
        self.sweep()
        if token not in self.held:
            raise Refusal(410, "the session has ended, or there never was one (expected a lease of /claim in X-Lease-Token)")
        self.held[token].heard = self.clock()
        return self.held[token]

    def remaining(self, lease: Lease) -> float:
        """Seconds until it ends, should its user do nothing."""
        return max(0.0, self.idle_seconds - (self.clock() - lease.worked))

    def sweep(self) -> None:
        """Ends those whose time is over, with all that they hold; not while a request of theirs is answered."""
        now = self.clock()
        for token, lease in list(self.held.items()):
            over = now - lease.worked > self.idle_seconds or now - lease.heard > self.alive_seconds
            if over and not lease.lock.locked():
                del self.held[token]
