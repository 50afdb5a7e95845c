"""VGGT's global attention layer, dense and block-sparse, and how the one takes the other's place in a model.

Shape letters: B batch, H heads, N tokens of all frames, M = N keys, P tokens per frame, S special tokens per frame,
C channels, D head dim, E width of values.
"""

from __future__ import annotations

import fnmatch
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.block_sparse_vggt.operator import block_sparse_vggt_attend
from saccade.layers.constants import Constants
from saccade.ops.attend import attend
from saccade.ops.hilbert import hilbert_order
from saccade.ops.rope import rotate


class GridRotary(nn.Module):
    """Rotary positions of a grid: the first half of the channels by the row, the second by the column."""

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base

    def forward(self, x_BHND: Tensor, pos_BN2: Tensor) -> Tensor:
        halves = x_BHND.chunk(2, -1)
        return torch.cat([rotate(x, pos_BN2[:, None, :, i], base=self.base) for i, x in enumerate(halves)], -1)


class GlobalAttention(nn.Module):
    """VGGT's global attention layer, dense: all tokens of all frames attend to each other.

    Args:
        dim: channels C.
        num_heads: H.
        causal: must be False.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: layer norms of queries and keys over the head dim.
        rope: 2-D rotary positions, from the `pos` of a call.
        rope_base: their base.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: if `causal` is True, the heads do not divide, or, with `rope`, the head dim is no multiple of 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        causal: bool = False,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = True,
        rope: bool = False,
        rope_base: float = 10000.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError("global attention over frames is bidirectional, got causal=True")
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        head_dim = dim // num_heads
        if rope and head_dim % 4:
            raise ValueError(f"rotary positions of a grid need a head_dim that is a multiple of 4, got {head_dim}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.rope: nn.Module | None = GridRotary(rope_base) if rope else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop: nn.Module = nn.Dropout(proj_drop)

    def attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, pos_BN2: Tensor | None) -> Tensor:
        return attend(q_BHND, k_BHND, v_BHNE)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        pos: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Attend among all tokens, frame by frame: special tokens, then patches.

        Args:
            pos: (B, N, 2), (0, 0) for special tokens, (1 + row, 1 + column) for patches.

        Raises:
            ValueError: for a context, a mask or a cache; if `x` does not fit, or rotary positions lack `pos`.
        """
        for name, given in (("context", context_BMC), ("mask", mask), ("cache", cache)):
            if given is not None:
                raise ValueError(f"global attention over frames takes no {name}")
        q_BHND, k_BHND, v_BHND = self._project(x_BNC, pos)
        out_BHND = self.attend(q_BHND, k_BHND, v_BHND, pos)
        return self.proj_drop(self.proj(out_BHND.transpose(1, 2).flatten(2)))

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, pos: Tensor | None = None) -> Tensor:
        """This layer's weights on `x_BNC`, applied to given values; what `attention_map` calls."""
        q_BHND, k_BHND, _ = self._project(x_BNC, pos)
        return self.attend(q_BHND, k_BHND, values_BHME, pos)

    def _project(self, x_BNC: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        if pos is not None and tuple(pos.shape[-2:]) != (x_BNC.shape[1], 2):
            raise ValueError(f"pos must be (batch, {x_BNC.shape[1]}, 2), got {tuple(pos.shape)}")
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope is not None:
            if pos is None:
                raise ValueError("rotary positions need pos, the grid positions of the tokens")
            q, k = self.rope(q, pos), self.rope(k, pos)
        return q, k, v


class BlockSparseGlobalAttention(Constants, GlobalAttention):
    """`GlobalAttention` with block-sparse attention among patches.

    Args:
        dim, num_heads, causal: `GlobalAttention`'s; layer: its other arguments.
        tokens_per_frame: P. Where None, each token at position (0, 0) of a call's `pos` is a special one, which tells
            the frames; without `pos` all tokens are one frame.
        num_special_tokens: S per frame.
        cdf_threshold, sparse_ratio, top_k, block_q, block_k, pool, packed: `block_sparse_vggt_attend`'s.
        grid: (rows, columns) of a frame's patches, to cut them into blocks along a Hilbert curve.

    Raises:
        ValueError: as `GlobalAttention` and `block_sparse_vggt_attend`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        causal: bool = False,
        *,
        tokens_per_frame: int | None = None,
        num_special_tokens: int = 5,
        cdf_threshold: float | None = None,
        sparse_ratio: float | None = None,
        top_k: int | None = None,
        block_q: int = 128,
        block_k: int = 64,
        pool: Literal["mean", "max"] = "mean",
        packed: bool = False,
        grid: tuple[int, int] | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **layer)
        if tokens_per_frame is not None and tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame must be at least 1, got {tokens_per_frame}")
        self.tokens_per_frame, self.grid = tokens_per_frame, grid
        self.options: dict[str, Any] = {
            "special_tokens": num_special_tokens, "cdf_threshold": cdf_threshold, "sparse_ratio": sparse_ratio,
            "top_k": top_k, "block_q": block_q, "block_k": block_k, "pool": pool, "packed": packed,
        }  # fmt: skip
        # a call on one token raises for whatever is out of range
        token = torch.zeros(1, 1, 1, dim // num_heads)
        block_sparse_vggt_attend(token, token, token, **self.options)
        self.order: Tensor | None
        self.constant("order", None if grid is None else partial(hilbert_order, grid))

    @classmethod
    def from_dense(cls, module: nn.Module, **options: Any) -> BlockSparseGlobalAttention:
        """A block-sparse layer over the very projections, norms and positions of a VGGT-style attention layer.

        Args:
            module: has `qkv`, `proj` and `num_heads`; `q_norm`, `k_norm`, `rope` and `proj_drop` where it uses them.
            options: the arguments of this class about blocks and frames.

        Raises:
            ValueError: if the module is of another kind.
        """
        missing = [name for name in ("qkv", "proj", "num_heads") if not hasattr(module, name)]
        if missing:
            raise ValueError(f"{type(module).__name__} is no VGGT-style attention: it has no {', '.join(missing)}")
        layer = cls(module.qkv.in_features, module.num_heads, qk_norm=False, **options)  # type: ignore[union-attr,arg-type]
        for name in ("qkv", "proj", "q_norm", "k_norm", "rope", "proj_drop"):
            if getattr(module, name, None) is not None:
                setattr(layer, name, getattr(module, name))
        return layer.train(module.training)

    def attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, pos_BN2: Tensor | None) -> Tensor:
        frames = self._frames(q_BHND.shape[2], pos_BN2)
        return block_sparse_vggt_attend(q_BHND, k_BHND, v_BHNE, frames=frames, order=self.order, **self.options)

    def _frames(self, N: int, pos_BN2: Tensor | None) -> int:
        if self.tokens_per_frame is not None:
            if N % self.tokens_per_frame:
                raise ValueError(f"tokens must come in frames of {self.tokens_per_frame}, got {N}")
            return max(1, N // self.tokens_per_frame)
        if pos_BN2 is None or not self.options["special_tokens"]:
            return 1
        return max(1, int((pos_BN2[0] == 0).all(-1).sum()) // self.options["special_tokens"])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)


def retrofit_global_attention(
    model: nn.Module, pattern: str = "*global_blocks.*.attn", **options: Any
) -> dict[str, nn.Module]:
    """Put block-sparse layers in the place of a model's global attention layers, over the same weights.

    Args:
        model: changed in place.
        pattern: of the layers' paths; VGGT's by default.
        options: `BlockSparseGlobalAttention`'s.

    Returns:
        The layers that were replaced, by path; `model.set_submodule(path, layer)` puts one back.

    Raises:
        ValueError: if no path fits the pattern, or a layer is no VGGT-style attention.

    >>> model = nn.ModuleDict({"global_blocks": nn.ModuleList([nn.ModuleDict({"attn": GlobalAttention(32, 2)})])})
    >>> list(retrofit_global_attention(model, cdf_threshold=0.9))
    ['global_blocks.0.attn']
    """
    found = {path: module for path, module in model.named_modules() if fnmatch.fnmatch(path, pattern)}
    if not found:
        raise ValueError(
            f"no module's path fits {pattern!r}; there are {', '.join(n for n, _ in model.named_children())}"
        )
    layers = {path: BlockSparseGlobalAttention.from_dense(module, **options) for path, module in found.items()}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return found
