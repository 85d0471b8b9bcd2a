"""An answer store in memory, as the journal is one on disk."""

from __future__ import annotations

from google.protobuf.message import Message


class FakeAnswers:
    """Keeps answers by request_id; `found` may hold those of an earlier process."""

    def __init__(self, found: dict[str, tuple[str, bytes]] | None = None) -> None:
        self.found = found or {}
        self.reasons: list[str] = []

    async def find(self, request_id: str) -> tuple[str, bytes] | None:
        """What is kept."""
        return self.found.get(request_id)

    async def keep(self, request_id: str, reason: str, answer: Message) -> None:
        """The answer's message tells which call it was, as in the journal."""
        self.reasons.append(reason)
        self.found[request_id] = (answer.DESCRIPTOR.name.removesuffix("Response"), answer.SerializeToString())
