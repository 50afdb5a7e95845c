"""VTFF: the face and its local binary patterns through two trunks, fused, and read by a transformer as visual words.

Shape letters: B batch, C channels, D width of the words, H height, W width of a map, N words, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.positions import positions_at
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.resnet import ResNetTrunk
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.backbone import Backbone, ImageOutput, check_images, maps_of
from saccade.models.images import luma, middle, normalised
from saccade.models.vtff.fusion import SelectiveFusion

NORMS = ("pre", "post")
#: (row, column) of the neighbours, once around
_AROUND = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))


def local_binary_patterns(image_BCHW: Tensor) -> Tensor:
    """The codes of the eight neighbours of each pixel, 0 to 255 as 0 to 1, (B, 1, H, W); without gradient.

    Bit p is set where neighbour p is at least as bright as the pixel; around the image its border goes on. A code
    depends on the order of the brightnesses alone, so that any scale and shift of them leaves it.

    Args:
        image_BCHW: grey or in colour, C = 1 or 3.

    >>> local_binary_patterns(torch.tensor([[[[1.0, 2, 3], [1, 2, 3], [1, 2, 3]]]]))[0, 0, 1, 1] * 255
    tensor(62.)
    """
    grey = image_BCHW.detach()
    if grey.shape[1] == 3:
        grey = luma(grey)
    height, width = grey.shape[2:]
    around = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    bits = [around[:, :, r : r + height, c : c + width] >= grey for r, c in _AROUND]
    return torch.stack([bit * (1 << p) for p, bit in enumerate(bits)]).sum(0).to(grey.dtype) / 255


class PostNormBlock(nn.Module):
    """A transformer block whose norms follow the sums: u = LN(x + attention(x)), y = LN(u + mlp(u)).

    Args:
        dim: D.
        num_heads: of the attention.
        hidden: inner width of the MLP.
        dropout: of both branches.
        qkv_bias: of the projections.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, *, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=qkv_bias, proj_bias=True)
        self.mlp, self.dropout = MLP(dim, hidden), nn.Dropout(dropout)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = self.norm1(x_BND + self.dropout(self.attention(x_BND)))
        return self.norm2(x_BND + self.dropout(self.mlp(x_BND)))


class VTFF(Backbone):
    """The expression classifier. The image's patterns are made here where they are not given.

    Args:
        num_classes: K: 7 (RAF-DB), 8 (FERPlus).
        trunks: two networks that give maps, of the face and of its patterns, of which the last is taken; both with
            `channels`. Two ResNet-18s where None.
        stage: of these, the last that is built: 3 (C = 256, 14 x 14 words of an image of 224) or 4 (512, 7 x 7).
        width: channels of their stems.
        reduction, mix, bias: of the fusion, see `SelectiveFusion`.
        dim: D.
        num_heads, depth, hidden: of the transformer.
        norm: "pre" as in ViT, or "post".
        final_norm: layer norm of the class token.
        dropout: of the branches, and of the words.
        qkv_bias: of the attention.
        image_size: side of the images whose words have a position each; others' positions are interpolated.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "vtff"

    def __init__(
        self,
        num_classes: int = 7,
        *,
        trunks: Sequence[nn.Module] | None = None,
        stage: int = 3,
        width: int = 64,
        reduction: int = 8,
        mix: str = "convex",
        bias: bool = False,
        dim: int = 768,
        num_heads: int = 8,
        depth: int = 4,
        hidden: int = 3072,
        norm: str = "pre",
        final_norm: bool = True,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        if min(num_classes, depth, image_size) < 1:
            raise ValueError(
                f"num_classes, depth and image_size must be positive, got {num_classes}, {depth} and {image_size}"
            )
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        made: list[nn.Module] = list(trunks or (ResNetTrunk(18, width=width, stages=stage) for _ in range(2)))
        channels = {tuple(getattr(trunk, "channels", ()))[-1:] for trunk in made}
        if len(made) != 2 or len(channels) != 1 or channels == {()}:
            raise ValueError("trunks must be two with channels, the same of their last maps")
        self.rgb_trunk, self.lbp_trunk = made
        ((last,),) = channels
        stride = tuple(getattr(self.rgb_trunk, "strides", (32,)))[-1]
        self.channels, self.strides, self.image_size = (last,), (stride,), image_size
        self.side = -(-image_size // stride)
        self.fusion = SelectiveFusion(last, reduction, mix=mix, bias=bias)
        self.embed = nn.Linear(last, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                PostNormBlock(dim, num_heads, hidden, dropout=dropout, qkv_bias=qkv_bias)
                if norm == "post"
                else PreNormBlock(
                    SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=qkv_bias, proj_bias=True),
                    dim, hidden, drop=dropout, attention_drop=dropout, norm_eps=1e-6,
                )
                for _ in range(depth)
            )
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.head = nn.Linear(dim, num_classes)

    def features(self, x_BCHW: Tensor, lbp_BCHW: Tensor | None = None) -> list[Tensor]:
        """The fused map, (B, C, H, W).

        Args:
            x_BCHW: faces (B, 3, H, W).
            lbp_BCHW: their patterns (B, 3, H, W); made of the faces where None.

        Raises:
            ValueError: if they are no batches of colour images.
        """
        check_images(x_BCHW, 3)
        if lbp_BCHW is None:
            lbp_BCHW = local_binary_patterns(x_BCHW).expand(-1, 3, -1, -1)
        check_images(lbp_BCHW, 3)
        rgb, lbp = maps_of(self.rgb_trunk(x_BCHW))[-1], maps_of(self.lbp_trunk(lbp_BCHW))[-1]
        return [self.fusion(rgb, lbp)]

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the fused map, read word by word."""
        words_BND = self.embed(x_BCHW.flatten(2).mT)
        tokens_BND = torch.cat([self.class_token.expand(len(words_BND), -1, -1), words_BND], 1)
        tokens_BND = self.dropout(
            tokens_BND + positions_at(self.positions, self.side, x_BCHW.shape[2], x_BCHW.shape[3])
        )
        return self.head(self.norm(self.blocks(tokens_BND)[:, 0]))

    def forward(self, pixel_values: Tensor, lbp: Tensor | None = None) -> ImageOutput:
        """
        Args:
            pixel_values: faces (B, 3, H, W), normalised as the trunk wants them.
            lbp: their patterns (B, 3, H, W); made of `pixel_values` where None.

        Raises:
            ValueError: if they are no batches of colour images.
        """
        maps = self.features(pixel_values, lbp)
        return ImageOutput(maps, self.classify(maps[-1]))

    def see(self, images: Sequence[Tensor]) -> ImageOutput:
        """Patterns are those of the images before they are normalised."""
        squares = torch.stack([middle(image, self.image_size) for image in images])
        patterns = local_binary_patterns(squares).expand(-1, 3, -1, -1)
        said = self(normalised(squares, self.in_channels), patterns)
        return replace(said, images=list(images))
