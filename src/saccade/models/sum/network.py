"""SUM: an encoder that halves the resolution between stages, a decoder that is told the condition, one map.

Shape letters: B batch, H height, W width, C channels, P conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.initialization import start_transformer
from saccade.layers.patches import PatchEmbedding, PatchMerging
from saccade.models.backbone import check_images
from saccade.models.heatmap import HeatmapNetwork, HeatmapOutput
from saccade.models.sum.blocks import Expand, VSSBlock

#: what is shown, and how it was measured where people look: photographs by mouse or by eye tracking, goods, interfaces
CONDITIONS = ("mouse", "eye", "commerce", "interface")

_PATCH = 4


class SUM(HeatmapNetwork):
    """Where people look, for each kind of image; by default as it was trained.

    Args:
        dims: channels of the encoder's stages, each twice those of the one before.
        depths: blocks of the encoder's stages.
        decoder_depths: of the decoder's, from coarse to fine.
        states: N of the scans.
        drop_path: rate of the encoder's last and the decoder's first block, falling to 0 at the other end.
        conditions: how many kinds of images there are; 0 tells them not apart.
        prompt_dim: width of a prompt.
        condition: the kind that is meant where a call names none: one of `CONDITIONS`, or its number.
        in_channels: of images.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "sum"

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 27, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        *,
        states: int = 16,
        drop_path: float = 0.3,
        conditions: int = len(CONDITIONS),
        prompt_dim: int = 128,
        condition: str | int = "eye",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not dims or dims[0] % _PATCH or any(2 * a != b for a, b in zip(dims, dims[1:])):
            raise ValueError(
                f"dims must double from stage to stage, the first a multiple of {_PATCH}, got {tuple(dims)}"
            )
        if not len(dims) == len(depths) == len(decoder_depths) or min(*depths, *decoder_depths) < 1:
            raise ValueError(
                f"depths and decoder_depths must be positive, one for each of {len(dims)} stages, got {tuple(depths)} "
                f"and {tuple(decoder_depths)}"
            )
        self.condition = _number(condition)
        if conditions and not 0 <= self.condition < conditions:
            raise ValueError(f"condition must be below {conditions}, got {condition!r}")
        self.in_channels, self.conditions = in_channels, conditions
        self.stride = _PATCH * 2 ** (len(dims) - 1)
        self.patch_embed = PatchEmbedding(in_channels, dims[0], _PATCH)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.encoder = nn.ModuleList(
            nn.ModuleList(VSSBlock(dim, states=states, drop_path=next(rates)) for _ in range(depth))
            for dim, depth in zip(dims, depths)
        )
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        rates = iter(drop_path_rates(drop_path, sum(decoder_depths))[::-1])
        told: dict[str, Any] = {"states": states, "prompt_dim": prompt_dim}
        self.decoder = nn.ModuleList(
            nn.ModuleList(VSSBlock(dim, conditions, drop_path=next(rates), **told) for _ in range(depth))
            for dim, depth in zip(dims[::-1], decoder_depths)
        )
        self.expands = nn.ModuleList(Expand(dim) for dim in dims[:0:-1])
        self.last_expand = Expand(dims[0], _PATCH)
        self.head = nn.Conv2d(dims[0] // _PATCH, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                start_transformer(module)

    def forward(self, pixel_values: Tensor, condition: Tensor | None = None) -> HeatmapOutput:
        """Where people look in each image, (B, H, W).

        Args:
            pixel_values: images (B, 3, H, W) as ImageNet's are normalised; sides are multiples of `stride`.
            condition: the number of each image's condition, (B,), or one of them 1 in (B, P); the network's own where
                None.

        Raises:
            ValueError: if they are no images, or sides or conditions do not fit.
        """
        check_images(pixel_values, self.in_channels)
        if any(side % self.stride for side in pixel_values.shape[2:]):
            raise ValueError(f"sides must be multiples of {self.stride}, got {tuple(pixel_values.shape[2:])}")
        condition_B = self._conditions(condition, pixel_values)
        x, entered = self.patch_embed(pixel_values), []
        for stage, blocks in enumerate(self.encoder):
            entered.append(x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if stage < len(self.merges):
                x = self.merges[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for stage, blocks in enumerate(self.decoder):
            if stage:
                x = self.expands[stage - 1](x + entered[-stage])
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, condition_B)
        logits = self.head(self.last_expand(x).permute(0, 3, 1, 2))[:, 0]
        return HeatmapOutput(logits.sigmoid(), logits)

    def _conditions(self, condition: Tensor | None, images: Tensor) -> Tensor | None:
        if not self.conditions:
            return None
        batch = len(images)
        if condition is None:
            return torch.full((batch,), self.condition, device=images.device)
        if condition.shape == (batch, self.conditions):
            return condition.argmax(1)
        if condition.shape != (batch,) or condition.is_floating_point():
            raise ValueError(
                f"condition must be ({batch},) of integers or ({batch}, {self.conditions}) with a 1 in each row, got "
                f"{condition.dtype} {tuple(condition.shape)}"
            )
        return condition


def _number(condition: str | int) -> int:
    if isinstance(condition, int):
        return condition
    if condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, or a number, got {condition!r}")
    return CONDITIONS.index(condition)
