"""C-DiffDet+: a pyramid of maps, the scene's context, and the decoder that turns noise into boxes.

Shape letters: B batch, N proposals, M context tokens, K classes, S stages, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images, maps_of
from saccade.models.context_aware_fusion.context import GlobalContextEncoder
from saccade.models.context_aware_fusion.diffusion import BoxDiffusion, fill, noise
from saccade.models.context_aware_fusion.head import DiffusionHead
from saccade.models.context_aware_fusion.losses import Objects, detection_loss
from saccade.models.detection import Detection, Detector, Target
from saccade.models.images import normalised
from saccade.ops.boxes import suppress, to_centres, to_corners
from saccade.ops.constants import numbers
from saccade.ops.export import output

#: the largest IoU of two boxes of a class that are both kept
OVERLAP = 0.5


@output
@dataclass
class BoxOutput(Detection):
    """What C-DiffDet+ says of images.

    Attributes:
        stage_logits, stage_boxes: (S, B, N, K) and (S, B, N, 4) of all stages, the last one last; (x, y, width, height)
            in shares of the image.
    """

    stage_logits: Tensor | None = None
    stage_boxes: Tensor | None = None


class FeaturePyramid(nn.Module):
    """Maps of one width: each level's own, and what the coarser ones add to it (Lin et al., arXiv 1612.03144).

    Args:
        channels: of the maps, from fine to coarse.
        dim: C.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.outs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, channels, H, W) of each level -> (B, C, H, W)."""
        levels = [lateral(x_BCHW) for lateral, x_BCHW in zip(self.laterals, maps)]
        for fine, coarse in zip(range(len(levels) - 2, -1, -1), range(len(levels) - 1, 0, -1)):
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], levels[fine].shape[2:], mode="nearest")
        return [out(x_BCHW) for out, x_BCHW in zip(self.outs, levels)]


class CDiffDet(Detector):
    """The detector. Noisy boxes and their times in, better ones out; without boxes it begins with noise.

    Where no generator is given, all images in evaluation begin with one noise, that of seed 0, so that what is said of
    an image follows from the image.

    Args:
        num_classes: K.
        proposals: N.
        backbone: gives maps from fine to coarse, each half the size of the one before; has `channels` and `strides`
            (a `Backbone`, a trunk). A ResNet where None.
        depth, width, levels: of that ResNet: layers, channels of the stem, and how many of its four maps are used.
        dim: C.
        stages, hidden, num_heads, dropout, inner, pooled, detach: of the decoder, see `DiffusionHead`.
        context: the global context; False is DiffusionDet.
        pooled_context: as one token, as the authors; False as a map of tokens.
        scale, times: of the diffusion, see `BoxDiffusion`.
        steps: of sampling.

    Raises:
        ValueError: if a number is out of range, or the backbone tells no channels and strides.
    """

    slug = "context-aware-fusion"
    overlap = OVERLAP

    def __init__(
        self,
        num_classes: int = 6,
        proposals: int = 500,
        *,
        backbone: nn.Module | None = None,
        depth: int = 50,
        width: int = 64,
        levels: int = 4,
        dim: int = 256,
        stages: int = 6,
        hidden: int = 2048,
        num_heads: int = 8,
        dropout: float = 0.0,
        inner: int = 64,
        pooled: int = 7,
        detach: bool = True,
        context: bool = True,
        pooled_context: bool = True,
        scale: float = 2.0,
        times: int = 1000,
        steps: int = 1,
    ) -> None:
        super().__init__()
        if proposals < 1 or not 1 <= steps <= times:
            raise ValueError(f"proposals must be positive and steps from 1 to {times}, got {proposals} and {steps}")
        self.proposals, self.steps = proposals, steps
        self.backbone = ResNetTrunk(depth, width=width, stages=levels) if backbone is None else backbone
        channels, strides = (getattr(self.backbone, name, None) for name in ("channels", "strides"))
        if not channels or not strides:
            raise ValueError(f"backbone must have channels and strides, got {type(self.backbone).__name__} without")
        self.pyramid = FeaturePyramid(channels, dim)
        self.encoder = GlobalContextEncoder(dim, pooled=pooled_context) if context else None
        self.diffusion = BoxDiffusion(times, scale)
        self.head = DiffusionHead(
            num_classes, dim, stages, strides=strides, detach=detach, hidden=hidden, num_heads=num_heads,
            dropout=dropout, inner=inner, pooled=pooled, context=context,
        )  # fmt: skip

    def forward(
        self,
        pixel_values: Tensor,
        boxes: Tensor | None = None,
        times: Tensor | None = None,
        *,
        generator: Generator | None = None,
    ) -> BoxOutput:
        """
        Args:
            pixel_values: images (B, 3, H, W) in [0, 1].
            boxes: noisy ones (B, N, 4), (x, y, width, height) in shares of the image; where None, `steps` steps from
                noise, of which the last is returned.
            times: (B,) of the boxes, from 0 to T - 1.
            generator: of the noise.

        Raises:
            ValueError: if they are no batch of colour images, or the boxes do not fit.
        """
        said = self._sampled(pixel_values, generator)[-1] if boxes is None else self._decode(pixel_values, boxes, times)
        return BoxOutput(said[0][-1], said[1][-1], stage_logits=said[0], stage_boxes=said[1])

    def detect(
        self,
        pixel_values: Tensor,
        *,
        most: int | None = None,
        overlap: float = OVERLAP,
        generator: Generator | None = None,
    ) -> list[dict[str, Tensor]]:
        """The objects of each image, from noise: `scores`, `labels`, and `boxes` by their corners in pixels.

        The best N pairs of box and class of each step are put together, where there are several steps, and those that
        overlap a better one of their class leave.

        Args:
            pixel_values: images (B, 3, H, W) in [0, 1].
            most: boxes of a step; N where None.
            overlap: the largest IoU of two boxes of a class.
            generator: of the noise.

        Raises:
            ValueError: if they are no batch of colour images.
        """
        extent_4 = _extent(pixel_values)
        found: list[tuple[Tensor, ...]] = []
        for logits_SBNK, boxes_SBN4 in self._sampled(pixel_values, generator):
            scores_BNK = logits_SBNK[-1].sigmoid()
            best = scores_BNK.flatten(1).topk(min(most or self.proposals, scores_BNK[0].numel()))
            which_BN = best.indices // scores_BNK.shape[2]
            boxes_BN4 = boxes_SBN4[-1].gather(1, which_BN[..., None].expand(-1, -1, 4))
            found.append((best.values, best.indices % scores_BNK.shape[2], to_corners(boxes_BN4) * extent_4))
        scores_BN, labels_BN, boxes_BN4 = (torch.cat(parts, 1) for parts in zip(*found))
        objects = []
        for scores, labels, boxes in zip(scores_BN, labels_BN, boxes_BN4):
            stays = suppress(boxes, scores, labels, most=overlap)
            objects.append({"scores": scores[stays], "labels": labels[stays], "boxes": boxes[stays]})
        return objects

    def loss(self, pixel_values: Tensor, targets: Sequence[Target]) -> Tensor:
        return self.objective(pixel_values, targets)[0]

    def objective(
        self, pixel_values: Tensor, targets: Sequence[Target], *, generator: Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss and its terms, at a random time of each image.

        Args:
            pixel_values: images (B, 3, H, W) in [0, 1].
            targets: `labels` (G,) and `boxes` (G, 4) of each, (x, y, width, height) in shares.
            generator: of what is drawn.

        Raises:
            ValueError: if they do not fit together.
        """
        if len(pixel_values) != len(targets):
            raise ValueError(f"targets must be one for each of {len(pixel_values)} images, got {len(targets)}")
        extent_4, device = _extent(pixel_values), pixel_values.device
        start_BN4 = fill([target["boxes"] for target in targets], self.proposals, generator)
        times_B = torch.randint(self.diffusion.times, (len(targets),), generator=generator).to(device)
        noise_BN4 = torch.randn(start_BN4.shape, generator=generator).to(start_BN4)
        noisy_BN4 = self.diffusion.boxes(self.diffusion.noised(start_BN4, times_B, noise_BN4))
        logits_SBNK, boxes_SBN4 = self._decode(pixel_values, noisy_BN4, times_B)
        objects = Objects.of(
            [to_corners(target["boxes"]) * extent_4 for target in targets], [target["labels"] for target in targets]
        )
        return detection_loss(logits_SBNK, to_corners(boxes_SBN4) * extent_4, objects, extent_4)

    def _decode(self, pixel_values: Tensor, boxes: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
        if times is None or times.shape != boxes.shape[:1]:
            raise ValueError("times must be one for each image of boxes")
        return self._say(*self._look(pixel_values), _extent(pixel_values), boxes, times)

    def _sampled(self, pixel_values: Tensor, generator: Generator | None) -> list[tuple[Tensor, Tensor]]:
        """Logits (S, B, N, K) and boxes (S, B, N, 4) of each step of sampling."""
        maps, context_BMC = self._look(pixel_values)
        extent_4, said = _extent(pixel_values), []

        def predict(boxes_BN4: Tensor, times_B: Tensor) -> tuple[Tensor, Tensor]:
            said.append(self._say(maps, context_BMC, extent_4, boxes_BN4, times_B))
            return said[-1][0][-1], said[-1][1][-1]

        alike = generator is None and not self.training
        if alike:
            generator = Generator().manual_seed(0)
        start = pixel_values.new_empty(len(pixel_values), self.proposals, 4)
        self.diffusion.sample(predict, noise(start, generator, alike), self.steps, generator=generator, alike=alike)
        return said

    def _look(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor | None]:
        check_images(pixel_values, 3)
        x_BCHW = normalised(pixel_values, 3).to(pixel_values.dtype)
        maps = self.pyramid(maps_of(self.backbone(x_BCHW)))
        return maps, None if self.encoder is None else self.encoder(x_BCHW)

    def _say(
        self, maps: list[Tensor], context_BMC: Tensor | None, extent_4: Tensor, boxes_BN4: Tensor, times_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, corners = self.head(maps, to_corners(boxes_BN4) * extent_4, times_B, context_BMC)
        return logits, to_centres(corners / extent_4)


def _extent(pixel_values: Tensor) -> Tensor:
    height, width = pixel_values.shape[-2:]
    return numbers([width, height, width, height], pixel_values)
