"""What a real model is measured on: the first tokens of a text, or a photograph of so many patches.

Shape letters: B batch, C channels, H, W picture, N tokens, S side of a square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from saccade.integrations.advise import positions
from saccade.models.images import normalised, read_image
from saccade.train import models
from saccade.train.data import english, photographs

__all__ = ["carried", "following", "image_sample", "image_tokens", "square", "text_sample"]

#: tokens that a vision transformer of DINOv2's layout puts before the patches
_FIRST = 1


def carried(name: str, context: int | None, data: Path | None = None) -> tuple[Any, dict[str, Any], Any]:
    """A model of `saccade.train.models`, what it is called with, and its tokenizer, None of one that sees.

    Args:
        name: of the model.
        context: tokens of a text, or the most of an image; see `text_sample` and `image_sample`.
        data: a file; `saccade.train.data.english`, or scikit-image's astronaut, where None.

    Raises:
        ValueError: if the model reads neither texts nor images by itself, or as the samples'.
        OSError: if the file cannot be read.
        ImportError: if the model's package is not installed.
    """
    if not models.MODELS[name].kind:
        known = ", ".join(each for each, entry in models.MODELS.items() if entry.kind)
        raise ValueError(f"{name} is no transformer of texts or images by itself; {known} are")
    found = models.load(name)
    if isinstance(found, tuple):
        model, tokenizer = found
        return model, text_sample(lambda: tokenizer, model.config, english(data), context), tokenizer
    image = photographs("astronaut")[0] if data is None else read_image(data)
    return found, image_sample(found.config, image, context), None


def text_sample(tokenizer: Callable[[], Any], config: Any, text: str, context: int | None) -> dict[str, Any]:
    """The first tokens of a text, as a language model is called with them.

    Args:
        tokenizer: makes the model's tokenizer; asked when the rest is found to be right.
        config: of the model.
        text: of enough words.
        context: tokens; 2048, or as many positions as there are, where None.

    Raises:
        ValueError: if the model has fewer positions, or the text fewer tokens.
    """
    limit = positions(config)
    if context is not None and limit is not None and context > limit:
        raise ValueError(f"the context must be at most the model's positions ({limit}), got {context}")
    longest = context or min(2048, limit or 2048)
    encoded = tokenizer()(text[: longest * 32], return_tensors="pt", truncation=True, max_length=longest)
    if context is not None and encoded["input_ids"].shape[1] < context:
        had = encoded["input_ids"].shape[1]
        raise ValueError(f"the text must have at least {context} tokens, got {had}; give a longer --data")
    return dict(encoded)


def following(tokenizer: Any, text: str, sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """As many tokens of a text again, behind those of a `text_sample`; None where it ends before.

    Args:
        tokenizer, text: of the sample.
        sample: what `text_sample` gave.
    """
    count = sample["input_ids"].shape[1]
    encoded = tokenizer(text[: count * 64], return_tensors="pt", truncation=True, max_length=2 * count)
    both = {name: x[:, count:] for name, x in encoded.items() if x.shape[1] == 2 * count}
    return both or None


def image_tokens(config: Any, context: int | None) -> int:
    """The tokens of the largest square image of at most `context`; of the size that was pretrained on where None.

    Args:
        config: of a vision transformer.
        context: the most tokens.

    Raises:
        ValueError: if that is less than a patch.
    """
    return (_side(config, context) // config.patch_size) ** 2 + _FIRST


def image_sample(config: Any, image_3HW: Tensor, context: int | None) -> dict[str, Tensor]:
    """The middle square of a photograph in [0, 1], of at most `context` tokens, as a vision transformer takes it.

    A size that was not pretrained on is the model's own affair: it interpolates its positions.

    Args:
        config: of the model.
        image_3HW: the photograph.
        context: the most tokens; those of the size that was pretrained on where None.

    Raises:
        ValueError: if `context` is less than a patch.
    """
    return {"pixel_values": normalised(square(image_3HW, _side(config, context)), 3)}


def _side(config: Any, context: int | None) -> int:
    patches = config.image_size // config.patch_size if context is None else math.isqrt(max(0, context - _FIRST))
    if patches < 1:
        raise ValueError(f"the context must be at least {_FIRST + 1} tokens, a patch of an image, got {context}")
    return patches * config.patch_size


def square(image_CHW: Tensor, side: int) -> Tensor:
    """The middle square at another size, (1, C, side, side).

    Args:
        image_CHW: in [0, 1].
        side: S, in pixels.
    """
    least = min(image_CHW.shape[1:])
    top, left = ((n - least) // 2 for n in image_CHW.shape[1:])
    cut = image_CHW[None, :, top : top + least, left : left + least]
    return F.interpolate(cut, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
