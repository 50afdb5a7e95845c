"""UniMatch: features of two images, made aware of each other and matched; one network for flow, stereo and depth.

Shape letters: B batch, C channels, H height, W width, E values, D depths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.backbone import check_images
from saccade.models.flow import FlowNetwork, FlowOutput
from saccade.models.images import normalised
from saccade.models.unimatch.encoder import Encoder, with_places
from saccade.models.unimatch.matching import (
    Propagation,
    convex_upsampled,
    depth_weights,
    global_disparity,
    global_flow,
    local_disparity,
    local_flow,
    places,
    seen_by_other,
    upsampled,
    warped,
)
from saccade.models.unimatch.refinement import RADIUS, Update
from saccade.models.unimatch.transformer import CROSS, FeatureTransformer
from saccade.ops.matching import local_correlation

TASKS = ("flow", "stereo", "depth")


class UniMatch(FlowNetwork):
    """Flow, disparity or depth of two images; by default GMFlow at one scale.

    Args:
        task: one of `TASKS`: flow, disparity of rectified images (left and right), depth of images with known cameras.
        scales: 1 matches at 1/8; 2 also at 1/4.
        refinements: recurrent updates after matching.
        dim: C.
        layers, expansion: of the transformer.
        width: of the CNN's stem; 128 channels of upsampler and refinement are twice as many.
        splits: windows per axis, for each scale: 2, then 8 where None.
        radii: of local matching for each scale, -1 over all: -1, then 4 where None.
        propagation: radius of the propagation for each scale, -1 over all: -1, then 1 where None.
        cross: what cross attention sees, of `CROSS`; where None windows, or for stereo rows at one scale and windows of
            rows at more.
        candidates: D, depths that are tried.
        inverse_depths: the least and the largest.
        factor: of the last upsampling; 8 at one scale, else 4, where None.
        chained: see `Propagation`.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "unimatch"
    authors_module = "flow"

    def __init__(
        self,
        task: str = "flow",
        *,
        scales: int = 1,
        refinements: int = 0,
        dim: int = 128,
        layers: int = 6,
        expansion: int = 4,
        width: int = 64,
        splits: Sequence[int] | None = None,
        radii: Sequence[int] | None = None,
        propagation: Sequence[int] | None = None,
        cross: str | None = None,
        candidates: int = 64,
        inverse_depths: tuple[float, float] = (0.1, 2.0),
        factor: int | None = None,
        chained: bool = True,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if not 1 <= scales <= 4 or (task == "depth" and scales > 1):
            raise ValueError(f"scales must be 1 to 4, and 1 for depth, got {scales}")
        if dim < 4 or dim % 4 or width < 2 or width % 2 or layers < 1 or refinements < 0 or candidates < 1:
            raise ValueError(
                "dim must be a multiple of 4, width even, layers and candidates positive and refinements 0 or more, "
                f"got {dim}, {width}, {layers}, {candidates} and {refinements}"
            )
        self.task, self.refinements = task, refinements
        self.splits = _for_scales("splits", splits, (2, 8), scales)
        self.radii = _for_scales("radii", radii, (-1, 4), scales)
        self.propagation = _for_scales("propagation", propagation, (-1, 1), scales)
        if min(self.splits) < 1:
            raise ValueError(f"splits must be positive, got {self.splits}")
        if cross is None:
            cross = "windows" if task != "stereo" else "rows" if scales == 1 else "row-windows"
        if cross not in CROSS:
            raise ValueError(f"cross must be one of {', '.join(CROSS)}, got {cross!r}")
        self.cross, self.factor = cross, factor or (8 if scales == 1 else 4)
        least, most = inverse_depths
        if not 0 < least < most:
            raise ValueError(f"inverse_depths must be positive and rise, got {inverse_depths}")
        self.candidates, self.inverse_depths = candidates, (float(least), float(most))
        strides = [8] if scales == 1 else [4 * 2**s for s in reversed(range(scales))]
        self.multiple = max(stride * k for stride, k in zip(strides, self.splits))
        self.encoder = Encoder(dim, width, scales)
        self.transformer = FeatureTransformer(dim, layers, expansion)
        self.propagate = Propagation(dim, chained=chained)
        self.upsampler = None
        if not refinements or task == "depth":
            self.upsampler = nn.Sequential(
                nn.Conv2d(2 + dim, 4 * width, 3, padding=1), nn.ReLU(), nn.Conv2d(4 * width, 9 * self.factor**2, 1)
            )
        self.context, self.update = None, None
        if refinements:
            self.context = nn.Conv2d(dim, 4 * width, 1)
            channels = 2 if task == "flow" else 1
            self.update = Update(channels, 2 * width, 0 if task == "depth" else self.factor)

    def ready(self, images_B3HW: Tensor) -> Tensor:
        """Images in [0, 1] as `forward` takes them: 0 to 255 for flow, else as ImageNet's are normalised."""
        return 255 * images_B3HW if self.task == "flow" else normalised(images_B3HW, 3)

    def forward(
        self,
        image0: Tensor,
        image1: Tensor,
        intrinsics: Tensor | None = None,
        pose: Tensor | None = None,
        *,
        both: bool = False,
    ) -> FlowOutput:
        """What the task says of each pixel of the first image, at its size; in training also all it came from.

        Args:
            image0, image1: (B, 3, H, W), as `ready` gives them; sides are multiples of `multiple`. Of stereo the left
                and the right one.
            intrinsics: (B, 3, 3) of both cameras, for depth.
            pose: (B, 4, 4) from the first camera to the second, for depth.
            both: of the second image too, as `backward`; for flow and depth.

        Raises:
            ValueError: if they are no two batches of images of one size, sides do not divide, or cameras are missing.
        """
        cameras = self._check(image0, image1, intrinsics, pose, both)
        pair = torch.cat([image0, image1])
        if self.task == "flow":
            pair = normalised(pair / 255, 3).to(image0.dtype)
        values: Tensor | None = None
        stages: list[Tensor] = []
        maps = self.encoder(pair)
        for scale, map_BCHW in enumerate(maps):
            f0, f1 = map_BCHW.chunk(2)
            if both and scale:
                f0, f1 = torch.cat([f0, f1]), torch.cat([f1, f0])
            plain = f0, f1
            if values is not None:
                values = self._alone(upsampled(values, 2))
                f1 = warped(f1, self._displacement(values, None))
            splits = self.splits[scale]
            f0, f1 = self.transformer(with_places(f0, splits), with_places(f1, splits), splits, self.cross)
            if both and not scale:
                f0, f1 = torch.cat([f0, f1]), torch.cat([f1, f0])
                plain = torch.cat(plain), torch.cat(plain[::-1])
            last = scale == len(maps) - 1
            away = self.factor * 2 ** (len(maps) - 1 - scale)
            values = self._matched(f0, f1, self.radii[scale], values, cameras)
            self._keep(stages, values, away)
            values = self.propagate(f0, self._alone(values), self.propagation[scale])
            if not last or self.refinements:
                self._keep(stages, values, away)
        assert values is not None
        if self.refinements:
            fine = self._refined(values, f0, plain, cameras, stages)
        else:
            fine = self._upsampled(values, self._logits(values, f0))
        return self._said(fine.to(image0.dtype), stages if self.training else None, both)

    def _matched(
        self, f0: Tensor, f1: Tensor, radius: int, before: Tensor | None, cameras: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if self.task == "depth":
            assert cameras is not None
            line = torch.linspace(*self.inverse_depths, self.candidates, device=f0.device, dtype=cameras[0].dtype)
            candidates = line[:, None, None].expand(len(f0), -1, *f0.shape[2:])
            weight = depth_weights(f0, f1, candidates, *cameras)
            return (weight * candidates.to(weight.dtype)).sum(1, keepdim=True)
        if self.task == "flow":
            found = global_flow(f0, f1) if radius < 1 else local_flow(f0, f1, radius)[0]
            return found if before is None else before + found
        found = global_disparity(f0, f1) if radius < 1 else local_disparity(f0, f1, radius)
        return (found if before is None else before + found).clamp(min=0)

    def _displacement(self, values: Tensor, cameras: tuple[Tensor, Tensor] | None) -> Tensor:
        """Where the other image is read, as flow."""
        if self.task == "flow":
            return values
        if self.task == "stereo":
            return torch.cat([-values, torch.zeros_like(values)], 1)
        assert cameras is not None
        return (seen_by_other(values, *cameras)[:, 0] - places(values)).permute(0, 3, 1, 2)

    def _as_two(self, values: Tensor) -> Tensor:
        """Values as the two channels that the upsampler has for all tasks."""
        if self.task == "flow":
            return values
        return torch.cat([-values if self.task == "stereo" else values, torch.zeros_like(values)], 1)

    def _logits(self, values: Tensor, f0: Tensor) -> Tensor:
        assert self.upsampler is not None
        return self.upsampler(torch.cat([self._as_two(values).to(f0.dtype), f0], 1))

    def _upsampled(self, values: Tensor, logits: Tensor) -> Tensor:
        if self.task == "depth":
            return convex_upsampled(values, logits, self.factor).clamp(*self.inverse_depths)
        return convex_upsampled(self.factor * values, logits, self.factor)

    def _alone(self, values: Tensor) -> Tensor:
        """In training what comes next learns from these values, and is not learned through."""
        return values.detach() if self.training else values

    def _keep(self, stages: list[Tensor], values: Tensor, factor: int) -> None:
        if self.training:
            stages.append(upsampled(values, factor, scales=self.task != "depth"))

    def _refined(
        self,
        values: Tensor,
        f0: Tensor,
        plain: tuple[Tensor, Tensor],
        cameras: tuple[Tensor, Tensor] | None,
        stages: list[Tensor],
    ) -> Tensor:
        assert self.update is not None and self.context is not None
        h, context = self.context(f0).chunk(2, 1)
        h, context = h.tanh(), F.relu(context)
        fine = values
        for turn in range(self.refinements):
            values = self._alone(values)
            centre = places(f0) + self._displacement(values, cameras).permute(0, 2, 3, 1)
            correlation = local_correlation(*plain, centre, radius=RADIUS).permute(0, 3, 1, 2)
            change, logits = self.update(h, context, correlation.to(h.dtype), values.to(h.dtype))
            if self.task == "depth":
                values = (values - change).clamp(*self.inverse_depths)
            else:
                values = values + change
                values = values.clamp(min=0) if self.task == "stereo" else values
            if self.training or turn == self.refinements - 1:
                fine = self._upsampled(values, self._logits(values, f0) if logits is None else logits)
                if turn < self.refinements - 1:
                    stages.append(fine)
        return fine

    def _said(self, fine: Tensor, stages: list[Tensor] | None, both: bool) -> FlowOutput:
        if stages is not None:
            stages = [*stages, fine]
        if self.task == "flow":
            first, second = fine.chunk(2) if both else (fine, None)
            return FlowOutput(flow=first, backward=second, stages=stages)
        if self.task == "stereo":
            return FlowOutput(disparity=fine[:, 0], stages=stages)
        first, second = (1 / fine[:, 0]).chunk(2) if both else (1 / fine[:, 0], None)
        return FlowOutput(depth=first, backward=second, stages=stages)

    def _check(
        self, image0: Tensor, image1: Tensor, intrinsics: Tensor | None, pose: Tensor | None, both: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The cameras at the size of the maps, of both images where both are asked for."""
        check_images(image0, 3)
        if image1.shape != image0.shape:
            raise ValueError(f"image1 must be {tuple(image0.shape)} as image0 is, got {tuple(image1.shape)}")
        if any(side % self.multiple for side in image0.shape[2:]):
            raise ValueError(f"sides must be multiples of {self.multiple}, got {tuple(image0.shape[2:])}")
        if self.task != "depth":
            if both and self.task == "stereo":
                raise ValueError("both is for flow and depth: a disparity is of the left image")
            return None
        batch = len(image0)
        if intrinsics is None or pose is None:
            raise ValueError("depth needs intrinsics and pose")
        if intrinsics.shape != (batch, 3, 3) or pose.shape != (batch, 4, 4):
            raise ValueError(
                f"intrinsics must be ({batch}, 3, 3) and pose ({batch}, 4, 4), got {tuple(intrinsics.shape)} and "
                f"{tuple(pose.shape)}"
            )
        wide = torch.promote_types(torch.float32, intrinsics.dtype)
        intrinsics, pose = intrinsics.to(wide), pose.to(wide)
        small = intrinsics / intrinsics.new_tensor([8.0, 8.0, 1.0])[:, None]
        if both:
            small, pose = torch.cat([small, small]), torch.cat([pose, torch.linalg.inv(pose)])
        return small, pose


def _for_scales(name: str, given: Sequence[int] | None, usual: tuple[int, int], scales: int) -> tuple[int, ...]:
    """One number for each scale."""
    chosen = tuple([usual[0]] + [usual[1]] * (scales - 1)) if given is None else tuple(given)
    if len(chosen) != scales:
        raise ValueError(f"{name} must be one for each of {scales} scales, got {chosen}")
    return chosen
