"""What the draft is taught, and what it is spared: features by the entropy of attention, image tokens by its weight.

Shape letters: B batch, H heads, L layers that are looked at, S tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attention_entropy", "kept_tokens", "mutual_information", "select_features"]

CRITERIA = ("sum", "entropy", "mutual")


def attention_entropy(attention_BHSS: Tensor, eps: float = 1e-8) -> Tensor:
    """-sum_k a log(a + eps), the mean over heads: (B, S), in float32.

    Args:
        attention_BHSS: weights of a layer.
        eps: within the logarithm.
    """
    a_BHSS = attention_BHSS.float()
    return -(a_BHSS * (a_BHSS + eps).log()).sum(-1).mean(1)


def mutual_information(first_BHSS: Tensor, second_BHSS: Tensor, eps: float = 1e-8) -> Tensor:
    """H(a) + H(b) - H(ab), ab being the normalised product of both layers' weights: (B, S).

    Args:
        first_BHSS, second_BHSS: weights of two layers.
        eps: within logarithm and quotient.
    """
    joint_BHSS = first_BHSS.float() * second_BHSS.float()
    joint_BHSS = joint_BHSS / (joint_BHSS.sum(-1, keepdim=True) + eps)
    return sum(attention_entropy(a, eps) for a in (first_BHSS, second_BHSS)) - attention_entropy(joint_BHSS, eps)


def select_features(
    hidden_states: Sequence[Tensor],
    attentions: Sequence[Tensor],
    criterion: str = "entropy",
    *,
    fraction: float = 0.4,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Of each token the input of that early layer whose attention is surest: features (B, S, D), layers (B, S).

        l* = argmin over 1 <= l <= L - 2 of  H(a_l)  and/or  I(a_l, a_{l-1}) + I(a_l, a_{l+1}),   L = floor(fraction N)

    Args:
        hidden_states: of the target, N + 1 of (B, S, D); the first is the embedding.
        attentions: of its N layers, (B, H, S, S).
        criterion: "entropy", "mutual", or "sum" of both.
        fraction: of the layers that are looked at.
        eps: see `attention_entropy`.

    Raises:
        ValueError: for another criterion, too few layers, or layers without attention.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if not attentions or any(a is None for a in attentions):
        raise ValueError("the target gives no attentions: load it with attn_implementation='eager'")
    layers = int(fraction * len(attentions))
    if layers < 3:
        raise ValueError(f"{fraction} of the target's layers must be at least 3, got {len(attentions)} layers")
    scores = []
    for l in range(1, layers - 1):
        score_BS = attention_entropy(attentions[l], eps) if criterion != "mutual" else 0.0
        if criterion != "entropy":
            score_BS = score_BS + sum(mutual_information(attentions[l], attentions[l + d], eps) for d in (-1, 1))
        scores.append(score_BS)
    layer_BS = 1 + torch.stack([torch.as_tensor(score) for score in scores]).argmin(0)
    stacked_LBSD = torch.stack(list(hidden_states[:layers]))
    index = layer_BS[None, ..., None].expand(1, *layer_BS.shape, stacked_LBSD.shape[-1])
    return stacked_LBSD.gather(0, index)[0], layer_BS


def kept_tokens(attention_HSS: Tensor, is_image_S: Tensor, keep_ratio: float = 0.5) -> Tensor:
    """The places of all text tokens and of the image tokens that are looked at most, in order.

    Args:
        attention_HSS: weights of the target's last layer; of an image token counts what all queries and heads give it.
        is_image_S: bool.
        keep_ratio: of the image tokens, of which one stays at least.

    Raises:
        ValueError: if the ratio is not above 0 and at most 1.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
    places = is_image_S.nonzero()[:, 0]
    keep_S = ~is_image_S
    if len(places):
        score_S = attention_HSS.float().mean((0, 1))
        best = score_S[places].topk(max(1, int(keep_ratio * len(places)))).indices
        keep_S = keep_S.index_fill(0, places[best], True)
    return keep_S.nonzero()[:, 0]
