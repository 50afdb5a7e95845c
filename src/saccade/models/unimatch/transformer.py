"""UniMatch's attention: self and cross attention of two maps, in windows that shift from block to block, or along rows.

Shape letters: B batch, H height, W width, C channels, X windows, T pixels of a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.attend import attend
from saccade.ops.export import exporting

#: over what the other image is attended to: windows of both axes, whole rows, windows of rows
CROSS = ("windows", "rows", "row-windows")


def window_attend_maps(
    q_BHWC: Tensor, k_BHWC: Tensor, v_BHWC: Tensor, splits: tuple[int, int], shifted: bool = False
) -> Tensor:
    """Attention of maps inside their windows, (B, H, W, C).

    Shifted by half a window, the windows at the edge are cut in two, whose pixels do not see each other. Equal boxes
    of pixels are attended to together, in memory linear in pixels.

    Args:
        q_BHWC, k_BHWC, v_BHWC: of one image, or of two.
        splits: windows per axis.
        shifted: where there are several windows on an axis, move them by half a window.
    """
    if exporting():
        return _as_swin(q_BHWC, k_BHWC, v_BHWC, splits, shifted)
    lines = []
    for top, bottom, down in _runs(q_BHWC.shape[1], splits[0], shifted):
        parts = []
        for left, right, across in _runs(q_BHWC.shape[2], splits[1], shifted):
            q, k, v = (_boxes(x[:, top:bottom, left:right], down, across) for x in (q_BHWC, k_BHWC, v_BHWC))
            parts.append(_back(attend(q, k, v), q_BHWC[:, top:bottom, left:right], down, across))
        lines.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
    return lines[0] if len(lines) == 1 else torch.cat(lines, 1)


def _as_swin(q_BHWC: Tensor, k_BHWC: Tensor, v_BHWC: Tensor, splits: tuple[int, int], shifted: bool) -> Tensor:
    """The same as Swin writes it down, for exporters: a graph of free sizes has no equal boxes.

    The map is turned by half a window, and what did not lie side by side is masked.
    """
    sizes, parts = q_BHWC.shape[1:3], []
    turned = [q_BHWC, k_BHWC, v_BHWC]
    back = []
    for axis, (length, count) in enumerate(zip(sizes, splits)):
        shift = length // count // 2 if shifted and count > 1 else 0
        place = torch.arange(length, device=q_BHWC.device)
        on = place + shift
        on = torch.where(on >= length, on - length, on)
        turned = [x.index_select(axis + 1, on) for x in turned]
        back.append(torch.where(place < shift, place + length - shift, place - shift))
        parts.append(place >= length - shift)
    q, k, v = (_boxes(x, *splits) for x in turned)
    part_HW = 2 * parts[0][:, None].long() + parts[1].long()
    part_X1T1 = _boxes(part_HW[None, :, :, None], *splits)
    together = (part_X1T1 == part_X1T1.mT).repeat(q_BHWC.shape[0], 1, 1, 1)
    out = _back(F.scaled_dot_product_attention(q, k, v, attn_mask=together), q_BHWC, *splits)
    return out.index_select(1, back[0]).index_select(2, back[1])


def _runs(length: int, splits: int, shifted: bool) -> Iterator[tuple[int, int, int]]:
    """Start, end and number of equal windows beside each other, on one axis."""
    window = length // splits
    if not shifted or splits == 1 or window < 2:
        yield 0, length, splits
        return
    shift = window // 2
    yield 0, shift, 1
    yield shift, length - (window - shift), splits - 1
    yield length - (window - shift), length, 1


def _boxes(x_BHWC: Tensor, down: int, across: int) -> Tensor:
    """(B boxes, 1, pixels, C)."""
    B, H, W, C = x_BHWC.shape
    boxes = x_BHWC.reshape(B, down, H // down, across, W // across, C).transpose(2, 3)
    return boxes.reshape(B * down * across, 1, (H // down) * (W // across), C)


def _back(boxes: Tensor, like_BHWC: Tensor, down: int, across: int) -> Tensor:
    B, H, W, C = like_BHWC.shape
    return boxes.reshape(B, down, across, H // down, W // across, C).transpose(2, 3).reshape(B, H, W, C)


class Attention(nn.Module):
    """x + LN(merge(attention)), or with an MLP x + LN(W2 GELU(W1 [x; LN(merge(attention))])). One head, no biases.

    Args:
        dim: C.
        expansion: width of the MLP over that of [x; m]; 0 has no MLP.
    """

    def __init__(self, dim: int, expansion: int = 0) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim)
        self.mlp, self.norm2 = None, None
        if expansion:
            hidden = 2 * dim * expansion
            self.mlp = nn.Sequential(
                nn.Linear(2 * dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
            )
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, x_BHWC: Tensor, other_BHWC: Tensor, splits: int, shifted: bool, rows: str = "windows") -> Tensor:
        q, k, v = self.q_proj(x_BHWC), self.k_proj(other_BHWC), self.v_proj(other_BHWC)
        if rows == "windows":
            out = window_attend_maps(q, k, v, (splits, splits), shifted)
        else:
            q, k, v = (x.flatten(0, 1)[:, None] for x in (q, k, v))
            out = window_attend_maps(q, k, v, (1, 1 if rows == "rows" else splits), shifted).view(x_BHWC.shape)
        message = self.norm1(self.merge(out))
        if self.mlp is not None and self.norm2 is not None:
            message = self.norm2(self.mlp(torch.cat([x_BHWC, message], 3)))
        return x_BHWC + message


class Block(nn.Module):
    """Self attention, then cross attention to the other image as it was before this block.

    Args:
        dim: C.
        expansion: of the MLP.
    """

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = Attention(dim), Attention(dim, expansion)

    def forward(self, x_BHWC: Tensor, other_BHWC: Tensor, splits: int, shifted: bool, cross: str) -> Tensor:
        x_BHWC = self.self_attention(x_BHWC, x_BHWC, splits, shifted)
        return self.cross_attention(x_BHWC, other_BHWC, splits, shifted, cross)


class FeatureTransformer(nn.Module):
    """Two maps that become aware of each other, both by the same blocks: (B, C, H, W) twice -> the same.

    Args:
        dim: C.
        layers: blocks; every second one has shifted windows.
        expansion: of the MLPs.
    """

    def __init__(self, dim: int = 128, layers: int = 6, expansion: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, expansion) for _ in range(layers))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, f0_BCHW: Tensor, f1_BCHW: Tensor, splits: int = 1, cross: str = "windows"
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            f0_BCHW, f1_BCHW: with places.
            splits: windows per axis; they divide height and width.
            cross: of `CROSS`.
        """
        x = torch.cat([f0_BCHW, f1_BCHW]).permute(0, 2, 3, 1)
        for number, layer in enumerate(self.layers):
            first, second = x.chunk(2)
            x = layer(x, torch.cat([second, first]), splits, number % 2 == 1, cross)
        f0, f1 = x.permute(0, 3, 1, 2).chunk(2)
        return f0, f1
