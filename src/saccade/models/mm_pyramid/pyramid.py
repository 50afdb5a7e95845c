"""The pyramid: attention in windows within and across two streams, dilated convolutions, and the sum over levels.

Shape letters: B batch, T steps, L levels, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import masks
from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.heads import check_heads


class WindowLayer(nn.Module):
    """x = q + MHA(LN q, k, v), x + FFN(LN x); keys and values are what they are given as, without a norm.

    Args:
        dim: C.
        feedforward: inner width of the FFN.
        num_heads: of the attention.
        drop: of both branches, and inside the FFN.
        attention_drop: of attention weights.

    Raises:
        ValueError: if heads do not divide the channels.
    """

    def __init__(
        self, dim: int, feedforward: int, num_heads: int, *, drop: float = 0.2, attention_drop: float = 0.1
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SoftmaxAttention(
            dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=attention_drop
        )
        self.mlp, self.drop = MLP(dim, feedforward, activation="relu", drop=drop), nn.Dropout(drop)

    def forward(
        self, x_BTC: Tensor, source_BTC: Tensor, reach: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x_BTC: asks.
            source_BTC: keys and values.
            reach: r; a step attends to those at most so far away. None for all.
            mask: bool (B, T), False is padding.
        """
        seen = None if reach is None else masks.window(reach, reach)
        if mask is not None:
            seen = masks.padding(mask) if seen is None else seen & masks.padding(mask)
        x_BTC = x_BTC + self.drop(self.attention(self.norm1(x_BTC), source_BTC, mask=seen))
        return x_BTC + self.mlp(self.norm2(x_BTC))


class GatedSum(nn.Module):
    """s(L1 [S; X]) S + s(L2 [S; X]) X of two streams of the same steps.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own_gate, self.other_gate = nn.Linear(2 * dim, dim), nn.Linear(2 * dim, dim)

    def forward(self, own_BTC: Tensor, other_BTC: Tensor) -> Tensor:
        both = torch.cat([own_BTC, other_BTC], -1)
        return self.own_gate(both).sigmoid() * own_BTC + self.other_gate(both).sigmoid() * other_BTC


class IntegrateBlock(nn.Module):
    """Attention in a window within each stream, and across them by one layer for both directions; gated sums.

    Args:
        dim, feedforward, num_heads, drop, attention_drop: of `WindowLayer`.
        reach: of the window; None for all steps.
        cross: False leaves the other stream out, to see what it brings.
    """

    def __init__(
        self,
        dim: int,
        feedforward: int,
        num_heads: int,
        *,
        reach: int | None = None,
        cross: bool = True,
        drop: float = 0.2,
        attention_drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.reach = reach

        def layer() -> WindowLayer:
            return WindowLayer(dim, feedforward, num_heads, drop=drop, attention_drop=attention_drop)

        self.video, self.audio, self.cross = layer(), layer(), layer() if cross else None
        self.video_sum = GatedSum(dim) if cross else None
        self.audio_sum = GatedSum(dim) if cross else None

    def forward(self, video_BTC: Tensor, audio_BTC: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both streams, with the same steps; `mask` is bool (B, T), False is padding."""
        own_video = self.video(video_BTC, video_BTC, self.reach, mask)
        own_audio = self.audio(audio_BTC, audio_BTC, self.reach, mask)
        if self.cross is None or self.video_sum is None or self.audio_sum is None:
            return own_video, own_audio
        other_video = self.cross(video_BTC, audio_BTC, self.reach, mask)
        other_audio = self.cross(audio_BTC, video_BTC, self.reach, mask)
        return self.video_sum(own_video, other_video), self.audio_sum(own_audio, other_audio)


