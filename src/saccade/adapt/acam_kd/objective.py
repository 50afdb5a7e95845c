"""ACAM-KD: teacher and student features meet in cross attention, and what comes out masks their difference.

Shape letters: B batch, C channels of the teacher, D of queries and keys, H height, W width, N positions, U units,
L entries of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.objective import Objective
from saccade.ops.attend import attend
from saccade.ops.feature_maps import check_map

#: which features ask, forms of the diversity term, and what a unit's channel mask is learned from
QUERIES, DIVERSITIES, CHANNEL_UNITS = ("teacher", "student"), ("ratio", "pairwise"), ("scalar", "vector")
_EPS = 1e-12


def masked_error(error_BL: Tensor, masks_BUL: Tensor, spread_B: Tensor | int, *, normalise: bool = True) -> Tensor:
    """(1/U) sum_u || M_u D ||^2 / (spread sum M_u), the mean over the batch: a scalar.

    Args:
        error_BL: D^2, summed over the axis along which the masks are constant.
        masks_BUL: M, of each unit.
        spread_B: how many positions, or channels, were summed up.
        normalise: divide by the mask's sum; False by the number of its entries.
    """
    weighted_BU = (masks_BUL.square() @ error_BL[..., None])[..., 0]
    size_BU = masks_BUL.sum(-1).clamp(min=_EPS) if normalise else torch.full_like(weighted_BU, masks_BUL.shape[2])
    spread = spread_B[:, None] if isinstance(spread_B, Tensor) else spread_B
    return (weighted_BU / (size_BU * spread)).mean()


def overlap(masks_BUL: Tensor, form: str = "ratio") -> Tensor:
    """How much the units' masks are the same, the mean over the batch: a scalar; 0 for a single unit.

        ratio       2 sum_i sum_{j != i} <M_i, M_j> / (sum_i |M_i|^2 + sum_j |M_j|^2)           from 0 to U - 1
        pairwise    mean over pairs of 2 <M_i, M_j> / (|M_i|^2 + |M_j|^2)                       from 0 to 1

    Args:
        masks_BUL: of each unit.
        form: "ratio" or "pairwise".
    """
    products_BUU = masks_BUL @ masks_BUL.mT
    squares_BU = products_BUU.diagonal(dim1=1, dim2=2)
    if form == "ratio":
        return ((products_BUU.sum((1, 2)) - squares_BU.sum(1)) / squares_BU.sum(1).clamp(min=_EPS)).mean()
    pairs_BUU = 2 * products_BUU / (squares_BU[:, :, None] + squares_BU[:, None] + 2 * _EPS)
    units = masks_BUL.shape[1]
    apart = pairs_BUU.sum((1, 2)) - pairs_BUU.diagonal(dim1=1, dim2=2).sum(1)
    return (apart / max(1, units * (units - 1))).mean()


class LevelDistillation(nn.Module):
    """ACAM-KD between one map of the teacher and one of the student.

        F     = align(F_S)
        fused = softmax(Q^T K / sqrt(D)) V,      Q = W_q F_T, K = W_k F, V = W_v F
        M^c   = sigmoid(m_c mean_N(fused)),      M^s = sigmoid(m_s fused)                  for each of U units

    Args:
        channels: C.
        student_channels: C where None.
        units: U.
        query: "teacher", or "student": which asks; the other answers.
        align: a 1x1 convolution of the student's map; False takes it as it is.
        channel_units: m_c is a number for each unit ("scalar"), or one for each channel too ("vector").
        normalise: see `masked_error`.
        diversity: see `overlap`.
        keys: the answering map is pooled to this side at most; None keeps all positions. Memory is linear in them
            either way, time is not.
        detach: the teacher gets no gradient.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        student_channels: int | None = None,
        units: int = 6,
        *,
        query: str = "teacher",
        align: bool = True,
        channel_units: str = "scalar",
        normalise: bool = True,
        diversity: str = "ratio",
        keys: int | None = None,
        detach: bool = True,
    ) -> None:
        super().__init__()
        student_channels = channels if student_channels is None else student_channels
        if channels < 2 or student_channels < 1 or units < 1 or (keys is not None and keys < 1):
            raise ValueError(
                "channels must be at least 2, and student_channels, units and keys positive, got "
                f"{channels}, {student_channels}, {units} and {keys}"
            )
        if not align and channels != student_channels:
            raise ValueError(f"without align both must have as many channels, got {channels} and {student_channels}")
        for name, value, known in (
            ("query", query, QUERIES),
            ("diversity", diversity, DIVERSITIES),
            ("channel_units", channel_units, CHANNEL_UNITS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.channels, self.student_channels, self.units, self.keys = channels, student_channels, units, keys
        self.query, self.normalise, self.diversity, self.detach = query, normalise, diversity, detach
        self.align = nn.Conv2d(student_channels, channels, 1) if align else nn.Identity()
        self.q_proj, self.k_proj = (nn.Conv2d(channels, channels // 2, 1) for _ in range(2))
        self.v_proj = nn.Conv2d(channels, channels, 1)
        self.channel_units = nn.Parameter(torch.empty(units, channels if channel_units == "vector" else 1))
        self.spatial_units = nn.Parameter(torch.empty(units, channels))
        for parameter in (self.channel_units, self.spatial_units):
            nn.init.normal_(parameter, std=0.01)

    def fuse(self, teacher_BCHW: Tensor, aligned_BCHW: Tensor, real_BHW: Tensor | None = None) -> Tensor:
        """STCA-FF: what the asking features read of the other's, (B, N, C)."""
        asking, answering = teacher_BCHW, aligned_BCHW
        if self.query == "student":
            asking, answering = answering, asking
        q, k, v = self.q_proj(asking), self.k_proj(answering), self.v_proj(answering)
        height, width = k.shape[2:]
        if self.keys is not None and max(height, width) > self.keys:
            size = (min(height, self.keys), min(width, self.keys))
            k, v = (F.adaptive_avg_pool2d(x, size) for x in (k, v))
            if real_BHW is not None:
                real_BHW = F.adaptive_max_pool2d(real_BHW[:, None].to(k.dtype), size)[:, 0] > 0
        mask = None if real_BHW is None else real_BHW.flatten(1)[:, None, None]
        return attend(*(x.flatten(2).mT[:, None] for x in (q, k, v)), mask=mask)[:, 0]

    def masks(self, fused_BNC: Tensor, real_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ASCM: the units' masks of channels (B, U, C) and of positions (B, U, N); these are 0 where there is none."""
        spatial_BUN = (self.spatial_units @ fused_BNC.mT).sigmoid()
        if real_BN is None:
            mean_BC = fused_BNC.mean(1)
        else:
            spatial_BUN = spatial_BUN * real_BN[:, None]
            mean_BC = (fused_BNC * real_BN[..., None]).sum(1) / real_BN.sum(1, keepdim=True).clamp(min=1)
        return (self.channel_units * mean_BC[:, None]).sigmoid(), spatial_BUN

    def forward(self, teacher_BCHW: Tensor, student_BCHW: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The terms `channel`, `spatial` and `diversity`.

        Args:
            teacher_BCHW: (B, C, H, W).
            student_BCHW: of the same height and width.
            mask: bool (B, H, W), True = real; what lies under the others counts nowhere.

        Raises:
            ValueError: if the maps or the mask do not fit.
        """
        check_map(teacher_BCHW, self.channels)
        check_map(student_BCHW, self.student_channels)
        size = (len(teacher_BCHW), *teacher_BCHW.shape[2:])
        if size != (len(student_BCHW), *student_BCHW.shape[2:]):
            raise ValueError(
                "both maps must have one batch, height and width, got "
                f"{tuple(teacher_BCHW.shape)} and {tuple(student_BCHW.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != size):
            raise ValueError(f"a mask must be bool {size}, got {mask.dtype} {tuple(mask.shape)}")
        teacher_BCHW = teacher_BCHW.detach() if self.detach else teacher_BCHW
        aligned_BCHW = self.align(student_BCHW)
        real_BN = None if mask is None else mask.flatten(1).to(aligned_BCHW.dtype)
        channel_BUC, spatial_BUN = self.masks(self.fuse(teacher_BCHW, aligned_BCHW, mask), real_BN)
        error_BCN = (teacher_BCHW - aligned_BCHW).square().flatten(2)
        if real_BN is None:
            positions: Tensor | int = error_BCN.shape[2]
        else:
            error_BCN, positions = error_BCN * real_BN[:, None], real_BN.sum(1).clamp(min=1)
        return {
            "channel": masked_error(error_BCN.sum(2), channel_BUC, positions, normalise=self.normalise),
            "spatial": masked_error(error_BCN.sum(1), spatial_BUN, self.channels, normalise=self.normalise),
            "diversity": overlap(channel_BUC, self.diversity) + overlap(spatial_BUN, self.diversity),
        }


class ACAMKD(nn.Module):
    """The objective between the maps of a teacher and a student, the sum over levels; to be added to the task's loss.

        loss = alpha (L_channel + L_spatial) + weight L_diversity

    Its parameters learn with the student's and are thrown away afterwards.

    Args:
        channels: of the teacher's map at each level.
        student_channels: of the student's; the teacher's where None.
        units: U: 6 for detection, the number of classes for segmentation.
        alpha: of what the maps differ by.
        weight: of the diversity.
        query, align, channel_units, normalise, diversity, keys, detach: see `LevelDistillation`.

    Raises:
        ValueError: if there is no level, the levels do not fit together, or an argument is out of range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        student_channels: Sequence[int] | None = None,
        units: int = 6,
        *,
        alpha: float = 1.0,
        weight: float = 1.0,
        query: str = "teacher",
        align: bool = True,
        channel_units: str = "scalar",
        normalise: bool = True,
        diversity: str = "ratio",
        keys: int | None = None,
        detach: bool = True,
    ) -> None:
        super().__init__()
        theirs, ours = list(channels), list(channels if student_channels is None else student_channels)
        if not theirs or len(theirs) != len(ours):
            raise ValueError(f"channels and student_channels must be one for each level, got {theirs} and {ours}")
        self.alpha, self.weight = alpha, weight
        self.levels = nn.ModuleList(
            LevelDistillation(
                teacher, student, units, query=query, align=align, channel_units=channel_units, normalise=normalise,
                diversity=diversity, keys=keys, detach=detach,
            )
            for teacher, student in zip(theirs, ours)
        )  # fmt: skip

    def forward(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> Objective:
        """
        Args:
            teacher, student: maps (B, C, H, W) of each level.
            masks: bool (B, H, W) of each level, True = real, or None.

        Raises:
            ValueError: if they are not one for each level, or do not fit together.
        """
        count = len(self.levels)
        masks = [None] * count if masks is None else masks
        if not len(teacher) == len(student) == len(masks) == count:
            raise ValueError(
                f"maps must be one for each of {count} levels, "
                f"got {len(teacher)}, {len(student)} and {len(masks)} masks"
            )
        found = [level(*maps) for level, *maps in zip(self.levels, teacher, student, masks)]
        terms = {name: torch.stack([of_level[name] for of_level in found]).sum() for name in found[0]}
        loss = self.alpha * (terms["channel"] + terms["spatial"]) + self.weight * terms["diversity"]
        return Objective(loss, terms)
