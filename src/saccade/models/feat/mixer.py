"""FEAT's blocks: WKV over space or time, guided by the input, and attention among channels.

Shape letters: B batch, F frames, N positions of a frame (height h times width w of its grid), C channels, E heads, D
channels of a head, H hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.ops.wkv import DISTANCES, wkv

#: what brings SiLU of normal numbers back to their variance
SILU_SCALE = 0.596


class Mixer(nn.Module):
    """WKV over the positions of each frame, by rows and then by columns, or over the frames at each position.

    Args:
        dim: C.
        axis: "space" or "time".
        distance: of tokens, see `saccade.ops.wkv`.
        chunks: of the "kernel" distance.

    Raises:
        ValueError: if axis or distance is unknown.
    """

    def __init__(self, dim: int, axis: str = "space", *, distance: str = "kernel", chunks: int = 16) -> None:
        super().__init__()
        if axis not in ("space", "time"):
            raise ValueError(f"axis must be space or time, got {axis!r}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        self.axis, self.distance, self.chunks = axis, distance, chunks
        scans = 2 if axis == "space" else 1
        self.shift_space = depthwise(dim, 3, bias=False)
        self.shift_time = None if axis == "space" else nn.Conv1d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.key, self.value, self.receptance, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.decay, self.first = (nn.Parameter(torch.randn(scans, dim)) for _ in range(2))
        self.alpha = nn.Parameter(torch.zeros(2, dim))

    def forward(self, x_BFNC: Tensor, size: tuple[int, int], res_BFNC: Tensor | None = None) -> Tensor:
        """(B, F, N, C), of frames of height and width `size`; `res` guides the values where it is given."""
        x_BFNC = self.shifted(x_BFNC, size)
        k_BFNC, v_BFNC, r_BFNC = self.key(x_BFNC), self.value(x_BFNC), self.receptance(x_BFNC).sigmoid()
        gap_BFNC = None
        if res_BFNC is not None:
            gap_BFNC = res_BFNC - v_BFNC
            v_BFNC = v_BFNC + self.alpha[0] * res_BFNC
        v_BFNC = self.over_time(k_BFNC, v_BFNC) if self.axis == "time" else self.over_space(k_BFNC, v_BFNC, size)
        if gap_BFNC is not None:
            v_BFNC = v_BFNC + self.alpha[1] * gap_BFNC
        return self.output(r_BFNC * v_BFNC)

    def shifted(self, x_BFNC: Tensor, size: tuple[int, int]) -> Tensor:
        """Each token plus a convolution of its neighbours in the frame, and then in time."""
        x_BFNC = x_BFNC + on_grid(self.shift_space, x_BFNC, size)
        if self.shift_time is None:
            return x_BFNC
        B, _, N, _ = x_BFNC.shape
        over_time = self.shift_time(x_BFNC.permute(0, 2, 3, 1).flatten(0, 1))
        return x_BFNC + over_time.unflatten(0, (B, N)).permute(0, 3, 1, 2)

    def over_space(self, k_BFNC: Tensor, v_BFNC: Tensor, size: tuple[int, int]) -> Tensor:
        """Two scans of each frame: its rows one after the other, then its columns."""
        k, v = k_BFNC.flatten(0, 1), v_BFNC.flatten(0, 1)
        v = self.scan(0, k, v)
        k, v = (x.unflatten(1, size).transpose(1, 2).flatten(1, 2) for x in (k, v))
        v = self.scan(1, k, v).unflatten(1, size[::-1]).transpose(1, 2)
        return v.reshape(v_BFNC.shape)

    def over_time(self, k_BFNC: Tensor, v_BFNC: Tensor) -> Tensor:
        """One scan over the frames."""
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k_BFNC, v_BFNC))
        return self.scan(0, k, v).unflatten(0, (-1, v_BFNC.shape[2])).transpose(1, 2)

    def scan(self, which: int, k: Tensor, v: Tensor) -> Tensor:
        """WKV over axis 1, whose decay and bonus are divided by its length."""
        decay, first = self.decay[which] / k.shape[1], self.first[which] / k.shape[1]
        return wkv(k, v, decay, first, distance=self.distance, chunks=self.chunks)


class GatedConvolution(nn.Module):
    """GDFN: GELU(a) b of the two halves of a 3 x 3 of a 1 x 1 convolution, and a 1 x 1 back.

    Args:
        dim: C.
        expansion: H over C.
    """

    def __init__(self, dim: int, expansion: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.depthwise = depthwise(2 * hidden, 3, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x_BChw: Tensor) -> Tensor:
        gate_BHhw, x_BHhw = self.depthwise(self.project_in(x_BChw)).chunk(2, 1)
        return self.project_out(F.gelu(gate_BHhw) * x_BHhw)


class ChannelAttention(nn.Module):
    """Restormer's attention among the channels of each head: softmax of their products over all positions.

    Args:
        dim: C.
        num_heads: E, divides C.

    Raises:
        ValueError: if E does not divide C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.depthwise = depthwise(3 * dim, 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def weights(self, q_BEDN: Tensor, k_BEDN: Tensor) -> Tensor:
        """(B, E, D, D), rows sum to 1."""
        q_BEDN, k_BEDN = F.normalize(q_BEDN, dim=-1), F.normalize(k_BEDN, dim=-1)
        return (q_BEDN @ k_BEDN.mT * self.temperature).softmax(-1)

    def attend(self, q_BEDN: Tensor, k_BEDN: Tensor, v_BEDN: Tensor) -> Tensor:
        """(B, E, D, N): each channel a mean of the channels of its head."""
        return self.weights(q_BEDN, k_BEDN).to(v_BEDN.dtype) @ v_BEDN

    def forward(self, x_BChw: Tensor) -> Tensor:
        qkv = self.depthwise(self.qkv(x_BChw)).chunk(3, 1)
        out_BEDN = self.attend(*(x.flatten(2).unflatten(1, (self.num_heads, -1)) for x in qkv))
        return self.project_out(out_BEDN.reshape(x_BChw.shape))


class Modulated(nn.Module):
    """x + gate f(LN(x) (1 + scale) + shift), twice: shift, scale and gate of both come from the condition.

    Args:
        dim: C.
        expansion: of the gated convolution, the second f.
        silu_scale: by which SiLU of the condition is divided.
    """

    def __init__(self, dim: int, expansion: float, silu_scale: float) -> None:
        super().__init__()
        self.silu_scale = silu_scale
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.modulation, self.ffn = nn.Linear(dim, 6 * dim), GatedConvolution(dim, expansion)

    def conditions(self, c_BC: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the first and of the second f, (B, 1, 1, C) each."""
        return self.modulation(F.silu(c_BC) / self.silu_scale)[:, None, None].chunk(6, -1)


class WKVBlock(Modulated):
    """WKV over space or time, and a gated convolution of each frame; what they add is scaled by gamma too.

    Args:
        dim: C.
        axis, distance, chunks: see `Mixer`.
        expansion: H over C.
    """

    def __init__(
        self,
        dim: int,
        axis: str = "space",
        *,
        expansion: float = 4.0,
        distance: str = "kernel",
        chunks: int = 16,
    ) -> None:
        super().__init__(dim, expansion, SILU_SCALE)
        self.mixer = Mixer(dim, axis, distance=distance, chunks=chunks)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BFNC: Tensor, c_BC: Tensor, size: tuple[int, int], res_BFNC: Tensor | None = None) -> Tensor:
        """(B, F, N, C), with the condition of each clip; `res` as in `Mixer`."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.conditions(c_BC)
        y_BFNC = self.mixer(self.norm1(x_BFNC) * (1 + scale_a) + shift_a, size, res_BFNC)
        x_BFNC = x_BFNC + self.gamma1 * gate_a * y_BFNC
        y_BFNC = on_grid(self.ffn, self.norm2(x_BFNC) * (1 + scale_f) + shift_f, size)
        return x_BFNC + self.gamma2 * gate_f * y_BFNC


class ChannelBlock(Modulated):
    """Attention among the channels of each frame, and a gated convolution.

    Args:
        dim: C.
        num_heads: E.
        expansion: H over C.
    """

    def __init__(self, dim: int, num_heads: int, *, expansion: float = 4.0) -> None:
        super().__init__(dim, expansion, 1.0)
        self.attention = ChannelAttention(dim, num_heads)

    def forward(self, x_BFNC: Tensor, c_BC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, F, N, C), with the condition of each clip."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.conditions(c_BC)
        x_BFNC = x_BFNC + gate_a * on_grid(self.attention, self.norm1(x_BFNC) * (1 + scale_a) + shift_a, size)
        return x_BFNC + gate_f * on_grid(self.ffn, self.norm2(x_BFNC) * (1 + scale_f) + shift_f, size)


def on_grid(function: nn.Module, x_BFNC: Tensor, size: tuple[int, int]) -> Tensor:
    """A function of maps (B F, C, h, w) of each frame's tokens."""
    B, frames = x_BFNC.shape[:2]
    x_BChw = x_BFNC.flatten(0, 1).mT.unflatten(2, size)
    return function(x_BChw).flatten(2).mT.unflatten(0, (B, frames))
