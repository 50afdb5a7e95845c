"""The layer, the attention between two sentences, and what puts combined attention into a BERT.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, C channels, D head dim, E head dim of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.comateformer.operator import Gate, Mode, check, check_share, comateformer_attend, shared_attend
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern


def _real_pairs(query_BN: Tensor, key_BM: Tensor) -> Mask:
    """Pairs of real tokens: those of padding have ids that are nowhere else."""
    return masks.Documents(query_BN.long() - 1, 2 * (key_BM.long() - 1))


class Comateformer(QKVAttention):
    """Multi-head combined attention.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: as `QKVAttention`'s.
        alpha, beta, gate: as `comateformer_attend`'s.
        share, mode: the part of the layer that is not softmax, see the paper's page.

    Raises:
        ValueError: if arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = False,
        rope_base: float = 10000.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: Gate = "doubled",
        share: float = 1.0,
        mode: Mode = "heads",
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
        )
        check(alpha, beta, gate, causal)
        check_share(share, mode)
        self.share, self.mode = share, mode
        self.options: dict[str, Any] = {"alpha": alpha, "beta": beta, "gate": gate}

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        mask = pattern.mask
        real_BN = pattern.real_queries(q_BHND.shape[0], q_BHND.shape[2])
        if self.options["gate"] == "centred" and real_BN is not None and mask is not None:
            # padding is no query either: it would count in the mean
            mask = mask & _real_pairs(real_BN, real_BN)
        return shared_attend(q_BHND, k_BKMD, v_BKME, self.share, self.mode, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share={self.share}, mode={self.mode}, gate={self.options['gate']}"


class DualAffinity(nn.Module):
    """Both sentences through each other: A' = M B and B' = M^T A.

    Args:
        dim: channels C.
        alpha, beta, gate: as `comateformer_attend`'s.
        similarity, dissimilarity: F_E and F_N, any modules C -> channels; a linear layer C -> C where None.

    Raises:
        ValueError: if arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: Gate = "doubled",
        similarity: nn.Module | None = None,
        dissimilarity: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check(alpha, beta, gate, causal=False)
        self.dim = dim
        self.options: dict[str, Any] = {"alpha": alpha, "beta": beta, "gate": gate, "scale": 1.0}
        self.similarity = nn.Linear(dim, dim) if similarity is None else similarity
        self.dissimilarity = nn.Linear(dim, dim) if dissimilarity is None else dissimilarity

    def forward(
        self, a_BNC: Tensor, b_BMC: Tensor, *, mask_a: GivenMask = None, mask_b: GivenMask = None
    ) -> tuple[Tensor, Tensor]:
        """A' (B, N, C) and B' (B, M, C); masks are those of padding, as bool (B, N) and (B, M), True = real token.

        Raises:
            ValueError: if shapes do not fit.
        """
        given = []
        for name, x, mask in (("a", a_BNC, mask_a), ("b", b_BMC, mask_b)):
            if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[0] != a_BNC.shape[0]:
                raise ValueError(f"{name} must be ({a_BNC.shape[0]}, tokens, {self.dim}), got {tuple(x.shape)}")
            B, N = x.shape[:2]
            given.append(Pattern.of(mask, B, N, N).only(("padding",), f"mask_{name}").real_keys(B))
        masked = any(real is not None for real in given)
        real_a, real_b = (
            x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real
            for x, real in zip((a_BNC, b_BMC), given, strict=True)
        )
        a, b = ((self.similarity(x), self.dissimilarity(x)) for x in (a_BNC, b_BMC))
        keys_a, keys_b = (torch.cat(maps, -1)[:, None] for maps in (a, b))
        outs = [
            comateformer_attend(
                query,
                key,
                value[:, None],
                mask=_real_pairs(*real) if masked else None,
                similarity_dim=a[0].shape[-1],
                **self.options,
            )[:, 0]
            for query, key, value, real in (
                (keys_a, keys_b, b_BMC, (real_a, real_b)),
                (keys_b, keys_a, a_BNC, (real_b, real_a)),
            )
        ]
        return outs[0], outs[1]


class CombinedSelfAttention(nn.Module):
    """In the place of transformers' `BertSelfAttention` or `RobertaSelfAttention`, with its projections' names.

    Args:
        host: the attention that it replaces.
        share, mode, alpha, beta, gate: as `Comateformer`'s.

    Raises:
        ValueError: if the host decodes, or has not the names of a `BertSelfAttention`.
    """

    def __init__(self, host: nn.Module, share: float, mode: Mode = "heads", **options: Any) -> None:
        super().__init__()
        names = ("query", "key", "value", "dropout", "num_attention_heads")
        missing = [name for name in names if not hasattr(host, name)]
        if missing or getattr(host, "is_decoder", False):
            what = f"has no {missing[0]}" if missing else "decodes"
            raise ValueError(f"the host must be the self-attention of a BERT-like encoder, but {what}")
        check_share(share, mode)
        check(options.get("alpha", 1.0), options.get("beta", 1.0), options.get("gate", "doubled"), causal=False)
        for name in names[:3]:
            self.add_module(name, host.get_submodule(name))
        self.dropout: float = host.dropout.p  # type: ignore[assignment, union-attr]
        self.num_attention_heads: int = host.num_attention_heads  # type: ignore[assignment]
        self.share, self.mode, self.options = share, mode, options
        self.train(host.training)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Context (B, N, C). attention_mask: None, (B, N), or over pairs, bool or added to scores, as transformers
        hands it down."""
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for project in map(self.get_submodule, ("query", "key", "value"))
        )
        mask: Mask | None = None
        if attention_mask is not None:
            allowed = attention_mask
            if allowed.dtype != torch.bool:
                allowed = allowed != 0 if allowed.ndim == 2 else allowed > torch.finfo(allowed.dtype).min / 2
            mask = masks.padding(allowed) if allowed.ndim == 2 else masks.dense(allowed)
        dropout = self.dropout if self.training else 0.0
        out = shared_attend(q, k, v, self.share, self.mode, mask=mask, dropout=dropout, **self.options)
        return out.transpose(1, 2).flatten(2), None


def combine(
    model: nn.Module, shares: Sequence[float] = (0.5, 0.4, 0.3), *, mode: Mode = "heads", **options: Any
) -> nn.Module:
    """Combined attention in the lower layers of a BERT-like encoder of transformers, in place; fine-tune it then.

    Args:
        model: a model with a list of layers that have `attention.self`.
        shares: share of combined attention in layer 1, 2 ...; a layer of share 0 is left as it is.
        mode: as `Comateformer`'s; options: its alpha, beta and gate.

    Returns:
        the model.

    Raises:
        ValueError: if the model has no such layers, or fewer than there are shares.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(hasattr(getattr(layer, "attention", None), "self") for layer in module)
    ]
    if not lists or len(lists[0]) < len(shares):
        found = len(lists[0]) if lists else 0
        raise ValueError(f"the model must have {len(shares)} encoder layers with attention.self, got {found}")
    for layer, share in zip(lists[0], shares):
        if share:
            attention: Any = layer.attention
            attention.self = CombinedSelfAttention(attention.self, share, mode, **options)
    return model
