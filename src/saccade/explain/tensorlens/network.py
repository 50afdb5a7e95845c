"""A small transformer that says what it computes, and the operator that it computed it by.

Shape letters: B batch, L tokens, D width, H heads, K key heads, E head width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.explain.linearised import GATED, held_slope
from saccade.explain.tensorlens.operator import Attention, Chain, FeedForward, Norm, Step, Sum
from saccade.explain.tensorlens.relevance import AGGREGATIONS, Lens, relevance
from saccade.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from saccade.ops.heads import repeat_heads

#: what may be left out of the operator: then it is the identity
PARTS = ("norm", "ffn", "residual", "values")
ORDERS = ("pre", "post", "parallel")


class LensBlock(nn.Module):
    """A block of a transformer, of which `at` gives the operator.

    Args:
        dim: D.
        num_heads: H.
        num_kv_heads: K; H where None.
        hidden: F; 4 D where None, of a gated layer 8 D / 3; 0 for attention alone.
        norm: "layer", "rms" or None.
        order: of `ORDERS`.
        gated: None, or of `GATED`: a gated layer, and what is held in it.
        activation: of `saccade.layers.mlp.ACTIVATIONS`.
        causal: a token sees itself and those before it.
        bias: of attention's projections.

    Raises:
        ValueError: if sizes do not fit, or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        hidden: int | None = None,
        norm: str | None = "layer",
        order: str = "pre",
        gated: str | None = None,
        activation: str = "gelu",
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        K = num_heads if num_kv_heads is None else num_kv_heads
        if min(dim, num_heads, K) < 1 or dim % num_heads or num_heads % K:
            given = f"{dim}, {num_heads} and {K}"
            raise ValueError(f"heads must divide dim, and key heads the heads, got {given}")
        if norm not in _NORMS or order not in ORDERS or gated not in (None, *GATED):
            asked = f"{', '.join(map(str, _NORMS))}; {', '.join(ORDERS)}; None, {', '.join(GATED)}"
            raise ValueError(f"norm, order and gated must be of {asked}, got {norm!r}, {order!r} and {gated!r}")
        self.num_heads, self.order, self.gated, self.causal = num_heads, order, gated, causal
        width = dim // num_heads * K
        self.q_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=bias) for _ in range(2))
        self.norm1 = _NORMS[norm](dim)
        self.norm2, self.mlp = None, None
        if hidden != 0:
            self.norm2 = _NORMS[norm](dim)
            self.mlp = (MLP if gated is None else GatedMLP)(dim, hidden, activation=activation)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.at(x_BLD).affine(x_BLD)

    def at(self, x_BLD: Tensor, parts: Collection[str] = PARTS) -> Chain:
        """The block's operator, its factors those at these tokens.

        Args:
            x_BLD: what goes into the block.
            parts: of `PARTS`; the others are the identity.
        """
        steps: list[Step] = []
        paths: list[Step] = []
        x = x_BLD
        kept, residual = int("norm" in parts), float("residual" in parts)
        for norm, sublayer in ((self.norm1, self._attention), (self.norm2, self._feed_forward)):
            if norm is None:
                continue
            given = x_BLD if self.order == "parallel" else x
            before = [] if self.order == "post" else _norm(norm, given)
            normed = Chain(before).affine(given)
            step = sublayer(normed)
            x = x + step.affine(normed)
            after = _norm(norm, x) if self.order == "post" else []
            x = Chain(after).affine(x)
            if isinstance(step, Attention):
                paths.append(Chain([*before * kept, step if "values" in parts else Attention(step.weight_BHLL)]))
            elif "ffn" in parts:
                paths.append(Chain([*before * kept, step]))
            if self.order != "parallel":
                steps += [Sum(paths, residual)] if paths else []
                steps += after * kept
                paths = []
        return Chain([Sum(paths, residual)] if self.order == "parallel" else steps)

    def _attention(self, x_BLD: Tensor) -> Attention:
        E = x_BLD.shape[-1] // self.num_heads
        q, k = (proj(x_BLD).unflatten(-1, (-1, E)).transpose(1, 2) for proj in (self.q_proj, self.k_proj))
        score = q @ repeat_heads(k, self.num_heads).mT * E**-0.5
        if self.causal:
            hidden = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
            score = score.masked_fill(hidden, -torch.inf)
        weight_BHLL = score.softmax(-1).to(x_BLD.dtype)
        H = self.num_heads
        value_KED = self.v_proj.weight.unflatten(0, (-1, E))
        value_HDE = repeat_heads(value_KED[None], H)[0].mT
        bias = self.v_proj.bias
        value_bias = None if bias is None else repeat_heads(bias.view(1, -1, 1, E), H)[0, :, 0]
        out_HED = self.o_proj.weight.mT.unflatten(0, (H, E))
        return Attention(weight_BHLL, value_HDE, out_HED, value_bias, self.o_proj.bias)

    def _feed_forward(self, x_BLD: Tensor) -> Step:
        assert self.mlp is not None
        f = ACTIVATIONS[self.mlp.activation]
        if isinstance(self.mlp, MLP):
            u = self.mlp.fc1(x_BLD)
            return _linears(held_slope(f, u), self.mlp.fc1, self.mlp.fc2)
        g, up = self.mlp.gate_proj(x_BLD), self.mlp.up_proj(x_BLD)
        by_up = _linears(held_slope(f, g) * up, self.mlp.gate_proj, self.mlp.down_proj)
        by_gate = _linears(f(g), self.mlp.up_proj, self.mlp.down_proj)
        return {"gate": by_gate, "up": by_up}.get(self.gated or "", Sum([by_gate, by_up], 0.0, 0.5))


