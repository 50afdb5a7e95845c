"""Gaze put into a model: as input, as supervision of its attention or map, along a scanpath.

| use | |
|---|---|
| input | F' = F (1 + S), or S as one more channel |
| supervision | KL(G, A), CC, NSS or squared error of attention A and gaze G, times lambda |
| sequence | features at the fixations, in their order |

Losses of saliency: w_kl KL + w_cc CC + w_nss NSS, binary cross entropy of points. Of scanpaths: cross entropy over
patches, the likelihood of a mixture of Gaussians for positions, of a log-normal for durations.

Shape letters: B batch, C channels, H height, W width, T fixations, K parts of a mixture, N pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective
from saccade.ops.saliency import correlation, divergence, scanpath_saliency

Pull = Literal["kl", "cc", "nss", "mse"]
#: of SAM and TranSalNet
SALIENCY_WEIGHTS: Mapping[str, float] = {"kl": 10.0, "cc": -2.0, "nss": -1.0}


class GazeSupervision(nn.Module):
    """lambda times how far attention is from gaze, to be added to a model's own loss.

    Args:
        weight: lambda; 0.1 to 1 is usual.
        pull: KL of gaze from attention; 1 - CC; -NSS, of gaze above 0; or the squared error of both with sum 1, times
            their number of pixels.

    Raises:
        ValueError: if there is no such pull, or lambda is negative.

    >>> same = torch.rand(2, 4, 4)
    >>> abs(round(float(GazeSupervision(0.5, "cc")(same, 3 * same).loss), 6))
    0.0
    """

    def __init__(self, weight: float = 0.5, pull: Pull = "kl") -> None:
        super().__init__()
        if pull not in ("kl", "cc", "nss", "mse") or weight < 0:
            raise ValueError(f"pull must be kl, cc, nss or mse and weight not negative, got {pull!r} and {weight}")
        self.weight, self.pull = weight, pull

    def forward(self, attention_BHW: Tensor, gaze_BHW: Tensor) -> Objective:
        """
        Args:
            attention_BHW: not negative, such as softmax's.
            gaze_BHW: density of gaze, not negative; brought to the size of the attention. An image without any does not
                count.

        Raises:
            ValueError: if the shapes do not fit.
        """
        a_BN, g_BN = _rows(attention_BHW, gaze_BHW)
        if self.pull == "kl":
            far_B = divergence(a_BN, g_BN)
        elif self.pull == "cc":
            far_B = 1 - correlation(a_BN, g_BN)
        elif self.pull == "nss":
            far_B = -scanpath_saliency(a_BN, g_BN > 0)
        else:
            a, g = (x / x.sum(1, keepdim=True).clamp(min=1e-12) for x in (a_BN, g_BN))
            far_B = a.shape[1] * (a - g).square().sum(1)
        looked_B = (g_BN.sum(1) > 0).to(far_B.dtype)
        far = (far_B * looked_B).sum() / looked_B.sum().clamp(min=1)
        return Objective(self.weight * far, {self.pull: far})


def saliency_loss(
    map_BHW: Tensor,
    density_BHW: Tensor,
    fixations_BHW: Tensor | None = None,
    weights: Mapping[str, float] = SALIENCY_WEIGHTS,
) -> Objective:
    """10 KL - 2 CC - NSS, the mean over images; and binary cross entropy of points where it has a weight.

    Args:
        map_BHW: predicted, not negative; in [0, 1] for the cross entropy.
        density_BHW: of fixations.
        fixations_BHW: above 0 where somebody looked; without, NSS and cross entropy are left out.
        weights: of kl, cc, nss and bce.

    Raises:
        ValueError: if the shapes do not fit, or there is no such term.
    """
    if strange := set(weights) - {"kl", "cc", "nss", "bce"}:
        raise ValueError(f"weights must be of kl, cc, nss and bce, got {', '.join(sorted(strange))}")
    p_BN, g_BN = _rows(map_BHW, density_BHW)
    terms = {"kl": divergence(p_BN, g_BN).mean(), "cc": correlation(p_BN, g_BN).mean()}
    if fixations_BHW is not None:
        at_BN = (fixations_BHW > 0).flatten(1)
        terms["nss"] = scanpath_saliency(p_BN, at_BN).mean()
        if weights.get("bce"):
            terms["bce"] = F.binary_cross_entropy(p_BN.clamp(0, 1), at_BN.to(p_BN.dtype))
    return Objective(sum((weights.get(name, 0.0) * term for name, term in terms.items()), p_BN.new_zeros(())), terms)


def scanpath_loss(
    logits_BTN: Tensor,
    patches_BT: Tensor,
    *,
    durations_BT: Tensor | None = None,
    mean_BT: Tensor | None = None,
    spread_BT: Tensor | None = None,
    real_BT: Tensor | None = None,
) -> Objective:
    """Cross entropy of the next patch, and the log-normal likelihood of durations where they are foretold.

    Args:
        logits_BTN: over patches, of each fixation.
        patches_BT: the patch that was fixated.
        durations_BT: in any unit, above 0; with `mean_BT` and `spread_BT`.
        mean_BT, spread_BT: of their logarithm; the spread above 0.
        real_BT: bool, False is behind the end of a scanpath.

    Raises:
        ValueError: if there are durations without what is foretold of them.
    """
    real_BT = torch.ones_like(patches_BT, dtype=torch.bool) if real_BT is None else real_BT
    of_patch_BT = F.cross_entropy(logits_BTN.flatten(0, 1), patches_BT.flatten(), reduction="none").view_as(patches_BT)
    terms = {"patches": _mean(of_patch_BT, real_BT)}
    if durations_BT is not None:
        if mean_BT is None or spread_BT is None:
            raise ValueError("durations need mean and spread of their logarithm, got none")
        log_BT = torch.where(real_BT, durations_BT, 1.0).log()
        score_BT = ((log_BT - mean_BT) / spread_BT).square() / 2 + spread_BT.log() + log_BT + math.log(2 * math.pi) / 2
        terms["durations"] = _mean(score_BT, real_BT)
    return Objective(sum(terms.values(), logits_BTN.new_zeros(())), terms)


def position_loss(
    weight_BTK: Tensor, mean_BTK2: Tensor, spread_BTK2: Tensor, points_BT2: Tensor, real_BT: Tensor | None = None
) -> Objective:
    """-log of a mixture of Gaussians at the fixations, the mean over them.

    Args:
        weight_BTK: logits of the mixture's parts.
        mean_BTK2: their middles.
        spread_BTK2: their standard deviations in x and y.
        points_BT2: the fixations.
        real_BT: bool, False is behind the end of a scanpath.
    """
    away_BTK2 = (points_BT2[:, :, None] - mean_BTK2) / spread_BTK2
    log_BTK = -(away_BTK2.square() / 2 + spread_BTK2.log()).sum(-1) - math.log(2 * math.pi)
    loss_BT = -(weight_BTK.log_softmax(-1) + log_BTK).logsumexp(-1)
    loss = _mean(loss_BT, torch.ones_like(loss_BT, dtype=torch.bool) if real_BT is None else real_BT)
    return Objective(loss, {"positions": loss})


def modulated(features_BCHW: Tensor, saliency_BHW: Tensor, *, concat: bool = False) -> Tensor:
    """F (1 + S), or F with S as one more channel; S is brought to the size of F.

    Args:
        features_BCHW: F, or an image.
        saliency_BHW: S.
        concat: as a channel.
    """
    size = features_BCHW.shape[2:]
    s_B1HW = F.interpolate(saliency_BHW[:, None], size, mode="bilinear", align_corners=False).to(features_BCHW.dtype)
    return torch.cat([features_BCHW, s_B1HW], 1) if concat else features_BCHW * (1 + s_B1HW)


def along(features_BCHW: Tensor, path_BT2: Tensor, size: tuple[int, int]) -> Tensor:
    """Features at the fixations of a scanpath, in their order, (B, T, C); bilinear between cells.

    Args:
        features_BCHW: of an image.
        path_BT2: x and y in pixels of it.
        size: height and width of the image.
    """
    scale = path_BT2.new_tensor([size[1], size[0]])
    grid_BT12 = ((2 * path_BT2 + 1) / scale - 1)[:, :, None].to(features_BCHW.dtype)
    found_BCT1 = F.grid_sample(features_BCHW, grid_BT12, padding_mode="border", align_corners=False)
    return found_BCT1[..., 0].mT


def scanned(map_HW: Tensor, count: int, radius: float | None = None) -> Tensor:
    """The scanpath (count, 2) of a map, x and y: each time the highest pixel, about which the map is then inhibited.

    Args:
        map_HW: of saliency.
        count: fixations; fewer where all is inhibited before.
        radius: of the inhibition in pixels; 0.1 of the longer side where None.

    Raises:
        ValueError: if it is no map.
    """
    if map_HW.ndim != 2 or not map_HW.numel():
        raise ValueError(f"map must be (height, width), got {tuple(map_HW.shape)}")
    height, width = map_HW.shape
    radius = 0.1 * max(height, width) if radius is None else radius
    y_H1, x_1W = torch.arange(height)[:, None], torch.arange(width)[None]
    left_HW, path = map_HW.detach().double().cpu().clone(), []
    for _ in range(count):
        if left_HW.isneginf().all():
            break
        y, x = divmod(int(left_HW.argmax()), width)
        path.append([float(x), float(y)])
        left_HW[(y_H1 - y).square() + (x_1W - x).square() <= radius**2] = -torch.inf
    return torch.tensor(path).view(-1, 2)


def _rows(a_BHW: Tensor, g_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both as rows of pixels in one size and single precision at least."""
    if a_BHW.ndim != 3 or g_BHW.ndim != 3 or len(a_BHW) != len(g_BHW):
        given = f"{tuple(a_BHW.shape)} and {tuple(g_BHW.shape)}"
        raise ValueError(f"map and gaze must be (batch, height, width) of one batch, got {given}")
    wide = torch.promote_types(a_BHW.dtype, torch.float32)
    g_BHW = g_BHW.to(wide)
    if g_BHW.shape != a_BHW.shape:
        g_BHW = F.interpolate(g_BHW[:, None], a_BHW.shape[1:], mode="bilinear", antialias=True)[:, 0]
    return a_BHW.to(wide).flatten(1), g_BHW.flatten(1)


def _mean(values: Tensor, real: Tensor) -> Tensor:
    return (values * real).sum() / real.sum().clamp(min=1)
