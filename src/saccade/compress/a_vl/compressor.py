"""A-VL as an attention layer, and LLaMA's decoder with it, of which the prefill may drop image tokens.

Shape letters: B batch, H query heads, K key heads, N new tokens, M stored tokens, D head dim, E width of values,
C channels, P tokens that pass the prefill filter.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from saccade.compress.a_vl.cache import AVLCache, AVLLayerCache
from saccade.compress.a_vl.selection import AVLOptions
from saccade.layers.llama import LlamaBlock
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import GivenMask, Pattern, Said


class AVL(QKVAttention):
    """Causal attention that decodes with an A-VL cache; without one it is plain causal softmax attention.

    `forward` is its own for a prompt that has lost tokens: its positions differ by row, and its cache wants its length.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be True.
        **policy: `AVLOptions`'.

    >>> layer = AVL(32, 4, rate=0.5)
    >>> cache = layer.new_cache(1, image=(2, 20))
    >>> with torch.no_grad():
    ...     out = layer(torch.randn(1, 30, 32), cache=cache)
    >>> cache.length, cache.used
    (30, 20)

    Raises:
        ValueError: if `causal` is False or an option is out of range.
    """

    takes_decoding: tuple[Said, ...] = ()

    def __init__(self, dim: int, num_heads: int = 8, causal: bool = True, **arguments: Any) -> None:
        if not causal:
            raise ValueError("A-VL is a policy for decoding, which is causal; got causal=False")
        policy = {f.name: arguments.pop(f.name) for f in fields(AVLOptions) if f.name in arguments}
        super().__init__(dim, num_heads, causal, **arguments)
        self.options = AVLOptions(**policy)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask)

    def remember(
        self, cache: AVLLayerCache, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, pattern: Pattern
    ) -> Tensor:
        return cache.attend(q_BHND, k_BKND, v_BKNE) if q_BHND.shape[2] else q_BHND

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: Any = None,
        positions_BN: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """`QKVAttention.forward`; with a cache, under the policy.

        Args:
            positions_BN, length: the prompt's positions and its true length where tokens were dropped from it.

        Raises:
            ValueError: if there is a mask beside a cache.
        """
        if cache is None or (positions_BN is None and length is None):
            return super().forward(x_BNC, context_BMC, mask=mask, cache=cache)
        self.check(x_BNC, context_BMC, cache)
        self.pattern(mask, x_BNC, context_BMC, cache)
        positions = self.positions(x_BNC, context_BMC, cache.length)
        if positions is not None and positions_BN is not None:
            positions = positions_BN[:, None]
        return self.out(cache.attend(*self.project(x_BNC, context_BMC, positions), length=length))

    def new_cache(
        self,
        batch_size: int,
        *,
        image: tuple[int, int] = (0, 0),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> AVLLayerCache:
        """An empty cache; `image` is the first position and the number of the image tokens in the prompt."""
        return AVLLayerCache(self.options, image)


class AVLDecoder(nn.Module):
    """LLaMA's blocks and last norm on embeddings, decoding with an `AVLCache`; parameters named as the authors' are.

    Args:
        dim, hidden: channels, and those of the MLP.
        num_heads, num_kv_heads, layers: as LLaMA's.
        head_dim: D, dim / num_heads where None.
        eps, rope_base: of its norms and positions.
        **policy: `AVLOptions`'.

    Raises:
        ValueError: if an option is out of its range, or heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_heads: int,
        layers: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        rope_base: float = 10000.0,
        **policy: Any,
    ) -> None:
        super().__init__()
        self.options = AVLOptions(**policy)
        heads: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        attentions = (AVL(dim, rope_base=rope_base, **heads, **policy) for _ in range(layers))
        blocks = (LlamaBlock(attention, dim, hidden, eps=eps) for attention in attentions)
        self.layers, self.norm = nn.ModuleList(blocks), nn.RMSNorm(dim, eps)

    def new_cache(self, image: tuple[int, int]) -> AVLCache:
        return AVLCache(self.options, image, len(self.layers))

    def forward(self, x_BNC: Tensor, cache: AVLCache) -> Tensor:
        """Last hidden states; of a prompt, those of the tokens that passed the filter."""
        tokens = x_BNC.shape[1]
        for number, block in enumerate(self.layers):
            kept_BP = cache.survivors_of(number, tokens)
            if kept_BP is not None and x_BNC.shape[1] == tokens:
                x_BNC = x_BNC.gather(1, kept_BP[..., None].expand(-1, -1, x_BNC.shape[-1]))
            length = None if kept_BP is None else tokens
            x_BNC = block(x_BNC, cache=cache.layers[number], positions_BN=kept_BP, length=length)
        return self.norm(x_BNC)
