"""The trunk of a vision transformer: patches, a class token, learned positions, pre-norm blocks (Dosovitskiy et al.,
arXiv 2010.11929).

Shape letters: B batch, C channels, H height, W width, N tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.layers.mlp import MLP
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
        activation: of their MLPs, of `saccade.layers.mlp.ACTIVATIONS`.
        patch_bias: whether the patches' projection has a bias.
        first_norm: whether tokens are normalised before the first block too.

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
        activation: str = "gelu",
        patch_bias: bool = True,
        first_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(image_size, patch, in_channels) < 1 or depth < 0 or image_size % patch:
            raise ValueError(
                "image_size must be whole patches, channels positive and depth not negative, got "
                f"{image_size}, {patch}, {in_channels} and {depth}"
            )
        self.dim, self.num_heads, self.hidden, self.norm_eps = dim, num_heads, hidden, norm_eps
        self.in_channels, self.patch, self.side = in_channels, patch, image_size // patch
        self.embed = nn.Conv2d(in_channels, dim, patch, patch, bias=patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.side**2, dim))
        self.norm_first = nn.LayerNorm(dim, norm_eps) if first_norm else None
        self.blocks = nn.ModuleList(
            PreNormBlock(
                SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True),
                dim, mlp=MLP(dim, hidden, activation=activation, drop=drop), attention_drop=drop, norm_eps=norm_eps,
            )
            for _ in range(depth)
        )  # fmt: skip

    def start(self, x_BCHW: Tensor) -> Tensor:
        """The tokens (B, 1 + patches, D) that the first block takes."""
        map_BDHW = self.embed(filled(x_BCHW, self.patch))
        x_BND = torch.cat([self.class_token.expand(len(map_BDHW), -1, -1), map_BDHW.flatten(2).mT], 1)
        x_BND = x_BND + positions_at(self.positions, self.side, map_BDHW.shape[2], map_BDHW.shape[3])
        return x_BND if self.norm_first is None else self.norm_first(x_BND)

    def states(
        self, x_BCHW: Tensor, *, skip: int = 0, adapt: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """The tokens before the first block and after each, depth + 1 - skip of them.

        Args:
            x_BCHW: images.
            skip: how many of the last blocks are left out.
            adapt: of a block's number, from 0, and the tokens that it gives: what the next one takes in their place.

        Raises:
            ValueError: if there are not that many blocks.
        """
        return block_states(self.blocks, self.start(x_BCHW), skip=skip, adapt=adapt)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.start(x_BCHW)
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND


def block_states(
    blocks: nn.ModuleList, x_BND: Tensor, *, skip: int = 0, adapt: Callable[[int, Tensor], Tensor] | None = None
) -> list[Tensor]:
    """`x_BND` and what each block gives, one after the other; arguments and errors are `VisionTransformer.states`'."""
    if not 0 <= skip <= len(blocks):
        raise ValueError(f"skip must be between 0 and the number of blocks ({len(blocks)}), got {skip}")
    states = [x_BND]
    for i, block in enumerate(blocks[: len(blocks) - skip]):
        x_BND = block(states[-1])
        states.append(x_BND if adapt is None else adapt(i, x_BND))
    return states
