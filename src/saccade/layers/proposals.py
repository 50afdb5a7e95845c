"""What speculative decoding is told and tells: trees of proposed tokens, who proposes them, and what came of it.

Shape letters: P tokens of the prompt, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from saccade.layers.wrapping import Report

__all__ = ["Drafter", "Proposal", "Speculated"]


@dataclass
class Proposal:
    """A tree of tokens.

    Attributes:
        tokens: of each node; the first is the last token that is known, the root.
        parents: the number of each node's parent, before it; -1 of the root. Children of one node differ.
    """

    tokens: list[int]
    parents: list[int]

    @property
    def is_chain(self) -> bool:
        """Each node is the parent of the next."""
        return self.parents == list(range(-1, len(self.parents) - 1))


class Drafter(Protocol):
    """Who proposes."""

    def begin(self, model: nn.Module, prompt: Tensor, attention: Tensor | None) -> Tensor | None:
        """A new text.

        Args:
            model: the target.
            prompt: its tokens (1, P); none where embeddings were given.
            attention: of the last layer (H, P, P), where it is wanted.

        Returns:
            the places of the prompt that it wants to read; None for all.
        """

    @property
    def wants_attention(self) -> bool:
        """Whether `begin` needs the attention."""

    def propose(self, tokens: Sequence[int], embeds: Tensor, features: Tensor) -> Proposal:
        """A tree behind what is known.

        Args:
            tokens: that are known since the last call (at first those of the prompt that it wanted), the last one
                being the root.
            embeds: of them, (1, N, D).
            features: the model's last hidden states of the tokens before the root that it has not been given, (1, N, D)
                and at first (1, N - 1, D).
        """


@dataclass
class Speculated(Report):
    """What speculation brought.

    Attributes:
        rounds: passes of the model behind those of the prompts.
        tokens: that came out of these.
        proposed: nodes that were proposed, without the roots.
    """

    rounds: int = 0
    tokens: int = 0
    proposed: int = 0

    @property
    def accepted_length(self) -> float:
        """Tokens per pass of the model; 1 without a draft."""
        return self.tokens / max(1, self.rounds)

    def figures(self) -> dict[str, str]:
        return {
            "passes": str(self.rounds),
            "tokens": str(self.tokens),
            "tokens per pass": f"{self.accepted_length:.2f}",
            "proposed per pass": f"{self.proposed / max(1, self.rounds):.1f}",
            **super().figures(),
        }