class LensTransformer(nn.Module):
    """Blocks, and what each token of the input does to each of the output.

    Args:
        dim: D.
        num_heads: H.
        depth: blocks.
        num_kv_heads, hidden, norm, order, gated, activation, causal: as of `LensBlock`.
        final_norm: a norm after the blocks.
        aggregation: of `AGGREGATIONS`.
        parts: of `PARTS`; the others are the identity in the operator, which then does not say what is computed.

    Raises:
        ValueError: if sizes do not fit, or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int = 2,
        *,
        num_kv_heads: int | None = None,
        hidden: int | None = None,
        norm: str | None = "layer",
        order: str = "pre",
        gated: str | None = None,
        activation: str = "gelu",
        causal: bool = False,
        final_norm: bool = True,
        aggregation: str = "input_output",
        parts: Sequence[str] = PARTS,
    ) -> None:
        super().__init__()
        if strange := set(parts) - set(PARTS):
            raise ValueError(f"parts must be of {', '.join(PARTS)}, got {', '.join(sorted(strange))}")
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
        self.aggregation, self.parts = aggregation, tuple(parts)
        self.blocks = nn.ModuleList(
            LensBlock(
                dim, num_heads, num_kv_heads=num_kv_heads, hidden=hidden, norm=norm, order=order, gated=gated,
                activation=activation, causal=causal,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = _NORMS[norm if final_norm else None](dim)

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """Y (B, L, D).

        Args:
            x_BLD: X.
        """
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return Chain(_norm(self.norm, x_BLD)).affine(x_BLD)

    def operator(self, x_BLD: Tensor, layers: tuple[int, int] | None = None) -> Chain:
        """T and b at these tokens.

        Args:
            x_BLD: X.
            layers: the first block and the last one; all, and the last norm, where None. What goes into the first is
                still that which X becomes.

        Raises:
            ValueError: if there are no such blocks.
        """
        first, last = (0, len(self.blocks) - 1) if layers is None else layers
        if not 0 <= first <= last < len(self.blocks):
            raise ValueError(f"layers must be two of {len(self.blocks)} blocks, in order, got {layers}")
        steps: list[Step] = []
        for number, block in enumerate(self.blocks):
            if first <= number <= last:
                steps += block.at(x_BLD, self.parts).steps  # type: ignore[operator]
            x_BLD = block(x_BLD)
        if layers is None and "norm" in self.parts:
            steps += _norm(self.norm, x_BLD)
        return Chain(steps)

    def rollout(self, x_BLD: Tensor) -> Tensor:
        """The rollout of these blocks' attention (B, L, L): the operator of heads' means and halved residual paths.

        Args:
            x_BLD: X.
        """
        steps: list[Step] = []
        for block in self.blocks:
            (attention,) = block.at(x_BLD, ("residual",)).steps[:1]  # type: ignore[operator]
            steps.append(replace(attention, scale=0.5))
            x_BLD = block(x_BLD)
        # each number of a token goes the same way: one is enough
        eye_LL = torch.eye(x_BLD.shape[1], dtype=x_BLD.dtype, device=x_BLD.device)
        return Chain(steps).linear(eye_LL.expand(len(x_BLD), -1, -1))

    def forward(self, x_BLD: Tensor, direction_BLD: Tensor | None = None, *, rows: Sequence[int] | None = None) -> Lens:
        """Y, and what each token does to it.

        Args:
            x_BLD: X.
            direction_BLD: w_i, what is asked of each output token, as a row of the unembedding; y_i where None.
            rows: i, from the end where negative; all where None.

        Raises:
            ValueError: if shapes do not fit.
        """
        operator = self.operator(x_BLD)
        y_BLD = self.hidden(x_BLD)
        w_BLD = y_BLD if direction_BLD is None else direction_BLD
        found = relevance(operator, x_BLD, w_BLD, self.aggregation, rows=rows)
        offset_BL, value_BL = ((w_BLD * each).sum(-1) for each in (operator.affine(torch.zeros_like(x_BLD)), y_BLD))
        if rows is not None:
            offset_BL, value_BL = (each[:, list(rows)] for each in (offset_BL, value_BL))
        return Lens(y_BLD, found, offset_BL, value_BL, self.aggregation)


_NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": lambda dim: nn.RMSNorm(dim, eps=1e-6),
    None: lambda dim: nn.Identity(),
}


def _norm(norm: nn.Module, x_BLD: Tensor) -> list[Step]:
    """The norm with its factors at these tokens; nothing where there is none."""
    if isinstance(norm, nn.Identity):
        return []
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and norm.eps is not None
    wide = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    scale_BL1 = (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt().to(x_BLD.dtype)
    return [Norm(scale_BL1, norm.weight, norm.bias if isinstance(norm, nn.LayerNorm) else None)]


def _linears(gain_BLF: Tensor, inner: nn.Linear, outer: nn.Linear) -> FeedForward:
    return FeedForward(gain_BLF, inner.weight.mT, outer.weight.mT, inner.bias, outer.bias)
