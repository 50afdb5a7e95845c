"""Networks that show a scene from where nobody has been: their output, what rays see, and its picture.

Shape letters: B scenes, R rays, S samples of a ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saccade.models.images import beside, stacked, to_picture
from saccade.models.scene import SceneNetwork
from saccade.ops.export import output
from saccade.ops.rays import opacity, volume_weights

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: length of the piece of a ray behind its last sample
_ENDLESS = 1e10


@output
@dataclass
class Radiance:
    """What rays see.

    Attributes:
        colour: (B, R, 3) in [0, 1].
        depth: (B, R), mean over what the ray sees.
        opacity: (B, R), the share of the light that the scene takes.
        coarse: (B, R, 3), `colour` of a first, coarser pass; None without one.
        image: (B, 3, H, W), the colours as an image; None in what `forward` gives.
        images: (3, H, W) in [0, 1] each, the views that were given; None in what `forward` gives.
    """

    colour: Tensor
    depth: Tensor
    opacity: Tensor
    coarse: Tensor | None = None
    image: Tensor | None = None
    images: list[Tensor] | None = None


class Seen(NamedTuple):
    """What a pass over rays gives: colour (..., 3), depth, opacity, and the weights (..., S) of the samples."""

    colour: Tensor
    depth: Tensor
    opacity: Tensor
    weights: Tensor


def see_along(
    density_RS: Tensor, colours_RS3: Tensor, depths_RS: Tensor, directions_R3: Tensor, background: float = 0.0
) -> Seen:
    """NeRF's sum along rays: alpha = 1 - exp(-density length); the last sample is endless.

    Args:
        density_RS: at least 0.
        colours_RS3: in [0, 1].
        depths_RS: rising.
        directions_R3: as `camera_rays` gives them: of depth 1, whose norms make lengths of depths.
        background: the colour of what takes no light; 1 is white.
    """
    gaps = torch.cat([depths_RS.diff(dim=-1), torch.full_like(depths_RS[..., :1], _ENDLESS)], -1)
    weights = volume_weights(opacity(density_RS, gaps * directions_R3.norm(dim=-1, keepdim=True)))
    taken = weights.sum(-1)
    colour = (weights[..., None] * colours_RS3).sum(-2) + background * (1 - taken)[..., None]
    return Seen(colour, (weights * depths_RS).sum(-1), taken, weights)


def radiance_loss(said: Radiance, truth_R3: Tensor) -> Tensor:
    """Mean square error of the colours, and of the coarse pass where there is one.

    Args:
        said: of the rays.
        truth_R3: (B, R, 3), their colours.
    """
    loss = (said.colour - truth_R3).square().mean()
    return loss if said.coarse is None else loss + (said.coarse - truth_R3).square().mean()


class RadianceNetwork(SceneNetwork):
    """Base of the networks that show a scene from elsewhere; a subclass gives `forward` and `see_scene`."""

    def answer(self, output: Radiance, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The size of what is shown, and how much of it the scene fills, at what depth."""
        if output.image is None:
            raise ValueError("output must be one of predict, which holds an image; this one has none")
        height, width = output.image.shape[2:]
        there = output.opacity > 0.5
        depth = (
            f"{(output.depth / output.opacity.clamp(min=1e-6))[there].mean():.3g}" if there.any() else "nothing seen"
        )
        return [{"size": f"{width} x {height}", "filled": f"{output.opacity.mean():.1%}", "mean depth": depth}]

    def drawn(self, output: Radiance, names: Sequence[str] | None) -> Picture:
        """The view, and its depth, near bright; beside them the views that were given, of which four are shown."""
        if output.image is None:
            raise ValueError("output must be one of predict, which holds an image; this one has none")
        image = output.image[0]
        depth = (output.depth[0] / output.opacity[0].clamp(min=1e-6)).view(1, *image.shape[1:])
        near, far = depth.amin(), depth.amax()
        shade = ((far - depth) / (far - near).clamp(min=1e-6)).expand(3, -1, -1)
        given = beside([to_picture(each) for each in (output.images or [])[:4]])
        return stacked([beside([to_picture(image), to_picture(shade)]), given])
