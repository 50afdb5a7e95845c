"""Features against candidate messages: scores, the loss, and the figures of the ads' benchmark.

Shape letters: B batch, T texts, S statements of an ad, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def matching_logits(
    image_BD: Tensor, text: Tensor, logit_scale: Tensor | float, *, largest: float | None = math.log(100)
) -> Tensor:
    """e^s cos(image, text), in float32.

    Args:
        image_BD: adapted features.
        text: (T, D) for all images, giving (B, T), or (B, S, D) for each its own, giving (B, S).
        logit_scale: s.
        largest: s is cut off there; None leaves it.

    Raises:
        ValueError: if the shapes do not fit.
    """
    of_each = text.ndim == 3
    if image_BD.ndim != 2 or text.ndim not in (2, 3) or text.shape[-1] != image_BD.shape[1]:
        raise ValueError(
            "image must be (batch, width) and text (texts, width) or (batch, statements, width), got "
            f"{tuple(image_BD.shape)} and {tuple(text.shape)}"
        )
    if of_each and len(text) != len(image_BD):
        raise ValueError(f"there must be statements for each image, got {len(text)} and {len(image_BD)}")
    scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=image_BD.device)
    scale = (scale if largest is None else scale.clamp(max=largest)).exp()
    image, message = (F.normalize(x.float(), dim=-1) for x in (image_BD, text))
    return scale * (torch.einsum("bd,bsd->bs", image, message) if of_each else image @ message.T)


def matching_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The mean of the cross entropies of images over the batch's texts, and of texts over its images.

    Args:
        image_BD: adapted features.
        text_BD: of one true statement of each.
        logit_scale: s.

    Raises:
        ValueError: if there is no text for each image.
    """
    if text_BD.shape != image_BD.shape:
        raise ValueError(f"there must be a text for each image, got {tuple(text_BD.shape)}, {tuple(image_BD.shape)}")
    logits_BB = matching_logits(image_BD, text_BD, logit_scale)
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def statement_figures(logits_BS: Tensor, true_BS: Tensor) -> dict[str, float]:
    """How well true statements of an ad rank among its statements.

    Args:
        logits_BS: of each statement.
        true_BS: bool, whether it is true; one of each ad at least.

    Returns:
        `top1` (the first is true), `best_rank` (of the best true one, from 1), `recall3` (the share of true ones among
        the first three), their means over ads.

    Raises:
        ValueError: if the shapes differ, or an ad has no true statement.
    """
    if logits_BS.shape != true_BS.shape or logits_BS.ndim != 2 or true_BS.dtype != torch.bool:
        raise ValueError(
            f"logits and true must be (ads, statements), true bool, got {tuple(logits_BS.shape)} and "
            f"{tuple(true_BS.shape)} {true_BS.dtype}"
        )
    if not true_BS.any(1).all():
        raise ValueError("each ad must have a true statement")
    ranked_BS = true_BS.gather(1, logits_BS.argsort(1, descending=True))
    return {
        "top1": float(ranked_BS[:, 0].float().mean()),
        "best_rank": float((ranked_BS.int().argmax(1) + 1).float().mean()),
        "recall3": float((ranked_BS[:, :3].sum(1) / true_BS.sum(1)).mean()),
    }
