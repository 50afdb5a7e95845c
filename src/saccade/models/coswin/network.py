"""CoSwin: the local branch, window attention fused with it, the block, and the backbone with its classifier.

Shape letters: B batch, N = h w tokens, C channels, H image height, W width, h, w of a stage's map, G heads of D
channels, T tokens of a window, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.initialization import start_transformer
from saccade.layers.norms import ChannelNorm
from saccade.layers.patches import PatchMerging, filled
from saccade.layers.pre_norm import PreNormBlock
from saccade.models.backbone import Backbone, check_images
from saccade.ops.partitions import packed_window_attend, window_bias

if TYPE_CHECKING:
    from typing_extensions import Self


LOCAL_BLOCKS = ("dw", "conv", "dwonly")


LOCAL_NORMS = ("batch", "layer", "none")


FUSIONS = ("sum", "gate", "concat", "pre", "value")


#: the card's presets, for `CoSwin.from_config`; no paper's table gives their parameters
SIZES: Mapping[str, Mapping[str, Any]] = {
    "cos4": {},
    "small3": {"depths": (2, 6, 4), "num_heads": (3, 6, 12), "mlp_ratio": 2.0},
}


def to_map(x_BNC: Tensor, size: tuple[int, int]) -> Tensor:
    """All tokens as an image (B, C, h, w), a view, channels-last in memory.

    Args:
        x_BNC: tokens in row-major order.
        size: (h, w).
    """
    return x_BNC.transpose(1, 2).unflatten(2, size)


def to_tokens(x_BChw: Tensor) -> Tensor:
    """The inverse of `to_map`.

    Args:
        x_BChw: an image.
    """
    return x_BChw.flatten(2).transpose(1, 2)


class LocalBranch(nn.Sequential):
    """LFM: a map (B, C, h, w) to another.

    Args:
        channels: C.
        block, norm: `local_block` and `local_norm` of the table on the paper's page.
        kernel_size: odd.

    Raises:
        ValueError: if `block` or `norm` is not offered, or the kernel is even.
    """

    def __init__(self, channels: int, block: str = "dw", norm: str = "batch", kernel_size: int = 3) -> None:
        _check("local_block", block, LOCAL_BLOCKS)
        _check("local_norm", norm, LOCAL_NORMS)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"local_kernel must be odd, got {kernel_size}")
        groups = 1 if block == "conv" else channels
        plain = block == "dwonly" or norm == "none"
        layers: list[nn.Module] = [
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=plain)
        ]
        if not plain:
            layers.append(nn.BatchNorm2d(channels) if norm == "batch" else ChannelNorm(channels))
        if block != "dwonly":
            layers.append(nn.GELU())
        if block == "dw":
            layers.append(nn.Conv2d(channels, channels, 1))
        super().__init__(*layers)


class FusedAttention(nn.Module):
    """(Shifted) window attention with the local branch; u (B, N, C) -> (B, N, C).

    Args:
        dim: C.
        num_heads: a divisor of C.
        window_size: M.
        shift: of the windows, below M.
        local, local_block, local_kernel, local_norm, fusion: see the table on the paper's page.

    Raises:
        ValueError: if an argument is out of range or not offered.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 4,
        shift: int = 0,
        *,
        local: bool = True,
        local_block: str = "dw",
        local_kernel: int = 3,
        local_norm: str = "batch",
        fusion: str = "sum",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the channels ({dim}), got {num_heads}")
        if window_size < 1 or not 0 <= shift < window_size:
            raise ValueError(f"window_size must be positive and above the shift, got {window_size} and {shift}")
        _check("fusion", fusion, FUSIONS)
        self.num_heads, self.window, self.shift, self.fusion = num_heads, window_size, shift, fusion
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        #: by key - query
        self.bias_table = nn.Parameter(torch.zeros(num_heads, 2 * window_size - 1, 2 * window_size - 1))
        self.local = LocalBranch(dim, local_block, local_norm, local_kernel) if local else None
        self.gate = nn.Parameter(torch.ones(dim)) if local and fusion == "gate" else None
        self.fuse = nn.Linear(2 * dim, dim) if local and fusion == "concat" else None

    def windows(self, u_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        """G, the attention's output after its projection."""
        qkv_BN3GD = self.qkv(u_BNC).unflatten(2, (3, self.num_heads, -1))
        bias_GTT = window_bias(self.bias_table, (self.window, self.window))
        out_BGND = packed_window_attend(qkv_BN3GD, size, self.window, self.shift, bias_GTT)
        out_BNC = out_BGND.transpose(1, 2).flatten(2)
        if self.local is not None and self.fusion == "value":
            out_BNC = out_BNC + to_tokens(self.local(to_map(qkv_BN3GD[:, :, 2].flatten(2), size)))
        return self.proj(out_BNC)

    def forward(self, u_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        if self.local is None or self.fusion == "value":
            return self.windows(u_BNC, size)
        local_BNC = to_tokens(self.local(to_map(u_BNC, size)))
        if self.fusion == "pre":
            return self.windows(u_BNC + local_BNC, size)
        global_BNC = self.windows(u_BNC, size)
        if self.fuse is not None:
            return self.fuse(torch.cat([global_BNC, local_BNC], 2))
        return global_BNC + (local_BNC if self.gate is None else self.gate * local_BNC)


class CoSwinBlock(PreNormBlock):
    """Fused attention and MLP, each after a layer norm and with a residual; x (B, N, C) -> (B, N, C), with `size=`.

    Args:
        dim: C.
        num_heads: a divisor of C.
        mlp_ratio: hidden units of the MLP over C.
        drop_path: probability of leaving a sub-layer out, per image, in training.
        arguments: of `FusedAttention`.

    Raises:
        ValueError: as `FusedAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, **arguments: Any
    ) -> None:
        super().__init__(FusedAttention(dim, num_heads, **arguments), dim, int(mlp_ratio * dim), drop_path=drop_path)


class CoSwin(Backbone):
    """The backbone and its classifier.

    Args:
        num_classes: K; 0 leaves the classifier out.
        in_channels: of the images.
        patch_size: P; 2 for images of 32 x 32, 4 for 64 x 64.
        embed_dim: channels of the first stage, which double at each merge.
        depths, num_heads: of each stage.
        window_size: M.
        mlp_ratio: hidden units of the MLP over channels.
        local, local_block, local_kernel, local_norm, fusion: see the table on the paper's page.
        drop_path: of the last block, rising linearly from 0.

    Raises:
        ValueError: if an argument is out of range or not offered.
    """

    slug = "coswin"
    image_size = 32

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        patch_size: int = 2,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 4,
        mlp_ratio: float = 4.0,
        local: bool = True,
        local_block: str = "dw",
        local_kernel: int = 3,
        local_norm: str = "batch",
        fusion: str = "sum",
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if min(in_channels, patch_size, embed_dim) < 1 or num_classes < 0 or mlp_ratio <= 0:
            raise ValueError(
                "in_channels, patch_size, embed_dim and mlp_ratio must be positive and num_classes not negative, got "
                f"{in_channels}, {patch_size}, {embed_dim}, {mlp_ratio} and {num_classes}"
            )
        if not depths or min(depths) < 1 or len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must have one positive entry per stage, got {depths}, {num_heads}")
        self.in_channels = in_channels
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.strides = tuple(patch_size * 2**stage for stage in range(len(depths)))
        self.patches = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)
        self.merges = nn.ModuleList(PatchMerging(dim) for dim in self.channels[:-1])
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                CoSwinBlock(
                    dim,
                    heads,
                    mlp_ratio,
                    next(rates),
                    window_size=window_size,
                    shift=window_size // 2 if index % 2 else 0,
                    local=local,
                    local_block=local_block,
                    local_kernel=local_kernel,
                    local_norm=local_norm,
                    fusion=fusion,
                )
                for index in range(depth)
            )
            for dim, depth, heads in zip(self.channels, depths, num_heads)
        )
        self.norm = nn.LayerNorm(self.channels[-1])
        self.head = nn.Linear(self.channels[-1], num_classes) if num_classes else None
        self.apply(start_transformer)
        for module in self.modules():
            if isinstance(module, FusedAttention):
                nn.init.trunc_normal_(module.bias_table, std=0.02)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, self.in_channels)
        map_BChw = self.patches(filled(x_BCHW, self.strides[0]))
        maps: list[Tensor] = []
        for index, blocks in enumerate(self.stages):
            if index:
                map_BChw = self.merges[index - 1](map_BChw)
            height, width = map_BChw.shape[2:]
            x_BNC = to_tokens(map_BChw)
            for block in blocks:  # type: ignore[attr-defined]
                x_BNC = block(x_BNC, size=(height, width))
            map_BChw = to_map(x_BNC, (height, width))
            maps.append(map_BChw)
        return maps

    def classify(self, x_BChw: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.norm(to_tokens(x_BChw)).mean(1))

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A preset, "cos4" or "small3"; `changes` go before its arguments.

        Raises:
            ValueError: if there is no such preset.
        """
        _check("name", name, tuple(SIZES))
        return cls(**{**SIZES[name], **changes})


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
