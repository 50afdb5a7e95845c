"""What was sent and received, by what it was for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from saccade.tables import table


class Count(NamedTuple):
    """Bytes and messages of one kind.

    Attributes:
        sent, received: bytes.
        messages: collectives that were called.
    """

    sent: int = 0
    received: int = 0
    messages: int = 0


@dataclass
class Traffic:
    """The bytes that one rank sent to others, and received from them.

    Attributes:
        counts: by (kind, "forward" or "backward").
    """

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def add(self, kind: str, direction: str, sent: int, received: int) -> None:
        """Enter one message.

        Args:
            kind: what it was for.
            direction: "forward" or "backward".
            sent, received: bytes.
        """
        old = self.counts.get((kind, direction), Count())
        self.counts[kind, direction] = Count(old.sent + sent, old.received + received, old.messages + 1)

    @property
    def sent(self) -> int:
        """Bytes of all kinds."""
        return sum(count.sent for count in self.counts.values())

    @property
    def received(self) -> int:
        """Bytes of all kinds."""
        return sum(count.received for count in self.counts.values())

    def __str__(self) -> str:
        rows = [(kind, way, *map(str, count)) for (kind, way), count in sorted(self.counts.items())]
        return table(("for", "pass", "sent", "received", "messages"), rows, left=2)
