"""What holds parts to be parts: all of them somewhere, the background at the border, whole, sure, different, and moving
with the image.

Shape letters: B batch, K parts and T = K + 1 maps, the background last, D width of features, C channels, H height,
W width, h, w of pooled maps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective
from saccade.models.faithful_attention_maps.network import TwoStageViT

#: weights of the terms beside the two cross entropies
WEIGHTS = {
    "presence": 1.0,
    "background": 2.0,
    "equivariance": 1.0,
    "variation": 1.0,
    "entropy": 1.0,
    "orthogonality": 1.0,
    "concentration": 0.0,
}


def presence(maps_BKHW: Tensor) -> Tensor:
    """1 - mean over parts of the largest 3 x 3 mean of a map in the batch.

    Args:
        maps_BKHW: of parts, without the background.
    """
    return 1 - _pooled(maps_BKHW).amax((0, 2, 3)).mean()


def background_presence(maps_BTHW: Tensor) -> Tensor:
    """-log of the largest 3 x 3 mean of the background's map, each weighed by the squared distance from the centre.

    Args:
        maps_BTHW: with the background last.
    """
    back_Bhw = _pooled(maps_BTHW[:, -1:])[:, 0]
    y, x = (torch.linspace(-1, 1, n, device=maps_BTHW.device, dtype=maps_BTHW.dtype) for n in back_Bhw.shape[1:])
    far_hw = y[:, None].square() + x.square()
    best_B = (back_Bhw * far_hw / far_hw.max()).amax((1, 2)).clamp(max=1)
    return -best_B.log().clamp(min=-100).mean()


def total_variation(maps_BTHW: Tensor) -> Tensor:
    """Sum of the differences of neighbours, by B H W."""
    down, right = maps_BTHW.diff(dim=2).abs().sum(), maps_BTHW.diff(dim=3).abs().sum()
    return (down + right) / maps_BTHW[:, 0].numel()


def pixel_entropy(maps_BTHW: Tensor) -> Tensor:
    """Mean over places of the entropy of what they belong to."""
    return torch.special.entr(maps_BTHW).sum(1).mean()


def orthogonality(features_BDT: Tensor) -> Tensor:
    """Mean square of (cosines of parts - identity).

    The authors' training loop hands over (B, K + 1, D), and so holds channels apart; parts are meant.
    """
    unit = F.normalize(features_BDT, dim=1)
    gram_BTT = unit.mT @ unit
    return (gram_BTT - torch.eye(gram_BTT.shape[1], device=unit.device, dtype=unit.dtype)).square().mean()


def concentration(maps_BKHW: Tensor) -> Tensor:
    """Mean over parts of the variance of a map's coordinates, which run from -1 to 1."""
    height, width = maps_BKHW.shape[2:]
    share = maps_BKHW / maps_BKHW.sum((2, 3), keepdim=True).clamp(min=1e-6)
    total = maps_BKHW.new_zeros(())
    for places, axis in ((height, 3), (width, 2)):
        at = torch.linspace(-1, 1, places, device=share.device, dtype=share.dtype)
        along = share.sum(axis)
        total = total + ((along * at.square()).sum(2) - (along * at).sum(2).square()).mean()
    return total


def random_motion(
    count: int,
    generator: torch.Generator | None = None,
    *,
    degrees: float = 90.0,
    shift: float = 0.11,
    scale: tuple[float, float] = (0.8, 1.4),
) -> Tensor:
    """Affine maps (B, 2, 3) of a square's coordinates, as `affine_grid` takes them.

    Args:
        count: B.
        generator: of what is drawn.
        degrees: turned by at most, either way.
        shift: of the side, at most, either way.
        scale: least and most.
    """
    draws = torch.rand(4, count, generator=generator)
    angle = (2 * draws[0] - 1) * math.radians(degrees)
    size = scale[0] + (scale[1] - scale[0]) * draws[1]
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) / size[:, None, None]
    return torch.cat([turned, 2 * shift * (2 * draws[2:].T[..., None] - 1)], 2)