class TemporalBlock(nn.Module):
    """relu(conv1(relu(conv_k(x; dilation))) + x) over steps, whose number stays.

    Args:
        dim: C.
        kernel_size: k, odd.
        dilation: of the first convolution.

    Raises:
        ValueError: if the kernel is even.
    """

    def __init__(self, dim: int, kernel_size: int = 3, dilation: int = 1) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        padding = kernel_size // 2 * dilation
        self.conv1 = nn.Conv1d(dim, dim, kernel_size, padding=padding, dilation=dilation)
        self.conv2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x_BTC: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C); `mask` is bool (B, T), False is padding, which the convolution sees as 0."""
        if mask is not None:
            x_BTC = x_BTC * mask[..., None]
        x_BCT = x_BTC.transpose(1, 2)
        return F.relu(self.conv2(F.relu(self.conv1(x_BCT))) + x_BCT).transpose(1, 2)


class LevelFusion(nn.Module):
    """Attention among the L vectors of a step, and their sum with weights s(w . z).

    Args:
        dim, feedforward, num_heads, drop, attention_drop: of `WindowLayer`.
    """

    def __init__(
        self, dim: int, feedforward: int, num_heads: int, *, drop: float = 0.2, attention_drop: float = 0.1
    ) -> None:
        super().__init__()
        self.layer = WindowLayer(dim, feedforward, num_heads, drop=drop, attention_drop=attention_drop)
        self.weight = nn.Linear(dim, 1)

    def forward(self, levels_BTLC: Tensor) -> Tensor:
        """(B, T, C)."""
        levels = levels_BTLC.flatten(0, 1)
        z = self.layer(levels, levels)
        return (self.weight(z).sigmoid() * z).sum(1).unflatten(0, levels_BTLC.shape[:2])


class Pyramid(nn.Module):
    """Two streams through L levels, level i with windows of 2^i steps to either side and dilation 2^i; then the fusion.

    Args:
        dim, feedforward, num_heads, drop, attention_drop: of `WindowLayer`.
        levels: L.
        kernel_size: of `TemporalBlock`.
        cross: of `IntegrateBlock`.

    Raises:
        ValueError: if there is no level, or a size does not fit.
    """

    def __init__(
        self,
        dim: int,
        feedforward: int,
        num_heads: int,
        *,
        levels: int = 4,
        kernel_size: int = 3,
        cross: bool = True,
        drop: float = 0.2,
        attention_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be positive, got {levels}")
        drops = {"drop": drop, "attention_drop": attention_drop}
        self.dim = dim
        self.blocks = nn.ModuleList(
            IntegrateBlock(dim, feedforward, num_heads, reach=2**i, cross=cross, **drops) for i in range(levels)
        )
        self.video, self.audio = (
            nn.ModuleList(TemporalBlock(dim, kernel_size, 2**i) for i in range(levels)) for _ in range(2)
        )
        self.video_fusion, self.audio_fusion = (LevelFusion(dim, feedforward, num_heads, **drops) for _ in range(2))

    def capture(self, video_BTC: Tensor, audio_BTC: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each level gives, (B, T, L, C) of either stream.

        Args:
            video_BTC, audio_BTC: of the same steps.
            mask: bool (B, T), False is padding.

        Raises:
            ValueError: if they are no such streams.
        """
        if video_BTC.shape != audio_BTC.shape or video_BTC.ndim != 3 or video_BTC.shape[2] != self.dim:
            raise ValueError(
                f"video and audio must both be (batch, steps, {self.dim}), got {tuple(video_BTC.shape)} and "
                f"{tuple(audio_BTC.shape)}"
            )
        videos, audios = [], []
        for block, of_video, of_audio in zip(self.blocks, self.video, self.audio):
            video_BTC, audio_BTC = block(video_BTC, audio_BTC, mask)
            video_BTC, audio_BTC = of_video(video_BTC, mask), of_audio(audio_BTC, mask)
            videos.append(video_BTC)
            audios.append(audio_BTC)
        return torch.stack(videos, 2), torch.stack(audios, 2)

    def forward(self, video_BTC: Tensor, audio_BTC: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, C) of either stream; arguments and errors as of `capture`."""
        videos, audios = self.capture(video_BTC, audio_BTC, mask)
        return self.video_fusion(videos), self.audio_fusion(audios)
