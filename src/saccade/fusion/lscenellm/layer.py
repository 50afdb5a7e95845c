"""The attention of a decoder's block with a magnifier: an ordinary one that also reads selected fine tokens.

Shape letters: B batch, N tokens, C channels, H query heads, K key heads, D head dim, V coarse tokens, n fine tokens
of each, F fine tokens in all, R rows of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.fusion.lscenellm.selection import coarse_shares, magnify, select_fine
from saccade.layers.llama import LlamaAttention
from saccade.ops.attend import attend


@dataclass(frozen=True)
class Scene:
    """Where a scene stands in a sequence.

    Attributes:
        start: of the first coarse token.
        tokens: V.
        per_token: n.
        first_text: the first row that may read fine tokens.
        last_text: the last one; the last of the sequence where None.

    Raises:
        ValueError: if a number is negative or text begins before the scene ends.
    """

    start: int
    tokens: int
    per_token: int
    first_text: int
    last_text: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or self.tokens < 1 or self.per_token < 1:
            raise ValueError(
                f"start must not be negative, tokens and per_token positive, got {self.start}, {self.tokens} and "
                f"{self.per_token}"
            )
        if self.first_text < self.start + self.tokens:
            raise ValueError(
                f"first_text must stand behind the scene, {self.start} .. {self.start + self.tokens - 1}, got "
                f"{self.first_text}"
            )
        if self.last_text is not None and self.last_text < self.first_text:
            raise ValueError(f"last_text must not stand before first_text ({self.first_text}), got {self.last_text}")

    def positions(self, device: Any = None) -> Tensor:
        """Of the coarse tokens, (V,)."""
        return torch.arange(self.start, self.start + self.tokens, device=device)

    def rows(self, begin: int, end: int) -> slice:
        """Of the rows `begin` .. `end - 1` of a sequence those of the text, counted from `begin`."""
        last = end if self.last_text is None else min(end, self.last_text + 1)
        first = min(max(self.first_text, begin), last)
        return slice(max(first - begin, 0), max(last - begin, 0))


class MagnifierAttention(LlamaAttention):
    """Causal attention that selects, and reads what the layer before selected.

    Args:
        dim, num_heads, arguments: as of `LlamaAttention`.
        magnifies: whether it reads fine tokens, and so has projections of them; the first one only selects.
        threshold: tau.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, magnifies: bool = True, threshold: float = 96.0, **arguments: Any
    ) -> None:
        super().__init__(dim, num_heads, **arguments)
        self.threshold, width = threshold, self.num_kv_heads * self.head_dim
        bias = self.k_proj.bias is not None
        self.fine_k_proj = nn.Linear(dim, width, bias=bias) if magnifies else None
        self.fine_v_proj = nn.Linear(dim, width, bias=bias) if magnifies else None

    def look(
        self, x_BNC: Tensor, scene: Scene, fine_BFC: Tensor | None = None, selected_BRF: Tensor | None = None,
        *, share: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output (B, N, C), and what the next layer's rows of text may read, (B, R, F).

        Args:
            x_BNC: the whole sequence.
            scene: where it stands in it.
            fine_BFC: the fine tokens, those of each coarse token one after the other.
            selected_BRF: of the layer before; nothing is read where either is None.
            share: alpha.

        Raises:
            ValueError: if the layer reads no fine tokens and there are some, or they are not as many as the scene says.
        """
        self.check(x_BNC, None, None)
        pattern = self.pattern(None, x_BNC, None, None)
        q_BHND, k_BKND, v_BKND = self.project(x_BNC, None, self.positions(x_BNC, None, 0))[:3]
        out_BHND, lse_BHN = attend(q_BHND, k_BKND, v_BKND, mask=pattern.mask, return_lse=True)
        rows = scene.rows(0, x_BNC.shape[1])
        q_BHRD, lse_BHR = q_BHND[:, :, rows], lse_BHN[:, :, rows]
        if fine_BFC is not None and selected_BRF is not None:
            fine_k, fine_v = self.fine(fine_BFC, scene)
            text = magnify(q_BHRD, out_BHND[:, :, rows], lse_BHR, fine_k, fine_v, selected_BRF, share=share)
            out_BHND = torch.cat([out_BHND[:, :, : rows.start], text, out_BHND[:, :, rows.stop :]], 2)
        coarse = k_BKND[:, :, scene.start : scene.start + scene.tokens]
        share_BRV = coarse_shares(q_BHRD.detach(), coarse.detach(), lse_BHR.detach())
        return self.out(out_BHND), select_fine(share_BRV, self.threshold, scene.per_token)

    def fine(self, fine_BFC: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Keys, at the places of their coarse tokens, and values of fine tokens, (B, K, F, D) each.

        Raises:
            ValueError: as `look`.
        """
        if self.fine_k_proj is None or self.fine_v_proj is None:
            raise ValueError("this layer only selects (magnifies=False); fine tokens are read by those after it")
        check_fine(fine_BFC, scene, self.dim)
        k_BKFD = self.split_heads(self.fine_k_proj(fine_BFC), self.num_kv_heads)
        if self.rope:
            k_BKFD = self.rotate(k_BKFD, scene.positions(fine_BFC.device).repeat_interleave(scene.per_token))
        return k_BKFD, self.split_heads(self.fine_v_proj(fine_BFC), self.num_kv_heads)


def check_fine(fine_BFC: Tensor, scene: Scene, dim: int) -> None:
    """Refuse fine tokens that are not as many, or as wide, as they should be.

    Raises:
        ValueError: in words.
    """
    count = scene.tokens * scene.per_token
    if fine_BFC.ndim != 3 or fine_BFC.shape[1:] != (count, dim):
        raise ValueError(
            f"fine tokens must be (batch, {scene.tokens} x {scene.per_token}, {dim}), got {tuple(fine_BFC.shape)}"
        )
