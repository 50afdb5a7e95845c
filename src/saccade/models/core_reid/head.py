"""CORE-ReID's heads: ECAB, a person in three views (whole, upper, lower), and the fusion of two networks' views.

Shape letters: B batch, C channels, K classes, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import channel_gate, channel_statistics


def bmfn(first_BC: Tensor, mirrored_BC: Tensor) -> Tensor:
    """Bidirectional mean feature normalisation: the mean of the features of an image and of its mirror, of length 1.

    Args:
        first_BC, mirrored_BC: of the same images.

    >>> bmfn(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 8.0]])).tolist()
    [[0.6..., 0.8...]]
    """
    return F.normalize((first_BC + mirrored_BC) / 2, dim=-1)


class ECAB(nn.Module):
    """sigmoid(S(max x) + S(mean x)), a weight in (0, 1) for each channel, (B, C, 1, 1).

    S: six linear maps without bias, C -> C/r -> C/r^2 -> C/r^3 and back, ReLU between.

    Args:
        channels: C.
        reduction: r.

    Raises:
        ValueError: if r^3 does not divide the channels.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        if reduction < 1 or channels < 1 or channels % reduction**3:
            raise ValueError(f"channels must be a multiple of reduction^3, got {channels} and {reduction}")
        self.channels = channels
        widths = [channels // reduction**level for level in (0, 1, 2, 3, 2, 1, 0)]
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in zip(widths, widths[1:]))

    def shared(self, x_BC: Tensor) -> Tensor:
        """S."""
        for layer in self.layers[:-1]:
            x_BC = layer(x_BC).relu()
        return self.layers[-1](x_BC)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels)
        return channel_gate(x_BCHW, self.shared, ("max", "avg"))


class Parts(NamedTuple):
    """What a head sees of a person.

    Attributes:
        whole, upper, lower: features (B, C).
        logits: (B, K), of the whole.
        upper_attention, lower_attention: t (B, C, 1, 1), pooled features times ECAB's weights.
        features: the map (B, C, H, W).
    """

    whole: Tensor
    upper: Tensor
    lower: Tensor
    logits: Tensor
    upper_attention: Tensor
    lower_attention: Tensor
    features: Tensor

    @property
    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.whole, self.upper, self.lower


class Half(nn.Module):
    """One half of a person: f = BN(W [mean; max] + b) and t = (mean + max) ECAB(x).

    Args:
        channels, reduction: of `ECAB`.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.ecab = ECAB(channels, reduction)
        self.fc, self.norm = nn.Linear(2 * channels, channels), _neck(channels)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The feature (B, C) and t (B, C, 1, 1)."""
        mean_BC, most_BC = channel_statistics(x_BCHW, ("avg", "max"))
        attention = (mean_BC + most_BC)[..., None, None] * self.ecab(x_BCHW)
        return self.norm(self.fc(torch.cat([mean_BC, most_BC], 1))), attention


class PartHead(nn.Module):
    """The head of student and teacher: the whole person, and two halves of the height.

    Of an odd height the row in the middle belongs to both halves.

    Args:
        channels: C, a multiple of reduction^3.
        num_classes: K, of the source, or clusters of the target.
        reduction: of `ECAB`.

    Raises:
        ValueError: if a number is not positive, or the channels are no such multiple.
    """

    def __init__(self, channels: int = 2048, num_classes: int = 700, *, reduction: int = 4) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.channels = channels
        self.norm = _neck(channels)
        self.upper, self.lower = Half(channels, reduction), Half(channels, reduction)
        self.classifier = nn.Linear(channels, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def parts(self, x_BCHW: Tensor) -> Parts:
        """
        Raises:
            ValueError: if `x` is no map of the channels.
        """
        check_map(x_BCHW, self.channels)
        H = x_BCHW.shape[2]
        whole = self.norm(_pooled(x_BCHW))
        upper, upper_attention = self.upper(x_BCHW[:, :, : -(-H // 2)])
        lower, lower_attention = self.lower(x_BCHW[:, :, H // 2 :])
        logits = self.classifier(whole)
        return Parts(whole, upper, lower, logits, upper_attention, lower_attention, x_BCHW)

    def forward(self, x_BCHW: Tensor) -> Parts:
        return self.parts(x_BCHW)


class Fuse(nn.Module):
    """Ensemble fusion: the teacher's map, weighed by the student's attention to either half, in three views.

        F_g = BN(max x + mean x),   F_u = BN(max x t_u + mean x t_u),   F_l likewise

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_neck(channels) for _ in range(3))

    def forward(self, x_BCHW: Tensor, upper_BC11: Tensor, lower_BC11: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C) each.

        Args:
            x_BCHW: the teacher's map.
            upper_BC11, lower_BC11: t of the student.
        """
        maps = (x_BCHW, x_BCHW * upper_BC11, x_BCHW * lower_BC11)
        whole, upper, lower = (norm(_pooled(weighed)) for norm, weighed in zip(self.norms, maps))
        return whole, upper, lower


class Ensemble(nn.Module):
    """A student, its teacher, and the fusion of what they see.

    Args:
        student, teacher: of one structure, `PartHead` (on maps) or `CoReID` (on images); what has `parts`.
        channels: C.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, channels: int) -> None:
        super().__init__()
        self.student, self.teacher, self.fuse = student, teacher, Fuse(channels)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Parts, Parts]:
        """The fused views (B, C) each, and the parts that student and teacher see."""
        student, teacher = self.student.parts(x), self.teacher.parts(x)  # type: ignore[operator]
        return self.fuse(teacher.features, student.upper_attention, student.lower_attention), student, teacher


def embedding_of(parts: Parts) -> Tensor:
    """[g; f_u; f_l] of length 1, (B, 3 C)."""
    return F.normalize(torch.cat(parts.views, 1), dim=-1)


def _pooled(x_BCHW: Tensor) -> Tensor:
    return channel_statistics(x_BCHW, ("avg", "max")).sum(0)


def _neck(channels: int) -> nn.BatchNorm1d:
    """Batch norm whose bias stays 0."""
    norm = nn.BatchNorm1d(channels)
    norm.bias.requires_grad_(False)
    return norm
