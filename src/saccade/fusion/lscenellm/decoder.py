"""A decoder that reads a scene as coarse tokens, and looks closer where it just looked.

Shape letters: B batch, V coarse tokens, n fine tokens of each, P tokens before the scene, T tokens of text, C
channels, F fine tokens in all, N tokens of a call.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.fusion.lscenellm.layer import MagnifierAttention, Scene
from saccade.layers.llama import LlamaAttention, LlamaBlock


class MagnifiedDecoder(nn.Module):
    """Blocks of LLaMA; from block `start` on attention selects, from the next one on it reads what was selected.

    >>> decoder = MagnifiedDecoder(16, 2, layers=3, start=0)
    >>> decoder(torch.randn(2, 5, 16), torch.randn(2, 5, 4, 16), torch.randn(2, 7, 16)).shape
    torch.Size([2, 7, 16])

    Args:
        dim: C.
        num_heads: of each attention.
        layers: blocks.
        start: the first block that selects.
        threshold: tau, on a scale of 0 to 255.
        share: alpha, of what text reads with fine tokens; training may raise it from 0 to 1.
        hidden: inner width of the MLPs, 8 C / 3 where None.
        norm_eps: of the norms.
        arguments: of the attentions.

    Raises:
        ValueError: if no block would read fine tokens, or heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        layers: int = 32,
        *,
        start: int = 8,
        threshold: float = 96.0,
        share: float = 1.0,
        hidden: int | None = None,
        norm_eps: float = 1e-6,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not 0 <= start < layers - 1:
            raise ValueError(f"start must be between 0 and layers - 2 ({layers - 2}), got {start}")
        self.start, self.share = start, share
        attentions = [
            LlamaAttention(dim, num_heads, **arguments)
            if i < start
            else MagnifierAttention(dim, num_heads, magnifies=i > start, threshold=threshold, **arguments)
            for i in range(layers)
        ]
        self.layers = nn.ModuleList(LlamaBlock(each, dim, hidden, eps=norm_eps) for each in attentions)
        self.norm = nn.RMSNorm(dim, norm_eps)

    def forward(
        self,
        coarse_BVC: Tensor,
        fine_BVnC: Tensor,
        text_BTC: Tensor,
        *,
        prefix_BPC: Tensor | None = None,
        last_text: int | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of the text, normed.

        Args:
            coarse_BVC: the scene.
            fine_BVnC: what lies under each coarse token, as projected.
            text_BTC: instruction and answer, that may read it.
            prefix_BPC: words before the scene.
            last_text: the last row of the whole sequence that is no padding, that of the longest text; all where None.

        Raises:
            ValueError: if coarse and fine tokens do not fit together.
        """
        if fine_BVnC.ndim != 4 or fine_BVnC.shape[:2] != coarse_BVC.shape[:2]:
            raise ValueError(
                f"fine tokens must be (batch, {coarse_BVC.shape[1]}, fine tokens of each, channels), got "
                f"{tuple(fine_BVnC.shape)}"
            )
        begin = 0 if prefix_BPC is None else prefix_BPC.shape[1]
        V, n = fine_BVnC.shape[1:3]
        scene = Scene(begin, V, n, begin + V, last_text)
        parts = [coarse_BVC, text_BTC] if prefix_BPC is None else [prefix_BPC, coarse_BVC, text_BTC]
        x_BNC, fine_BFC, selected = torch.cat(parts, 1), fine_BVnC.flatten(1, 2), None
        for i, each in enumerate(self.layers):
            block = cast(LlamaBlock, each)
            if i < self.start:
                x_BNC = block(x_BNC)
                continue
            attention = cast(MagnifierAttention, block.self_attn)
            seen = fine_BFC if i > self.start else None
            y_BNC, selected = attention.look(block.input_layernorm(x_BNC), scene, seen, selected, share=self.share)
            x_BNC = x_BNC + y_BNC
            x_BNC = x_BNC + block.feed(x_BNC)
        return self.norm(x_BNC[:, begin + V :])
