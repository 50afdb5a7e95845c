"""UFC's aggregation over three levels, and the network of two images around it.

Shape letters: B batch, C channels, G heads, H, W image, h, w map of a level, Y, X finest map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import maps_of
from saccade.models.flow import FlowNetwork, FlowOutput, consistent
from saccade.models.images import normalised
from saccade.models.ufc.layer import PATHS, UFCLayer
from saccade.models.ufc.volumes import VolumeEncoder, correlation, flow_of, resize, soft_positions, transposed
from saccade.ops.constants import numbers

SELECTIONS = ("mean", "confidence")


class Aggregated(NamedTuple):
    """What the aggregation gives.

    Attributes:
        features: of each level the refined maps of both images, (B, C, h, w) each.
        costs: of each level, (B, Y, X, Y, X), source before target, at the finest size.
    """

    features: list[tuple[Tensor, Tensor]]
    costs: list[Tensor]

    @property
    def cost(self) -> Tensor:
        """The mean over levels."""
        return torch.stack(self.costs).mean(0)


class UFC(nn.Module):
    """Features and costs of two images, refined by each other from coarse to fine.

    Args:
        in_channels: of the maps of three levels, coarse first.
        dim: C.
        num_heads: G.
        sides: of the maps, coarse first; each is a whole number of times the first.
        cost_side: of the cost volume.
        layers: of each level.
        expand: of the MLPs.
        kernels: from features' to costs' size, at each level.
        paths: see `UFCLayer`.

    Raises:
        ValueError: if numbers do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (512, 256, 128),
        *,
        dim: int = 256,
        num_heads: int = 8,
        sides: Sequence[int] = (16, 32, 64),
        cost_side: int = 16,
        layers: Sequence[int] = (2, 2, 1),
        expand: float = 4.0,
        kernels: Sequence[int] = (3, 3, 5),
        paths: Sequence[str] = PATHS,
    ) -> None:
        super().__init__()
        if len({len(each) for each in (in_channels, sides, layers, kernels)}) > 1 or not sides or min(layers) < 1:
            raise ValueError(
                "in_channels, sides, layers and kernels must be of the same levels, each of a layer at least, got "
                f"{tuple(in_channels)}, {tuple(sides)}, {tuple(layers)} and {tuple(kernels)}"
            )
        if cost_side < 1 or any(side % cost_side for side in sides):
            raise ValueError(f"sides must be whole numbers of times cost_side, got {tuple(sides)} and {cost_side}")
        self.in_channels, self.sides = tuple(in_channels), tuple(sides)
        self.projects = nn.ModuleList(nn.Sequential(nn.Linear(c, dim), nn.ReLU()) for c in in_channels)
        self.embeds = nn.ModuleList(
            VolumeEncoder((1, num_heads), kernel, side // cost_side) for side, kernel in zip(sides, kernels)
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(
                UFCLayer(
                    dim, num_heads, (cost_side, cost_side), (side, side), expand=expand, kernel_size=kernel,
                    last=level == len(sides) - 1 and j == count - 1, paths=paths,
                )
                for j in range(count)
            )
            for level, (side, kernel, count) in enumerate(zip(sides, kernels, layers))
        )  # fmt: skip

    def forward(self, source_BChw: Sequence[Tensor], target_BChw: Sequence[Tensor]) -> Aggregated:
        """
        Args:
            source_BChw, target_BChw: maps of both images, coarse first.

        Raises:
            ValueError: if a map has other channels or another size.
        """
        expected = [(c, side, side) for c, side in zip(self.in_channels, self.sides)]
        for maps in (source_BChw, target_BChw):
            if [tuple(x.shape[1:]) for x in maps] != expected:
                raise ValueError(f"maps must be {expected}, got {[tuple(x.shape[1:]) for x in maps]}")
        cost: Tensor | None = None
        pair: tuple[Tensor, Tensor] | None = None
        features, costs = [], []
        finest = (self.sides[-1], self.sides[-1])
        for level, (project, embed, layers) in enumerate(zip(self.projects, self.embeds, self.layers)):
            side = self.sides[level]
            own = [project(maps[level].flatten(2).mT) for maps in (source_BChw, target_BChw)]
            as_maps = [x.mT.unflatten(2, (side, side)) for x in own]
            embedded = embed(correlation(as_maps[0], as_maps[1]))
            if pair is not None:
                larger = [F.interpolate(x, (side, side), mode="bilinear", align_corners=True) for x in pair]
                own = [x + coarse.flatten(2).mT for x, coarse in zip(own, larger)]
            cost = embedded if cost is None else cost + embedded
            source, target = own
            for layer in layers:  # type: ignore[attr-defined]
                cost, source, target = layer(cost, source, target)
            pair = source.mT.unflatten(2, (side, side)), target.mT.unflatten(2, (side, side))
            features.append(pair)
            costs.append(resize(correlation(*pair), finest)[:, 0])
        return Aggregated(features, costs)


class UFCNet(FlowNetwork):
    """Dense correspondence of two images: a backbone, UFC, and the expected position of each pixel in the other image.

    Images of any size are seen as squares of `image_size` pixels; flow comes back at their own.

    Args:
        backbone: images -> maps, of which the last three are taken; a ResNet where None.
        image_size: of the squares; the maps' sides are 1/32, 1/16 and 1/8 of it.
        dim, num_heads, layers, expand, paths: see `UFC`.
        beta: of the soft arg-max.
        select: "mean" of the levels' costs, as released, or the flow of the level with the most "confidence" at each
            position (its largest share), as the paper has it.
        depth, width: of the ResNet, and of its stem.

    Raises:
        ValueError: if a number does not fit or a name is unknown.
    """

    slug = "ufc"
    authors_module = "network"
    task = "flow"

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        image_size: int = 512,
        dim: int = 256,
        num_heads: int = 8,
        layers: Sequence[int] = (2, 2, 1),
        expand: float = 4.0,
        paths: Sequence[str] = PATHS,
        beta: float = 0.02,
        select: str = "mean",
        depth: int = 34,
        width: int = 64,
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32 or beta <= 0:
            raise ValueError(f"image_size must be a multiple of 32 and beta positive, got {image_size} and {beta}")
        if select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
        self.backbone = ResNetTrunk(depth, width=width) if backbone is None else backbone
        channels = getattr(self.backbone, "channels", None)
        if channels is None or len(channels) < 3:
            raise ValueError(f"the backbone must tell the channels of three maps, got {channels}")
        self.image_size, self.beta, self.select = image_size, beta, select
        sides = (image_size // 32, image_size // 16, image_size // 8)
        self.aggregate = UFC(
            tuple(channels)[:-4:-1], dim=dim, num_heads=num_heads, sides=sides, cost_side=sides[0], layers=layers,
            expand=expand, paths=paths,
        )  # fmt: skip

    def ready(self, images_B3HW: Tensor) -> Tensor:
        return normalised(images_B3HW, 3)

    def forward(self, image0: Tensor, image1: Tensor, *, both: bool = False) -> FlowOutput:
        """Flow from the first image to the second, in pixels.

        Args:
            image0, image1: (B, 3, H, W), of one size, normalised.
            both: also from the second to the first.

        Raises:
            ValueError: if they are no images of one size.
        """
        if image0.ndim != 4 or image0.shape[1] != 3 or image0.shape != image1.shape or min(image0.shape[2:]) < 2:
            raise ValueError(
                f"image0 and image1 must be (batch, 3, height, width) of one size, got {tuple(image0.shape)} and "
                f"{tuple(image1.shape)}"
            )
        seen = [self.square(x) for x in (image0, image1)]
        maps = maps_of(self.backbone(torch.cat(seen)))[:-4:-1]
        halves = [x.chunk(2) for x in maps]
        found = self.aggregate([x[0] for x in halves], [x[1] for x in halves])
        size = (image0.shape[2], image0.shape[3])
        said = FlowOutput(flow=self.full(self.read(found, back=False), size))
        if both:
            backward = self.full(self.read(found, back=True), size)
            assert said.flow is not None
            said = replace(said, backward=backward, consistent=consistent(said.flow, backward))
        return said

    def square(self, x_BCHW: Tensor) -> Tensor:
        """As the backbone sees an image; in float32, as torch's filter against aliasing has no bfloat16."""
        size = [self.image_size, self.image_size]
        if tuple(x_BCHW.shape[2:]) == tuple(size):
            return x_BCHW
        wide = torch.promote_types(x_BCHW.dtype, torch.float32)
        return F.interpolate(x_BCHW.to(wide), size, mode="bilinear", antialias=True).to(x_BCHW.dtype)

    def read(self, found: Aggregated, *, back: bool) -> Tensor:
        """Flow (B, 2, Y, X) from the first image, or `back` from the second, in cells of the finest map."""
        costs = [found.cost] if self.select == "mean" else found.costs
        # positions in the second image: it takes the source's place
        costs = [c if back else transposed(c[:, None])[:, 0] for c in costs]
        size = costs[0].shape[1:3]
        flows = torch.stack([flow_of(soft_positions(c, self.beta), size) for c in costs])
        if len(costs) == 1:
            return flows[0]
        sure = torch.stack([(c / self.beta).flatten(1, 2).softmax(1).amax(1) for c in costs])
        best = sure.argmax(0)[None, :, None].expand(-1, -1, 2, -1, -1)
        return flows.gather(0, best)[0]

    def full(self, flow_B2YX: Tensor, size: tuple[int, int]) -> Tensor:
        """Flow of cells at the image's size, in its pixels."""
        Y, X = flow_B2YX.shape[2:]
        scale = numbers([size[1] / X, size[0] / Y], flow_B2YX)[:, None, None]
        return F.interpolate(flow_B2YX * scale, size, mode="bilinear")
