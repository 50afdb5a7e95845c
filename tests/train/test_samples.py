"""Inputs of real models: an image of at most so many tokens, a text of exactly so many."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saccade.train import models
from saccade.train.samples import carried, following, image_sample, image_tokens, square, text_sample

#: of the ViT-S/14
CONFIG = SimpleNamespace(patch_size=14, image_size=518)


@pytest.mark.parametrize(
    ("context", "tokens", "side"),
    [(None, 1370, 518), (1370, 1370, 518), (1369, 1297, 504), (5477, 5477, 1036), (2048, 2026, 630), (2, 2, 14)],
)
def test_an_image_has_at_most_so_many_tokens(context: int | None, tokens: int, side: int) -> None:
    assert image_tokens(CONFIG, context) == tokens
    assert image_sample(CONFIG, torch.rand(3, 20, 30), context)["pixel_values"].shape == (1, 3, side, side)


def test_less_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        image_tokens(CONFIG, 1)


def test_only_transformers_by_themselves_are_carried() -> None:
    with pytest.raises(ValueError, match=r"saliency is no transformer .*; vit-s14, smollm2-135m, minilm are"):
        carried("saliency", None)


def test_a_square_is_the_middle() -> None:
    image = torch.zeros(1, 2, 6)
    image[..., 2:4] = 1
    assert square(image, 2).eq(1).all()


def test_a_text_has_as_many_tokens_as_are_asked_for() -> None:
    def tokenizer(text: str, max_length: int, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(len(text))[None, :max_length]}

    text = "a" * 100
    config = SimpleNamespace(max_position_embeddings=64)
    first = text_sample(lambda: tokenizer, config, text, 7)
    whole = text_sample(lambda: tokenizer, config, text, 14)["input_ids"]
    behind = following(tokenizer, text, first)
    assert behind is not None and torch.equal(torch.cat([first["input_ids"], behind["input_ids"]], 1), whole)
    assert following(tokenizer, text[:9], first) is None
    assert text_sample(lambda: tokenizer, config, text, 7)["input_ids"].shape == (1, 7)
    assert text_sample(lambda: tokenizer, config, text, None)["input_ids"].shape == (1, 64)
    with pytest.raises(ValueError, match=r"positions \(64\), got 65"):
        text_sample(lambda: tokenizer, config, text, 65)
    with pytest.raises(ValueError, match="at least 40 tokens, got 20"):
        text_sample(lambda: tokenizer, config, text[:20], 40)


def test_the_vit_interpolates_its_positions() -> None:
    if not models.installed("vit-s14"):
        pytest.skip("vit-s14 is not installed")
    vit = models.load("vit-s14")
    for context in (5, 26):
        with torch.no_grad():
            seen = vit(**image_sample(vit.config, torch.rand(3, 40, 40), context)).last_hidden_state
        assert seen.shape == (1, context, 384) and seen.isfinite().all()
