"""The two stages: parts are found in the whole image, and a second transformer sees the patches of parts alone.

Shape letters: B batch, C channels, H height, W width, D width, K parts, T = K + 1 with the background, Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.backbone import Backbone, ImageOutput, check_images
from saccade.models.faithful_attention_maps.parts import Foreground, PartFinder, foreground, without
from saccade.models.faithful_attention_maps.transformer import RegisterTransformer
from saccade.ops.distributions import gumbel_noise
from saccade.ops.export import output

#: of a soft mask where it is 0
_LEAST = 1e-10


@output
@dataclass
class TwoStageOutput(ImageOutput):
    """What the model returns; `logits` are of the second stage, `features` the first one's map.

    Attributes:
        part_maps: A (B, K + 1, H, W), the background last.
        mask: (B, 2, H, W), foreground and background, 0 or 1; the second stage saw the foreground.
        soft_mask: the same before it is decided.
        part_features: (B, D, K + 1).
        part_scores: (B, Y, K), what each part says of each class; their mean is the first stage's answer.
        part_dots: (B, K + 1, H, W), of patches and prototypes, to which thresholds are held.
    """

    part_maps: Tensor | None = None
    mask: Tensor | None = None
    soft_mask: Tensor | None = None
    part_features: Tensor | None = None
    part_scores: Tensor | None = None
    part_dots: Tensor | None = None


class TwoStageViT(Backbone):
    """Images -> `TwoStageOutput`. What the mask leaves out cannot move the logits, once the mask is there.

    Args:
        num_classes: Y.
        parts: K.
        image_size, patch, dim, depth, num_heads, mlp_ratio: of both transformers, see `RegisterTransformer`.
        registers, class_positions, layer_scale, drop_path, in_channels: of both too.
        modulation, temperature: of the parts.
        drop: p1, of parts that speak for the class.
        mask_drop: p2, of parts in the mask.
        gumbel: noise in the parts' maps too, in training; the mask has it always there.
        soft: the second stage sees each patch by its share of foreground: no longer faithful.
        through: whether the second stage's loss reaches the mask, in training.
        prune: in evaluation the second stage computes what it sees alone.
        thresholds: of the dots of each part, (K,), in evaluation: patches below are no part's.

    Raises:
        ValueError: if a number is out of range, or an option is unknown.
    """

    slug = "faithful-attention-maps"
    authors_module = "two_stage"
    thresholds: Tensor | None

    def __init__(
        self,
        num_classes: int = 200,
        parts: int = 8,
        *,
        image_size: int = 518,
        patch: int = 14,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        registers: int = 4,
        class_positions: bool = False,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        in_channels: int = 3,
        modulation: str = "layer-norm",
        temperature: float = 1.0,
        drop: float = 0.3,
        mask_drop: float = 0.3,
        gumbel: bool = True,
        soft: bool = False,
        through: bool = True,
        prune: bool = True,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= mask_drop < 1:
            raise ValueError(f"mask_drop must be at least 0 and below 1, got {mask_drop}")
        if thresholds is not None and len(thresholds) != parts:
            raise ValueError(f"thresholds must be {parts}, one for each part, got {len(thresholds)}")
        sizes: dict[str, Any] = {
            "image_size": image_size, "patch": patch, "dim": dim, "depth": depth, "num_heads": num_heads,
            "mlp_ratio": mlp_ratio, "registers": registers, "class_positions": class_positions,
            "layer_scale": layer_scale, "drop_path": drop_path, "in_channels": in_channels,
        }  # fmt: skip
        self.first, self.second = RegisterTransformer(**sizes), RegisterTransformer(**sizes)
        self.parts = PartFinder(dim, parts, num_classes, modulation=modulation, temperature=temperature, drop=drop)
        self.head_norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.channels, self.strides, self.image_size, self.in_channels = (dim,), (patch,), image_size, in_channels
        self.mask_drop, self.gumbel, self.soft, self.through, self.prune = mask_drop, gumbel, soft, through, prune
        values = None if thresholds is None else torch.tensor(list(thresholds), dtype=torch.float32)
        self.register_buffer("thresholds", values, persistent=False)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The first stage's map (B, D, H, W), in a list."""
        check_images(x_BCHW, self.in_channels)
        tokens = self.first(x_BCHW)[:, self.first.prefix :]
        return [tokens.mT.unflatten(2, self.first.grid(x_BCHW)).contiguous()]

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """The first stage's answer by its map: the mean of what parts say."""
        maps = self.parts.maps(self.parts.logits(x_BCHW, self.parts.dots(x_BCHW)))
        return self.parts.classify(self.parts.features(x_BCHW, maps)).mean(2)

    def forward(
        self, pixel_values: Tensor, *, noise: Tensor | None = None, removed: Sequence[int] = ()
    ) -> TwoStageOutput:
        """
        Args:
            pixel_values: images (B, C, H, W).
            noise: Gumbel noise (B, K + 1, H, W) of the mask; drawn in training and none in evaluation, where None.
            removed: parts that are taken out of the foreground, from 0; the mask is then that of the maps without
                noise.

        Raises:
            ValueError: if these are no images, or there is no such part.
        """
        maps = self.features(pixel_values)
        x = maps[0]
        dots, logits, part_maps = self._near(x)
        K = self.parts.prototypes.out_channels - 1
        if any(not 0 <= part < K for part in removed):
            raise ValueError(f"removed must be parts from 0 to {K - 1}, got {list(removed)}")
        if noise is not None and noise.shape != dots.shape:
            raise ValueError(f"noise must be {tuple(dots.shape)}, got {tuple(noise.shape)}")
        if noise is None and self.training:
            noise = gumbel_noise(dots)
        if removed:
            found = without(part_maps, removed)
        else:
            found = foreground(self.parts.maps(logits, noise), self.mask_drop if self.training else 0.0)
        features = self.parts.features(x, part_maps)
        tokens = self._second(pixel_values, found)
        return TwoStageOutput(
            maps,
            self.head(self.head_norm(tokens[:, 0])),
            part_maps=part_maps,
            mask=found.hard if self.training else found.hard.detach(),  # a gradient that is none is for training
            soft_mask=found.soft,
            part_features=features,
            part_scores=self.parts.classify(features),
            part_dots=dots,
        )

    def masked(self, pixel_values: Tensor, seen: Tensor, *, prune: bool = False) -> Tensor:
        """The second stage alone: logits (B, Y) of images of which patches `seen`, bool (B, H, W), are seen.

        Args:
            pixel_values: images.
            seen: True is foreground.
            prune: see the class.

        Raises:
            ValueError: if they do not fit together.
        """
        check_images(pixel_values, self.in_channels)
        wanted = (len(pixel_values), *self.second.grid(pixel_values))
        if seen.dtype != torch.bool or seen.shape != wanted:
            raise ValueError(f"seen must be bool {wanted}, got {seen.dtype} {tuple(seen.shape)}")
        return self.head(self.head_norm(self.second(pixel_values, seen.flatten(1), prune=prune)[:, 0]))

    def find(self, pixel_values: Tensor) -> Tensor:
        """The maps (B, K + 1, H, W) of parts and background alone; images as in the call."""
        return self._near(self.features(pixel_values)[0])[2]

    def _near(self, x_BDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dots, logits and maps of parts; in evaluation with thresholds, dots are the logits."""
        dots = self.parts.dots(x_BDHW)
        if self.thresholds is not None and not self.training:
            below = dots[:, :-1] < self.thresholds.to(dots)[:, None, None]
            logits = torch.cat([dots[:, :-1].masked_fill(below, -torch.inf), dots[:, -1:]], 1)
        else:
            logits = self.parts.logits(x_BDHW, dots)
        return dots, logits, self.parts.maps(logits, gumbel_noise(dots) if self.training and self.gumbel else None)

    def _second(self, pixel_values: Tensor, found: Foreground) -> Tensor:
        if self.soft:
            return self.second(pixel_values, found.soft[:, 0].flatten(1) + _LEAST)
        seen = found.hard[:, 0].flatten(1)
        if (self.training and self.through) or seen.is_meta:  # without values there is no mask to be planned by
            return self.second(pixel_values, seen)
        # what compiles computes all patches: how many there are to be seen is data
        prune = self.prune and not self.training and not torch.compiler.is_compiling()
        return self.second(pixel_values, seen > 0.5, prune=prune)


@torch.no_grad()
def part_thresholds(dots_BTHW: Tensor, maps_BTHW: Tensor, quantile: float = 0.05) -> Tensor:
    """The dots (K,) below which a share of each part's own patches lies; -inf of a part that has none.

    Args:
        dots_BTHW: `part_dots` of its images.
        maps_BTHW: their `part_maps`.
        quantile: the share.

    Raises:
        ValueError: if it is no share.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}")
    best_BHW = maps_BTHW.argmax(1)
    parts = [dots_BTHW[:, k][best_BHW == k].float() for k in range(dots_BTHW.shape[1] - 1)]
    none = dots_BTHW.new_tensor(-torch.inf, dtype=torch.float32)
    return torch.stack([part.quantile(quantile) if part.numel() else none for part in parts])
