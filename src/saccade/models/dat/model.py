"""The backbones: blocks, stages and the networks of DAT and DAT++. Maps have channels last from the stem on.

Shape letters: B batch, H, W height and width of a map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import ChannelsLastConv2d
from saccade.layers.drop_path import drop_path_rates
from saccade.layers.patches import filled
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.window_attention import WindowAttention
from saccade.models.backbone import Backbone, check_images
from saccade.models.dat.attention import DeformableAttention, NeighborhoodAttention, ShiftedWindowAttention

#: kinds of attention in a stage's pattern: deformable, neighbourhood, windows, shifted windows
KINDS = "DNLS"


class ConvMLP(nn.Module):
    """W_2 GELU(u + DWConv_3x3(u)), u = W_1 x; without the convolution, the plain MLP.

    Args:
        dim: C.
        expansion: the inner width is expansion * C.
        convolution: False leaves it out.
        drop: dropout after each layer.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(self, dim: int, expansion: float = 4, *, convolution: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        inner = int(dim * expansion)
        if dim < 1 or inner < 1:
            raise ValueError(f"dim and expansion must be positive, got {dim} and {expansion}")
        self.linear1, self.linear2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.conv = ChannelsLastConv2d(inner, inner, 3, padding=1, groups=inner) if convolution else None
        self.drop = nn.Dropout(drop)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        u = self.drop(self.linear1(x_BHWC))
        if self.conv is not None:
            u = u + self.conv(u)
        return self.drop(self.linear2(F.gelu(u)))


class Block(PreNormBlock):
    """x + LPU(x), then x + attention(LN(x)), then x + MLP(LN(x)).

    Args:
        dim: C.
        attention: a module on (B, H, W, C).
        expansion, conv_mlp, drop: of the MLP.
        local_perception: the depthwise convolution at the start (LPU).
        layer_scale: initial factor of both branches, one per channel; None has none.
        drop_path: probability.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        expansion: float = 4,
        conv_mlp: bool = True,
        local_perception: bool = True,
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        mlp = ConvMLP(dim, expansion, convolution=conv_mlp, drop=drop)
        super().__init__(attention, dim, mlp=mlp, layer_scale=layer_scale, drop_path=drop_path)
        self.local = ChannelsLastConv2d(dim, dim, 3, padding=1, groups=dim) if local_perception else None

    def forward(self, x: Tensor, *, mask: Any = None, cache: Any = None, **arguments: Any) -> Tensor:
        x = x if self.local is None else x + self.local(x)
        return super().forward(x, mask=mask, cache=cache, **arguments)


class Stage(nn.Module):
    """Blocks at one resolution.

    Args:
        dim: C.
        pattern: a letter per block: D deformable, N neighbourhood, L windows, S shifted windows.
        map_size: height and width, for which biases of deformable attention are made.
        num_heads, groups, stride, kernel_size, offset_range, bias, offsets, reference: see `DeformableAttention`.
        window: of L and S.
        neighborhood: kernel of N.
        drop_path: of each block.
        in_dim: channels of the input; another number than C is projected first.
        attn_drop, proj_drop: see `DeformableAttention`; the local attentions take the latter alone.
        expansion, conv_mlp, local_perception, layer_scale, drop: see `Block`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        pattern: str | Sequence[str],
        map_size: int | tuple[int, int],
        *,
        num_heads: int,
        groups: int = 1,
        stride: int = 1,
        kernel_size: int = 3,
        offset_range: float = -1.0,
        bias: str | None = "table",
        offsets: bool = True,
        reference: str = "published",
        window: int = 7,
        neighborhood: int = 7,
        expansion: float = 4,
        conv_mlp: bool = True,
        local_perception: bool = True,
        layer_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: Sequence[float] = (),
        in_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not pattern or not set(pattern) <= set(KINDS):
            raise ValueError(f"pattern must be letters of {KINDS}, got {pattern!r}")

        def attention(kind: str) -> nn.Module:
            if kind == "D":
                return DeformableAttention(
                    dim, num_heads, map_size, groups=groups, stride=stride, kernel_size=kernel_size,
                    offset_range=offset_range, bias=bias, offsets=offsets, reference=reference, attn_drop=attn_drop,
                    proj_drop=proj_drop,
                )  # fmt: skip
            if kind == "N":
                return NeighborhoodAttention(dim, num_heads, neighborhood, proj_drop=proj_drop)
            windows = ShiftedWindowAttention if kind == "S" else WindowAttention
            return windows(dim, num_heads, window_size=window, proj_drop=proj_drop)

        self.proj = nn.Identity() if in_dim in (None, dim) else nn.Linear(in_dim, dim)  # type: ignore[arg-type]
        rates = [*drop_path, *[0.0] * (len(pattern) - len(drop_path))]
        self.blocks = nn.ModuleList(
            Block(
                dim,
                attention(kind),
                expansion=expansion,
                conv_mlp=conv_mlp,
                local_perception=local_perception,
                layer_scale=layer_scale,
                drop=drop,
                drop_path=rate,
            )
            for kind, rate in zip(pattern, rates)
        )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.proj(x_BHWC)
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return x_BHWC


class DAT(Backbone):
    """A pyramid of four stages (strides 4, 8, 16, 32) of local and deformable attention.

    The defaults are DAT-T++.

    Args:
        dims: channels of each stage.
        patterns: a letter per block and stage, see `Stage`.
        num_heads, groups, strides, kernel_sizes: of each stage; see `DeformableAttention`.
        offset_range: s; negative is unbounded. This and the following take one value for all stages or one for each.
        window, neighborhood: lengths of L and S, of N.
        conv_mlp, local_perception, layer_scale, bias, offsets: see `Stage`.
        expansion: width of the MLPs over C.
        image_size: for which biases are made; images of any size are taken.
        stem_dim: channels of the stem where they are others than the first stage's.
        conv_stem: two convolutions of stride 2 and overlapping ones between stages; else patches.
        reference: see `DeformableAttention`.
        drop_path: rate of the last block; grows linearly from 0.
        attn_drop, proj_drop, drop: dropouts.
        in_channels: of the images.
        num_classes: of the head; 0 has none.

    Raises:
        ValueError: if arguments are out of range or lists differ in length.
    """

    slug = "dat"

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        patterns: Sequence[str] = ("ND", "ND" * 2, "ND" * 9, "DD"),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        groups: Sequence[int] = (1, 2, 4, 8),
        strides: Sequence[int] = (8, 4, 2, 1),
        kernel_sizes: Sequence[int] = (9, 7, 5, 3),
        *,
        offset_range: float | Sequence[float] = -1.0,
        window: int | Sequence[int] = 7,
        neighborhood: int | Sequence[int] = 7,
        image_size: int | tuple[int, int] = 224,
        stem_dim: int | None = None,
        conv_stem: bool = True,
        conv_mlp: bool | Sequence[bool] = True,
        local_perception: bool | Sequence[bool] = True,
        expansion: float | Sequence[float] = 4,
        layer_scale: float | Sequence[float | None] | None = None,
        bias: str | Sequence[str | None] | None = "table",
        offsets: bool | Sequence[bool] = True,
        reference: str = "published",
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop: float = 0.0,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        stages = _of_stages(
            len(dims), dims=dims, patterns=patterns, num_heads=num_heads, groups=groups, strides=strides,
            kernel_sizes=kernel_sizes, offset_range=offset_range, window=window, neighborhood=neighborhood,
            conv_mlp=conv_mlp, local_perception=local_perception, expansion=expansion, layer_scale=layer_scale,
            bias=bias, offsets=offsets,
        )  # fmt: skip
        first = dims[0] if stem_dim is None and dims else stem_dim
        if not dims or min(dims) < 2 or first is None or first < 2 or in_channels < 1 or num_classes < 0:
            raise ValueError(
                "dims, stem_dim, in_channels and num_classes must be at least 2, 2, 1 and 0, "
                f"got {tuple(dims)}, {first}, {in_channels} and {num_classes}"
            )
        self.channels, self.strides = tuple(dims), tuple(4 * 2**i for i in range(len(dims)))
        self.in_channels = in_channels
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        depths = [len(pattern) for pattern in patterns]
        rates = drop_path_rates(drop_path, sum(depths))
        starts = [0, *accumulate(depths)]
        self.stem = nn.Sequential()
        if conv_stem:
            self.stem.extend(
                [ChannelsLastConv2d(in_channels, first // 2, 3, 2, 1), nn.LayerNorm(first // 2), nn.GELU(),
                 ChannelsLastConv2d(first // 2, first, 3, 2, 1), nn.LayerNorm(first)]
            )  # fmt: skip
        else:
            self.stem.extend([ChannelsLastConv2d(in_channels, first, 4, 4), nn.LayerNorm(first)])
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for i, arguments in enumerate(stages):
            stage = Stage(
                map_size=(-(-sides[0] // self.strides[i]), -(-sides[1] // self.strides[i])),
                in_dim=None if i else first, reference=reference, attn_drop=attn_drop, proj_drop=proj_drop,
                drop=drop, drop_path=rates[starts[i] : starts[i + 1]], **arguments,
            )  # fmt: skip
            self.stages.append(stage)
        for dim, wider in zip(dims, dims[1:]):
            shape = (3, 2, 1) if conv_stem else (2, 2, 0)
            self.merges.append(nn.Sequential(ChannelsLastConv2d(dim, wider, *shape, bias=False), nn.LayerNorm(wider)))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else None

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, self.in_channels)
        x = filled(x_BCHW, 4).permute(0, 2, 3, 1) if len(self.stem) == 2 else x_BCHW.permute(0, 2, 3, 1)
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            if i:
                merge = self.merges[i - 1]
                if merge[0].padding == (0, 0):  # type: ignore[index, union-attr]
                    x = filled(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
                x = merge(x)
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        """LN, mean over positions, linear layer."""
        if self.head is None:
            return None
        return self.head(self.norm(x_BCHW.permute(0, 2, 3, 1)).mean((1, 2)))


def _of_stages(count: int, **lists: Any) -> list[dict[str, Any]]:
    """The arguments of each `Stage`; one value alone is for all."""
    names = {"dims": "dim", "patterns": "pattern", "strides": "stride", "kernel_sizes": "kernel_size"}
    stages: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in lists.items():
        given = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,) * count
        if len(given) != count:
            raise ValueError(f"{name} must have an entry per stage ({count}), got {values}")
        for stage, value in zip(stages, given):
            stage[names.get(name, name)] = value
    return stages
