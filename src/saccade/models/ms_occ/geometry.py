"""Before lifting, the images' branch: the scanner's depths are spread over the images and read beside their features.

Shape letters: B scenes, V views, M = B V, N points, K cells of a kernel, I = N K, P pixels of a map and one more, C
channels, D those of the depth, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.ops.autocast import working_dtype
from saccade.ops.deformable.points import Size
from saccade.ops.rays import inside

KERNELS = ("scaled", "nearest")


def kernel_cells(sigma: float, radius: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """The cells that a kernel covers, (K, 2) as (x, y) from its middle, and exp(-|q|^2 / (2 sigma^2)) at each, (K,)."""
    reach = int(radius)
    step = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(step, step, indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1)
    square = cells.square().sum(-1)
    cells, square = cells[square <= radius**2], square[square <= radius**2]
    return cells, torch.exp(-square / (2 * sigma**2))


def render_depth(
    pixels_BVN2: Tensor,
    depths_BVN: Tensor,
    seen_BVN: Tensor,
    size: Size,
    *,
    sigma: float = 1.0,
    radius: float | None = None,
    kernel: str = "scaled",
) -> Tensor:
    """Y(q) = min over the points j whose kernel covers q of D_j exp(-|q - p_j|^2 / (2 sigma^2)), (B, V, H, W).

    0 where no kernel covers. A point lies in the middle of the pixel that holds it. As published the value falls off
    towards a kernel's rim; "nearest" is the depth of the point whose kernel weighs most at q, the nearest to the camera
    of equals.

    Args:
        pixels_BVN2: as (x, y), as `ops.rays` gives them.
        depths_BVN: D, positive where seen.
        seen_BVN: bool; other points are left out.
        size: (H, W).
        sigma: in pixels, positive.
        radius: of a kernel, in pixels; 3 sigma where None.
        kernel: of `KERNELS`.

    Raises:
        ValueError: if a number is not positive, or the kernel unknown.

    >>> pixels, depths = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[4.0]]])
    >>> render_depth(pixels, depths, depths > 0, (1, 4), sigma=1.0, radius=1.0)
    tensor([[[[2.4261, 4.0000, 2.4261, 0.0000]]]])
    """
    if sigma <= 0 or (radius is not None and radius < 0):
        raise ValueError(f"sigma must be positive and radius not negative, got {sigma} and {radius}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    (B, V, N), (H, W) = depths_BVN.shape, size
    depths_BVN = depths_BVN.to(working_dtype(depths_BVN.dtype))
    cells_K2, weight_K = kernel_cells(sigma, 3 * sigma if radius is None else radius, depths_BVN)
    place_BVNK2 = pixels_BVN2.to(depths_BVN.dtype).round()[..., None, :] + cells_K2
    covers_BVNK = inside(place_BVNK2, size) & seen_BVN[..., None]
    x, y = place_BVNK2.unbind(-1)
    number_BVI = torch.where(covers_BVNK, y * W + x, H * W).long().flatten(2)  # one pixel more, for what is left out
    depth_BVI = depths_BVN[..., None].expand(-1, -1, -1, len(weight_K)).flatten(2)
    weight_BVI = weight_K.expand(B, V, N, -1).flatten(2)
    far = torch.finfo(depths_BVN.dtype).max
    empty_BVP = depths_BVN.new_full((B, V, H * W + 1), far)
    if kernel == "scaled":
        found_BVP = empty_BVP.scatter_reduce(2, number_BVI, depth_BVI * weight_BVI, "amin")
    else:
        most_BVP = torch.zeros_like(empty_BVP).scatter_reduce(2, number_BVI, weight_BVI, "amax")
        best_BVI = weight_BVI == most_BVP.gather(2, number_BVI)
        number_BVI = number_BVI.masked_fill(~best_BVI, H * W)
        found_BVP = empty_BVP.scatter_reduce(2, number_BVI, depth_BVI, "amin")
    found_BVP = found_BVP[..., : H * W]
    return found_BVP.masked_fill(found_BVP == far, 0).unflatten(2, size)


class GaussianGeo(nn.Module):
    """Depth beside features: F + psi([phi(Y); F]) on each level, psi two convolutions, phi shared over cameras.

    Args:
        channels: C of each level, from fine to coarse; each has half the size of the one before.
        depth_channels: of phi.
        stages: halvings from the rendered depth to the first level.
        sigma, radius, kernel: of `render_depth`, in pixels of the rendered depth.

    Raises:
        ValueError: if a number is out of range or the kernel unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        depth_channels: int = 32,
        stages: int = 1,
        sigma: float = 1.0,
        radius: float | None = None,
        kernel: str = "scaled",
    ) -> None:
        super().__init__()
        if not channels or min(*channels, depth_channels) < 1 or stages < 0:
            raise ValueError(
                f"channels and depth_channels must be positive and stages not negative, got {tuple(channels)}, "
                f"{depth_channels} and {stages}"
            )
        if sigma <= 0 or kernel not in KERNELS:
            raise ValueError(f"sigma must be positive and kernel one of {', '.join(KERNELS)}, got {sigma}, {kernel!r}")
        self.channels, self.stages = tuple(channels), stages
        self.sigma, self.radius, self.kernel = sigma, radius, kernel
        first = [1] + [depth_channels] * max(stages, 1)
        self.first = nn.Sequential(*(conv_norm_relu(a, b, 3, 2 if stages else 1) for a, b in pairwise(first)))
        self.further = nn.ModuleList(conv_norm_relu(depth_channels, depth_channels, 3, 2) for _ in channels[1:])
        self.mixers = nn.ModuleList(
            nn.Sequential(conv_norm_relu(c + depth_channels, c), nn.Conv2d(c, c, 3, padding=1)) for c in channels
        )

    def forward(
        self, maps_BVCHW: Sequence[Tensor], pixels_BVN2: Tensor, depths_BVN: Tensor, seen_BVN: Tensor
    ) -> list[Tensor]:
        """The maps, with the geometry in them.

        Args:
            maps_BVCHW: of each level.
            pixels_BVN2: of the points, in pixels of the first level, as (x, y).
            depths_BVN, seen_BVN: of the points.

        Raises:
            ValueError: if there are not as many maps as levels, or of other channels.
        """
        found = [x.shape[2] for x in maps_BVCHW]
        if tuple(found) != self.channels:
            raise ValueError(f"maps must have {self.channels} channels, got {tuple(found)}")
        B, V, _, H, W = maps_BVCHW[0].shape
        factor = 2**self.stages
        # the middle of a pixel of the first level is that of a square of finer ones
        finer = pixels_BVN2 * factor + (factor - 1) / 2
        size = (H * factor, W * factor)
        options = {"sigma": self.sigma, "radius": self.radius, "kernel": self.kernel}
        depth_BVHW = render_depth(finer, depths_BVN, seen_BVN, size, **options)  # type: ignore[arg-type]
        d_MDHW = self.first(depth_BVHW.flatten(0, 1)[:, None].to(maps_BVCHW[0].dtype))
        given = [d_MDHW]
        for step in self.further:
            given.append(step(given[-1]))
        out = []
        for x_BVCHW, d_MDHW, mix in zip(maps_BVCHW, given, self.mixers, strict=True):
            x_MCHW = x_BVCHW.flatten(0, 1)
            d_MDHW = d_MDHW[..., : x_MCHW.shape[2], : x_MCHW.shape[3]]
            out.append((x_MCHW + mix(torch.cat([d_MDHW, x_MCHW], 1))).unflatten(0, (B, V)))
        return out
