"""The paper's claim at laptop size: words that follow from the word before are said without a look at the image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.captioning import CaptionOutput, caption_loss
from saccade.models.visual_sentinel.network import VisualSentinel

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: kinds of things, regions of an image, things that are named, width of a region's vector
KINDS, REGIONS, NAMED, WIDTH = 6, 9, 4, 32
FIRST, _NOISE = 3, 0.3
_NOTE = (
    "Each of four words names what the region of its place shows, and is followed by one that it alone determines; "
    "spatial attention has the same regions and no sentinel."
)


def scenes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Regions (B, R, C) of noise, place and, of the first four, kind; and words: of a kind, and what follows of it."""
    fixed = torch.Generator().manual_seed(0)
    kinds, places = torch.randn(KINDS, WIDTH, generator=fixed), torch.randn(REGIONS, WIDTH, generator=fixed)
    follows = torch.randperm(KINDS, generator=fixed)
    shown = torch.randint(KINDS, (count, REGIONS), generator=generator)
    regions = kinds[shown] + places + _NOISE * torch.randn(count, REGIONS, WIDTH, generator=generator)
    visual = shown[:, :NAMED]
    return regions, torch.stack([visual, KINDS + follows[visual]], 2).flatten(1) + FIRST


def _claim(lab: Lab) -> ClaimResult:
    """Is the sentinel's weight larger on words that the word before determines?"""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return caption_loss(model(*batch).logits, batch[1], end=2, pad=0)

    def measure(trial: Trial) -> dict[str, float]:
        regions, words = scenes(lab.size(256, 4), lab.held_out())
        said: CaptionOutput = trial.model(regions, words)
        assert said.logits is not None and said.looks is not None and said.attention is not None
        right, beta = (said.logits.argmax(2) == words).float(), 1 - said.looks
        at = said.attention[:, ::2].argmax(2) == torch.arange(NAMED)
        figures = {
            "visual_accuracy_percent": 100 * right[:, ::2].mean(),
            "function_accuracy_percent": 100 * right[:, 1::2].mean(),
            "pointing_percent": 100 * at.float().mean(),
        }
        if trial.form == "adaptive":
            figures |= {"beta_visual": beta[:, ::2].mean(), "beta_function": beta[:, 1::2].mean()}
        return {name: float(value) for name, value in figures.items()}

    sizes: dict[str, Any] = {
        "vocab_size": FIRST + 2 * KINDS, "channels": WIDTH, "dim": 64, "word_dim": 32, "attention_dim": 49,
        "dropout": 0.0,
    }  # fmt: skip
    forms: dict[str, Any] = {
        "adaptive": partial(VisualSentinel, **sizes),
        "spatial": partial(VisualSentinel, sentinel=False, **sizes),
    }
    trials = lab.forms(forms, lambda generator: scenes(lab.size(64, 2), generator), measure, 800, loss=loss, lr=1e-3)
    measured = trials.means("{form}_{figure}")
    holds = (
        measured["adaptive_beta_function"] > measured["adaptive_beta_visual"] + 0.2
        and measured["adaptive_visual_accuracy_percent"] > 90
        and measured["adaptive_function_accuracy_percent"] > 90
    )
    return ClaimResult(measured, holds=holds, note=_NOTE)


CLAIM = Claim(
    paper="the sentinel is taken for words that language alone determines, and regions for those that name things",
    expected="nine of ten words right, and a weight of the sentinel on function words that is larger by 0.2 at least",
    run=_claim,
)
