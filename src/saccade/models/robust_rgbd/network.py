"""RFNet: two trunks, a gate for each level, fusion level by level, a decoder from coarse to fine.

Shape letters: B batch, C channels, H height, W width, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.res2net import Res2NetTrunk
from saccade.layers.resize import resize
from saccade.models.backbone import check_images
from saccade.models.robust_rgbd.parts import AF, GCM, LWA
from saccade.models.segmentation import Saliency, SaliencyNetwork


class RFNet(SaliencyNetwork):
    """Saliency of an image and a depth map that may be noisy or out of place; by default as published.

    Args:
        channels: of the decoder.
        blocks, width, base_width, scale: of both Res2Net trunks, see `Res2NetTrunk`.
        hidden: of the LWA's MLP.
        pool: of the LWA, see there; it attends to all pairs of positions at stride 4.
        over_places: of the AFs, see there.
        trusts: False fuses with gates of 1, without LWA.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "robust-rgbd"
    views = ("image", "depth")

    def __init__(
        self,
        channels: int = 32,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        base_width: int = 26,
        scale: int = 4,
        hidden: int = 24,
        pool: int = 1,
        over_places: bool = False,
        trusts: bool = True,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.image_trunk, self.depth_trunk = (
            Res2NetTrunk(blocks, width=width, base_width=base_width, scale=scale) for _ in range(2)
        )
        self.depth_stem = nn.Conv2d(1, 3, 1)
        levels = self.image_trunk.channels
        self.trust = LWA(levels[1], len(levels), hidden, pool=pool) if trusts else None
        fused = (levels[0], *(c // 2 for c in levels[1:]))
        self.fusions = nn.ModuleList(
            AF(c, out if i else None, over_places=over_places) for i, (c, out) in enumerate(zip(levels, fused))
        )
        below = [channels] * (len(fused) - 1) + [0]
        self.decoder = nn.ModuleList(GCM(c + more, channels) for c, more in zip(fused, below))
        self.head = nn.Conv2d(channels, 1, 1)

    def gates(self, image_maps: Sequence[Tensor], depth_maps: Sequence[Tensor]) -> Tensor:
        """How much each level trusts depth, (B, L, 1, 1) in (0, 1); 1 without LWA."""
        if self.trust is None:
            return image_maps[0].new_ones(len(image_maps[0]), len(image_maps), 1, 1)
        return self.trust(image_maps[1], depth_maps[1])

    def encode(self, image: Tensor, depth: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The five maps of image and of depth.

        Raises:
            ValueError: as `forward`.
        """
        check_images(image, 3)
        if depth.shape != (len(image), 1, *image.shape[2:]):
            expected = (len(image), 1, *image.shape[2:])
            raise ValueError(f"depth must be {expected}, the image's size with one channel, got {tuple(depth.shape)}")
        return self.image_trunk(image), self.depth_trunk(self.depth_stem(depth))

    def forward(self, image: Tensor, depth: Tensor) -> Saliency:
        """Images (B, 3, H, W) as ImageNet's are normalised, and depth (B, 1, H, W) in [0, 1]; of any size.

        In training a batch is of two or more, as the LWA's batch norms see one number of an image.

        Raises:
            ValueError: if they are no images, or depth has not their size.
        """
        return self.decode(image, *self.encode(image, depth))

    def decode(self, image: Tensor, image_maps: Sequence[Tensor], depth_maps: Sequence[Tensor]) -> Saliency:
        """What `forward` returns, of the trunks' maps; the image tells the size."""
        gates = self.gates(image_maps, depth_maps)
        f_BCHW = self.fusions[0](image_maps[0], depth_maps[0], gates[:, :1])
        fused = [f_BCHW]
        for i in range(1, len(image_maps)):
            if i > 1:
                f_BCHW = F.max_pool2d(f_BCHW, 2, ceil_mode=True)
            f_BCHW = self.fusions[i](image_maps[i], depth_maps[i], gates[:, i : i + 1], f_BCHW)
            fused.append(f_BCHW)
        g_BCHW = self.decoder[-1](fused[-1])
        for f_BCHW, block in zip(fused[-2::-1], self.decoder[:-1][::-1]):
            g_BCHW = block(torch.cat([f_BCHW, resize(g_BCHW, f_BCHW, align_corners=True)], 1))
        return Saliency(resize(self.head(g_BCHW), image, align_corners=True))
