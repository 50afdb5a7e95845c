"""How it is trained: words' costs, attention that sums to 1 over words too, and the score function of drawn regions.

Adam (the paper: RMSProp for Flickr8k) on batches of 64 captions of one length, stopped by BLEU on held-out images.

Shape letters: B images, T words, V vocabulary, R regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: what the authors' code divides rewards by, and adds to probabilities
REWARD, LEAST = 10.0, 1e-8


def until_end(captions_BT: Tensor, end: int) -> Tensor:
    """Which words belong to captions, (B, T) bool: all until the one that ends it, with that.

    Args:
        captions_BT: words.
        end: the word.
    """
    ends_BT = (captions_BT == end).int()
    return ends_BT.cumsum(1) - ends_BT == 0


def word_costs(logits_BTV: Tensor, captions_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """-log(p + 1e-8) of each word, (B, T), 0 where it is masked. Their sum over words, and mean over captions, is L.

    Args:
        logits_BTV: of each word.
        captions_BT: the words.
        mask_BT: bool, which count; all where None.
    """
    share_BT = logits_BTV.float().softmax(2).gather(2, captions_BT[..., None])[..., 0]
    cost_BT = -(share_BT + LEAST).log()
    return cost_BT if mask_BT is None else cost_BT * mask_BT


def doubly_stochastic(alpha_BTR: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """mean over captions of sum_i (1 - sum_t alpha_ti)^2: each region is to be looked at once in a caption.

    Args:
        alpha_BTR: attention of each word.
        mask_BT: bool, which words count; all where None.
    """
    alpha_BTR = alpha_BTR if mask_BT is None else alpha_BTR * mask_BT[..., None]
    return (1 - alpha_BTR.sum(1)).square().sum(1).mean()


def reinforced(
    alpha_BTR: Tensor,
    chosen_BTR: Tensor,
    costs_BT: Tensor,
    *,
    baseline: Tensor | float | None = None,
    entropy: float = 0.002,
) -> Tensor:
    """A scalar whose gradient by alpha is what the authors' code puts there, and which says nothing by its value.

        (b - C_b) / 10 (-s / alpha) + lambda_e (log alpha + 1),     C_b the mean over steps of the words' costs,

    where there is a baseline b, and with the word's own cost in place of -(b - C_b) where there is none. It is to be
    added to the sum over words of costs, in which what was chosen has no gradient of its own.

    Args:
        alpha_BTR: attention.
        chosen_BTR: s, what was drawn of it, or alpha itself.
        costs_BT: of `word_costs`.
        baseline: b, of `Baseline`; None for the variant by words.
        entropy: lambda_e, how much attention that is spread is preferred.
    """
    with torch.no_grad():
        if baseline is None:
            reward_BT = costs_BT / REWARD
        else:
            reward_BT = (costs_BT.mean(1, keepdim=True) - baseline) / REWARD
        alpha = alpha_BTR.clamp(min=torch.finfo(alpha_BTR.dtype).tiny)
        gradient = reward_BT[..., None] * chosen_BTR / alpha + entropy * (alpha.log() + 1)
    return (gradient.to(alpha_BTR.dtype) * alpha_BTR).sum()


class Baseline(nn.Module):
    """b of `reinforced`: a moving mean of the cost of a word, b <- 0.9 b + 0.1 mean cost.

    Args:
        decay: 0.9.
    """

    value: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))

    @torch.no_grad()
    def update(self, costs_BT: Tensor) -> Tensor:
        """b as it was, to be used now; these costs move it."""
        before = self.value.clone()
        self.value.mul_(self.decay).add_((1 - self.decay) * costs_BT.float().mean())
        return before
