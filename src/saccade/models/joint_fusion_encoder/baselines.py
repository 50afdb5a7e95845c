"""What the joint encoder is compared with: two towers of CLIP, fused late (UniIR, arXiv 2311.17136).

    score fusion    e = m_t f_T(t) + m_I f_I(I)
    feature fusion  e = mean over tokens of Blocks([states of the text; states of the image])

Shape letters: B batch, L words, P tokens of an image, N all tokens, E width, H, W image.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.clip import ClipText, ClipVision
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.backbone import check_images
from saccade.models.embedding import EmbeddingOutput
from saccade.models.joint_fusion_encoder.pooling import last_state, mean_state, packed
from saccade.models.retrieval import Retriever


class ScoreFusion(nn.Module):
    """The sum of what two encoders make of the modalities that are there, not normalised.

    Args:
        text: texts -> (B, E).
        image: images -> (B, E).
        logit_scale: the logarithm of the scale of cosines, learned.
    """

    def __init__(self, text: nn.Module, image: nn.Module, logit_scale: float = math.log(1 / 0.07)) -> None:
        super().__init__()
        self.text, self.image = text, image
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))

    def forward(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            text, image: of B items each.
            text_mask, image_mask: (B,), 1 where the item has one; all have where None.
        """
        parts = ((self.text(text), text_mask), (self.image(image), image_mask))
        text_BE, image_BE = (x if there is None else x * there.to(x)[:, None] for x, there in parts)
        return text_BE + image_BE


class LateFusion(Retriever):
    """CLIP's towers, and one vector of what they say.

    A missing modality adds nothing to the sum, and no tokens to the fused features (UniIR encodes a blank image and an
    empty text there).

    Args:
        fusion: "score", or "feature": two transformer blocks over the states of both.
        vocabulary, context, dim, depth, num_heads: of the text tower.
        image_size, patch, vision_dim, vision_depth, vision_heads: of the vision tower.
        embed_dim: E; with "feature" it must be `dim`, as texts are not projected.

    Raises:
        ValueError: if the fusion is unknown, or the widths differ.
    """

    def __init__(
        self,
        fusion: Literal["score", "feature"] = "score",
        *,
        vocabulary: int = 49408,
        context: int = 77,
        dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        image_size: int = 224,
        patch: int = 32,
        vision_dim: int = 768,
        vision_depth: int = 12,
        vision_heads: int = 12,
        embed_dim: int = 512,
    ) -> None:
        super().__init__()
        if fusion not in ("score", "feature"):
            raise ValueError(f"fusion must be score or feature, got {fusion!r}")
        if fusion == "feature" and dim != embed_dim:
            raise ValueError(f"features are fused at one width: dim must be embed_dim ({embed_dim}), got {dim}")
        self.image_size = (image_size, image_size)
        self.vision = ClipVision(
            image_size=image_size, patch=patch, dim=vision_dim, depth=vision_depth, num_heads=vision_heads,
            embed_dim=embed_dim,
        )  # fmt: skip
        self.text = ClipText(
            vocabulary=vocabulary, context=context, dim=dim, depth=depth, num_heads=num_heads,
            embed_dim=embed_dim if fusion == "score" else None,
        )  # fmt: skip
        self.blocks = None
        if fusion == "feature":
            self.blocks = nn.ModuleList(
                PreNormBlock(SoftmaxAttention(embed_dim, num_heads), embed_dim) for _ in range(2)
            )

    def vector(self, pixel_values: Tensor | None, input_ids: Tensor | None, mask_BL: Tensor | None) -> EmbeddingOutput:
        said = None if input_ids is None else self.text.tokens(input_ids)
        seen = None
        if pixel_values is not None:
            check_images(pixel_values, 3)
            assert self.vision.proj is not None
            seen = self.vision.proj(self.vision.tokens(pixel_values))
        features_BE = self.fused(said, mask_BL, seen)
        return EmbeddingOutput(F.normalize(features_BE, dim=-1), features=features_BE)

    def fused(self, said_BLE: Tensor | None, mask_BL: Tensor | None, seen_BPE: Tensor | None) -> Tensor:
        """(B, E) of the states of those modalities that there are."""
        if self.blocks is None:
            parts = [] if seen_BPE is None else [seen_BPE[:, 0]]
            if said_BLE is not None and mask_BL is not None and self.text.proj is not None:
                parts.append(self.text.proj(last_state(said_BLE, mask_BL)))
            return torch.stack(parts).sum(0)
        tokens, real = [], []
        if said_BLE is not None and mask_BL is not None:
            tokens, real = [said_BLE], [mask_BL]
        if seen_BPE is not None:
            tokens, real = [*tokens, seen_BPE], [*real, seen_BPE.new_ones(seen_BPE.shape[:2], dtype=torch.bool)]
        x_BNE, mask_BN = packed(torch.cat(tokens, 1), torch.cat(real, 1))
        for block in self.blocks:
            x_BNE = block(x_BNE, mask=mask_BN)
        return mean_state(x_BNE, mask_BN)
