"""The paper's claim at laptop size: words that name something take more of the image than others, unsupervised."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.models.captioning import caption_loss
from saccade.models.token_gating.network import DualStream

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: width of the vector of an image, and what is added to it at random
WIDTH, NOISE = 64, 0.3
#: share of samples that are text alone
TEXT = 0.5
_NOTE = (
    "Sentences are those of the task `caption`; the vector of a scene is the sum of a code for each word in its place "
    "that names a colour or a thing, with noise, and is 0 for text alone."
)


def _claim(lab: Lab) -> ClaimResult:
    """Sentences with and without the vector of their scene: what do gates and perplexities say of which words?"""
    words = len(lab.data.WORDS)
    codes = torch.randn(9, words, WIDTH, generator=torch.Generator().manual_seed(0))

    def draw(generator: Generator, count: int = lab.size(64, 2), text: float = TEXT) -> tuple[Tensor, ...]:
        _, captions, cells = lab.data.described(count, 16, generator)
        at = torch.arange(captions.shape[1])
        vector = (codes[at, captions] * (cells >= 0)[..., None]).sum(1)
        vector = vector + NOISE * torch.randn(vector.shape, generator=generator)
        return vector * (torch.rand(count, 1, generator=generator) >= text), captions, cells

    def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        return caption_loss(model(*batch[:2]).logits, batch[1], end=2, pad=0)

    def measure(trial: Trial) -> dict[str, float]:
        vector, captions, cells = draw(lab.held_out(), lab.size(300, 4), text=0.0)
        named, others = cells >= 0, (cells < 0) & (captions > 2)
        figures = {}
        for name, given in (("image", vector), ("text", None)):
            said = trial.model(given, captions)
            nats = F.cross_entropy(said.logits.mT, captions, reduction="none")
            figures[f"perplexity_named_{name}"] = nats[named].mean().exp()
            figures[f"perplexity_others_{name}"] = nats[others].mean().exp()
            if said.looks is not None:
                figures |= {"looks_named": said.looks[named].mean(), "looks_others": said.looks[others].mean()}
        return {name: float(value) for name, value in figures.items()}

    sizes: dict[str, Any] = {
        "vocab_size": words, "dim": 64, "num_heads": 4, "hidden": 128, "image_depth": 1, "depth": 2,
        "image_dim": WIDTH, "max_len": 16, "dropout": 0.0,
    }  # fmt: skip
    forms: dict[str, Any] = {
        "gated": partial(DualStream, **sizes),
        "added": partial(DualStream, gate="none", **sizes),
    }
    measured = lab.forms(forms, draw, measure, 600, loss=loss, lr=2e-3).means("{form}_{figure}")
    holds = (
        measured["gated_looks_named"] > measured["gated_looks_others"]
        and measured["gated_perplexity_named_image"] < measured["gated_perplexity_named_text"] / 2
    )
    return ClaimResult(measured, holds=holds, note=_NOTE)


CLAIM = Claim(
    paper="gates lean to the image for content words and to the text for function words, without being told to",
    expected="a larger 1 - z on words that name a colour or a thing; of these half the perplexity, with the image",
    run=_claim,
)
