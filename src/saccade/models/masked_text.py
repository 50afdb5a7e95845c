"""Networks that fill in words and say whether a text and what is with it belong together: their output.

Shape letters: B batch, N words and whatever stands with them, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.ops.export import output


@output
@dataclass
class MaskedTextOutput:
    """What such a network returns.

    Attributes:
        logits: (B, N, V), of the word at each place.
        matched: (B, K), of whether they belong together, and what does not where they do not.
        states: (B, N, C), of each place.
        pooled: (B, C), of the whole.
    """

    logits: Tensor
    matched: Tensor
    states: Tensor
    pooled: Tensor