def moved(x_BCHW: Tensor, motion_B23: Tensor, *, back: bool = False) -> Tensor:
    """Images or maps after a motion, or what undoes it; 0 where they show nothing.

    Args:
        x_BCHW: images or maps.
        motion_B23: of `random_motion`.
        back: undo it.
    """
    motion = motion_B23.to(device=x_BCHW.device, dtype=torch.float32)
    if back:
        turned = torch.linalg.inv(motion[..., :2])
        motion = torch.cat([turned, -turned @ motion[..., 2:]], 2)
    grid = F.affine_grid(motion.to(x_BCHW.dtype), list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid, align_corners=False)


def equivariance(maps_BKHW: Tensor, others_BKHW: Tensor, motion_B23: Tensor) -> Tensor:
    """1 - mean cosine of maps and of those of the moved image, moved back.

    Args:
        maps_BKHW: of parts.
        others_BKHW: of the moved image's.
        motion_B23: of `random_motion`.
    """
    there = moved(others_BKHW, motion_B23, back=True)
    return 1 - F.cosine_similarity(maps_BKHW.flatten(2), there.flatten(2), dim=2).mean()


class TwoStageLoss(nn.Module):
    """The loss of images and labels: both stages' cross entropies, and the terms of `WEIGHTS`.

    Args:
        **weights: of terms, in the place of the usual ones.

    Raises:
        ValueError: if there is no such term.
    """

    def __init__(self, **weights: float) -> None:
        super().__init__()
        strange = set(weights) - set(WEIGHTS)
        if strange:
            raise ValueError(f"weights must be of {', '.join(WEIGHTS)}, got {', '.join(sorted(strange))}")
        self.weights = {**WEIGHTS, **weights}

    def forward(
        self, model: TwoStageViT, pixel_values: Tensor, labels: Tensor, motion: Tensor | None = None
    ) -> Objective:
        """
        Args:
            model: in training mode.
            pixel_values: images.
            labels: (B,).
            motion: of `random_motion`; drawn where None.
        """
        said = model(pixel_values)
        assert said.logits is not None and said.part_maps is not None
        assert said.part_scores is not None and said.part_features is not None
        maps, parts = said.part_maps, said.part_maps[:, :-1]
        terms = {
            "second": F.cross_entropy(said.logits, labels),
            "first": F.cross_entropy(said.part_scores.mean(2), labels),
            "presence": presence(parts),
            "background": background_presence(maps),
            "variation": total_variation(maps),
            "entropy": pixel_entropy(maps),
            "orthogonality": orthogonality(said.part_features),
            "concentration": concentration(parts),
        }
        if self.weights["equivariance"]:
            motion = random_motion(len(pixel_values)) if motion is None else motion
            others = model.find(moved(pixel_values, motion))
            terms["equivariance"] = equivariance(parts, others[:, :-1], motion)
        loss = torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        return Objective(loss, terms)


def learning_rates(model: TwoStageViT, *, base: float = 1e-6, batch: int = 16) -> list[dict[str, Any]]:
    """Groups for AdamW, of a model whose transformers are pretrained; it freezes the first one's blocks and patches.

    The second transformer and the first one's class token, registers and positions learn at base sqrt(batch / 16),
    prototypes at a thousand times that, modulation, heads and their norm at ten thousand; prototypes and modulation
    without decay, the others at 0.05.

    Args:
        model: is changed: what is frozen asks for no gradient.
        base: the rate at a batch of 16.
        batch: images of a step.
    """
    rate = base * math.sqrt(batch / 16)
    first = model.first
    tokens = [part for part in (first.class_token, first.registers, first.positions) if part is not None]
    model.first.requires_grad_(False)
    for token in tokens:
        token.requires_grad_(True)
    shaped = [] if model.parts.modulation is None else list(model.parts.modulation.parameters())
    heads = [*model.parts.head.parameters(), *model.head_norm.parameters(), *model.head.parameters()]
    rows: list[tuple[list[Any], float, float]] = [
        ([*tokens, *model.second.parameters()], rate, 0.05),
        (list(model.parts.prototypes.parameters()), 1e3 * rate, 0.0),
        (shaped, 1e4 * rate, 0.0),
        (heads, 1e4 * rate, 0.05),
    ]
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in rows if params]


def _pooled(maps_BKHW: Tensor) -> Tensor:
    """3 x 3 means, of smaller maps those of all their rows or columns."""
    height, width = maps_BKHW.shape[2:]
    return F.avg_pool2d(maps_BKHW, (min(3, height), min(3, width)), stride=1)
