"""What is learned beside the next word: which caption goes with which image, and which word with which image.

Both are added to the cross-entropy of words: `ImageTextContrast` of the pooled streams with weight 1,
`LexiconContrast` of the words after the first layer with weight 0.3.

Shape letters: B pairs, L tokens, D width, K images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective
from saccade.models.token_gating.network import Streams

#: least and largest temperature of each, and what they start with
_PAIRS, _WORDS, _START = (0.05, 1.0), (0.05, 2.0), 0.07


def contrast(text_BD: Tensor, image_BD: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric cross-entropy of cosines over a temperature: each text to its image, and the other way round.

    Args:
        text_BD, image_BD: pairs, of any length.
        temperature: positive.
    """
    score_BB = F.normalize(text_BD, dim=1) @ F.normalize(image_BD, dim=1).T / temperature
    own_B = torch.arange(len(score_BB), device=score_BB.device)
    return (F.cross_entropy(score_BB, own_B) + F.cross_entropy(score_BB.T, own_B)) / 2


def lexicon_shares(
    words_BLD: Tensor, image_BD: Tensor, there_BL: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor]:
    """log f1 and log f2 of each token, (B, L): the share of its own image among images, and of it among others' tokens.

        f1_ij = e^s(i,j,i) / sum_k e^s(i,j,k),     k the samples that have a j-th token
        f2_ij = e^s(i,j,i) / (e^s(i,j,i) + sum_{k != i, o} e^s(k,o,i)),     s(i,j,k) = h_ij . a_k / T

    Args:
        words_BLD: h.
        image_BD: a.
        there_BL: bool, which tokens there are; what is told of others means nothing.
        temperature: T.
    """
    score_BLK = torch.einsum("bld,kd->blk", words_BLD, image_BD) / temperature
    own_BL = score_BLK.diagonal(dim1=0, dim2=2).T
    among_BLK = score_BLK.masked_fill(~there_BL.T[None], -torch.inf)
    first_BL = own_BL - torch.logaddexp(among_BLK.logsumexp(2), torch.where(there_BL, -torch.inf, own_BL))
    itself = torch.eye(len(score_BLK), dtype=torch.bool, device=score_BLK.device)
    others_BLK = score_BLK.masked_fill(itself[:, None] | ~there_BL[..., None], -torch.inf)
    others_K = others_BLK.flatten(0, 1).logsumexp(0)
    return first_BL, own_BL - torch.logaddexp(own_BL, others_K[:, None])


class ImageTextContrast(nn.Module):
    """`contrast` of t = W_t mean of the embedded text and i = W_i m.

    Args:
        dim: D.
        weight: of the loss.
    """

    def __init__(self, dim: int, weight: float = 1.0) -> None:
        super().__init__()
        self.of_text, self.of_image = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.log_temperature, self.weight = nn.Parameter(torch.tensor(math.log(_START))), weight

    def forward(self, streams: Streams, there_BL: Tensor | None = None) -> Objective:
        """
        Args:
            streams: of a pass with images.
            there_BL: bool, which tokens there are; all where None.

        Raises:
            ValueError: if the pass had no images.
        """
        image_BD = _image(streams)
        there_BL1 = torch.ones_like(streams.embedded[..., :1])
        if there_BL is not None:
            there_BL1 = there_BL[..., None].to(there_BL1.dtype)
        text_BD = (streams.embedded * there_BL1).sum(1) / there_BL1.sum(1).clamp(min=1)
        temperature = self.log_temperature.exp().clamp(*_PAIRS)
        loss = contrast(self.of_text(text_BD), self.of_image(image_BD), temperature)
        return Objective(self.weight * loss, {"contrast": loss})


class LexiconContrast(nn.Module):
    """Lexicon-level contrastive grounding: -(log f1 + log f2) / 2, its mean over tokens; see `lexicon_shares`.

    Args:
        dim: D.
        weight: of the loss.
        form: "log", or "fraction" for (f1 + f2) / 2 as the released code has it, which is no loss to be minimised.
        temperature: it starts with.

    Raises:
        ValueError: if the form is another.
    """

    def __init__(self, dim: int, weight: float = 0.3, *, form: str = "log", temperature: float = _START) -> None:
        super().__init__()
        if form not in ("log", "fraction"):
            raise ValueError(f"form must be log or fraction, got {form!r}")
        self.of_words, self.of_image = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.temperature, self.weight, self.form = nn.Parameter(torch.tensor([temperature])), weight, form

    def forward(self, streams: Streams, there_BL: Tensor | None = None) -> Objective:
        """Of the words after the first layer; arguments and errors as `ImageTextContrast.forward`."""
        loss = self.of_features(streams.first, _image(streams), there_BL)
        return Objective(self.weight * loss, {"lexicon": loss})

    def of_features(self, words_BLD: Tensor, image_BD: Tensor, there_BL: Tensor | None = None) -> Tensor:
        """The mean over tokens.

        Args:
            words_BLD: before W_L.
            image_BD: before W_V.
            there_BL: bool, which tokens there are; all where None.
        """
        if there_BL is None:
            there_BL = torch.ones(words_BLD.shape[:2], dtype=torch.bool, device=words_BLD.device)
        shares = lexicon_shares(
            self.of_words(words_BLD), self.of_image(image_BD), there_BL, self.temperature.clamp(*_WORDS)
        )
        kept = [share[there_BL] for share in shares]
        if self.form == "fraction":
            return (kept[0].exp() + kept[1].exp()).mean() / 2
        return -(kept[0] + kept[1]).mean() / 2


def _image(streams: Streams) -> Tensor:
    if streams.image is None:
        raise ValueError("streams must be of a pass with images, this one had none")
    return streams.image.tokens.mean(1)
