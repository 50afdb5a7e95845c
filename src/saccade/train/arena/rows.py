"""What was measured on one cache at one share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RETRIEVAL", "Row", "row_of"]

#: kinds of prompts, by the names of `Row`'s fields, in words
RETRIEVAL = {"passkey": "passkey", "multi_key": "multi-key", "later": "asked later"}


@dataclass(frozen=True)
class Row:
    """One cache at one share.

    Attributes:
        name: of the cache.
        share: of the tokens that might stay; None where the cache takes no share.
        bytes: held after reading a text.
        bytes_after: held after the tokens that followed.
        perplexity: of these tokens.
        passkey, multi_key: share of the prompts that were answered, the question being read with the text; None, here
            and below, where there were none.
        later: of the `multi-key` prompts whose question was asked after the text had been read and compressed.
        decode_rate: tokens per second after reading.
        first: seconds to the first token, the fastest of the texts.
        waited: the largest share of its time that a measurement stood in the queue for a processor.
    """

    name: str
    share: float | None
    bytes: float
    bytes_after: float
    perplexity: float
    passkey: float | None
    multi_key: float | None
    later: float | None
    decode_rate: float
    first: float
    waited: float | None = None


def row_of(name: str, share: float | None, pieces: Mapping[str, Mapping[str, float]]) -> Row:
    """A row of what was measured, text by text and prompt by prompt.

    Args:
        name, share: of the row.
        pieces: "text 0", "passkey 0", "multi-key 0", "later 0" ... -> figures.
    """

    def of(kind: str, figure: str) -> list[float]:
        return [said[figure] for piece, said in pieces.items() if piece.rpartition(" ")[0] == kind and figure in said]

    def right(kind: str) -> float | None:
        return statistics.fmean(told) if (told := of(kind, "right")) else None

    return Row(
        name,
        share,
        bytes=statistics.fmean(of("text", "bytes")),
        bytes_after=statistics.fmean(of("text", "bytes_after")),
        perplexity=math.exp(statistics.fmean(of("text", "loss"))),
        passkey=right("passkey"),
        multi_key=right("multi-key"),
        later=right("later"),
        decode_rate=statistics.harmonic_mean(of("text", "rate")),
        first=min(of("text", "first")),
        waited=max(of("text", "waited"), default=None),
    )
