"""Twins: the two attentions, a stage, and the backbone.

Shape letters: B batch, C channels, H height, W width, N = H W tokens, h heads of D channels, M keys, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.initialization import start_transformer
from saccade.layers.patches import PatchEmbedding, filled_to
from saccade.layers.positions import ConditionalPosition
from saccade.layers.pre_norm import PreNormBlock
from saccade.models.backbone import Backbone, check_images
from saccade.ops.attend import attend
from saccade.ops.heads import check_heads
from saccade.ops.partitions import packed_window_attend

PADDINGS = ("mask", "zeros")


class LocallyGroupedAttention(nn.Module):
    """LSA: attention inside windows that do not shift and have no position bias.

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        window: side of the windows.
        qkv_bias: bias of the projection to queries, keys and values.
        scale: D ** -0.5 where None.
        padding: where windows are not filled: "mask" sees no token outside of the map, "zeros" joins zero tokens.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window: int = 7,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        padding: str = "mask",
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        self.dim, self.num_heads, self.window, self.scale, self.padding = dim, num_heads, window, scale, padding
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """The same shape, (B, H, W, C).

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        _check_map(x_BHWC, self.dim)
        B, H, W, C = x_BHWC.shape
        down, right = (-n % self.window if self.padding == "zeros" else 0 for n in (H, W))
        if down or right:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, down))
        full = (H + down, W + right)
        qkv_BN3hD = self.qkv(x_BHWC).view(B, full[0] * full[1], 3, self.num_heads, -1)
        # windows that the map does not fill are smaller windows here: the mask, without the tokens it hides
        out_BhND = packed_window_attend(qkv_BN3hD, full, self.window, scale=self.scale)
        out_BHWC = out_BhND.transpose(1, 2).reshape(B, *full, C)[:, :H, :W]
        return self.proj_drop(self.proj(out_BHWC))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window={self.window}, padding={self.padding!r}"


class GlobalSubsampledAttention(nn.Module):
    """GSA: all tokens attend to one representative of each sub-window, made by a convolution.

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        reduction: sr, side of the sub-windows; with 1 it is plain multi-head attention.
        qkv_bias: biases of the projections to queries, keys and values.
        scale: D ** -0.5 where None.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        reduction: int = 1,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction must be positive, got {reduction}")
        self.dim, self.num_heads, self.reduction, self.scale = dim, num_heads, reduction, scale
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def representatives(self, x_BHWC: Tensor) -> Tensor:
        """What keys and values are made of, (B, M, C)."""
        if self.reduce is None or self.norm is None:
            return x_BHWC.flatten(1, 2)
        reduced_BCHW = self.reduce(filled_to(x_BHWC.permute(0, 3, 1, 2), self.reduction))
        return self.norm(reduced_BCHW.flatten(2).mT)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """The same shape, (B, H, W, C).

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        _check_map(x_BHWC, self.dim)
        heads = (self.num_heads, self.dim // self.num_heads)
        q_BhND = self.q(x_BHWC).flatten(1, 2).unflatten(2, heads).transpose(1, 2)
        k_BMhD, v_BMhD = self.kv(self.representatives(x_BHWC)).unflatten(2, (2, *heads)).unbind(2)
        out_BhND = attend(q_BhND, k_BMhD.transpose(1, 2), v_BMhD.transpose(1, 2), scale=self.scale)
        return self.proj_drop(self.proj(out_BhND.transpose(1, 2).reshape(x_BHWC.shape)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, reduction={self.reduction}"


class Stage(nn.Module):
    """An embedding, a block, the position encoding, the other blocks: (B, C', H, W) to (B, H / patch, W / patch, C).

    Args:
        inputs: C', channels of the map that comes in.
        dim: C.
        patch: side of the embedding's patches.
        blocks: of width C, on maps with channels last.
        drop: dropout after the embedding.
        norm: keep a norm for the stage's map (`Twins.features` applies it).
    """

    def __init__(
        self, inputs: int, dim: int, patch: int, blocks: Sequence[PreNormBlock], drop: float, norm: bool
    ) -> None:
        super().__init__()
        self.embed, self.drop = PatchEmbedding(inputs, dim, patch), nn.Dropout(drop)
        self.blocks, self.position = nn.ModuleList(blocks), ConditionalPosition(dim)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.drop(self.embed(x_BCHW))
        for i, block in enumerate(self.blocks):
            x_BHWC = block(x_BHWC)
            if i == 0:
                x_BHWC = self.position(x_BHWC)
        return x_BHWC


class Twins(Backbone):
    """Twins-SVT, or with `windows=None` Twins-PCPVT.

    Args:
        dims, num_heads, depths, mlp_ratios, reductions: C, heads, blocks, width of the MLP over C, and sr, per stage.
        windows: sides of LSA's windows per stage; where 1, or None, all blocks have GSA.
        patch_size: of the first embedding; later ones halve the map.
        in_channels: of the images.
        num_classes: K; 0 has no head, and `classify` gives None.
        qkv_bias, scale, padding: see `LocallyGroupedAttention`.
        global_attention: False has LSA in all blocks that have a window (the paper's ablation).
        stage_norm: normalise the map of each stage that `features` gives (the segmentation code for SVT-L); the next
            stage takes the map without it.
        drop, drop_path: dropout of MLPs, projections and embeddings; drop path of the last block.
        norm_eps: of the norms of blocks and head.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "twins"
    authors_module = "svt"

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 2, 10, 4),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        windows: Sequence[int] | None = (7, 7, 7, 7),
        *,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        scale: float | None = None,
        padding: str = "mask",
        global_attention: bool = True,
        stage_norm: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        windows = (1,) * len(dims) if windows is None else tuple(windows)
        lengths = [len(x) for x in (dims, num_heads, depths, mlp_ratios, reductions, windows)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                "dims, num_heads, depths, mlp_ratios, reductions and windows must have one entry per stage, got "
                f"{', '.join(map(str, lengths))}"
            )
        if min(depths) < 1 or min(patch_size, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "depths, patch_size and in_channels must be positive and num_classes at least 0, got "
                f"{tuple(depths)}, {patch_size}, {in_channels} and {num_classes}"
            )
        self.channels = tuple(dims)
        self.strides = tuple(patch_size * 2**i for i in range(len(dims)))
        self.in_channels = in_channels
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        shared: dict[str, Any] = {"qkv_bias": qkv_bias, "scale": scale, "proj_drop": drop}
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for j in range(depths[i]):
                attention: nn.Module
                if windows[i] == 1 or (j % 2 and global_attention):
                    attention = GlobalSubsampledAttention(dim, num_heads[i], reductions[i], **shared)
                else:
                    attention = LocallyGroupedAttention(dim, num_heads[i], windows[i], padding=padding, **shared)
                hidden = int(dim * mlp_ratios[i])
                block = PreNormBlock(attention, dim, hidden, drop=drop, drop_path=next(rates), norm_eps=norm_eps)
                blocks.append(block)
            inputs, patch = (dims[i - 1], 2) if i else (in_channels, patch_size)
            self.stages.append(Stage(inputs, dim, patch, blocks, drop, stage_norm))
        self.norm = nn.LayerNorm(dims[-1], norm_eps) if num_classes else None
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else None
        self.apply(start_transformer)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, self.in_channels)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x_BHWC = stage(x_BCHW)
            x_BCHW = x_BHWC.permute(0, 3, 1, 2)
            maps.append(x_BCHW if stage.norm is None else stage.norm(x_BHWC).permute(0, 3, 1, 2))
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.pool(x_BCHW))

    def pool(self, x_BCHW: Tensor) -> Tensor:
        """The mean of a map's tokens, normalised where there is a head, (B, C)."""
        tokens_BNC = x_BCHW.flatten(2).mT
        return (tokens_BNC if self.norm is None else self.norm(tokens_BNC)).mean(1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors train without weight decay: those of the position encodings."""
        return {name for name, _ in self.named_parameters() if ".position." in name}


def _check_map(x_BHWC: Tensor, dim: int) -> None:
    if x_BHWC.ndim != 4 or x_BHWC.shape[3] != dim or 0 in x_BHWC.shape[1:3]:
        raise ValueError(f"x must be (batch, height, width, {dim}), got {tuple(x_BHWC.shape)}")


DEPTHS = (2, 2, 10, 4)


PCPVT = {
    "dims": (64, 128, 320, 512),
    "num_heads": (1, 2, 5, 8),
    "depths": (3, 4, 6, 3),
    "mlp_ratios": (8, 8, 4, 4),
    "windows": None,
}
