"""LIT: deformable merging of tokens, attention with a table of positions, and the backbone.

Shape letters: B batch, C channels, H height, W width, N = H W tokens, h heads of D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.drop_path import drop_path_rates
from saccade.layers.patches import PatchEmbedding, filled
from saccade.layers.pre_norm import PreNormBlock
from saccade.models.backbone import Backbone, ImageOutput, check_images
from saccade.ops.deformable import deformable_conv
from saccade.ops.heads import check_heads
from saccade.ops.partitions import packed_window_attend, window_bias

POSITIONS = ("relative", "absolute")


class DeformableTokenMerging(nn.Module):
    """DTM: a deformable 2 x 2 convolution of stride 2, batch normalisation, GELU.

    Args:
        dim: C.
        out_dim: C', 2 C where None.
        deformable: False is the plain convolution, without offsets.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, dim: int, out_dim: int | None = None, *, deformable: bool = True) -> None:
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        if min(dim, out_dim) < 1:
            raise ValueError(f"dim and out_dim must be positive, got {dim} and {out_dim}")
        self.dim = dim
        self.conv, self.norm = nn.Conv2d(dim, out_dim, 2, 2), nn.BatchNorm2d(out_dim)
        self.offset_conv = nn.Conv2d(dim, 8, 2, 2) if deformable else None
        if self.offset_conv is not None:
            nn.init.zeros_(self.offset_conv.weight)
            assert self.offset_conv.bias is not None
            nn.init.zeros_(self.offset_conv.bias)

    def offsets(self, x_BCHW: Tensor) -> Tensor | None:
        """(B, 8, H / 2, W / 2): dy, then dx, of the taps in row-major order; None where not deformable."""
        return None if self.offset_conv is None else self.offset_conv(filled(x_BCHW, 2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2).

        Raises:
            ValueError: if `x` is no map of C channels.
        """
        check_images(x_BCHW, self.dim)
        x_BCHW = filled(x_BCHW, 2)
        offset = self.offsets(x_BCHW)
        if offset is None:
            y_BCHW = self.conv(x_BCHW)
        else:
            y_BCHW = deformable_conv(x_BCHW, offset, self.conv.weight, self.conv.bias, stride=2)
        return F.gelu(self.norm(y_BCHW))


class RelativeAttention(nn.Module):
    """Attention of all tokens of a map, with or without a bias by relative position; (B, H, W, C).

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        map_size: height and width for which the table is made; for others it is stretched. None has no bias.
        qkv_bias: bias of the projection to queries, keys and values.
        scale: D ** -0.5 where None.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int] | None,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if map_size is not None and min(map_size) < 1:
            raise ValueError(f"map_size must be positive, got {map_size}")
        self.num_heads, self.map_size, self.scale = num_heads, map_size, scale
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table: nn.Parameter | None = None
        if map_size is None:
            return
        # row (dy + H - 1) (2 W - 1) + dx + W - 1 for (dy, dx) = query - key
        table = torch.empty((2 * map_size[0] - 1) * (2 * map_size[1] - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def bias(self, size: tuple[int, int]) -> Tensor | None:
        """(h, N, N) of a map of `size`; None without a table."""
        if self.relative_position_bias_table is None or self.map_size is None:
            return None
        rows, columns = (2 * n - 1 for n in self.map_size)
        table = self.relative_position_bias_table.T.unflatten(1, (rows, columns))
        if size != self.map_size:
            wanted = [2 * n - 1 for n in size]
            working = torch.promote_types(table.dtype, torch.float32)
            table = F.interpolate(table[None].to(working), wanted, mode="bicubic", align_corners=False)[0].to(table)
        # the other way round: `window_bias` is of key - query
        return window_bias(table.flip(1, 2), size)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        qkv_BN3hD = self.qkv(x_BHWC).view(B, H * W, 3, self.num_heads, -1)
        # one window, as large as the map
        out_BhND = packed_window_attend(qkv_BN3hD, (H, W), (H, W), 0, self.bias((H, W)), scale=self.scale)
        return self.proj_drop(self.proj(out_BhND.transpose(1, 2).reshape(B, H, W, C)))


class LIT(Backbone):
    """LIT-Ti, -S, -M and -B.

    Args:
        dim: C of the first stage, doubled by every merging; or of each stage.
        depths, num_heads: of each stage; heads count where there is attention.
        attention: which stages have attention.
        mlp_ratio: width of the MLP over C, of all stages or of each.
        positions: "relative" gives attention tables of biases, "absolute" adds learned vectors to each stage's map.
        class_token: a token that joins the last stage, and is classified in the place of the mean; positions are to be
            absolute.
        image_size: height and width, or one number, for which tables are made; other images are taken.
        patch_size: of the first embedding.
        in_channels: of the images.
        num_classes: K; 0 has no head, and `classify` gives None.
        deformable: False merges by plain convolutions.
        qkv_bias, scale: of attention.
        drop, drop_path: dropout of MLPs, projections and the embedding; drop path of the last block.
        norm_eps: of the layer norms.

    Raises:
        ValueError: if an argument is out of range.
    """

    slug = "lit"
    authors_module = "lit"

    def __init__(
        self,
        dim: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attention: Sequence[bool] = (False, False, True, True),
        *,
        mlp_ratio: float | Sequence[float] = 4.0,
        positions: str = "relative",
        class_token: bool = False,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        deformable: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(attention) or not depths:
            raise ValueError(
                "depths, num_heads and attention must have one entry per stage, got "
                f"{len(depths)}, {len(num_heads)} and {len(attention)}"
            )
        dims = [dim * 2**i for i in range(len(depths))] if isinstance(dim, int) else list(dim)
        ratios = [mlp_ratio] * len(depths) if isinstance(mlp_ratio, (int, float)) else list(mlp_ratio)
        if not len(dims) == len(ratios) == len(depths):
            raise ValueError(
                f"dim and mlp_ratio must have one entry per stage ({len(depths)}), got {len(dims)} and {len(ratios)}"
            )
        if min(*dims, *depths, patch_size, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "dim, depths, patch_size and in_channels must be positive and num_classes at least 0, got "
                f"{dim}, {tuple(depths)}, {patch_size}, {in_channels} and {num_classes}"
            )
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        if class_token and positions != "absolute":
            raise ValueError("class_token has no place in tables of relative positions: positions must be 'absolute'")
        self.channels = tuple(dims)
        self.strides = tuple(patch_size * 2**i for i in range(len(depths)))
        self.in_channels, self.patch_size = in_channels, patch_size
        image = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.map_sizes = [(-(-image[0] // stride), -(-image[1] // stride)) for stride in self.strides]
        if min(map(min, self.map_sizes)) < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        self.embed = PatchEmbedding(in_channels, dims[0], patch_size, norm_eps=norm_eps)
        self.drop = nn.Dropout(drop)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        stages = []
        for i, (depth, width) in enumerate(zip(depths, dims)):
            size = self.map_sizes[i] if positions == "relative" else None
            blocks = []
            for _ in range(depth):
                layer = (
                    RelativeAttention(width, num_heads[i], size, qkv_bias=qkv_bias, scale=scale, proj_drop=drop)
                    if attention[i]
                    else None
                )
                hidden = int(width * ratios[i])
                blocks.append(PreNormBlock(layer, width, hidden, drop=drop, drop_path=next(rates), norm_eps=norm_eps))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.mergings = nn.ModuleList(
            DeformableTokenMerging(fine, coarse, deformable=deformable) for fine, coarse in zip(dims, dims[1:])
        )
        self.norm = nn.LayerNorm(dims[-1], norm_eps) if num_classes else None
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else None
        self.positions: nn.ParameterList | None = None
        if positions == "absolute":
            # those of a map's tokens; the class token's comes first
            rows = [H * W for H, W in self.map_sizes]
            rows[-1] += class_token
            self.positions = nn.ParameterList(torch.empty(n, width) for n, width in zip(rows, dims))
        self.class_token = nn.Parameter(torch.empty(dims[-1])) if class_token else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (*(self.positions or ()), *(() if self.class_token is None else (self.class_token,))):
            nn.init.trunc_normal_(parameter, std=0.02)

    def pyramid(self, x_BCHW: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """`features`, and the class token (B, C) where there is one."""
        check_images(x_BCHW, self.in_channels)
        x_BHWC = self.drop(self.embed(filled(x_BCHW, self.patch_size)))
        maps: list[Tensor] = []
        token_BC: Tensor | None = None
        for i, stage in enumerate(self.stages):
            if i:
                x_BHWC = self.mergings[i - 1](maps[-1]).permute(0, 2, 3, 1)
            if self.positions is not None:
                x_BHWC = x_BHWC + self._positions_at(i, (x_BHWC.shape[1], x_BHWC.shape[2]))
            if self.class_token is None or i < len(self.stages) - 1:
                x_BHWC = stage(x_BHWC)
            else:
                token_BC, x_BHWC = self._joined(stage, x_BHWC)
            maps.append(x_BHWC.permute(0, 3, 1, 2))
        return maps, token_BC

    def _positions_at(self, stage: int, size: tuple[int, int]) -> Tensor:
        """(H, W, C) of a map of `size`."""
        assert self.positions is not None
        made = self.map_sizes[stage]
        rows_HWC = self.positions[stage][-made[0] * made[1] :].unflatten(0, made)
        if size == made:
            return rows_HWC
        working = rows_HWC.to(torch.promote_types(rows_HWC.dtype, torch.float32)).permute(2, 0, 1)
        stretched = F.interpolate(working[None], size, mode="bicubic", align_corners=False)[0]
        return stretched.permute(1, 2, 0).to(rows_HWC)

    def _joined(self, stage: nn.Module, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and the map after the last stage, which sees both as one row of tokens."""
        assert self.positions is not None and self.class_token is not None
        token_C = self.class_token + self.positions[-1][0]
        tokens_BNC = torch.cat([token_C.expand(x_BHWC.shape[0], 1, -1), x_BHWC.flatten(1, 2)], 1)
        out_BNC = stage(tokens_BNC[:, None])[:, 0]
        return out_BNC[:, 0], out_BNC[:, 1:].unflatten(1, x_BHWC.shape[1:3])

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        return self.pyramid(x_BCHW)[0]

    def forward(self, pixel_values: Tensor) -> ImageOutput:
        maps, token_BC = self.pyramid(pixel_values)
        return ImageOutput(maps, self.classify(maps[-1], token_BC))

    def classify(self, x_BCHW: Tensor, token_BC: Tensor | None = None) -> Tensor | None:
        """Logits (B, K); None without a head.

        Raises:
            ValueError: if the model has a class token and none is given: `pyramid` gives it.
        """
        return None if self.head is None else self.head(self.pool(x_BCHW, token_BC))

    def pool(self, x_BCHW: Tensor, token_BC: Tensor | None = None) -> Tensor:
        """The mean of a map's tokens, or the class token; normalised where there is a head, (B, C)."""
        if self.class_token is None:
            tokens_BNC = x_BCHW.flatten(2).mT
            return (tokens_BNC if self.norm is None else self.norm(tokens_BNC)).mean(1)
        if token_BC is None:
            raise ValueError("token must be the class token that pyramid() gives: the map alone is not classified")
        return token_BC if self.norm is None else self.norm(token_BC)

    def offset_parameters(self) -> list[nn.Parameter]:
        """Those of the offsets, which the authors train at a hundredth of the learning rate."""
        return [p for name, p in self.named_parameters() if ".offset_conv." in name]
