"""Deformable attention, and the local attentions beside it, on maps with channels last.

Shape letters: B batch, H, W height and width of the map, C channels, h heads of D channels, G groups, N sampling
points (n x m of them on a grid), K kernel of the neighbourhood, E channels of given values.
"""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.window_attention import WindowAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.constants import numbers
from saccade.ops.deformable import bias_at_points, sample
from saccade.ops.export import exporting
from saccade.ops.heads import check_heads
from saccade.ops.partitions import filled, window_attend
from saccade.ops.score_mods import grid_bias
from saccade.ops.sharding import refuse_parts

#: the biases by relative position that the authors' code knows
BIASES = ("table", "log", "fixed", "convolution", None)
REFERENCES = ("published", "symmetric")


class DeformableAttention(nn.Module):
    """Every query attends to few points that the queries have moved (card: DMHA).

        q = W_q x,   pos = ref + theta(q),   s = x at pos,   y = W_o softmax(q (W_k s)^T / sqrt(D) + bias) W_v s

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        map_size: (height, width) or one number, for which position biases are made; maps of other sizes are taken.
        groups: G sets of points, a divisor of h.
        stride: r, of the points' grid.
        kernel_size: of the offset network theta.
        offset_range: s; offsets are s tanh(.) / (n - 1) (DAT), or, negative, unbounded with points clamped to the map
            (DAT++).
        bias: "table" (read at displacements), "log" (a network of log displacements), "fixed" (one number per query
            and point), "convolution" (a depthwise convolution of q beside the attention), or None.
        offsets: False leaves points where they are, reads means of stride x stride pixels and has no bias.
        reference: "published" divides i + 1/2 by n - 1 as the authors' weights need it (points lean to the lower
            right); "symmetric" spreads them evenly from -1 to 1.
        attn_drop, proj_drop: dropout of weights and output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: int | tuple[int, int] = 7,
        *,
        groups: int = 1,
        stride: int = 1,
        kernel_size: int = 3,
        offset_range: float = -1.0,
        bias: str | None = "table",
        offsets: bool = True,
        reference: str = "published",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if groups < 1 or num_heads % groups:
            raise ValueError(f"groups must be positive and divide num_heads ({num_heads}), got {groups}")
        if stride < 1 or kernel_size < 1:
            raise ValueError(f"stride and kernel_size must be positive, got {stride} and {kernel_size}")
        if bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(map(str, BIASES))}, got {bias!r}")
        if reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}")
        H, W = self.map_size = (map_size, map_size) if isinstance(map_size, int) else tuple(map_size)
        if min(H, W) < 1:
            raise ValueError(f"map_size must be positive, got {map_size}")
        self.dim, self.num_heads, self.head_dim, self.groups = dim, num_heads, dim // num_heads, groups
        self.stride, self.offset_range, self.bias, self.offsets = stride, offset_range, bias, offsets
        self.reference, self.attn_drop = reference, attn_drop
        width = dim // groups
        padding = kernel_size // 2 if kernel_size != stride else 0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.offset_conv = nn.Conv2d(width, width, kernel_size, stride, padding, groups=width)
        self.offset_norm = nn.LayerNorm(width)
        self.offset_proj = nn.Linear(width, 2, bias=False)
        self.proj_drop = nn.Dropout(proj_drop)
        self.bias_table: nn.Parameter | None = None
        if bias == "table" and offsets:
            self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * H - 1, 2 * W - 1))
        if bias == "fixed" and offsets:
            self.bias_table = nn.Parameter(torch.empty(num_heads, H * W, self._points(H) * self._points(W)))
        if self.bias_table is not None:
            nn.init.trunc_normal_(self.bias_table, std=0.01)
        self.bias_network = (
            nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, num_heads // groups, bias=False))
            if bias == "log" and offsets
            else None
        )
        convolution = bias == "convolution" and offsets
        self.bias_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if convolution else None

    def _points(self, n: int) -> int:
        """Sampling points along an axis of n pixels."""
        kernel, padding = self.offset_conv.kernel_size[0], int(self.offset_conv.padding[0])
        return (max(n, kernel - 2 * padding) + 2 * padding - kernel) // self.stride + 1

    def references(self, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Undeformed points (n, m, 2) as (y, x), in [-1, 1] or, as published, a little beyond."""
        axes = []
        for n in map(self._points, size):
            i = torch.arange(n, device=self.offset_proj.weight.device, dtype=dtype)
            if self.reference == "published" or n == 1:
                i = i + 0.5  # one point alone stands in the middle
            axes.append(i / max(n - 1, 1) * 2 - 1)
        y, x = axes
        return torch.stack([y[:, None].expand(len(y), len(x)), x.expand(len(y), len(x))], -1)

    def points(self, q_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling points and where they come from, (B, G, n, m, 2) each, as (y, x)."""
        B, H, W, C = q_BHWC.shape
        G = self.groups
        reference = self.references((H, W), torch.promote_types(q_BHWC.dtype, torch.float32))
        n, m = reference.shape[:2]
        reference = reference.expand(B, G, n, m, 2)
        if not self.offsets:
            offset = torch.zeros_like(reference)
        else:
            # one convolution over all groups, whose weights they share, leaves channels last
            conv = self.offset_conv
            kernel, padding = conv.kernel_size[0], int(conv.padding[0])
            q = q_BHWC.permute(0, 3, 1, 2)
            small = [max(0, kernel - 2 * padding - size) for size in (H, W)]
            if any(small):
                q = F.pad(q, (0, small[1], 0, small[0]))
            assert conv.bias is not None
            moved = F.conv2d(q, conv.weight.repeat(G, 1, 1, 1), conv.bias.repeat(G), conv.stride, padding, groups=C)
            moved = self.offset_norm(moved.permute(0, 2, 3, 1).unflatten(3, (G, -1)))
            offset = self.offset_proj(F.gelu(moved)).permute(0, 3, 1, 2, 4).to(reference.dtype)
            if self.offset_range >= 0:
                limit = offset.new_tensor([1 / max(n - 1, 1), 1 / max(m - 1, 1)])
                offset = offset.tanh() * limit * self.offset_range
        position = reference + offset
        return position.clamp(-1, 1) if self.offset_range < 0 else position, reference

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.attend(x_BHWC)[0]

    def attend(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, H, W, C), sampling points and their references, (B, G, n, m, 2) as (y, x) each."""
        if x_BHWC.ndim != 4 or x_BHWC.shape[3] != self.dim or 0 in x_BHWC.shape[1:]:
            raise ValueError(f"x must be (batch, height, width, {self.dim}), got {tuple(x_BHWC.shape)}")
        B, H, W, C = x_BHWC.shape
        q_BHWC = self.q_proj(x_BHWC)
        position, reference = self.points(q_BHWC)
        # (x, y) in pixels
        extent = numbers([W - 1, H - 1], position)
        pixels_BNG2 = ((position.flip(-1) + 1) / 2 * extent).flatten(2, 3).transpose(1, 2)
        if self.offsets:
            sampled_BNC = sample(x_BHWC, pixels_BNG2)
        else:
            kernel = self.stride
            means = F.avg_pool2d(x_BHWC.permute(0, 3, 1, 2), kernel, ceil_mode=True, count_include_pad=False)
            sampled_BNC = means.permute(0, 2, 3, 1).flatten(1, 2)
        heads = (self.num_heads, self.head_dim)
        q = q_BHWC.flatten(1, 2).unflatten(2, heads).transpose(1, 2)
        k, v = (p(sampled_BNC).unflatten(2, heads).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        bias = self._bias(pixels_BNG2, (H, W))
        bias = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, bias, self.attn_drop if self.training else 0.0)
        # an exporter would take the strides of this machine's kernel for granted, so there it is copied in any case
        out = out.transpose(1, 2)
        out = out.clone(memory_format=torch.contiguous_format) if exporting() else out.contiguous()
        out = out.view(B, H, W, C)
        if self.bias_conv is not None:
            out = out + self.bias_conv(q_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.out_proj(out)), position, reference

    def _bias(self, pixels_BNG2: Tensor, size: tuple[int, int]) -> Tensor | None:
        """(B or 1, h, H W, N)."""
        table = self.bias_table
        if self.bias_network is not None:
            return self._log_bias(pixels_BNG2, size)
        if table is None:
            return None
        if self.bias == "table":
            return bias_at_points(table, pixels_BNG2, size)
        if size == self.map_size:
            return table[None]
        # the tables of another map, stretched in queries, then in points
        of_points = table.view(self.num_heads, *self.map_size, -1).permute(0, 3, 1, 2)
        of_points = F.interpolate(of_points, size, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        old, new = ((self._points(n), self._points(m)) for n, m in (self.map_size, size))
        return F.interpolate(of_points.unflatten(2, old), new, mode="bicubic", align_corners=False).flatten(2)[None]

    def _log_bias(self, pixels_BNG2: Tensor, size: tuple[int, int]) -> Tensor:
        """A network of sign(d) log2(1 + |d|) / log2(8), d = 4 (query - point), the map reaching from -1 to 1."""
        assert self.bias_network is not None
        H, W = size
        x, y = (torch.arange(n, device=pixels_BNG2.device, dtype=pixels_BNG2.dtype) for n in (W, H))
        queries = torch.stack([y[:, None].expand(H, W), x.expand(H, W)], -1).flatten(0, 1)
        extent = pixels_BNG2.new_tensor([max(H - 1, 1), max(W - 1, 1)])
        d = 8 * (queries[:, None] - pixels_BNG2.flip(-1).transpose(1, 2)[:, :, None]) / extent  # B G HW N 2
        d = d.sign() * d.abs().log1p() / log(8)
        bias = self.bias_network(d.to(self.offset_proj.weight.dtype))
        return bias.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, groups={self.groups}, stride={self.stride}"


class NeighborhoodAttention(nn.Module):
    """Each query attends the `kernel_size` x `kernel_size` window around it, moved inside at borders, with a bias.

    Maps smaller than the window are filled up with zeros before the projection, which take part.

    Args:
        dim: C.
        num_heads: h, a divisor of C.
        kernel_size: K, odd.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7, *, proj_drop: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        table = torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        self.bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        H, W = x_BHWC.shape[1:3]
        lower, right = (max(0, self.kernel_size - n) for n in (H, W))
        if lower or right:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, lower))
        size = x_BHWC.shape[1:3]
        near = masks.neighborhood(tuple(size), self.kernel_size)
        q, k, v = self.qkv(x_BHWC).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, mask=near, score_mod=grid_bias(self.bias_table, near))
        out = out.transpose(1, 2).flatten(2).unflatten(1, size)
        return self.proj_drop(self.proj(out[:, :H, :W]))


class ShiftedWindowAttention(WindowAttention):
    """Windows that are shifted by half their length, rounded up, on every axis of the map.

    Unlike Swin's, a window that covers an axis is shifted too: the axis falls into two parts that do not see each
    other.

    Args:
        dim, num_heads, window_size, proj_drop: see `WindowAttention`.
    """

    def __init__(self, dim: int, num_heads: int, *, window_size: int, proj_drop: float = 0.0) -> None:
        shift = -(-window_size // 2) % max(window_size, 1)
        super().__init__(dim, num_heads, window_size=window_size, shift=shift, proj_drop=proj_drop)

    def forward(self, x_BHWC: Tensor) -> Tensor:  # type: ignore[override]
        if not self._cuts(x_BHWC):
            return super().forward(x_BHWC)
        q, k, v = self._filled_heads(x_BHWC)
        return self.proj_drop(self.proj(self._attend(q, k, v, x_BHWC.shape).flatten(3)))

    def mix(self, x_BHWC: Tensor, values_BhNE: Tensor, **unused: None) -> Tensor:  # type: ignore[override]
        """This layer's weights on `x`, applied to given values (B, h, N, E); what `attention_map` calls."""
        if not self._cuts(x_BHWC):
            return super().mix(x_BHWC, values_BhNE)
        q, k, _ = self._filled_heads(x_BHWC)
        values_BHWhE = values_BhNE.permute(0, 2, 1, 3).unflatten(1, x_BHWC.shape[1:3])
        v = filled(values_BHWhE.flatten(3), q.shape[1:3]).unflatten(3, values_BHWhE.shape[3:])
        return self._attend(q, k, v, x_BHWC.shape).flatten(1, 2).transpose(1, 2)

    def _cuts(self, x_BHWC: Tensor) -> bool:
        """Whether an axis is cut at the shift, which Swin does not; else this is its layer.

        Raises:
            ValueError: if one is, and rows of the map are on several ranks.
        """
        full = self.full(self.grid(x_BHWC, None))
        found = any(shift and n == window for n, window, shift in zip(full, self.window_size, self.shift))
        if found:
            refuse_parts("a map of which one window covers an axis, and is shifted,")
        return found

    def _filled_heads(self, x_BHWC: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, H, W, h, D) of a map filled up to whole windows."""
        y_BHWC = filled(x_BHWC, self.full(tuple(x_BHWC.shape[1:3])))
        return self.qkv(y_BHWC).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)

    def _attend(self, q_BHWhD: Tensor, k_BHWhD: Tensor, v_BHWhE: Tensor, size: torch.Size) -> Tensor:
        return self._attend_parts([q_BHWhD, k_BHWhD, v_BHWhE], self.position_bias())[:, : size[1], : size[2]]

    def _attend_parts(self, heads: list[Tensor], bias: Tensor | None) -> Tensor:
        """(B, H, W, h, E), where an axis as long as the window is cut at the shift."""
        size = heads[0].shape[1:3]
        for axis, (window, shift) in enumerate(zip(self.window_size, self.shift), 1):
            if shift and heads[0].shape[axis] == window:
                parts = zip(*(x.split([shift, window - shift], axis) for x in heads))
                return torch.cat([self._attend_parts(list(part), bias) for part in parts], axis)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in heads)
        out: Tensor = window_attend(q, k, v, size, self.window_size, self.shift, bias, scale=self.scale)
        return out.transpose(1, 2).unflatten(1, size)
