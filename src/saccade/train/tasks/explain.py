"""Which words decide? Planted words among others that say something else, and every map of a mechanism.

Shape letters: B batch, N tokens, M tokens but the last, S sets of them, C channels, H heads, E width of
values, K classes.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.effective import effective, part_maps
from saccade.layers.wrapping import Report, changing
from saccade.train.data import IGNORE, generator_at
from saccade.train.data.planted import (
    ASKING,
    BLANK,
    CLASSES,
    FAMILIES,
    PLANTED_WORDS,
    PlantedTokens,
    planted_tokens,
)
from saccade.train.model import SequenceModel
from saccade.train.tasks.base import HELD_OUT, SAMPLE
from saccade.train.tasks.planted import Planted
from saccade.train.tasks.sequence import SequenceTask
from saccade.train.tasks.settings import STANDARD_SWEEP, Settings

#: pixels of a token's side, where it is shown
_CELL = 8


class Explain(Planted, SequenceTask):
    """The last token asks for one of four families of words, each of which stands in the row and names a class of its
    own: which one? The words of that family alone decide. The answer is read at the last token.

    Raises:
        ValueError: if the length does not hold the words.
    """

    name = "explain"
    vocab = PLANTED_WORDS
    budgets = {
        "quick": Settings(
            dim=64, length=64, pairs=2, batch=32, steps=300, lr=3e-3, evaluations=4, evaluation_size=48, decode_tokens=0
        ),
        "standard": Settings(
            dim=96, length=128, pairs=2, batch=64, steps=2000, lr=2e-3, evaluations=6, evaluation_size=64,
            decode_tokens=0, lengths=STANDARD_SWEEP,
        ),
        "long": Settings(
            dim=128, layers=4, length=256, pairs=4, batch=64, steps=8000, lr=1e-3, evaluations=8, evaluation_size=64,
            decode_tokens=0, lengths=STANDARD_SWEEP,
        ),
    }  # fmt: skip

    def __init__(self, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.planted(1, generator_at(0, 0, SAMPLE))

    def planted(self, count: int, generator: torch.Generator) -> PlantedTokens:
        return planted_tokens(count, self.settings.length, self.settings.pairs, generator)

    @cached_property
    def test(self) -> PlantedTokens:  # type: ignore[override]
        """All held-out examples."""
        return self.planted(self.settings.evaluation_size, generator_at(0, 0, HELD_OUT))

    def asked(self, planted: PlantedTokens) -> tuple[Tensor, Tensor]:
        """Tokens and, at the last one, the class; the other labels are ignored."""
        labels_BN = torch.full_like(planted.tokens, IGNORE)
        labels_BN[:, -1] = planted.labels
        return planted.tokens, labels_BN

    def answers(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs)[:, -1, :CLASSES]

    def evidence(self, planted: PlantedTokens) -> Tensor:
        return planted.evidence[:, :-1]

    def without(self, inputs: Tensor, kept_SM: Tensor) -> Tensor:
        tokens_SM = torch.where(kept_SM.to(inputs.device), inputs[:-1], BLANK)
        return torch.cat([tokens_SM, inputs[-1:].expand(len(kept_SM), 1)], 1)

    def maps(self, model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        assert isinstance(model, SequenceModel)
        held: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            held.append(output.detach().requires_grad_())
            return held[-1]

        with torch.enable_grad(), changing(model, Report("explained")) as changes:
            changes.after(model.embedding, keep)
            with effective(model, dict(self.parts_of(model))) as records:
                logits_BK = self.answers(model, inputs)
                sums = [record.out_BHNE for record in records if record.out_BHNE is not None]
                logits_BK.amax(1).sum().backward(inputs=[*held, *sums])
        found, missing = part_maps(records)
        (embeds_BNC,) = held
        assert embeds_BNC.grad is not None
        found["input x gradient"] = (embeds_BNC.detach() * embeds_BNC.grad).sum(-1).abs()
        found = {name: map_BN[:, :-1] for name, map_BN in found.items()}
        return found | {"occlusion": self._occluded(model, inputs, inputs.shape[1] - 1)}, missing

    def drawn(self, inputs: Tensor) -> Tensor:
        """Tokens line by line: blanks are dark, fillers grey, words of families and the one that asks pale."""
        return self._lines(0.4 * (inputs > BLANK) + 0.6 * ((inputs > BLANK) & (inputs < ASKING + FAMILIES)))

    def laid_out(self, map_BM: Tensor) -> Tensor:
        return self._lines(F.pad(map_BM, (0, 1)))

    @staticmethod
    def _lines(x_BN: Tensor) -> Tensor:
        """Tokens as the cells of a square, (B, 1, H, W)."""
        side = math.isqrt(x_BN.shape[1] - 1) + 1
        square = F.pad(x_BN, (0, side**2 - x_BN.shape[1])).view(-1, 1, side, side)
        return square.repeat_interleave(_CELL, 2).repeat_interleave(_CELL, 3)
