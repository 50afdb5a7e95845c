"""The trunk of a vision transformer: patches, a class token, learned positions, pre-norm blocks (Dosovitskiy et al.,
arXiv 2010.11929).

Shape letters: B batch, C channels, H height, W width, N tokens, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.layers.patches import filled
from saccade.layers.positions import positions_at
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) of any size -> tokens (B, 1 + patches, D), the class token first, without a last norm.

    Images are filled with zeros to whole patches; positions of other sizes than `image_size` are interpolated.

    Args:
        image_size: side of the images whose patches have a position each.
        patch: side of a patch.
        in_channels: C.
        dim: D.
        depth: blocks.
        num_heads, hidden: of a block; `hidden` is 4 D where None.
        drop: dropout of the blocks.
        norm_eps: of their norms.

    Raises:
        ValueError: if a number is not positive, or patches do not fill the image.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch: int = 16,
        in_channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        drop: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if min(image_size, patch, in_channels) < 1 or depth < 0 or image_size % patch:
            raise ValueError(
                "image_size must be whole patches, channels positive and depth not negative, got "
                f"{image_size}, {patch}, {in_channels} and {depth}"
            )
        self.dim, self.num_heads, self.hidden, self.norm_eps = dim, num_heads, hidden, norm_eps
        self.in_channels, self.patch, self.side = in_channels, patch, image_size // patch
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.side**2, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True),
                dim, hidden, drop=drop, attention_drop=drop, norm_eps=norm_eps,
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, x_BCHW: Tensor) -> Tensor:
        map_BDHW = self.embed(filled(x_BCHW, self.patch))
        x_BND = torch.cat([self.class_token.expand(len(map_BDHW), -1, -1), map_BDHW.flatten(2).mT], 1)
        x_BND = x_BND + positions_at(self.positions, self.side, map_BDHW.shape[2], map_BDHW.shape[3])
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND
