"""Command signatures: hex HMAC-SHA256 of a command's deterministic serialization without the signature."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict

from leyline.v1.commands_pb2 import AdaptationCommand

SIGNATURE = "signature"


def sign(command: AdaptationCommand, secret: bytes) -> None:
    """Adds the signature to the command's annotations."""
    command.annotations[SIGNATURE] = _digest(command, secret)


def is_signed(command: AdaptationCommand, secrets: tuple[bytes, ...]) -> bool:
    """Returns whether the command's signature was made with one of `secrets`. Compares in constant time."""
    if SIGNATURE not in command.annotations:  # reading a missing key of a map field would create it
        return False
    given = command.annotations[SIGNATURE].encode()
    return any(hmac.compare_digest(given, _digest(command, secret).encode()) for secret in secrets)


def _digest(command: AdaptationCommand, secret: bytes) -> str:
    unsigned = AdaptationCommand()
    unsigned.CopyFrom(command)
    unsigned.annotations.pop(SIGNATURE, None)
    return hmac.new(secret, unsigned.SerializeToString(deterministic=True), hashlib.sha256).hexdigest()


class NonceTable:
    """Remembers command ids for `window_s`, at most `capacity` of them; the oldest are forgotten first."""

    def __init__(self, *, window_s: float, capacity: int = 4096) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._seen: OrderedDict[str, float] = OrderedDict()

    def first_seen(self, nonce: str, *, now_s: float) -> bool:
        """Remembers `nonce` and returns whether it is new within the window."""
        while self._seen and next(iter(self._seen.values())) < now_s - self._window_s:
            self._seen.popitem(last=False)
        if nonce in self._seen:
            return False
        self._seen[nonce] = now_s
        if len(self._seen) > self._capacity:
            self._seen.popitem(last=False)
        return True
